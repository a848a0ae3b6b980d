"""Golden inputs: what masks mean, whether a fault in one shows, and what a model writes into its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import adaattn
from adaattn.errors import ConfigError
from adaattn.export import Options, export
from adaattn.export.capture.captured import Captured
from adaattn.export.capture.module import capture_module
from adaattn.export.capture.saved_program import capture_program
from adaattn.export.golden import cases
from adaattn.export.golden.eager import EagerReference, array
from adaattn.export.golden.plan_mode import PlanMode, run_eager
from adaattn.export.parity import compare
from adaattn.export.parity.compare import BackendResult
from adaattn.export.verification.verify import verify_export
from adaattn.input_spec import Dimension, InputSpec

DIMS = {"S": Dimension("S", 2, 9, 33), "B": Dimension("B", 1, 3, 4)}


class Masked(nn.Module):
    """Attention over x, and what is made of a mask."""

    def __init__(self, then: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.then = nn.Linear(16, 48), then
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.several = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.linear(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.then(self, x, mask)


def sdpa(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*m.heads(x), attn_mask=mask)


def by_hand(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Attention whose softmax makes NaN of a row that attends to nothing."""
    q, k, v = m.heads(x)
    return (q @ k.mT).masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1) @ v


def pooled(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return (m.linear(x) * mask[..., None]).sum(1) / mask.sum(1)[:, None]


def captured_of(then: Callable[[Any, Tensor, Tensor], Any], text: str, name: str = "mask") -> Captured:
    model = Masked(then).eval()
    if name != "mask":
        namespace: dict[str, Any] = {"Masked": Masked}
        exec(f"class Named(Masked):\n def forward(self, x, {name}): return self.then(self, x, {name})", namespace)
        model = namespace["Named"](then).eval()
    specs = [InputSpec("x", ("B", "S", 16)), InputSpec.parse(name, text)]
    return capture_module(model, specs, {d: DIMS[d] for d in DIMS if any(d in spec.shape for spec in specs)})


# A model, its mask, and what is found: the meaning, and whether a query may attend to nothing.
MEANT: dict[str, tuple[Callable[..., Any], str, str, str, bool]] = {
    "SDPA, boolean": (sdpa, "mask", "B,1,S,S:bool", "attend", True),
    "SDPA, float": (sdpa, "mask", "B,1,S,S", "bias", True),
    "SDPA, bias": (sdpa, "attn_bias", "B,1,1,S", "bias", True),
    "by hand": (by_hand, "mask", "B,S:bool", "attend", False),
    "inverted by hand": (lambda m, x, p: by_hand(m, x, ~p), "mask", "B,S:bool", "masked", False),
    "padding by hand": (lambda m, x, p: by_hand(m, x, ~p), "pad_mask", "B,S:bool", "masked", False),
    "weights of 0 and 1": (pooled, "mask", "B,S", "attend", False),
    "a layer's padding": (
        lambda m, x, p: m.layer(x, src_key_padding_mask=p),
        "src_key_padding_mask",
        "B,S:bool",
        "masked",
        True,
    ),
    "an encoder's padding": (
        lambda m, x, p: m.several(x, src_key_padding_mask=p),
        "src_key_padding_mask",
        "B,S:bool",
        "masked",
        True,
    ),
    "integers": (lambda m, x, p: by_hand(m, x, p.bool()), "attention_mask", "B,S:int64", "attend", False),
}


@pytest.mark.parametrize("name", MEANT)
def test_the_meaning_of_a_mask_is_found_and_said(name: str) -> None:
    then, mask, text, meaning, hides = MEANT[name]
    notes: list[str] = []
    found = cases.settle(captured_of(then, text, mask), notes)
    item = found.inputs[1]
    assert (item.meaning, item.hides) == (meaning, hides)
    assert sum(f"input {mask} is taken as {meaning}" in note for note in notes) == (mask != "attention_mask")
    assert any("always leave a key to attend to" in note for note in notes) != hides
    for case in cases.cases(found):
        (output,) = run_eager(found.eager, case.inputs)
        assert output.isfinite().all(), case.name


@pytest.mark.parametrize("stated", ["attend", "masked", "values"])
def test_what_is_stated_is_not_questioned(stated: str) -> None:
    notes: list[str] = []
    found = cases.settle(captured_of(sdpa, f"B,1,S,S:bool:{stated}"), notes)
    assert found.inputs[1].meaning == stated
    assert notes == []
    shown = {case.name: float(case.inputs["mask"].float().mean()) for case in cases.cases(found)}
    want = {"attend": 0.8, "masked": 0.2, "values": 0.5}[stated]
    assert abs(shown["longest"] - want) < 0.1
    assert stated == "values" or shown["shortest"] == (stated == "attend")


def test_a_program_has_its_masks_found_too() -> None:
    program = captured_of(lambda m, x, p: by_hand(m, x, ~p), "B,S:bool").program
    found = cases.settle(capture_program(program, {}), notes := [])
    assert (found.inputs[1].meaning, found.inputs[1].hides) == ("masked", False)
    assert len(notes) == 2


Inputs = dict[str, Tensor]


def judge(found: Captured) -> Callable[[Callable[[Inputs], Inputs]], str]:
    """Return the verdict on eager PyTorch with a fault in its inputs, which passes without one."""
    reference = EagerReference(found)
    made = {case.name: case for case in cases.cases(found)}
    goldens = [reference.golden(reference.expect(case), []) for case in made.values()]

    def verdict(fault: Callable[[Inputs], Inputs]) -> str:
        def backend(of: Any) -> BackendResult:
            outputs = run_eager(found.eager, fault(dict(made[of.name].inputs)), PlanMode())
            return BackendResult(dict(zip(found.output_names, map(array, outputs), strict=True)), {}, {})

        return str(compare.compare(goldens, backend)["verdict"])

    assert verdict(lambda given: given) == "passed"
    return verdict


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ignored": torch.zeros_like,
    "doubled": lambda b: 2 * b,
    "negated": lambda b: torch.where(b.isinf(), b, -b),
    "1.01 times": lambda b: 1.01 * b,
    "only where it hides": lambda b: torch.where(b.isinf(), b, 0),
    "never hides": lambda b: b.clamp_min(-10),
    "transposed": lambda b: b.mT if b.shape[-1] == b.shape[-2] else b.flip(-1),
    "shifted": lambda b: b.roll(1, -1),
}


@pytest.mark.parametrize("text", ["B,1,S,S", "B,1,1,S", "S,S", "B,1,S,S:float32:bias"])
def test_a_fault_in_a_bias_shows(text: str) -> None:
    verdict = judge(cases.settle(captured_of(sdpa, text, "attn_bias"), []))
    passed = [
        name
        for name, fault in FAULTS.items()
        if verdict(lambda given, fault=fault: given | {"attn_bias": fault(given["attn_bias"])}) != "failed"
    ]
    assert not passed


@pytest.mark.parametrize("then", [sdpa, by_hand])
def test_a_fault_in_a_boolean_mask_shows(then: Callable[..., Any]) -> None:
    verdict = judge(cases.settle(captured_of(then, "B,1,1,S:bool" if then is sdpa else "B,S:bool"), []))
    for fault in (torch.ones_like, lambda b: ~b, lambda b: b.roll(1, -1)):
        assert verdict(lambda given, fault=fault: given | {"mask": fault(given["mask"])}) == "failed"


def test_integers_clipped_in_a_backend_show() -> None:
    model = nn.Embedding(100, 8).eval()
    verdict = judge(capture_module(model, [InputSpec("input", ("B", "S"), "int64")], {"S": DIMS["S"]}))
    for top in (40, 98):
        assert verdict(lambda given, top=top: {"input": given["input"].clamp(max=top)}) == "failed"


class Timestep(nn.Module):
    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        return x * steps.float().sin()[:, None]


@pytest.mark.parametrize("saved", [False, True], ids=["module", "program"])
def test_an_export_whose_integers_have_no_range_is_not_passed(saved: bool, tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"x": "2,4", "steps": "2:int64"}
    model: Any = Timestep()
    if saved:
        model = torch.export.export(model, (torch.ones(2, 4), torch.tensor([0, 3])))
        inputs = {}
    options = Options(("onnx",))
    report = export(model, inputs, tmp_path / "out", options=options).report
    (target,) = report["targets"]
    assert (report["verdict"], target["verdict"]) == ("not run", "not run")
    assert target["reason"].startswith("input steps: only integers below ")
    assert target["reason"].endswith("give their range, as in --input steps=2:int64<512")
    assert verify_export(tmp_path / "out", ["ort-cpu"])["verdict"] != "passed"
    ranged = export(model, inputs | {"steps": "2:int64<1000"}, tmp_path / "ranged", options=options)
    assert ranged.passed, ranged.report["targets"]


def test_what_is_said_of_a_programs_inputs_must_be_theirs(tmp_path: Path) -> None:
    program = torch.export.export(Timestep(), (torch.ones(2, 4), torch.tensor([0, 3])))
    for name, text, message in (
        ("step", "2:int64<9", "the program has no input 'step'; it takes x, steps"),
        ("steps", "3:int64<9", "is not what the program takes, steps=2:int64"),
        ("steps", "2:int32<9", "is not what the program takes, steps=2:int64"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(program, {name: text}, tmp_path / "out", options=Options(("onnx",)))


class Cache(nn.Module):
    """A step of decoding: keys are written into a cache."""

    def __init__(self, returns: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.returns = nn.Linear(8, 8), returns

    def forward(self, x: Tensor, places: Tensor, cache: Tensor) -> Any:
        cache.index_copy_(1, places, self.linear(x))
        scores = x @ cache.mT
        return (scores, cache) if self.returns else scores


@pytest.mark.parametrize("kind", ["module", "program", "decomposed", "returned"])
def test_what_is_written_into_an_input_is_an_output(kind: str, tmp_path: Path) -> None:
    model: Any = Cache(returns=kind == "returned").eval()
    inputs = {"x": "2,3,8", "places": "3:int64", "cache": "2,20,8"}
    if kind in ("program", "decomposed"):
        model = torch.export.export(model, (torch.ones(2, 3, 8), torch.arange(3), torch.zeros(2, 20, 8)))
        model, inputs = model.run_decompositions() if kind == "decomposed" else model, {}
    made = export(model, inputs, tmp_path / "out", options=Options(("onnx",)))
    assert made.passed, made.report["targets"]
    names = ["output_0", "output_1"] if kind == "returned" else ["output", "cache_out"]
    assert {row["name"] for row in made.report["targets"][0]["outputs"]} == set(names)
    path = tmp_path / "out" / "model.onnx"
    graph = onnx.load(path)
    assert [x.name for x in graph.graph.output] == names
    # A file whose update is another one fails, and so does one that scores by it.
    for weight in graph.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.shape == (8,):
            weight.CopyFrom(numpy_helper.from_array(values + 1e-3, weight.name))
    onnx.save(graph, path)
    (target,) = verify_export(tmp_path / "out", ["ort-cpu"])["targets"]
    assert {row["name"] for row in target["outputs"] if row["verdict"] == "failed"} == set(names)


class Kept(nn.Module):
    """Adaptive attention over the sequences that are kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.attention = adaattn.AdaptiveAttention(16, 2, tolerance=1e-2)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        kept = x[keep]
        return self.attention(kept, kept, kept)


def test_where_nothing_is_kept_there_is_nothing_to_err(tmp_path: Path) -> None:
    specs = [InputSpec("x", ("B", "S", 16)), InputSpec("keep", ("B",), "bool")]
    found = cases.settle(capture_module(Kept().eval(), specs, DIMS), [])
    (hidden,) = [case for case in cases.cases(found) if case.name == "hidden"]
    assert not hidden.inputs["keep"].any()
    reference = EagerReference(found)
    want = reference.golden(reference.expect(hidden), ["attention"])
    assert want.outputs["output"].exact.shape == (0, 9, 16)
    assert want.outputs["output"].limit < 1e-5
    judge(found)


@pytest.mark.parametrize("meaning", ["attend", "masked", "bias"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 7), (3, 7), (1, 1, 1, 7), (2, 1, 5, 7), (0, 4)], ids=str)
def test_masks_of_every_shape_have_values(shape: tuple[int, ...], meaning: str) -> None:
    specs = [InputSpec("x", ("B", "S", 16)), InputSpec("mask", tuple(max(size, 1) for size in shape))]
    found = capture_module(Masked(lambda m, x, mask: x + mask.sum()).eval(), specs, DIMS)
    item = replace(found.inputs[1], shape=shape, meaning=meaning)
    for hides in (True, False):
        for case in ("shortest", "odd", "outliers", "longest", "hidden"):
            mask = cases._values(replace(item, hides=hides), {}, case, torch.Generator().manual_seed(1))
            assert mask.shape == shape
            shown = mask > -torch.inf if meaning == "bias" else (mask == 1) == (meaning == "attend")
            if not hides and mask.numel():
                assert shown.any(-1).all() if shape else shown
