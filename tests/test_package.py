"""What is installed: the wheel holds what it should and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_nothing_but_adaattn_enters_site_packages(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {"adaattn", "adaattn-0.1.0.dist-info"}


def test_every_source_file_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    homes = {"adaattn": "adaattn", "export": "adaattn/export", "plugins": "adaattn/plugins"}
    wanted = {
        f"{home}/{file.relative_to(ROOT / folder)}"
        for folder, home in homes.items()
        for pattern in ("*.py", "*.jinja", "py.typed")
        for file in (ROOT / folder).rglob(pattern)
    }
    assert wanted <= set(wheel.namelist())


def test_every_dependency_is_pinned_and_named() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    here = [*project["dependencies"], *extras["cpu"], *extras["tensorrt-rtx"], *extras["test"]]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    for requirement in here:
        name = requirement.split(">=")[0].lower().replace("_", "-")
        assert ">=" in requirement, requirement
        assert name in pinned, requirement
