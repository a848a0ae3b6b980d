"""What goes wrong in practice, planted in exported files: each must fail parity, and be traced to where it is."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from adaattn.export.parity import golden_case, metrics
from adaattn.export.verification import backends
from adaattn.export.verification.bisect import bisect
from adaattn.export.verification.verify import verify_export
from tests.parity import planted_faults
from tests.parity.planted_faults import Fault, attention, before, constant

FAULTS = list(planted_faults.faults())
# Every fourth is like one beside it; --thorough plants them too.
CHOSEN = [pytest.param(x, marks=pytest.mark.thorough) if at % 4 == 3 else x for at, x in enumerate(FAULTS)]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of an export, made on first use."""
    folder, made = tmp_path_factory.mktemp("exports"), dict[str, Path]()

    def get(base: str) -> Path:
        if base not in made:
            made[base] = planted_faults.make(base, folder)
        return made[base]

    return get


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def failed(folder: Path, said: str) -> dict[str, Any]:
    report = verify_export(folder, ["ort-cpu"])
    (target,) = report["targets"]
    assert (report["verdict"], target["verdict"]) == ("failed", "failed"), target["compared"]
    assert said in target["reason"]
    return report


def first_known(model: onnx.ModelProto, value: str, known: set[str]) -> set[str]:
    """Return the values that a trace knows nearest below a node, by one of its outputs."""
    made = {name for node in model.graph.node if value in node.output for name in node.output}
    if made & known:
        return made
    below = [name for node in model.graph.node if value in node.input for name in node.output]
    return set().union(*(first_known(model, name, known) for name in below))


def test_there_are_enough_of_them() -> None:
    assert len(FAULTS) >= 50
    assert len({fault.base for fault in FAULTS}) >= 6
    assert len({str(fault) for fault in FAULTS}) == len(FAULTS)
    assert sum(fault.traced for fault in FAULTS) >= 0.9 * len(FAULTS)


@pytest.mark.parametrize("fault", CHOSEN, ids=str)
def test_a_planted_fault_fails_and_is_found(fault: Fault, exports: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(exports(fault.base), tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    value = fault.edit(model, folder)
    onnx.save(model, folder / "model.onnx")
    report = failed(folder, "" if value else "ONNX Runtime refuses ")
    assert report["warnings"] == ["model.onnx is not the file that was exported"]
    if not value:
        return
    departure = bisect(folder)
    if not fault.traced:
        assert departure is None
        return
    assert departure is not None
    known = set().union(*(trace.outputs for trace in golden_case.load(folder / "trace.npz")))
    assert departure.value in first_known(model, value, known)
    assert not departure.error <= departure.limit
    # What departs is a model of its own, with the planted node in it.
    onnx.checker.check_model(departure.model)
    assert [output.name for output in departure.model.graph.output] == [departure.value]
    assert len(departure.nodes) == len(departure.model.graph.node)


@pytest.mark.parametrize("base", ["encoder", "ids", pytest.param("dense", marks=pytest.mark.thorough)])
def test_a_thousandth_of_any_number_fails_where_it_moves_the_output(
    base: str, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    """By four times eager's own error in any case that runs with all plans at fp32, or without plans."""
    folder = copied(exports(base), tmp_path)
    goldens = golden_case.load(folder / "golden.npz")
    planned = {case.case for case in goldens if case.forced == "fp32"}
    cases = [case for case in goldens if case.forced == "fp32" or (case.whole and case.case not in planned)]
    whole = onnx.load(folder / "model.onnx")
    before = {case.name: _outputs(folder, case) for case in cases}
    generator, moved = random.Random(3), 0
    floats = [x for x in whole.graph.initializer if x.data_type == onnx.TensorProto.FLOAT and len(x.raw_data) > 64]
    for weight in generator.sample(floats, 4):
        model = onnx.load(folder / "model.onnx")
        (found,) = [x for x in model.graph.initializer if x.name == weight.name]
        value = numpy_helper.to_array(found).copy()
        value.flat[generator.randrange(value.size)] *= 1.001
        found.CopyFrom(numpy_helper.from_array(value, found.name))
        changed = tmp_path / "changed"
        shutil.copytree(folder, changed)
        onnx.save(model, changed / "model.onnx")
        moves = []
        for case in cases:
            for name, x in _outputs(changed, case).items():
                was, output = before[case.name][name], case.outputs[name]
                share = metrics.relative_error(np.abs(x.astype(np.float64) - was), output.exact)
                moves.append(share / output.eager_error)
        if max(moves) > 4:
            moved += 1
            failed(changed, "over the limit")
        shutil.rmtree(changed)
    assert moved >= 2


def _outputs(folder: Path, case: golden_case.GoldenCase) -> dict[str, np.ndarray]:
    return dict(backends.onnxruntime_backend(folder / "model.onnx")(case).outputs)


def test_weights_of_another_model_fail(exports: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(exports("encoder"), tmp_path)
    shutil.copy(exports("other weights") / "model.onnx.data", folder)
    report = failed(folder, "output (")
    assert report["warnings"] == ["model.onnx.data is not the file that was exported"]
    departure = bisect(folder)
    assert departure is not None
    assert departure.value == "layer_norm" or departure.value.startswith("linear")


def test_a_plan_that_the_graph_shows_wrong_fails(exports: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(exports("encoder"), tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    before(model, attention(model), 6, "Min", constant(model, "four", np.int32(4)))
    onnx.save(model, folder / "model.onnx")
    failed(folder, "stack.0.attention, batch 0, head ")


@pytest.mark.parametrize("base", ["encoder", "dense", "half"])
def test_the_files_as_exported_pass(base: str, exports: Callable[[str], Path]) -> None:
    folder = exports(base)
    report = verify_export(folder, ["ort-cpu"])
    assert report["warnings"] == []
    then = json.loads((folder / "report.json").read_text())
    keys = ("verdict", "outputs", "heads", "histogram", "plans", "compared")
    assert [report["targets"][0][key] for key in keys] == [then["targets"][0][key] for key in keys]
    assert bisect(folder) is None
