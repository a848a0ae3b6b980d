"""What goes wrong in practice, planted in exported files: each must fail parity, and be traced to where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import adaattn
from adaattn.export import Options, export
from adaattn.export.bisect import bisect
from adaattn.export.verify import check

WIDTH, HEADS = 32, 4
SIZES = {"S": "1:33:48"}
Edit = Callable[[onnx.ModelProto], None]


def exported(folder: Path, name: str) -> Path:
    torch.manual_seed(8)
    inputs, layers = {"x": f"B,S,{WIDTH}", "attention_mask": "B,S:bool"}, ("adaptive_precision", "adaptive")
    if name == "dense":
        model, options = adaattn.DenseAttention(WIDTH, HEADS, causal=True), Options(("onnx",), opset=22)
        inputs = dict.fromkeys(("query", "key", "value"), f"B,S,{WIDTH}")
    elif name == "half":
        model, options = adaattn.Encoder(WIDTH, HEADS, layers), Options(("onnx",), dtype="float16")
    else:
        if name == "other weights":
            torch.manual_seed(9)
        model = adaattn.Encoder(WIDTH, HEADS, layers, causal=True)
        options = Options(("onnx",), external_data_threshold=0)
    made = export(model.eval(), inputs, folder / name.replace(" ", "_"), dims=SIZES, options=options)
    assert made.passed, made.report["targets"]
    return made.directory


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an export, made on first use."""
    folder, made = tmp_path_factory.mktemp("exports"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in made:
            made[name] = exported(folder, name)
        return made[name]

    return get


def attention(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type.startswith("adaptive_attention"))


def constant(model: onnx.ModelProto, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def before(model: onnx.ModelProto, node: onnx.NodeProto, place: int, op: str, *more: str, **attributes: Any) -> None:
    """Put an operator between a node and one of its inputs."""
    new = onnx.helper.make_node(op, [node.input[place], *more], [f"planted_{op}"], **attributes)
    model.graph.node.insert(list(model.graph.node).index(node), new)
    node.input[place] = new.output[0]


def scale_off(model: onnx.ModelProto) -> None:
    next(a for a in attention(model).attribute if a.name == "scale").f *= 1.01


def causal_off(model: onnx.ModelProto) -> None:
    next(a for a in attention(model).attribute if a.name == "is_causal").i = 0


def causal_shifted(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "LessOrEqual")  # keys and queries
    before(model, node, 1, "Add", constant(model, "one", np.int64(1)))


def rank_halved(model: onnx.ModelProto) -> None:
    """Behind the plan that the graph shows: nothing but the numbers tells."""
    node = attention(model)
    before(model, node, 0, "Mul", constant(model, "half", np.repeat([1, 0], WIDTH // HEADS // 2).astype(np.float32)))


def key_mean_lost(model: onnx.ModelProto) -> None:
    """Keys far from zero that nobody centres: right in exact arithmetic, poor in int8."""
    node = attention(model)
    before(model, node, 1, "Add", constant(model, "far", np.float32(30)))


def mask_inverted(model: onnx.ModelProto) -> None:
    before(model, attention(model), 7, "Not")


def heads_transposed(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if attention(model).output[0] in node.input)
    before(model, node, 0, "Gather", constant(model, "reverse", np.arange(HEADS)[::-1].copy()), axis=1)


def keys_and_values_swapped(model: onnx.ModelProto) -> None:
    node = attention(model)
    node.input[1], node.input[2] = node.input[2], node.input[1]


def overflow(model: onnx.ModelProto) -> None:
    """What float16 does to a large intermediate that a careless kernel has and eager has not."""
    node = attention(model)
    big = constant(model, "big", np.float16(60000))
    before(model, node, 2, "Div", big)
    before(model, node, 2, "Mul", constant(model, "tiny", np.float16(6e-8)))


def opset_downgraded(model: onnx.ModelProto) -> None:
    next(opset for opset in model.opset_import if opset.domain == "").version = 17


@dataclass(frozen=True)
class Fault:
    edit: Edit
    base: str = "planned"
    said: str = "over the limit"
    departs: str | None = "adaptive_attention"


FAULTS = [
    Fault(scale_off),
    Fault(causal_off),
    Fault(causal_shifted, base="dense", departs="scaled_dot_product_attention"),
    Fault(rank_halved),
    Fault(key_mean_lost),
    Fault(mask_inverted),
    Fault(heads_transposed, departs="transpose_3"),
    Fault(keys_and_values_swapped),
    Fault(overflow, base="half"),
    Fault(opset_downgraded, said="ONNX Runtime refuses ", departs=None),
]


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def failed(folder: Path, said: str) -> dict[str, Any]:
    report = check(folder, ["ort-cpu"])
    (target,) = report["targets"]
    assert (report["verdict"], target["verdict"]) == ("failed", "failed")
    assert said in target["reason"]
    return report


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.edit.__name__)
def test_a_planted_fault_fails_and_is_found(fault: Fault, exports: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(exports(fault.base), tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    fault.edit(model)
    onnx.save(model, folder / "model.onnx")
    report = failed(folder, fault.said)
    assert report["warnings"] == ["model.onnx is not the file that was exported"]
    if fault.departs is None:
        return
    assert report["targets"][0]["reason"].startswith("output (")  # the output that is wrong
    departure = bisect(folder)
    assert departure is not None
    assert departure.value == fault.departs
    assert not departure.error <= departure.limit
    # What departs is a model of its own, with the planted node in it.
    onnx.checker.check_model(departure.model)
    names = [value.name for value in departure.model.graph.output]
    assert names == [fault.departs]
    assert len(departure.nodes) == len(departure.model.graph.node)


def test_weights_of_another_model_fail(exports: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(exports("planned"), tmp_path)
    shutil.copy(exports("other weights") / "model.onnx.data", folder)
    report = failed(folder, "output (")
    assert report["warnings"] == ["model.onnx.data is not the file that was exported"]
    departure = bisect(folder)
    assert departure is not None
    assert departure.value == "layer_norm" or departure.value.startswith("linear")


def test_a_plan_that_the_graph_shows_wrong_fails(exports: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(exports("planned"), tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    before(model, attention(model), 6, "Min", constant(model, "four", np.int32(4)))
    onnx.save(model, folder / "model.onnx")
    failed(folder, "stack.0.attention, batch 0, head ")


@pytest.mark.parametrize("base", ["planned", "dense", "half"])
def test_the_files_as_exported_pass(base: str, exports: Callable[[str], Path]) -> None:
    folder = exports(base)
    report = check(folder, ["ort-cpu"])
    assert report["warnings"] == []
    then = json.loads((folder / "report.json").read_text())
    keys = ("verdict", "outputs", "heads", "histogram", "plans")
    assert [report["targets"][0][key] for key in keys] == [then["targets"][0][key] for key in keys]
    assert bisect(folder) is None
