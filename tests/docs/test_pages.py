"""The pages name what exists: links, files and folders in backticks, and the targets of make."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TOP = ("adaattn/", "benchmarks/", "docs/", "examples/", "export/", "plugins/", "tests/")
MADE = ("adaattn/lib",)  # folders of a user's own


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def faults(page: Path, text: str) -> list[str]:
    """Return a line for each thing that a page names and that does not exist."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            found.append(f"{page.name} links to {target}, which does not exist")
        elif anchor and anchor not in anchors(file.read_text() if file != page else text):
            found.append(f"{page.name} links to {target}, which has no such heading")
    for name in re.findall(r"`([\w./-]+)`", text):
        if name.startswith(TOP) and not name.startswith(MADE) and not (ROOT / name).exists():
            found.append(f"{page.name} names {name}, which does not exist")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    assert faults(page, page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](docs/nothing.md)", "links to docs/nothing.md, which does not exist"),
        ("[a](docs/design.md#nothing)", "links to docs/design.md#nothing, which has no such heading"),
        ("[a](#nothing)\n# Something", "links to #nothing, which has no such heading"),
        ("`export/nothing.py`", "names export/nothing.py, which does not exist"),
    ],
)
def test_a_wrong_name_is_found(text: str, fault: str) -> None:
    assert faults(ROOT / "README.md", text) == [f"README.md {fault}"]


def test_help_names_every_target() -> None:
    named = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    printed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in printed.splitlines()} == set(named)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
