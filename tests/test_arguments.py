"""Every public callable with arguments of wrong types: one line that names the argument and what was given.

A table of callables and of their arguments' kinds, times a table of values that are wrong for a kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaattn
from adaattn import ops
from adaattn.attention.torch_multihead import MultiheadAttention
from adaattn.conversion import replacement
from adaattn.errors import AdaAttnError
from adaattn.export.engines.options import BuildOptions
from adaattn.export.options import Options
from adaattn.export.pipeline import export
from adaattn.integrations.transformers import registration as integration
from adaattn.planning.budget import Budget

X = torch.randn(2, 5, 16)
Q = torch.randn(2, 4, 5, 8)
PER_HEAD = torch.ones(2, 4, dtype=torch.int32)
STATISTICS = torch.ones(2, 4, 8)
MASK, KEYS = torch.ones(2, 5, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool)


class Opaque:
    """Nothing that any argument can be, and its text has two lines."""

    def __repr__(self) -> str:
        return "two\nlines"


ANYTHING: tuple[Any, ...] = (
    Opaque(),
    [1],
    {"a": 1},
    {1},
    b"bytes",
    print,
    int,
    1j,
    np.ones(2),
    torch.ones(2),
    torch.eye(2),
)
NOT_NUMBERS = (*ANYTHING, "0.01", "", True, False, np.bool_(True), np.array([0.01]), torch.tensor(True), math.nan)
WRONG: dict[str, tuple[Any, ...]] = {
    "int": (
        *NOT_NUMBERS,
        4.0,
        np.float64(4),
        torch.tensor(4.0),
        0,
        -1,
        2**63,
        10**5000,
        math.inf,
        Fraction(8, 2),
    ),
    "float": (*NOT_NUMBERS, math.inf, -math.inf, 10**400, np.float32(np.nan), torch.tensor(math.nan)),
    "bool": (*ANYTHING, None, 0, 1, 2.0, "yes", np.int64(1), torch.tensor(1), math.nan),
    "name": (*ANYTHING, 0, 1.5, True, "", "none such", "x" * 10_000, "two\nlines", ("fp32",)),
    "names": (
        Opaque(),
        None,
        3,
        0.5,
        True,
        "fp32",
        "adaptive",
        b"fp32",
        (),
        [],
        ("none such",),
        (None,),
        [3],
        Q,
        {"a": 1},
    ),
    "path": (*ANYTHING, None, 3, True, 0.5, "a\0b"),
    "object": (*ANYTHING, None, 3, 0.5, True, "text"),
    "function": (Opaque(), None, 3, "text", [print], Q),
    "batches": (None, 3, 0.5, True, print, Opaque(), "text", ["text"], [3], [Opaque()], [None], [{1: X}]),
    "targets": (Opaque(), 3, True, "onnx", ("none such",), (None,), [3], Q, {"a": 1}),
    "classes": (None, 3, nn.Linear, [3], ["Linear"], "Linear"),
    "mapping": (Opaque(), 3, "text", [1], {1: "B,S"}, {"x": 3}, {"x": None}, {"x": ["B"]}),
}
NOT_TENSORS = (
    Opaque(),
    3,
    0.5,
    True,
    "text",
    [1.0],
    [X],
    (X,),
    {"x": X},
    X.numpy(),
    np.float32(1),
    torch.float32,
    print,
)


def tensors(good: Tensor) -> Iterator[Any]:
    """Yield values that are not such a tensor: of another class, layout, type or device."""
    yield from NOT_TENSORS
    yield good.to_sparse()
    yield torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    yield torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
    yield good.to(torch.complex64)
    yield good.to(torch.float8_e4m3fn)
    yield good.to(torch.float8_e5m2)
    yield good.to(torch.int8)
    yield good.to("meta")
    yield good[None, None, None]
    yield torch.zeros(0)
    yield good.flatten()[1:]


@dataclass
class Row:
    """A callable, arguments that it takes, and the kind of each that is tried."""

    call: Callable[..., Any]
    good: dict[str, Any]
    kinds: dict[str, str]
    optional: frozenset[str]  # None is right, too


MODULE = {"embed_dim": "int", "num_heads": "int", "dropout": "float", "causal": "bool", "bias": "bool"}
WIDTHS = {"kdim": "int", "vdim": "int", "num_kv_heads": "int"}
BUDGET = {"tolerance": "float", "safety": "float", "precisions": "names"}
NONE_TOO = frozenset({"kdim", "vdim", "num_kv_heads", "tolerance", "policy", "attention_mask", "attn_mask", "scale"})
OPERANDS = {"query": "tensor", "key": "tensor", "value": "tensor"}
SIZES = {"embed_dim": 16, "num_heads": 4}


def row(call: Callable[..., Any], good: dict[str, Any], *more: str, **kinds: str) -> Row:
    return Row(call, good, kinds, NONE_TOO | frozenset(more))


ROWS: dict[str, Row] = {
    "Budget": row(Budget, {"tolerance": 1e-2}, **BUDGET, low_rank="bool"),
    "DenseAttention": row(adaattn.DenseAttention, SIZES, **MODULE, **WIDTHS),
    "AdaptiveAttention": row(adaattn.AdaptiveAttention, SIZES, **MODULE, **WIDTHS, **BUDGET, policy="name"),
    "AdaptivePrecisionAttention": row(
        adaattn.AdaptivePrecisionAttention, SIZES, **MODULE, **BUDGET, policy="name", default_precision="name"
    ),
    "AdaptiveRankAttention": row(
        adaattn.AdaptiveRankAttention,
        SIZES,
        **MODULE,
        tolerance="float",
        safety="float",
        rank_ratio="float",
        adaptive_threshold="float",
        rank_estimation_method="name",
    ),
    "Encoder": row(
        adaattn.Encoder, SIZES, embed_dim="int", num_heads="int", causal="bool", tolerance="float", layers="names"
    ),
    "Encoder.forward": row(
        adaattn.Encoder(16, 4), {"x": X, "attention_mask": MASK}, x="tensor", attention_mask="tensor"
    ),
    **{
        f"{kind.__name__}.forward": row(
            kind(16, 4),
            {"query": X, "key": X, "value": X, "attention_mask": MASK},
            **OPERANDS,
            attention_mask="tensor",
            need_weights="flag",
        )
        for kind in (adaattn.DenseAttention, adaattn.AdaptiveAttention, adaattn.AdaptiveRankAttention)
    },
    "set_tolerance": row(
        lambda tolerance: adaattn.AdaptiveAttention(16, 4).set_tolerance(tolerance), {}, tolerance="float!"
    ),
    "MultiheadAttention": row(
        MultiheadAttention, {"attention": adaattn.DenseAttention(16, 4)}, attention="object", batch_first="bool"
    ),
    "MultiheadAttention.forward": row(
        MultiheadAttention(adaattn.DenseAttention(16, 4), batch_first=True),
        {"query": X, "key": X, "value": X, "key_padding_mask": MASK, "attn_mask": KEYS},
        "key_padding_mask",
        **OPERANDS,
        key_padding_mask="tensor",
        attn_mask="tensor",
        need_weights="bool",
        average_attn_weights="bool",
        is_causal="bool",
    ),
    "adaptive_attention": row(
        adaattn.adaptive_attention,
        {"query": Q, "key": Q, "value": Q, "attn_mask": KEYS, "tolerance": 1e-2},
        **OPERANDS,
        attn_mask="tensor",
        dropout_p="float",
        is_causal="bool",
        enable_gqa="bool",
        scale="float",
        safety="float",
        precisions="names",
        low_rank="bool",
        impl="name",
    ),
    "ops.adaptive_attention": row(
        ops.adaptive_attention,
        {
            **{"query": Q, "key": Q, "value": Q, "key_mean": STATISTICS, "value_peak": STATISTICS},
            **{"precision": PER_HEAD, "rank": PER_HEAD},
        },
        **OPERANDS,
        key_mean="tensor",
        value_peak="tensor",
        precision="tensor",
        rank="tensor",
        scale="float",
        is_causal="bool",
        impl="name",
    ),
    "ops.token_moments": row(
        ops.token_moments,
        {"x": Q, "key_mask": torch.ones(2, 4, 5, dtype=torch.bool)},
        "key_mask",
        x="tensor",
        key_mask="tensor",
        center="bool",
        impl="name",
    ),
    "Conversion": row(adaattn.Conversion, {}, **BUDGET, policy="name", kind="name"),
    "convert": row(
        adaattn.convert, {"model": nn.TransformerEncoderLayer(16, 4)}, "config", model="object", config="object"
    ),
    "replacement": row(
        replacement, {"attention": nn.MultiheadAttention(16, 4)}, "config", attention="object", config="object"
    ),
    "calibrate": row(
        adaattn.calibrate,
        {"model": adaattn.AdaptiveAttention(16, 4), "batches": [(X, X, X)]},
        "resume",
        model="object",
        batches="batches",
        save_every="int",
        resume="path",
        on_batch="function",
    ),
    "save": row(
        adaattn.save,
        {"module": adaattn.DenseAttention(16, 4), "path": "model.pt"},
        module="object",
        path="path",
        inputs="mapping",
        dims="mapping",
    ),
    "load": row(adaattn.load, {"path": "none.pt"}, path="path", classes="classes"),
    "register": row(
        integration.register, {}, **{**BUDGET, "tolerance": "float!"}, low_rank="bool", dense_below="count", name="name"
    ),
    "transformers.set_tolerance": row(
        integration.set_tolerance, {"model": nn.Linear(1, 1), "tolerance": 1e-2}, model="object", tolerance="float!"
    ),
    "export": row(
        export,
        {"model": adaattn.DenseAttention(16, 4), "output_dir": "export"},
        "options",
        model="object",
        inputs="mapping",
        dims="mapping",
        output_dir="path",
        options="object",
        on_stage="function",
        on_progress="function",
    ),
    "Options": row(
        Options,
        {},
        "opset",
        "dtype",
        "external_data_threshold",
        "samples",
        "state",
        "output_tolerance",
        "formats",
        "metric",
        "allocation",
        "targets",
        targets="targets",
        opset="int",
        dtype="name",
        tolerance="float",
        emit_plan="bool",
        verify="bool",
        external_data_threshold="count",
        build="object",
        force="bool",
    ),
    "BuildOptions": row(BuildOptions, {}, "workspace", strip_weights="bool"),
}


def values(given: Row, name: str) -> Iterator[Any]:
    kind = given.kinds[name]
    optional = name in given.optional and not kind.endswith("!")
    if kind == "tensor":
        found = tensors(given.good[name])
    elif kind == "count":  # from 0
        found = iter([x for x in WRONG["int"] if not (type(x) is int and x == 0)])
    elif kind == "flag":
        found = iter([x for x in WRONG["bool"] if not isinstance(x, str)])
    else:
        found = iter(WRONG[kind.rstrip("!")])
    yield from (x for x in found if x is not None or not optional)
    if not optional and kind not in WRONG:
        yield None


CASES = [(called, name) for called, given in ROWS.items() for name in given.kinds]


@pytest.mark.parametrize(("called", "name"), CASES, ids=[f"{called}-{name}" for called, name in CASES])
def test_a_wrong_argument_is_named_in_one_line(
    called: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ROWS[called]
    for value in values(given, name):
        with pytest.raises(AdaAttnError) as caught:
            given.call(**given.good | {name: value})
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 500, message
        assert name.removesuffix("es").removesuffix("s") in message, message
        if not isinstance(value, (Tensor, list, tuple, dict, int, float)):  # of these a part may be what is shown
            shown = (type(value).__name__, repr(value)[:50])
            assert any(text in message for text in shown), message
    assert not list(tmp_path.iterdir())


def test_a_wrong_size_is_refused_before_memory_is_asked_for() -> None:
    for size in (10**18, 2**62, 2**40):
        with pytest.raises(AdaAttnError, match="embed_dim"):
            adaattn.DenseAttention(size, 1)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor, np.array])
def test_integers_of_other_libraries_are_integers(kind: Callable[[int], Any]) -> None:
    module = adaattn.AdaptiveAttention(kind(16), kind(4), kdim=kind(8), vdim=kind(8), num_kv_heads=kind(2))
    assert all(
        type(getattr(module, name)) is int for name in ("embed_dim", "num_heads", "kdim", "vdim", "num_kv_heads")
    )
    assert module.k_proj.weight.shape == (8, 8)


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, np.array, Fraction])
def test_numbers_of_other_libraries_are_numbers(kind: Callable[[float], Any], tmp_path: Path) -> None:
    module = adaattn.AdaptiveAttention(
        16, 4, dropout=kind(0.25), tolerance=kind(0.5), safety=kind(2.0), causal=np.bool_(True)
    )
    assert (module.dropout, module.tolerance, module.safety, module.causal) == (0.25, 0.5, 2.0, True)
    module.set_tolerance(kind(0.125))
    adaattn.save(module, tmp_path / "model.pt")  # plain numbers alone can be
    assert adaattn.load(tmp_path / "model.pt").tolerance == 0.125
    output = adaattn.adaptive_attention(Q, Q, Q, tolerance=kind(0.25), scale=kind(0.5), is_causal=np.bool_(True))
    assert torch.equal(output, adaattn.adaptive_attention(Q, Q, Q, tolerance=0.25, scale=0.5, is_causal=True))
