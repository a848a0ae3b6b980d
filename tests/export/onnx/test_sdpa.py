"""`scaled_dot_product_attention` as ONNX against eager PyTorch: every form of mask, shape and type in one graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from adaattn.export.onnx import sdpa
from adaattn.export.onnx.lower import lower
from adaattn.export.onnx.save import save

TRACED = {"B": 2, "S": 3, "K": 5}
SIZES = (TRACED, {"B": 3, "S": 7, "K": 4}, {"B": 4, "S": 2, "K": 33})
LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Call:
    """Shapes of a call; letters are dynamic. Masks hide all keys from the first query that they have."""

    query: tuple[int | str, ...] = ("B", 4, "S", 8)
    key: tuple[int | str, ...] = ("B", 4, "K", 8)
    value: tuple[int | str, ...] = ("B", 4, "K", 8)
    mask: tuple[int | str, ...] | None = None
    kind: str = "bool"
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, sizes: dict[str, int], dtype: torch.dtype) -> list[Tensor]:
        def shape(text: tuple[int | str, ...]) -> list[int]:
            return [sizes[size] if isinstance(size, str) else size for size in text]

        found = [torch.randn(shape(text)).to(dtype) for text in (self.query, self.key, self.value)]
        if self.mask is not None:
            allowed = torch.rand(shape(self.mask)) < 0.6
            allowed.view(-1, allowed.shape[-1])[0] = False
            hidden = LEAST if self.kind == "least" else -math.inf
            added = torch.randn(allowed.shape).masked_fill(~allowed, hidden)
            if self.kind == "least and -inf":
                added.view(-1, added.shape[-1])[0] = LEAST
                added[..., -1] = -math.inf
            found.append(allowed if self.kind == "bool" else added if self.kind == "float32" else added.to(dtype))
        return found


GROUPED: dict[str, Any] = {"options": {"enable_gqa": True}}
SELF: dict[str, Any] = {"key": ("B", 4, "S", 8), "value": ("B", 4, "S", 8)}
MASKS: tuple[tuple[int | str, ...], ...] = (
    *(("B", 1, 1, "K"), ("B", 1, "S", "K"), ("B", 4, "S", "K"), (1, 4, "S", "K"), ("S", "K"), (1, "K"), (4, "S", "K")),
    *(("B", 4, 1, "K"), ("S", 1)),
)
CALLS = {
    "plain": Call(),
    "causal": Call(options={"is_causal": True}),
    "causal self": Call(**SELF, options={"is_causal": True}),
    "grouped": Call(key=("B", 2, "K", 8), value=("B", 2, "K", 8), **GROUPED),
    "one head": Call(key=("B", 1, "K", 8), value=("B", 1, "K", 8), **GROUPED),
    "grouped apart": Call(key=("B", 2, "K", 8), value=("B", 1, "K", 8), **GROUPED),
    "grouped, masked": Call(key=("B", 2, "K", 8), value=("B", 2, "K", 8), mask=("B", 1, 1, "K"), **GROUPED),
    "wide values": Call(value=("B", 4, "K", 6)),
    "scale": Call(options={"scale": 0.3}),
    "scale below 0": Call(options={"scale": -0.3}),
    "one batch of keys": Call(key=(1, 4, "K", 8), value=(1, 4, "K", 8)),
    "three axes": Call(("B", "S", 8), ("B", "K", 8), ("B", "K", 8), ("B", "S", "K")),
    "five axes": Call(("B", 3, 4, "S", 8), ("B", 3, 4, "K", 8), ("B", 3, 4, "K", 8), ("B", 1, 1, 1, "K")),
    "two axes": Call(("S", 8), ("K", 8), ("K", 8), options={"is_causal": True}),
    **{f"{shape} {kind}": Call(mask=shape, kind=kind) for shape in MASKS for kind in ("bool", "float")},
    "mask in float32": Call(mask=("B", 1, "S", "K"), kind="float32"),
    "least": Call(mask=("B", 1, 1, "K"), kind="least"),
    "least and -inf": Call(mask=("B", 1, "S", "K"), kind="least and -inf"),
    "mask and causal": Call(mask=("B", 1, 1, "K"), options={"is_causal": True}),
    "float mask and causal": Call(mask=("B", 1, "S", "K"), kind="float", options={"is_causal": True}),
}


# What `make test` runs; --thorough runs all of them.
FEW = ("plain", "causal", "grouped", "scale below 0", "one batch of keys", "least and -inf", "mask and causal")
FEW += tuple(f"{shape} {kind}" for shape in (MASKS[0], MASKS[4]) for kind in ("bool", "float"))


class Calls(nn.Module):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, inputs: list[list[Tensor]]) -> list[Tensor]:
        return [
            F.scaled_dot_product_attention(*given, **call.options)
            for call, given in zip(self.calls, inputs, strict=True)
        ]


def drawn(
    calls: Sequence[str], sizes: dict[str, int], dtype: torch.dtype, scale: float = 1.0
) -> dict[str, list[Tensor]]:
    found = {name: CALLS[name].inputs(sizes, dtype) for name in calls}
    return {name: [x * scale if i < 2 else x for i, x in enumerate(given)] for name, given in found.items()}


def program(calls: Sequence[str], dtype: torch.dtype) -> ExportedProgram:
    shapes = [
        [
            {axis: Dim.AUTO for axis, size in enumerate(text) if isinstance(size, str)}
            for text in (call.query, call.key, call.value, call.mask)
            if text is not None
        ]
        for call in (CALLS[name] for name in calls)
    ]
    inputs = list(drawn(calls, TRACED, dtype).values())
    return torch.export.export(Calls([CALLS[name] for name in calls]), (inputs,), dynamic_shapes=(shapes,))


def names(call: str) -> list[str]:
    return [f"{call} {role}" for role in ("q", "k", "v", "m")[: 3 + (CALLS[call].mask is not None)]]


DEFAULT = ((24, torch.float32), (18, torch.float16))


@pytest.mark.parametrize(
    ("opset", "dtype"),
    [
        pytest.param(*pair, marks=() if pair in DEFAULT else pytest.mark.thorough)
        for pair in product((18, 22, 23, 24), (torch.float32, torch.float16, torch.float64))
    ],
)
def test_every_call_agrees_with_eager(
    opset: int, dtype: torch.dtype, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    calls = [*CALLS] if pytestconfig.getoption("--thorough") else FEW
    inputs = [name for call in calls for name in names(call)]
    lowered = lower(program(calls, dtype), opset, {}, inputs, calls)
    save(lowered.graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    # Scores of 30² times eight products of N(0, 1) and more: peaked, and in float16 past 65504 at 300².
    for sizes, scale in ((SIZES[0], 1.0), (SIZES[1], 30.0), (SIZES[2], 300.0)):
        given = drawn(calls, sizes, dtype, scale)
        feed = {name: x.numpy() for call, xs in given.items() for name, x in zip(names(call), xs, strict=True)}
        got = dict(zip(calls, session.run([*calls], feed), strict=True))
        for call, xs in given.items():
            if call == "mask in float32" and dtype == torch.float64:
                continue  # torch's own kernel misreads such a mask
            want = Calls([CALLS[call]])([xs])[0].double().numpy()
            assert got[call].dtype == xs[0].numpy().dtype, call
            off = np.abs(got[call].astype(np.float64) - want)
            rounding = {torch.float32: 2e-6, torch.float16: 4e-3, torch.float64: 1e-13}[dtype]
            assert off.max(initial=0) <= rounding * max(1, scale**2 if dtype == torch.float32 else 1), (call, sizes)
        for kind in ("bool", "float"):  # the first sequence has no key
            assert not got[f"{MASKS[0]} {kind}"][0].any()
    attention = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Attention"]
    assert bool(attention) == (opset >= 23 and dtype == torch.float32)


def test_dense_attention_stays_one_node(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    q = torch.randn(2, 4, 3, 8)
    whole = torch.export.export(Plain(), (q, q + 1, q))
    counts = {opset: len(lower(whole, opset, {}, ["q", "k", "v"], ["y"]).graph.graph) for opset in (18, 24)}
    assert counts == {18: 5, 24: 1}  # Mul by a constant, Transpose, MatMul, Softmax, MatMul


def test_a_part_of_a_weight_may_be_an_output(tmp_path: Path) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first, second = self.weight.split([4, 4])
            return F.linear(x, first), second

    model, x = Parts(), torch.randn(2, 4)
    save(lower(torch.export.export(model, (x,)), 18, {}, ["x"], ["y", "z"]).graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for got, want in zip(session.run(None, {"x": x.numpy()}), model(x), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-6)


def test_a_program_that_was_decomposed_has_a_translation_too(tmp_path: Path) -> None:
    class Flash(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=m)

    q, m = torch.randn(2, 4, 5, 8), torch.randn(2, 1, 5, 5)
    m[0, 0, 1] = -torch.inf
    lowered = lower(torch.export.export(Flash(), (q, q + 1, q, m)), 22, {}, ["q", "k", "v", "m"], ["y", "sums"])
    save(lowered.graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, dict(zip("qkvm", (x.numpy() for x in (q, q + 1, q, m)), strict=True)))
    want = Flash()(q, q + 1, q, m)
    np.testing.assert_allclose(got[0], want[0].numpy(), atol=2e-6)
    some = np.isfinite(want[1].numpy()) & (np.arange(5) != 1)
    np.testing.assert_allclose(got[1][some], want[1].numpy()[some], atol=1e-5)
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default in sdpa.translations(22)
