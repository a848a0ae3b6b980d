"""A real sentence encoder from its folder to artifacts: calibrated, exported, verified, and judged by its task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adaattn.export.engines import options as engine_options
from benchmarks.minilm import EXPORTED, TOLERANCES, agreement, measure
from benchmarks.sentences import calibration_text, judged_text
from tests.support import oracle


@pytest.mark.thorough  # tests/export/sources/test_huggingface.py exports it
@pytest.mark.parametrize(
    ("sentences", "tolerances"),
    [(48, (EXPORTED,)), pytest.param(240, TOLERANCES, marks=pytest.mark.thorough)],
    ids=["some", "all"],
)
def test_minilm_end_to_end(sentences: int, tolerances: tuple[float, ...], minilm: Path) -> None:
    found = measure(minilm, tolerances, sentences, ("adaattn",))
    assert found["sentences"] >= sentences
    for row in found["rows"]:
        tolerance = row["tolerance"]
        # The promise is made of heads with enough queries to average over; sentences of a dozen tokens have few.
        assert row["heads_over"] < 0.05
        assert row["worst_head"] < oracle.MODEL * tolerance
        assert row["error"] < tolerance
        assert row["least_cosine"] > 1 - tolerance**2  # twice what an error of it turns a vector by
        assert row["spearman"] > 1 - 10 * tolerance**2
        assert sum(row["precision"].values()) == pytest.approx(1)
    as_it_is = next(row for row in found["rows"] if row["tolerance"] == EXPORTED and not row["calibrated"])
    assert as_it_is["precision"]["int8"] > 0.3
    assert 0 < as_it_is["saved"] < 1
    assert found["exported"]["onnx"]["verdict"] == "passed", found["exported"]
    if engine_options.installed("tensorrt-rtx"):
        assert found["exported"]["tensorrt-rtx"]["verdict"] in ("passed", "not run"), found["exported"]


def test_agreement_of_embeddings() -> None:
    random = np.random.default_rng(0)
    want = random.standard_normal((20, 8))
    same = agreement(want, want)
    assert (same["error"], same["spearman"]) == (0, pytest.approx(1))
    assert same["cosine"] == pytest.approx(1)
    turned = agreement(want @ np.linalg.qr(random.standard_normal((8, 8)))[0], want)
    assert turned["spearman"] == pytest.approx(1)  # a rotation moves all and ranks the same
    assert turned["error"] > 0.5
    assert abs(agreement(random.standard_normal((20, 8)), want)["spearman"]) < 0.5


def test_sentences_are_many_and_none_twice() -> None:
    judged, calibration = set(judged_text()), set(calibration_text())
    assert len(judged) == len(judged_text()) == len(calibration) == len(calibration_text()) == 240
    assert not judged & calibration
