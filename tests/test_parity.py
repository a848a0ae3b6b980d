"""The harness must fail what is wrong: faults planted in exported files, and the rule on its edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

import adaattn
from adaattn.errors import TargetError
from adaattn.export import Options, backends, export, golden, parity
from adaattn.export.capture import Captured, capture_module
from adaattn.export.golden import Case
from adaattn.export.yardstick import PlanMode, PlanPair, run
from adaattn.input_spec import Dimension, InputSpec

WIDTH, HEADS = 32, 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, parity.Reference, list[parity.Expected]]:
    """An export, and what eager says of it."""
    torch.manual_seed(8)
    model = adaattn.Encoder(WIDTH, HEADS, ("adaptive_precision", "adaptive"), causal=True).eval()
    folder = tmp_path_factory.mktemp("parity") / "out"
    options = Options(("onnx",), emit_plan=True, verify=False)
    export(model, {"x": f"B,S,{WIDTH}"}, folder, dims={"S": "1:33:48"}, options=options)
    dims = {"B": Dimension("B", 1, 1, 8), "S": Dimension("S", 1, 33, 48)}
    captured = capture_module(model, [InputSpec("x", ("B", "S", WIDTH))], dims)
    reference = parity.Reference(captured)
    return folder / "model.onnx", reference, [reference.expect(case) for case in golden.cases(captured)]


PLANS = [(f"stack.{i}.attention.precision", f"stack.{i}.attention.rank") for i in (0, 1)]


def verdict(path: Path, reference: parity.Reference, expected: list[parity.Expected]) -> Mapping[str, object]:
    return parity.compare(reference, expected, backends.onnxruntime_backend(path, PLANS))


def attention(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "adaptive_attention")


def scale_off(model: onnx.ModelProto) -> None:
    next(a for a in attention(model).attribute if a.name == "scale").f *= 1.01


def causal_off(model: onnx.ModelProto) -> None:
    next(a for a in attention(model).attribute if a.name == "is_causal").i = 0


def rank_halved(model: onnx.ModelProto) -> None:
    node = attention(model)
    divisor = numpy_helper.from_array(np.array([[1, 2, 1, 1]], np.int32), "divisor")
    model.graph.initializer.append(divisor)
    half = onnx.helper.make_node("Div", [node.input[6], "divisor"], ["halved"])
    index = list(model.graph.node).index(node)
    node.input[6] = "halved"
    model.graph.node.insert(index, half)


def keys_and_values_swapped(model: onnx.ModelProto) -> None:
    node = attention(model)
    node.input[1], node.input[2] = node.input[2], node.input[1]


def heads_transposed(model: onnx.ModelProto) -> None:
    node = attention(model)
    after = next(n for n in model.graph.node if node.output[0] in n.input)
    axes = next(a for a in after.attribute if a.name == "perm")
    assert list(axes.ints) == [0, 2, 1, 3]
    flip = onnx.helper.make_node("Gather", [node.output[0], "reverse"], ["flipped"], axis=1)
    model.graph.initializer.append(numpy_helper.from_array(np.array([3, 2, 1, 0]), "reverse"))
    after.input[0] = "flipped"
    model.graph.node.insert(list(model.graph.node).index(after), flip)


def keys_not_centred(model: onnx.ModelProto) -> None:
    """Keys far from zero, and a mean of zero: exact in exact arithmetic, poor in int8."""
    node = attention(model)
    far = numpy_helper.from_array(np.array(30.0, np.float32), "far")
    model.graph.initializer.append(far)
    shifted = onnx.helper.make_node("Add", [node.input[1], "far"], ["shifted"])
    model.graph.node.insert(list(model.graph.node).index(node), shifted)
    node.input[1] = "shifted"


def weight_stale(model: onnx.ModelProto) -> None:
    weight = next(x for x in model.graph.initializer if x.name.endswith("v_proj.bias"))
    array = numpy_helper.to_array(weight) + 0.05
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def overflow(model: onnx.ModelProto) -> None:
    node = model.graph.node[-1]
    big = numpy_helper.from_array(np.array(3e38, np.float32), "big")
    model.graph.initializer.append(big)
    first = next(n for n in model.graph.node if n.output[0] == "output")
    first.output[0] = "output_before"
    blown = onnx.helper.make_node("Mul", ["output_before", "big"], ["blown"])
    back = onnx.helper.make_node("Div", ["blown", "big"], ["output"])
    model.graph.node.extend([blown, back])
    assert node is not None


FAULTS: dict[Callable[[onnx.ModelProto], None], str] = {
    scale_off: "over the limit",
    causal_off: "over the limit",
    rank_halved: "over the limit",  # behind the plan that the graph shows
    keys_and_values_swapped: "over the limit",
    heads_transposed: "over the limit",
    keys_not_centred: "over the limit",
    weight_stale: "over the limit",
    overflow: "NaN or Inf",
}


def test_the_file_as_exported_passes(exported: tuple[Path, parity.Reference, list[parity.Expected]]) -> None:
    found = verdict(*exported)
    assert found["verdict"] == "passed", found["reason"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_fails(
    fault: Callable[[onnx.ModelProto], None],
    exported: tuple[Path, parity.Reference, list[parity.Expected]],
    tmp_path: Path,
) -> None:
    path, reference, expected = exported
    model = onnx.load(path)
    fault(model)
    broken = tmp_path / "broken.onnx"
    onnx.save(model, broken)
    found = verdict(broken, reference, expected)
    assert found["verdict"] == "failed"
    assert FAULTS[fault] in str(found["reason"])


def eager_backend(captured: Captured, nudge: float = 0.0) -> parity.Backend:
    def backend(case: Case) -> tuple[Mapping[str, Tensor], Sequence[PlanPair] | None]:
        mode = PlanMode(nudge=nudge)
        outputs = run(captured.eager, case.inputs, mode)
        return {"output": outputs[0]}, mode.plans

    return backend


class OneLayer:
    """A module with heads at known distances from their limit."""

    def __init__(self, distance: float) -> None:
        torch.manual_seed(9)
        model = adaattn.AdaptivePrecisionAttention(WIDTH, HEADS, tolerance=1e-2).eval()
        specs = [InputSpec(n, (1, 33, WIDTH)) for n in ("query", "key", "value")]
        captured = capture_module(model, specs, {})
        case = golden.cases(captured)[0]
        mode = PlanMode(measure=True)
        run(captured.eager, case.inputs, mode)
        largest = float(mode.errors[0].predicted[0, 0])
        model.set_tolerance(largest * model.safety * (1 + distance))
        self.captured = capture_module(model, specs, {})
        self.reference = parity.Reference(self.captured)
        self.expected = [self.reference.expect(case)]


def test_a_head_on_the_edge_of_its_limit_may_differ_and_is_counted() -> None:
    layer = OneLayer(distance=2e-6)
    found = parity.compare(layer.reference, layer.expected, eager_backend(layer.captured, nudge=4e-6))
    assert found["plans"]["differ"] == found["plans"]["excused"] == 1
    assert found["verdict"] == "passed", found["reason"]


def test_a_head_away_from_its_limit_may_not_differ() -> None:
    layer = OneLayer(distance=1e-3)
    found = parity.compare(layer.reference, layer.expected, eager_backend(layer.captured, nudge=2e-3))
    assert found["plans"]["differ"] == 1
    assert found["plans"]["excused"] == 0
    assert found["verdict"] == "failed"
    assert "head 0" in found["reason"]


def test_a_missing_output_and_a_wrong_shape_fail() -> None:
    layer = OneLayer(distance=0.5)
    for outputs in ({}, {"output": torch.zeros(1, 2, 3)}):
        found = parity.compare(layer.reference, layer.expected, lambda case, outputs=outputs: (outputs, None))
        assert found["verdict"] == "failed"
        assert "returns" in found["reason"]


def test_a_file_that_onnxruntime_refuses_is_a_failed_target(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(TargetError, match="ONNX Runtime refuses"):
        backends.onnxruntime_backend(path, [])
