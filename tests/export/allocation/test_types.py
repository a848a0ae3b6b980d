"""A typed file computes what its plan says, plans keep their tolerance, and what was predicted is what is measured.

One file, though long: nearly all of it is about one block, and files of it that are made once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaattn.errors import ConfigError
from adaattn.export import Options, allocate, export, pipeline
from adaattn.export.allocation import allocate as allocating
from adaattn.export.allocation import apply, measure
from adaattn.export.allocation import samples as sample_data
from adaattn.export.allocation.allocate import Request, allocate_captured
from adaattn.export.allocation.allocation import AllocatedSite, Allocation
from adaattn.export.allocation.heads import HeadStatistics, head_plans
from adaattn.export.allocation.sites import Network, network
from adaattn.export.allocation.state import State
from adaattn.export.allocation.write import emulated_program, typed_program, unrounded_program
from adaattn.export.artifacts.report import TargetResult
from adaattn.export.capture.captured import Captured
from adaattn.export.capture.module import capture_module
from adaattn.export.engines import worker
from adaattn.export.formats import BF16, FORMATS, FP8, FP16, FP32, PLUGIN, device_of, quantized, rounded, scale_of
from adaattn.export.golden.plan_mode import PlanMode, to_double
from adaattn.export.onnx import lower, save
from adaattn.export.rewrite.prove import Runs
from adaattn.export.targets import TARGETS
from adaattn.export.verification.graph_copies import float32_copy
from adaattn.input_spec import Dimension, InputSpec

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 10
SIZES = {"B": Dimension("B", 1, 2, 4), "S": Dimension("S", 1, 9, 24)}
GPU = device_of(["8.9"])
FORMS = (FP32, BF16, FP16, FP8)


class Block(nn.Module):
    """Attention with grouped heads and a mask, an MLP of each activation, a convolution and a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, HEADS * HEAD_DIM), nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM)
        self.out, self.up, self.down = nn.Linear(HEADS * HEAD_DIM, WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        y = self.before(x)
        q = self.q(y).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, KV_HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.up(self.after(x))
        x = x + self.down(F.gelu(y) * F.silu(y)) * 0.3
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x.sum(1), x @ self.embedding.weight.T


def captured_of(model: nn.Module, *inputs: str) -> Captured:
    specs = [InputSpec.parse(*given.split("=", 1)) for given in inputs]
    return capture_module(model.eval(), specs, {k: v for k, v in SIZES.items() if any(k in x.shape for x in specs)})


@pytest.fixture(scope="module")
def block() -> Captured:
    torch.manual_seed(0)
    return captured_of(Block(), "ids=B,S:int64<50", "mask=B,S:bool:attend")


def drawn(count: int = 24, seed: int = 1) -> list[dict[str, Tensor]]:
    """Return samples of other lengths, of which every third has padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place in range(count):
        tokens = int(torch.randint(1, 25, (), generator=generator))
        mask = torch.ones(1, tokens, dtype=torch.bool)
        mask[:, max(1, tokens // 2) :] = place % 3 > 0
        found.append({"ids": torch.randint(0, 50, (1, tokens), generator=generator), "mask": mask})
    return found


def run(program: ExportedProgram, sample: Mapping[str, Tensor], double: bool) -> list[Tensor]:
    arguments = Runs(program, convert=to_double if double else lambda x: x).arguments(sample)
    module = torch.fx.Interpreter(program.graph_module)
    with torch.no_grad():
        if not double:
            return list(module.run(*arguments, enable_io_processing=False))
        with PlanMode(double=True, dtype=torch.float32):
            return list(module.run(*arguments, enable_io_processing=False))


def error(got: Tensor | np.ndarray, exact: Tensor) -> float:
    return float((torch.as_tensor(got).double() - exact).norm() / exact.norm())


def saved(captured: Captured, program: ExportedProgram, path: Path, opset: int) -> Path:
    names = [item.name for item in captured.inputs]
    dims = {s: dim.name for s, dim in captured.dims.items()}
    made = lower.lower(program, opset, dims, names, captured.output_names)
    made.graph.metadata_props["adaattn.types"] = "{}"
    save.save(made.graph, path)
    return path


def in_onnxruntime(model: onnx.ModelProto | Path, sample: Mapping[str, Tensor]) -> list[np.ndarray]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: x.numpy() for name, x in sample.items()}))


def mixed(found: Network) -> dict[str, str]:
    """Return a plan in which neighbours have other formats."""
    return {site.name: site.candidates[place % len(site.candidates)] for place, site in enumerate(found.sites.values())}


PLANS: dict[str, Callable[[Network], dict[str, str]]] = {
    form: lambda found, form=form: {  # type: ignore[misc]
        site.name: form if form in site.candidates else FORMATS[form].carrier for site in found.sites.values()
    }
    for form in FORMS
} | {"mixed": mixed}


@pytest.fixture(scope="module")
def scales(block: Captured) -> dict[str, tuple[float, ...]]:
    found = network(block.program, FORMS)
    samples = sample_data.read(block, drawn())
    measured = allocating._measured(block, found, samples.choosing, State(None, found, ()), lambda phase, share: None)
    return {name: tuple(map(scale_of, each.peaks)) for name, each in measured.sites.items() if each.peaks}


@pytest.fixture(scope="module")
def file_of(
    block: Captured, scales: dict[str, tuple[float, ...]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    folder, found = tmp_path_factory.mktemp("typed"), network(block.program, FORMS)

    def make(plan: str, opset: int) -> Path:
        path = folder / f"{plan} {opset}.onnx"
        return path if path.exists() else saved(block, typed_program(found, PLANS[plan](found), scales), path, opset)

    return make


# From opset 23 on attention in fp32 and in 16 bits is one node.
FILES = [(plan, opset) for plan in (*FORMS, "mixed") for opset in (22, 23)]
USUAL = ((FP16, 23), ("mixed", 22))


@pytest.mark.parametrize(
    ("plan", "opset"), [pytest.param(*each, marks=() if each in USUAL else pytest.mark.thorough) for each in FILES]
)
def test_a_typed_file_computes_what_the_programs_say(
    block: Captured, scales: dict[str, tuple[float, ...]], plan: str, opset: int, file_of: Callable[[str, int], Path]
) -> None:
    found = network(block.program, FORMS)
    path = file_of(plan, opset)
    if plan != "mixed":
        operators = [node.op_type for node in onnx.load(path).graph.node]
        assert operators.count("Attention") == (opset == 23 and plan != FP8)
    check_file(
        path, (found, PLANS[plan](found), scales), drawn(6, seed=2), {FP32: 1e-6, FP16: 3e-3, BF16: 3e-2}.get(plan, 0.3)
    )


def check_file(path: Path, given: tuple[Network, Any, Any], samples: list[dict[str, Tensor]], most: float) -> None:
    """Check that a file computes what the programs of a plan say, of which the plan's error is at most a number."""
    emulated, unrounded = emulated_program(*given), unrounded_program(*given)
    strict, exact = float32_copy(path, rounds=True), float32_copy(path, rounds=False)
    one_node = any(node.op_type == "Attention" for node in strict.graph.node)
    for sample in samples:
        model = run(given[0].program, sample, double=True)
        wanted, eager = run(emulated, sample, double=True), run(emulated, sample, double=False)
        plain, got, sharp = (
            run(unrounded, sample, double=True),
            in_onnxruntime(strict, sample),
            in_onnxruntime(exact, sample),
        )
        for place in range(len(model)):
            # Sums in another order move numbers over the edge between two of a format: a share of the plan's own error.
            # The copy rounds nothing within an Attention.
            of_plan = error(wanted[place], model[place])
            flips = max(error(eager[place], wanted[place]), (0.6 if one_node else 0.3) * of_plan)
            assert error(got[place], wanted[place]) <= 2 * flips + 2e-6
            assert error(sharp[place], plain[place]) <= 3e-6
            assert of_plan < most


class Added(nn.Module):
    """Attention with a mask that is added, of the least number of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return F.scaled_dot_product_attention(q, k, v, added[:, None, None]).transpose(1, 2).flatten(2)


ATTENTIONS = {
    "fp16 at 23": (FP16, 23, False),
    "bf16 at 22": (BF16, 22, False),
    "fp8 at 23": (FP8, 23, False),
    "planned heads": (PLUGIN, 22, True),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.thorough if kind in ("bf16 at 22", "fp8 at 23") else ())
        for kind in ATTENTIONS
    ],
)
def test_masks_that_hide_every_key_by_the_least_number(kind: str, tmp_path: Path) -> None:
    form, opset, plugin = ATTENTIONS[kind]
    torch.manual_seed(0)
    captured = captured_of(Added(), f"x=B,S,{WIDTH}", "mask=B,S:bool:attend")
    found = network(captured.program, FORMS, plugin=plugin)
    samples = [{"x": 3 * torch.randn(2, 11, WIDTH), "mask": torch.rand(2, 11) < 0.7} for _ in range(10)]
    for sample in samples:
        sample["mask"][0] = False
    read = sample_data.read(captured, samples)
    measured = allocating._measured(captured, found, read.choosing, State(None, found, ()), lambda phase, share: None)
    plan, constants = {}, {}
    for site in found.sites.values():
        known = measured.sites[site.name]
        plan[site.name] = next(each for each in (form, FORMATS[form].carrier, FP32) if each in site.candidates)
        if site.heads:
            constants[site.name] = known.heads.planned([("int8", WIDTH // 2), ("int8_fp8", WIDTH // 4)])
        else:
            constants[site.name] = [scale_of(peak) for peak in known.peaks]
    assert form in plan.values()
    path = saved(captured, typed_program(found, plan, constants), tmp_path / "model.onnx", opset)
    assert len(worker.quantized_attentions(onnx.load(path).graph)) == (form == FP8)
    check_file(path, (found, plan, constants), samples[:3], 0.9 if plugin else 0.3)


@pytest.mark.thorough
def test_weights_are_stored_in_their_type(file_of: Callable[[str, int], Path]) -> None:
    sizes = {}
    for form in FORMS:
        tensors = onnx.load(file_of(form, 22)).graph.initializer
        sizes[form] = sum(len(x.raw_data) for x in tensors if len(x.dims) > 1)
    assert sizes[FP16] == sizes[BF16] <= 0.51 * sizes[FP32]
    assert sizes[FP8] < 0.8 * sizes[FP16]  # the embedding and the convolution are of fp16


def test_gradients_are_those_of_tensors_that_waited_on_disk(block: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    found, found_by = network(block.program, FORMS), {}
    for large in (measure.LARGE, 0):
        monkeypatch.setattr(measure, "LARGE", large)
        measured = measure.Measurements(found)
        measured.measure_sensitivity(Runs(found.program, convert=lambda x: x).arguments(drawn(1)[0]), seed=1)
        found_by[large] = {name: each.gain for name, each in measured.sites.items()}
    assert len(set(map(str, found_by.values()))) == 1
    assert max(found_by[0].values()) > 0


@pytest.mark.parametrize("form", [pytest.param(FP16, marks=pytest.mark.thorough), BF16, FP8])
def test_the_prediction_is_near_what_is_measured(block: Captured, form: str) -> None:
    found = network(block.program, FORMS)
    samples = sample_data.read(block, drawn(40))
    measured = allocating._measured(block, found, samples.choosing, State(None, found, ()), lambda phase, share: None)
    plan = PLANS[form](found)
    problem, heads = allocating._problem(found, measured, GPU)
    settle = partial(allocating._settled, measured, heads)
    certifier = allocating._Certifier(block, found, settle, samples.certifying, None)
    errors, predicted = certifier.errors(plan, lambda phase, share: None), problem.error(plan)
    assert 0.4 < predicted / float(np.sqrt(np.mean(np.square(errors)))) < 2.5


@pytest.mark.parametrize(
    "tolerance", [1e-1, 1e-2, *(pytest.param(x, marks=pytest.mark.thorough) for x in (1e-3, 1e-5))]
)
def test_an_allocation_keeps_its_tolerance_and_pays_less_for_a_larger_one(block: Captured, tolerance: float) -> None:
    found = network(block.program, FORMS)
    made = allocate_captured(block, found, sample_data.read(block, drawn(44)), Request(tolerance, ()), GPU)
    assert made.measured <= tolerance
    assert made.promises
    assert made.cost <= made.cost_fp32
    assert sum(site.share for site in made.sites) == pytest.approx(1)
    assert sum(made.work().values()) == pytest.approx(1)
    if tolerance >= 1e-2:
        assert made.cost < 0.8 * made.cost_fp32
    program = emulated_program(found, made.plan, made.constants)
    fresh = [
        max(error(got, exact) for got, exact in zip(run(program, x, False), run(found.program, x, True), strict=True))
        for x in drawn(40, seed=9)
    ]
    assert sum(each <= tolerance for each in fresh) >= 0.85 * len(fresh)


@pytest.mark.parametrize("tolerance", [3e-1, pytest.param(2e-2, marks=pytest.mark.thorough)])
def test_heads_are_planned_within_a_tolerance(block: Captured, tolerance: float, tmp_path: Path) -> None:
    found = network(block.program, FORMS, plugin=True)
    made = allocate_captured(block, found, sample_data.read(block, drawn(44)), Request(tolerance, ()), GPU)
    (attention,) = [site for site in made.sites if site.op == "scaled_dot_product_attention"]
    assert made.measured <= tolerance
    assert attention.format == PLUGIN
    assert attention.heads is not None
    assert len(attention.heads.plans) == HEADS
    assert {name for name, _ in attention.heads.plans} <= {"fp16", "int8", "int8_fp8"}
    if tolerance > 0.1:
        assert any(name == "int8_fp8" for name, _ in attention.heads.plans)
    made.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json") == made
    sites = [replace(site, heads=None if site.heads is None else replace(site.heads, plans=())) for site in made.sites]
    with pytest.raises(ConfigError, match="plans heads of scaled_dot_product_attention of other sizes"):
        apply.give_types(block, replace(made, sites=tuple(sites)), GPU, ["onnx"], lambda phase, share: None)
    content = json.loads((tmp_path / "allocation.json").read_text())
    for site in content["sites"]:
        site["heads"] = None
    (tmp_path / "allocation.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="holds no allocation: ValueError: the heads of"):
        Allocation.load(tmp_path / "allocation.json")


class Split(nn.Module):
    """Products of a transposed tensor with parts of one weight, as torch.nn.MultiheadAttention has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight.split([WIDTH, WIDTH])
        x = x.transpose(0, 1)
        return F.linear(x, first).sigmoid() * F.linear(x, second)


def test_parts_of_a_weight_are_stored_in_their_types_and_multiplied_before_a_transposition(tmp_path: Path) -> None:
    captured = captured_of(Split(), f"x=B,S,{WIDTH}")
    found = network(captured.program, FORMS)
    plan = {site.name: FP16 for site in found.sites.values()}
    first, _ = (site.name for site in found.sites.values() if site.product)
    plan[first], constants = FP8, {first: (2.0**-6, 2.0**-7)}
    path = saved(captured, typed_program(found, plan, constants), tmp_path / "model.onnx", 22)
    nodes, stored = onnx.load(path).graph.node, onnx.load(path).graph.initializer
    made = {name: node.op_type for node in nodes for name in node.output}
    assert "Split" not in made.values()
    assert sum(x.data_type == onnx.TensorProto.FLOAT8E4M3FN and len(x.dims) == 2 for x in stored) == 1
    (half,) = (node for node in nodes if node.op_type == "MatMul" and made.get(node.input[1]) is None)
    assert made[half.input[0]] == "Cast"
    in_onnxruntime(path, {"x": torch.randn(3, 7, WIDTH)})
    check_file(path, (found, plan, constants), [{"x": torch.randn(2, size, WIDTH)} for size in (1, 9)], 0.3)


class Plain(nn.Module):
    """Attention to one tensor, or to three."""

    def __init__(self, one: bool) -> None:
        super().__init__()
        self.one = one

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x if self.one else x + 1, x if self.one else x * 2, is_causal=True)


@pytest.mark.parametrize(
    ("head_dim", "one", "form", "taken"),
    [(16, False, FP16, True), (16, True, FP16, False), (8, False, FP16, False), (16, False, FP32, False)],
)
def test_what_a_target_does_not_take_is_lowered_otherwise(head_dim: int, one: bool, form: str, taken: bool) -> None:
    captured = captured_of(Plain(one), f"x=B,2,S,{head_dim}")
    found = network(captured.program, FORMS, TARGETS)
    program = typed_program(found, {site.name: form for site in found.sites.values()}, {})
    for targets, one_node in ((["onnx"], True), (["onnx", "tensorrt-rtx"], taken)):
        made = lower.lower(program, 23, {}, ["x"], ["output"], targets=targets)
        assert ("Attention" in [node.op_type for node in made.graph.graph]) == one_node
    (attention,) = (site for site in found.sites.values() if site.product)
    assert (FP8 in attention.candidates) == (head_dim > 8)


class Normed(nn.Module):
    """A root mean square norm, which ONNX has as one operator from opset 23 on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_operators_of_several_types_stay_apart(tmp_path: Path) -> None:
    captured = captured_of(Normed(), f"x=B,S,{WIDTH}")
    found = network(captured.program, FORMS)
    sites = [site for site in found.sites.values() if FP16 in site.candidates]
    for place in range(2):
        plan = {site.name: FP16 if (number + place) % 2 else FP32 for number, site in enumerate(sites)}
        path = saved(captured, typed_program(found, plan, {}), tmp_path / "model.onnx", 23)
        onnx.checker.check_model(path, full_check=True)
        check_file(path, (found, plan, {}), [{"x": torch.randn(2, 9, WIDTH)}], 3e-3)


def test_attention_of_fp8_in_half_precision_is_a_warning_with_its_cost() -> None:
    layers = [{"Name": "_gemm_mha_v2_0x1", "Metadata": "[ONNX Layer: node_MatMul_1]"}, "node_MatMul_11"]
    ops = worker.which_fused(["node_MatMul_1", "node_MatMul_11"], layers)
    assert ops == {"node_MatMul_1": "fused", "node_MatMul_11": "half precision"}
    site = AllocatedSite("a", "", "scaled_dot_product_attention", FP8, True, {FP32: 0.0}, 1.0, 1.0, 242e12)
    made = Allocation(1e-1, 0.95, None, GPU.name, (site,), 0.0, (0.0,), 0.0, 2.0, 8.0, 0)
    options = Options(output_tolerance=1e-1, samples=[], attention="plugin")
    assert pipeline._without_plugin(made, options)[0].startswith("--attention plugin changes nothing")
    assert pipeline._without_plugin(made, replace(options, attention="operators")) == []
    (said,) = pipeline._fallbacks(TargetResult("tensorrt", ops=ops), made, GPU)
    assert said.startswith("tensorrt runs 1 of 2 attentions of fp8 in half precision, which adds about 25% to the")
    assert pipeline._fallbacks(TargetResult("tensorrt", ops={"node_MatMul_1": "unknown"}), made, GPU) == []


def test_better_plans_of_heads_cost_more() -> None:
    plans, heads = head_plans(8, FORMS), 3
    draw = torch.Generator().manual_seed(0)
    noise = [[float(x) for x in torch.rand(heads, generator=draw)] for _ in plans]
    found = HeadStatistics([1.0, 2.0, 3.0], noise, [1.0, 0.1, 10.0])
    choices = sorted(found.choices(plans, 4, 1e9, 1e3, GPU), key=lambda choice: choice[1])
    assert len(choices) >= 3
    assert all(a[2] > b[2] for a, b in pairwise(choices))
    assert choices[0][0] == (("int8_fp8", 2),) * heads
    best = min(range(len(plans)), key=lambda place: noise[place][2])
    assert choices[-1][0][2] == plans[best]
    assert head_plans(8, (FP32, FP16))[-1] == ("int8", 2)


def test_a_program_gets_types_in_python(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16)).eval(), torch.randn(3, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    made = allocate(program, [torch.randn(5, 16) for _ in range(12)], 1e-2, compute_capabilities=["8.9"])
    assert made.measured <= 1e-2
    assert {site.format for site in made.sites} <= set(FORMS)
    options = Options(("onnx",), allocation=made)
    result = export(program, output_dir=tmp_path / "out", options=options)
    assert result.passed
    with pytest.raises(ConfigError, match="tolerance is -1"):
        allocate(program, [], -1)
    with pytest.raises(ConfigError, match="program is of type Sequential"):
        allocate(model, [], 1e-2)  # type: ignore[arg-type]


def test_least_error_is_named_where_nothing_keeps_a_tolerance(block: Captured) -> None:
    found = network(block.program, FORMS)
    with pytest.raises(ConfigError, match=r"no types keep 1e-12: float32 everywhere has \d\.\de-0\d .* the least"):
        allocate_captured(block, found, sample_data.read(block, drawn(8)), Request(1e-12, ()), GPU)


class Loud(nn.Module):
    """Has numbers in the middle that fp16 does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) * 3e4).relu() / 3e4)


def test_what_overflows_fp16_has_another_format() -> None:
    captured = captured_of(Loud(), "x=B,S,8")
    found = network(captured.program, FORMS)
    samples = sample_data.read(captured, [{"x": torch.randn(2, 9, 8)} for _ in range(10)])
    made = allocate_captured(captured, found, samples, Request(3e-2, ()), GPU)
    formats = {site.op: site for site in made.sites}
    assert formats["mul"].errors[FP16] == float("inf")
    assert formats["mul"].format in (FP32, BF16)
    assert {site.format for site in made.sites if site.op == "linear"} & {FP16, FP8, BF16}


def test_a_users_metric_is_bounded() -> None:
    captured = captured_of(Loud(), "x=B,S,8")
    found = network(captured.program, FORMS)
    samples = sample_data.read(captured, [{"x": torch.randn(2, 9, 8)} for _ in range(10)])

    def largest(outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
        return float((outputs["output"] - exact["output"]).abs().max())

    made = allocate_captured(captured, found, samples, Request(1e-2, (), metric=largest), GPU)
    assert made.metric == "largest"
    assert 0 < made.measured <= 1e-2

    def unknown(outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
        return float("nan")

    with pytest.raises(ConfigError, match=r"no types keep 0\.01: float32 everywhere has inf"):
        allocate_captured(captured, found, samples, Request(1e-2, (), metric=unknown), GPU)

    def fails(outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
        raise RuntimeError("no such label")

    with pytest.raises(ConfigError, match="the metric fails: RuntimeError: no such label"):
        allocate_captured(captured, found, samples, Request(1e-2, (), metric=fails), GPU)


def test_samples_that_the_program_does_not_take_are_refused() -> None:
    captured = captured_of(Loud(), "x=B,S,8")
    good = torch.randn(24, 12, 8)
    broken = good.clone()
    broken[3, 2, 1] = torch.nan

    def midway() -> Iterator[Tensor]:
        yield from good[:5].unsqueeze(1)
        raise OSError("the disk is gone")

    for given, said in (
        ([{"ids": good}], "batch 1 of the samples lacks x; the inputs are x"),
        ([{"x": good, "y": good}], "batch 1 of the samples has y, which is no input; the inputs are x"),
        ([(good, good)], "batch 1 of the samples has 2 tensors; the inputs are x"),
        ([good, good[..., :4]], "x in batch 2 of the samples has 4 where it takes B,S,8:float32"),
        ([good[:, 0]], r"x in batch 1 of the samples has 2 dimensions, \(24, 8\); the input has 3"),
        ([good.long()], "x in batch 1 of the samples is of type int64; the input is float32"),
        ([torch.cat([good] * 3, 1)], "batch 1 of the samples has S=36; the export takes 1:9:24"),
        ([good[:7]], "7 samples are too few to choose types and to certify them; give 8 or more"),
        ([], "0 samples are too few"),
        ([broken], "x in batch 1 of the samples has NaN or Inf"),
        (midway(), "the samples fail after 5 batches: OSError: the disk is gone"),
        (["a"] * 9, "x in batch 1 of the samples is a str; give a tensor or an array"),
    ):
        with pytest.raises(ConfigError, match=said):
            sample_data.read(captured, given)
    read = sample_data.read(captured, [good, good.double().numpy()[:3]])
    assert (len(read.choosing), len(read.certifying)) == (14, 13)
    assert all(sample["x"].shape == (1, 12, 8) and sample["x"].dtype == torch.float32 for sample in read.choosing)


class Head(nn.Module):
    """A linear layer and what is made of its result."""

    def __init__(self, made: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.made = nn.Linear(8, 9), made

    def forward(self, x: Tensor) -> Any:
        return self.made(self.linear(x), self.linear.weight)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda y, w: y.argmax(-1), r"no output is of floating-point numbers, .* output \(int64\)"),
        (lambda y, w: (w * 1.0, y.sum(-1) > 0), "no output of floating-point numbers depends on the inputs"),
        (lambda y, w: nn.functional.dropout(y, training=True), "the model is random: two runs on one sample differ in"),
    ],
)
def test_models_without_an_error_to_bound_are_refused(made: Callable[[Tensor, Tensor], Any], said: str) -> None:
    program = torch.export.export(Head(made), (torch.randn(2, 8),))
    with pytest.raises(ConfigError, match=said):
        allocate(program, [torch.randn(2, 8) for _ in range(8)], 1e-2)


def test_a_model_of_16_bits_is_refused() -> None:
    program = torch.export.export(nn.Linear(8, 9).half(), (torch.randn(2, 8).half(),))
    with pytest.raises(ConfigError, match="the model has weights of float16"):
        allocate(program, [torch.randn(2, 8).half() for _ in range(8)], 1e-2)


def test_an_interrupted_allocation_goes_on(block: Captured, tmp_path: Path) -> None:
    found, samples, state = network(block.program, FORMS), sample_data.read(block, drawn(12)), tmp_path / "state.json"
    seen: list[str] = []

    def stop(phase: str, share: float) -> None:
        seen.append(phase)
        if len(seen) == 5:
            raise KeyboardInterrupt

    straight = allocate_captured(block, found, samples, Request(1e-2, ()), GPU)
    with pytest.raises(KeyboardInterrupt):
        allocate_captured(block, found, samples, Request(1e-2, (), state=state), GPU, stop)
    seen.clear()
    again = allocate_captured(
        block, found, samples, Request(1e-2, (), state=state), GPU, lambda phase, share: seen.append(phase)
    )
    assert seen[0].startswith("measure 5 of ")
    assert again == straight
    other = sample_data.read(block, drawn(12, seed=5))
    with pytest.raises(ConfigError, match="is of another model, other samples or other formats; delete it"):
        allocate_captured(block, found, other, Request(1e-2, (), state=state), GPU)
    state.write_text("{}")
    with pytest.raises(ConfigError, match="is no state of an allocation"):
        allocate_captured(block, found, samples, Request(1e-2, (), state=state), GPU)


def test_an_allocation_is_read_as_it_was_written(block: Captured, tmp_path: Path) -> None:
    found = network(block.program, FORMS)
    made = allocate_captured(block, found, sample_data.read(block, drawn(10)), Request(1e-1, ()), GPU)
    made.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json") == made
    for text in ("", "[]", "{}", '{"version": 2}', '{"version": 2, "sites": [{}]}', '{"version": 2, "sites": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.json holds no allocation"):
            Allocation.load(tmp_path / "bad.json")
    (tmp_path / "new.json").write_text('{"version": 99, "sites": []}')
    with pytest.raises(ConfigError, match="of another version"):
        Allocation.load(tmp_path / "new.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Allocation.load(tmp_path / "none.json")


def test_roundings_are_those_of_onnx(tmp_path: Path) -> None:
    x = torch.cat([torch.randn(500) * 10.0**e for e in range(-6, 4)] + [torch.tensor([448.0, 1e4, -1e4, 0.0])])
    for scale in (1.0, 2.0**-7, 4.0):
        nodes = [
            onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            onnx.helper.make_node("DequantizeLinear", ["q", "scale"], ["y"]),
        ]
        float8 = onnx.TensorProto.FLOAT8E4M3FN
        stored = [
            onnx.numpy_helper.from_array(np.float32(scale), "scale"),
            onnx.helper.make_tensor("zero", float8, [], b"\0", raw=True),
        ]
        ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in "xy"]
        graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
        (got,) = in_onnxruntime(model, {"x": x})
        assert torch.equal(torch.from_numpy(got), quantized(x, torch.tensor(scale)))
    assert torch.equal(rounded(x, FP16), x.half().float())
    assert torch.equal(rounded(x.double(), BF16), x.bfloat16().double())
