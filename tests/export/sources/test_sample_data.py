"""`--samples`: sample data from files and functions, through the command, into the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import adaattn
from adaattn.calibration.projections import QueryKeyProjections, find_projections
from adaattn.errors import ConfigError
from adaattn.export.sources.sample_data import BATCH, batches
from adaattn.integrations.transformers import register
from tests.support import architectures
from tests.support.cli import refused, run

QUICK = ("-q", "--target", "onnx")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def correlated(*shape: int) -> np.ndarray:
    """Tokens that vary in few directions, as those of trained models do."""
    random = np.random.default_rng(1)
    width = shape[-1]
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
    return (random.standard_normal(shape) * 2.0 ** -np.arange(width) @ basis).astype(np.float32)


def model() -> None:
    torch.manual_seed(0)
    adaattn.save(adaattn.Encoder(32, 2, ("adaptive", "dense")), "model.pt")


def test_an_array_of_samples_calibrates_and_the_report_says_what_it_did() -> None:
    model()
    np.savez("samples.npz", x=correlated(40, 20, 32))
    state = ("--state", "state.pt")
    result = run("model.pt", "-q", "--target", "onnx", "--balance", "--samples", "samples.npz", *state, "-o", "out")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("out/report.json").read_text())
    found = report["calibration"]
    assert (found["batches"], Path("state.pt").is_file()) == (3, True)
    (layer,) = found["layers"]
    assert layer["name"] == "stack.0.attention"
    assert layer["tokens"] == 800
    before, after = layer["ranks"]
    assert after < before
    assert len(layer["beyond"][0]) == 16
    assert layer["beyond"][1][4] < layer["beyond"][0][4]
    assert found["refused"] == {"stack.1.attention": "it never cuts the rank, so no basis makes it cheaper"}
    assert "Rank before" in Path("out/report.html").read_text()


def test_functions_make_batches_too() -> None:
    model()
    Path("mine.py").write_text(
        "import torch\n\ndef batches():\n    return (torch.randn(2, 9, 32) for _ in range(3))\n\nother = batches\n"
    )
    for source in ("mine.py", "mine:other"):
        assert [x.shape for x in batches(source)] == [(2, 9, 32)] * 3
    result = run("model.pt", *QUICK, "--no-verify", "--balance", "--samples", "mine:other", "-o", "out")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("out/report.json").read_text())["calibration"]["batches"] == 3


def test_arrays_come_some_samples_at_a_time() -> None:
    np.savez("samples.npz", ids=np.arange(2 * BATCH + 3), x=np.zeros((2 * BATCH + 3, 4)))
    assert [len(batch["ids"]) for batch in batches("samples.npz")] == [BATCH, BATCH, 3]


def test_what_is_no_sample_data_is_refused() -> None:
    model()
    np.savez("uneven.npz", x=np.zeros((3, 2)), y=np.zeros((4, 2)))
    np.savez("empty.npz", x=np.zeros((0, 2)))
    Path("broken.py").write_text("def batches():\n    raise RuntimeError('no data')\n")
    Path("none.py").write_text("def batches():\n    pass\n")
    Path("nothing.py").write_text("")
    Path("ends.py").write_text("import sys\nsys.exit(0)\n")
    Path("stops.py").write_text("import sys\n\ndef batches():\n    sys.exit(0)\n")
    Path("syntax.py").write_text("def batches(:\n")
    Path("text.npz").write_text("no archive")
    Path("cut.npz").write_bytes(Path("uneven.npz").read_bytes()[:300])
    np.save("one.npy", np.zeros(3))
    Path("one.npy").rename("one.npz")
    for source, said in (
        ("ends.py", "fails: SystemExit: it ends the program"),
        ("stops.py", "fails: SystemExit: it ends the program"),
        ("syntax.py", "fails: SyntaxError"),
        ("text.npz", "cannot be read"),
        ("cut.npz", "cannot be read"),
        ("one.npz", "cannot be read"),
        ("missing.npz", "cannot be read"),
        ("uneven.npz", "as many samples of each input, and at least one; it has x 3, y 4"),
        ("empty.npz", "it has x 0"),
        ("missing.py", "does not exist"),
        ("nothing.py", "has no function batches"),
        ("broken.py", "fails: RuntimeError: no data"),
        ("none.py", "returns a NoneType; it must yield batches"),
        ("data", "'data' is not sample data"),
        ("nowhere.module:data", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=said):
            batches(source)
        refused(run("model.pt", *QUICK, "--balance", "--samples", source), said)
    refused(run("model.pt", *QUICK, "--state", "x"), "state apply only with samples")
    adaattn.save(adaattn.DenseAttention(32, 2), "dense.pt")
    Path("some.py").write_text("import torch\n\ndef batches():\n    return [[torch.ones(1, 3, 32)] * 3]\n")
    refused(run("dense.pt", *QUICK, "--balance", "--samples", "some.py"), "no attention to calibrate: it never cuts")


def test_data_that_fail_on_the_way_are_told_apart_from_the_model() -> None:
    model()
    Path("late.py").write_text(
        "import sys\n\ndef batches():\n    yield [__import__('torch').ones(1, 3, 32)]\n    sys.exit(0)\n"
    )
    refused(
        run("model.pt", *QUICK, "--balance", "--samples", "late.py"), "late.py fails: SystemExit: it ends the program"
    )
    np.savez("names.npz", ids=correlated(4, 20, 32))
    refused(
        run("model.pt", *QUICK, "--balance", "--samples", "names.npz"),
        "the model fails on the sample data: TypeError: ",
    )


def test_a_file_finds_the_modules_beside_it() -> None:
    Path("data").mkdir()
    Path("data/samples_helper.py").write_text("SHAPE = (2, 9, 32)\n")
    Path("data/mine.py").write_text(
        "import torch\nfrom samples_helper import SHAPE\n\ndef batches():\n    return [torch.ones(SHAPE)]\n"
    )
    assert [x.shape for x in batches("data/mine.py")] == [(2, 9, 32)]


ROTARY, SHARED = "rotary embedding turns", "share a projection"


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_models_of_transformers_are_calibrated_exactly_or_refused(name: str) -> None:
    register(tolerance=1e-2, precisions=("fp32",), low_rank=False)
    built = architectures.build(name, "adaattn")
    reason = {"gpt2": SHARED, **dict.fromkeys(("modernbert", "llama", "mistral", "qwen2"), ROTARY)}.get(name)
    found = find_projections(built)
    assert found
    if reason:
        assert all(isinstance(each, str) and reason in each for each in found.values())
        return
    assert all(isinstance(each, QueryKeyProjections) for each in found.values())
    given = architectures.inputs(name, 2, 17)
    with torch.no_grad():
        before = built(**given)[0]
        done = adaattn.calibrate(built, [given] * 2)
        after = built(**given)[0]
    assert list(done.layers) == list(found)
    # At full rank and in fp32 nothing changes but the rounding of the folded weights.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    tokens = {spectrum.tokens for spectrum in done.layers.values()}
    assert max(tokens) <= 2 * 2 * 17
