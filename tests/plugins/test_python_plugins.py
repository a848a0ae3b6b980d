"""The Python plugins, judged by NVIDIA's own plugin code and run with what a launch resolves to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adaattn import ops
from adaattn.errors import ConfigError, TargetError
from adaattn.ops.signatures import OPS
from adaattn.ops.token_moments.impl.triton import moments_spec
from adaattn.planning.budget import Budget
from adaattn.planning.ladder import ladder_table
from adaattn.planning.precision import FP32
from adaattn.plugins import ptx
from adaattn.plugins import python as plugins
from adaattn.plugins.op_variants import VARIANTS, Launch
from tests.support import fake_tensorrt, oracle
from tests.support.fake_tensorrt import DataType
from tests.support.triton_interpreter import DEVICE, GPU

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning"),  # numbers that leave their range, in the interpreter
    pytest.mark.skipif(not fake_tensorrt.HERE, reason="tensorrt-cu13-bindings is not installed"),
]
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TYPES = {dtype: getattr(DataType, name) for name, dtype in plugins.TYPES.items()}
Inputs = dict[str, tuple[Tensor, tuple[int | str, ...]]]
"""Tensors and their shapes as the network knows them."""


def moments_inputs(dtype: torch.dtype, mask: bool) -> Inputs:
    inputs: Inputs = {"x": ((torch.randn(2, 3, 70, 20) + 2).to(dtype), ("batch", 3, "tokens", 20))}
    if mask:
        inputs["key_mask"] = (torch.rand(2, 1, 70) < 0.6, ("batch", 1, "tokens"))
    return inputs


def plan_inputs() -> Inputs:
    q, k, v = (x.float() for x in oracle.DISTRIBUTIONS["outliers"]((2, 6, 33, 20), (2, 2, 40, 20)))
    of_q, of_k, of_v = ops.token_moments(q), ops.token_moments(k, center=True), ops.token_moments(v)
    moments = (*of_q, *of_k[1:], *of_v[1:3])
    *names, ladder = (x.name for x in OPS["plan"].inputs)
    inputs: Inputs = {name: (x, ("batch", *x.shape[1:])) for name, x in zip(names, moments, strict=True)}
    return inputs | {ladder: (ladder_table(Budget(1e-2), 20), (2, "steps"))}


def attention_inputs(dtype: torch.dtype, mask: Tensor | None = None, known: tuple[int | str, ...] = ()) -> Inputs:
    q, k, v = torch.randn(1, 10, 19, 16), torch.randn(1, 2, 35, 16), torch.randn(1, 2, 35, 16)
    precision = torch.arange(5, dtype=torch.int32).repeat(1, 2)
    rank = torch.tensor([[16, 5, 12, 16, 8, 9, 16, 16, 4, 16]], dtype=torch.int32)
    of_keys: tuple[int | str, ...] = ("batch", 2, "keys", 16)
    inputs: Inputs = {
        "query": (q.to(dtype), ("batch", 10, "queries", 16)),
        "key": (k.to(dtype), of_keys),
        "value": (v.to(dtype), of_keys),
        "key_mean": (k.mean(2), ("batch", 2, 16)),
        "value_peak": (v.abs().amax(2), ("batch", 2, 16)),
        "precision": (precision, ("batch", 10)),
        "rank": (rank, ("batch", 10)),
    }
    return inputs if mask is None else inputs | {"attn_mask": (mask, known)}


CASES: dict[str, Any] = {
    "moments": lambda: ("token_moments", moments_inputs(torch.float16, False), {"center": 1}),
    "moments, masked": lambda: ("token_moments_masked", moments_inputs(torch.float32, True), {"center": 0}),
    "plan": lambda: ("plan", plan_inputs(), {"scale": 20**-0.5, "limit": 8e-3}),
    "attention": lambda: ("adaptive_attention", attention_inputs(torch.float16), {"scale": 0.25, "is_causal": 1}),
    "attention, float32": lambda: (
        "adaptive_attention", attention_inputs(torch.float32), {"scale": 0.0, "is_causal": 0},
    ),
    "padding": lambda: (
        "adaptive_attention_masked",
        attention_inputs(torch.bfloat16, torch.rand(1, 1, 1, 35) < 0.6, ("batch", 1, 1, "keys")),
        {"scale": 0.25, "is_causal": 0},
    ),
    "of queries and heads": lambda: (
        "adaptive_attention_masked",
        attention_inputs(torch.float32, torch.rand(1, 10, 19, 1) < 0.6, (1, 10, "queries", 1)),
        {"scale": 0.25, "is_causal": 0},
    ),
    "added": lambda: (
        "adaptive_attention_biased",
        attention_inputs(torch.float16, torch.randn(1, 1, 19, 35), ("batch", 1, "queries", "keys")),
        {"scale": 0.25, "is_causal": 1},
    ),
}  # fmt: skip


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Our plugins in NVIDIA's registry, for sm_90. In the interpreter nothing compiles: launches come to this list."""
    for name, module in fake_tensorrt.load().items():
        monkeypatch.setitem(sys.modules, name, module)
    plugins.register(None if GPU else 90)
    launches: list[Launch] = []
    if not GPU:

        def noted(launch: Launch, *_: Any) -> ptx.Entry:
            launches.append(launch)
            return ptx.Entry("kernel", "", (), launch.spec.warps * 32, 0)

        monkeypatch.setattr(plugins, "compiled", noted)
    return launches


def build(name: str, inputs: Inputs, attributes: dict[str, float]) -> fake_tensorrt.Engine:
    return fake_tensorrt.build(name, {key: (TYPES[x.dtype], known) for key, (x, known) in inputs.items()}, attributes)


def interpret(launch: Launch, resolved: fake_tensorrt.Resolved, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Return the kernel with the arguments in the order in which TensorRT passes them."""
    spec = launch.spec
    given = [*(x.view(torch.uint8) if x.dtype == torch.bool else x for x in inputs), *resolved.integers, *outputs]
    named = dict(zip(spec.parameters, given, strict=True))
    rest = {name: spec.known.get(name) for name in spec.arguments if name not in named}
    spec.kernel[resolved.grid](**named, **{**rest, **spec.constants}, num_warps=spec.warps)


@pytest.mark.parametrize("case", CASES)
def test_what_a_launch_resolves_to_computes_the_op(case: str, registered: list[Launch]) -> None:
    name, inputs, attributes = CASES[case]()
    engine = build(name, inputs, attributes)
    assert list(engine.tactics) == list(VARIANTS[name].tactics)
    tensors = [x.to(DEVICE) for x, _ in inputs.values()]
    sizes: dict[str, int] = {}
    for x, known in inputs.values():
        sizes |= {size: real for size, real in zip(known, x.shape, strict=True) if isinstance(size, str)}
    want = reference(name, tensors, attributes)
    for tactic in engine.tactics:
        launch = engine.resolve(sizes, tactic)
        assert launch.output_shapes == tuple(x.shape for x in want)
        assert list(engine.output_types) == [TYPES[x.dtype] for x in want]
        outputs = [torch.full_like(x, 77) for x in want]
        if GPU:
            fake_tensorrt.enqueue(launch, tensors, outputs)
        else:
            interpret(registered[-1], launch, tensors, outputs)
        compare(name, inputs, outputs, want)


def reference(name: str, tensors: list[Tensor], attributes: dict[str, float]) -> list[Tensor]:
    if name == "plan":
        return list(ops.plan(*tensors, *attributes.values(), "reference"))
    if name.startswith("token_moments"):
        return list(ops.token_moments(*tensors, center=bool(attributes["center"]), impl="reference"))
    scale, is_causal = attributes["scale"], bool(attributes["is_causal"])
    return [ops.adaptive_attention(*tensors, scale=scale, is_causal=is_causal, impl="reference")]


def compare(name: str, inputs: Inputs, got: list[Tensor], want: list[Tensor]) -> None:
    if name.startswith("adaptive_attention"):
        output, exact = got[0].cpu(), want[0].cpu().double()
        precision, rank = inputs["precision"][0], inputs["rank"][0]
        error = oracle.error(output, exact)
        assert (error < 0.05).all()
        whole = (precision == FP32) & (rank == 16)
        assert (error[whole] < oracle.OUTPUT[output.dtype] + 1e-6).all()
    else:
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_only_a_head_dim_that_is_known_and_small_enough_is_taken(registered: list[Launch]) -> None:
    for width, said in (("width", "head_dim is dynamic"), (320, "head_dim is 320")):
        engine = fake_tensorrt.build("token_moments", {"x": (DataType.FLOAT, (2, 3, "tokens", width))}, {"center": 0})
        with pytest.raises(ConfigError, match=said):
            engine.resolve({"tokens": 5, "width": 64}, 1)


def test_what_the_kernels_cannot_do_is_refused(registered: list[Launch]) -> None:
    with pytest.raises(ConfigError, match="x of token_moments is INT8; the plugin takes FLOAT, HALF, BF16"):
        fake_tensorrt.build("token_moments", {"x": (DataType.INT8, (2, 3, 4, 16))}, {"center": 0})
    inputs = attention_inputs(torch.float32)
    with pytest.raises(ConfigError, match=r"scale is -0\.25; the plugins take one of at least 0"):
        build("adaptive_attention", inputs, {"scale": -0.25, "is_causal": 0}).resolve(
            {"batch": 1, "queries": 19, "keys": 35}, 1
        )


def test_a_gpu_too_old_for_the_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_tensorrt.load().items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(TargetError, match=r"need compute capability 8\.0; this GPU has 7\.5: take plugins='none'"):
        plugins.register(75)


def test_a_gpu_newer_than_the_driver_s_ptx_is_refused() -> None:
    spec = moments_spec(torch.float16, 64, masked=False, center=True)
    with pytest.raises(TargetError, match=r"sm_120 needs PTX 8\.7 and the driver takes 8\.4"):
        ptx.entry(spec, 120, 84)


KERNEL = """
.version 8.4
.target sm_90a
.visible .entry plan(
	.param .u64 .ptr .global .align 1 plan_param_0,
	.param .u64 .ptr .global .align 1 plan_param_1,
	.param .u64 .ptr .global .align 1 plan_param_2
)
{
	.loc 1 36 0 // secret.py:36:0
	ld.param.b64 	%rd19, [plan_param_0];
}
"""


def test_only_a_kernel_that_needs_no_scratch_memory_is_fit_to_travel() -> None:
    spec: Any = SimpleNamespace(parameters=["x"], warps=4)
    metadata = SimpleNamespace(name="plan", shared=16, global_scratch_size=0, profile_scratch_size=0)
    fit = ptx.fit(KERNEL, metadata, spec)
    assert (fit.name, fit.kinds, fit.threads, fit.shared_bytes) == ("adaattn_plan", (".u64",), 128, 16)
    assert "plan_param_1" not in fit.ptx
    assert "[adaattn_plan_param_0]" in fit.ptx
    assert "secret" not in fit.ptx
    with pytest.raises(TargetError, match="plan needs 8 bytes of scratch memory"):
        ptx.fit(KERNEL, SimpleNamespace(**{**vars(metadata), "global_scratch_size": 8}), spec)
    with pytest.raises(TargetError, match="reads its hidden parameter plan_param_2"):
        ptx.fit(KERNEL.replace("[plan_param_0]", "[plan_param_2]"), metadata, spec)
    with pytest.raises(TargetError, match="3 parameters in PTX; expected 2 and global scratch and profile scratch"):
        ptx.fit(KERNEL, metadata, SimpleNamespace(parameters=["x", "y"], warps=4))


@pytest.mark.parametrize(
    "capability", [x if x in (90, 120) else pytest.param(x, marks=pytest.mark.thorough) for x in ARCHITECTURES]
)
def test_an_assembler_takes_the_kernels_for_every_architecture(capability: int) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "assemble.py", str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0"},  # this process may interpret kernels, and then compiles none
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        variant = VARIANTS[name]
        pointers, integers = [".u64"], [".u32"] * found["integers"]
        assert found["kinds"] == pointers * len(variant.inputs) + integers + pointers * len(variant.outputs)
        assert found["shared_bytes"] <= 48 << 10
        assert found["registers"] > 0
        assert found["ptx"].startswith(f".version {found['newest'] / 10}\n")
        assert "/" not in found["ptx"]  # no path of this machine
