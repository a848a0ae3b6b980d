"""Blocks of README and docs, run in order as a newcomer would: their Python, and their commands that are not make's."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("document", "made"),
    [("README.md", "model"), pytest.param("docs/transformers.md", "folder", marks=pytest.mark.thorough)],
)
def test_blocks_run(document: str, made: str, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for language, text in BLOCK.findall((ROOT / document).read_text()):
        if language == "bash":
            lines = [line for line in text.splitlines() if not line.startswith(("make", "git", "cd ", "pip"))]
            command = ["bash", "-ec", "\n".join(lines)]
        else:
            command = [sys.executable, "-W", "ignore", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 2
    assert (tmp_path / f"{made}-export" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("script", "headings"),
    [
        ("basic_usage.py", ("dense", "adaptive precision", "adaptive rank", "cross-attention", "masks")),
        ("convert_and_calibrate.py", ("converted", "calibrated", "energy")),
    ],
)
def test_examples_run(script: str, headings: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    said = capsys.readouterr().out
    for heading in headings:
        assert heading in said


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path
