"""The rule on its edges: plans that may differ and may not, outputs that are missing, metrics of known errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adaattn
from adaattn.errors import ConfigError, TargetError
from adaattn.export.capture.module import capture_module
from adaattn.export.golden import cases
from adaattn.export.golden.eager import EagerReference, array
from adaattn.export.golden.plan_mode import PlanMode, run_eager
from adaattn.export.parity import compare, criterion, golden_case
from adaattn.export.parity.compare import BackendResult
from adaattn.export.parity.golden_case import ExpectedOutput, GoldenCase
from adaattn.export.verification import backends
from adaattn.input_spec import InputSpec

WIDTH, HEADS = 32, 4


class OneLayer:
    """A module with heads at known distances from their limit."""

    def __init__(self, distance: float) -> None:
        torch.manual_seed(9)
        model = adaattn.AdaptivePrecisionAttention(WIDTH, HEADS, tolerance=1e-2).eval()
        specs = [InputSpec(n, (1, 33, WIDTH)) for n in ("query", "key", "value")]
        captured = capture_module(model, specs, {})
        self.case = cases.cases(captured)[0]
        mode = PlanMode(measure=True)
        run_eager(captured.eager, self.case.inputs, mode)
        largest = float(mode.errors[0].predicted[0, 0])
        model.set_tolerance(largest * model.safety * (1 + distance))
        self.captured = capture_module(model, specs, {})
        self.reference = EagerReference(self.captured)
        self.goldens = [self.reference.golden(self.reference.expect(self.case), ["layer"])]

    def eager(self, nudge: float) -> compare.Backend:
        def backend(of: GoldenCase) -> BackendResult:
            mode = PlanMode(perturb_moments=nudge)
            (output, *_) = run_eager(self.captured.eager, self.case.inputs, mode)
            ((precision, rank),) = mode.plans
            return BackendResult({"output": array(output)}, {"layer": (array(precision), array(rank))}, {})

        return backend

    def exact_at(self, of: GoldenCase, plans: Any) -> Any:
        return self.reference.exact_at(self.case, list(plans.values()))


def test_a_head_on_the_edge_of_its_limit_may_differ_and_is_counted() -> None:
    layer = OneLayer(distance=2e-6)
    found = compare.compare(layer.goldens, layer.eager(nudge=4e-6), layer.exact_at)
    assert found["plans"]["differ"] == found["plans"]["excused"] == 1
    assert found["verdict"] == "passed", found["reason"]


def test_without_the_model_such_a_head_leaves_its_case_open() -> None:
    layer = OneLayer(distance=2e-6)
    found = compare.compare(layer.goldens, layer.eager(nudge=4e-6))
    assert found["verdict"] == "not run"
    assert "not compared: 1 plans differ from eager's on the edge" in found["reason"]


def test_a_head_away_from_its_limit_may_not_differ() -> None:
    layer = OneLayer(distance=1e-3)
    found = compare.compare(layer.goldens, layer.eager(nudge=2e-3), layer.exact_at)
    assert found["plans"]["differ"] == 1
    assert found["plans"]["excused"] == 0
    assert found["verdict"] == "failed"
    assert "layer, batch 0, head 0" in found["reason"]


def golden_of_identity(
    precision: str, query: list[float], keys: list[list[float]], dtype: torch.dtype
) -> ExpectedOutput:
    """Return golden cases of attention without projections, whose keys have the mean zero."""
    model = adaattn.AdaptivePrecisionAttention(4, 1, default_precision=precision, bias=False).to(dtype).eval()
    with torch.no_grad():
        for layer in (model.q_proj, model.k_proj, model.v_proj, model.out_proj):
            layer.weight.copy_(torch.eye(4))
    keys = [*keys, *([-x for x in key] for key in keys)]
    given = {"query": [query], "key": keys, "value": torch.eye(len(keys), 4).tolist()}
    inputs = {name: torch.tensor([rows], dtype=dtype) for name, rows in given.items()}
    captured = capture_module(model, [InputSpec(name, tuple(x.shape)) for name, x in inputs.items()], {})
    reference = EagerReference(captured)
    return reference.golden(reference.expect(cases.Case("edge", inputs)), ["layer"]).outputs["output"]


@pytest.mark.parametrize(("gap", "tie"), [(2.0**-6, True), (1.0, False)])
def test_where_two_keys_nearly_tie_the_last_digit_may_decide(gap: float, tie: bool) -> None:
    # Exact in float16, so eager has next to no error; but a rounding of q or k moves scores of 512 by 1/8, and those of
    # the two keys differ by 16 gaps.
    keys = [[32.0, 0, 0, 0], [32 - gap, 0, 0, 0]]
    output = golden_of_identity("fp32", [32.0, 0, 0, 0], keys, torch.float16)
    assert output.eager_error < 5e-4
    assert (output.limit > 1e-2) == tie


@pytest.mark.parametrize(("steps", "edge"), [(10.5, True), (10.7, False), (126.5, True), (-126.5, True)])
def test_where_a_number_is_between_two_integers_it_may_become_either(steps: float, edge: bool) -> None:
    output = golden_of_identity("int8", [1.27, 0.9, 0, 0], [[1.27, steps / 100, 0, 0]], torch.float32)
    assert (output.limit > 4e-4) == edge


@pytest.mark.parametrize(("precision", "least"), [("fp32", 1e-7), ("fp16", 1e-5), ("bf16", 1e-4), ("int8", 8e-5)])
def test_numbers_on_an_edge_of_any_rounding_have_a_share_of_it(precision: str, least: float) -> None:
    output = golden_of_identity(precision, [1.27, 0.9, 0, 0], [[1.27, 0.2, 0, 0]], torch.float32)
    assert least < output.limit < 7 * least
    assert output.eager_error < 1e-6


def test_a_missing_output_and_a_wrong_shape_fail() -> None:
    layer = OneLayer(distance=0.5)
    for outputs in ({}, {"output": np.zeros((1, 2, 3))}):
        found = compare.compare(layer.goldens, lambda of, outputs=outputs: BackendResult(outputs, {}, {}))
        assert found["verdict"] == "failed"
        assert "returns" in found["reason"]


def one(exact: Any, dtype: str = "float32", limit: float = 1e-3, lost: Any = None) -> list[GoldenCase]:
    return [GoldenCase("case", {}, {"y": ExpectedOutput(np.asarray(exact), dtype, 0.0, limit, limit, lost)})]


def of(goldens: list[GoldenCase], got: Any) -> dict[str, Any]:
    (output,) = goldens[0].outputs.values()
    outputs = {"y": np.asarray(got).astype("float32" if output.dtype == "bfloat16" else output.dtype)}
    found = compare.compare(goldens, lambda golden: BackendResult(outputs, {}, {}))
    (row,) = found["outputs"]
    assert found["verdict"] == row["verdict"]
    return row


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 23), ("float16", 10), ("bfloat16", 7)])
def test_metrics_of_an_error_that_is_known(dtype: str, digits: int) -> None:
    exact = np.array([[1.0, 1.5], [2.0, 3.0]])
    step = 2.0**-digits
    row = of(one(exact, dtype, limit=1), exact + np.array([[0, 0], [0, 4 * step]]))
    assert row["ulp"] == pytest.approx([0, 2 * 0.97, 2])  # a step of 2 to 4 is twice that of 1 to 2
    assert row["worst"] == [1, 1]
    assert row["max_abs"] == 4 * step
    assert row["error"] == pytest.approx(4 * step / np.sqrt(np.square(exact).sum()))
    assert row["cosine"] == pytest.approx(1, abs=1e-3)
    assert of(one(exact, dtype), -exact)["cosine"] == pytest.approx(-1)


def test_zeros_huge_and_tiny_numbers_have_errors_too() -> None:
    assert of(one([0.0, 0.0]), [0.0, 0.0])["verdict"] == "passed"
    assert of(one([0.0, 0.0]), [0.0, 1.0])["verdict"] == "failed"
    for scale in (1e-300, 1e300):
        row = of(one(np.array([3.0, 4.0]) * scale, "float64"), np.array([3.0, 4.1]) * scale)
        assert row["error"] == pytest.approx(0.02)
        assert row["verdict"] == "failed"


def test_only_what_eager_lost_may_be_lost() -> None:
    lost = np.array([False, True])
    assert of(one([1.0, 1e9], lost=lost), [1.0, np.inf])["verdict"] == "passed"
    row = of(one([1.0, 1e9], lost=lost), [np.nan, np.inf])
    assert row["reason"] == "1 of 2 elements are NaN or Inf where eager has numbers, first at [0]"
    everything = of(one([1.0, 1e9], lost=np.array([True, True])), [1.0, 1e9])
    assert (everything["verdict"], everything["reason"][:19]) == ("not run", "nothing to compare:")


def test_integers_differ_by_place() -> None:
    assert of(one([3, 4], "int64"), [3, 5])["reason"] == "1 of 2 elements differ from eager's, first at [1]"
    row = of(one([3, 4], "int64", lost=np.array([False, True])), [3, 5])
    assert row["verdict"] == "passed"
    assert row["reason"] == "1 of 2 elements are not compared: a rounding decides them"


def test_fill_values_and_infinities_stand_for_themselves() -> None:
    exact = [1.0, 2.0, -1e9, -np.inf]
    assert of(one(exact), [1.0, 2.0, -1e9, -np.inf])["verdict"] == "passed"
    for got in ([1.0, 2.0, -1e9, np.inf], [1.0, 2.0, -2e9, -np.inf], [1.0, 2.0, np.nan, -np.inf]):
        assert "are not the infinities or fill values" in of(one(exact), got)["reason"]
    assert of(one(exact), [1.0, 2.1, -1e9, -np.inf])["error"] == pytest.approx(0.1 / np.sqrt(5))
    # Of several kinds, and beside nothing but zeros.
    exact = [1.0, 2.0, -1e9, -2e9, -3.4e38]
    assert of(one(exact), exact)["verdict"] == "passed"
    assert of(one(exact), [100.0, -7.0, *exact[2:]])["verdict"] == "failed"
    assert of(one([0.0, 0.0, -1e9]), [500.0, -7.0, -1e9])["verdict"] == "failed"
    # Large numbers with others between, or none beside them, are results like any other.
    assert of(one([1.0, 300.0, 2000.0]), [1.0, 300.0, 2001.0])["verdict"] == "passed"
    assert of(one([5000.0, 5000.0]), [5000.0, 5001.0])["error"] == pytest.approx(1e-4, rel=0.5)
    # The least number of a type is written for -inf, and is another in float64.
    assert of(one([1.0, -1.7e308]), np.array([1.0, -3.4028235e38], np.float32))["verdict"] == "passed"


def test_an_output_has_its_type() -> None:
    for dtype, got in (("float32", np.float64), ("int64", np.float32), ("bool", np.int64), ("float16", np.float32)):
        outputs = {"y": np.ones(3, got)}
        found = compare.compare(one(np.ones(3), dtype), lambda golden, outputs=outputs: BackendResult(outputs, {}, {}))
        assert found["outputs"][0]["reason"] == f"the backend returns {got.__name__}; eager returns {dtype}"


def test_an_output_that_is_never_compared_is_no_success() -> None:
    lost = np.array([True, True])
    outputs = {
        "x": ExpectedOutput(np.ones(2), "float32", 0.0, 1e-3),
        "y": ExpectedOutput(np.ones(2), "int64", 0.0, 0.0, excluded=lost),
    }
    goldens = [GoldenCase(name, {}, outputs) for name in ("one", "other")]
    ran = BackendResult({"x": np.ones(2, np.float32), "y": np.ones(2, np.int64)}, {}, {})
    found = compare.compare(goldens, lambda golden: ran)
    assert (found["verdict"], found["reason"]) == (
        "not run",
        "y (one): nothing to compare: a rounding decides all of it",
    )


def test_a_limit_that_passes_anything_passes_nothing() -> None:
    row = of(one([1.0, 2.0], limit=0.6), [1.0, 2.0])
    assert row["verdict"] == "not run"
    assert "eager PyTorch is too inaccurate itself" in row["reason"]
    row = of(one([1.0, 2.0], limit=0.2), [1.0, 2.0])
    assert (row["verdict"], row["reason"]) == (
        "passed",
        "loose limit 2.0e-01: eager PyTorch in this dtype is that inaccurate",
    )


def test_the_weights_type_counts_as_far_as_eager_errs() -> None:
    for error, floor in ((0.0, 2.0**-24), (1e-7, 1e-7), (1e-4, 1e-4), (1e-1, 4e-3)):
        assert criterion.limit_of(error, "float32", inner="bfloat16") == pytest.approx(2 * error + floor, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8_fp8"])
def test_a_head_that_attends_to_nothing_has_no_loose_limit(precision: str) -> None:
    model = adaattn.AdaptivePrecisionAttention(WIDTH, HEADS, default_precision=precision).eval()
    specs = [
        *(InputSpec(n, (1, 1, WIDTH)) for n in ("query", "key", "value")),
        InputSpec("attention_mask", (1, 1), "bool"),
    ]
    reference = EagerReference(capture_module(model, specs, {}))
    inputs = {spec.name: torch.randn(1, 1, WIDTH) for spec in specs[:3]} | {"attention_mask": torch.zeros(1, 1) > 0}
    output = reference.golden(reference.expect(cases.Case("masked", inputs)), ["layer"]).outputs["output"]
    assert output.limit < 5e-6


def test_heads_have_the_same_metrics_and_lose_no_nan() -> None:
    (golden,) = OneLayer(distance=0.5).goldens
    layer = golden.layers["layer"]
    heads = layer.exact * (1 + np.arange(HEADS).reshape(1, HEADS, 1, 1) * 2.0**-20)
    heads[0, 3, 5, 2] = np.nan
    plans = {"layer": (layer.precision, layer.rank)}
    outputs = {name: x.exact for name, x in golden.outputs.items()}
    rows = compare.compare([golden], lambda of: BackendResult(outputs, plans, {"layer": heads}))["heads"]
    assert [row["error"] for row in rows] == pytest.approx([0, 2**-20, 2**-19, 3 * 2**-20], rel=0.1, abs=1e-12)
    assert rows[1]["ulp"][2] == pytest.approx(2 * 2**3, rel=0.2)  # of float32: 2⁻²³, over numbers of 1 to 2
    assert [row["lost"] for row in rows] == [0, 0, 0, 1]
    assert rows[3]["worst"] == [0, 5, 2]


def test_golden_results_survive_their_file(tmp_path: Path) -> None:
    layer = OneLayer(distance=0.5)
    lost = ExpectedOutput(np.ones(2), "float16", 1e-4, 1e-3, 2e-3, np.array([True, False]))
    for goldens in (layer.goldens, [GoldenCase("case", {"a/b": np.ones(3)}, {"c/d": lost})]):
        golden_case.save(tmp_path / "golden.npz", goldens)
        (loaded,), (given,) = golden_case.load(tmp_path / "golden.npz"), goldens
        np.testing.assert_equal(_plain(loaded), _plain(given))
    (tmp_path / "golden.npz").write_bytes(b"none")
    with pytest.raises(ConfigError, match="holds no golden results"):
        golden_case.load(tmp_path / "golden.npz")


def _plain(of: GoldenCase) -> Any:
    outputs, layers = ({name: vars(x) for name, x in each.items()} for each in (of.outputs, of.layers))
    return [of.name, dict(of.inputs), outputs, layers]


def test_a_file_that_onnxruntime_refuses_is_a_failed_target(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(TargetError, match="ONNX Runtime refuses"):
        backends.onnxruntime_backend(path)
