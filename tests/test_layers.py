"""The layers: which folder may import which, that no import leads back to its module, and who needs no torch."""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from tests.support.paths import ROOT

HOMES = {"adaattn": "adaattn", "plugins": "adaattn.plugins", "export": "adaattn.export"}
"""For each top folder the package that it is installed as, from the bottom up: each may import those before it."""

ARROWS = {
    "adaattn/archive": "errors",
    "adaattn/checks": "errors",
    "adaattn/input_spec": "errors",
    "adaattn/system": "errors",
    "adaattn/command_line": "errors system",
    "adaattn/planning": "checks errors heads",
    "adaattn/tensor_checks": "checks errors",
    "adaattn/masks": "errors tensor_checks",
    "adaattn/ops": "checks errors heads masks planning tensor_checks",
    "adaattn/functional": "checks errors masks ops planning tensor_checks",
    "adaattn/attention": "checks errors functional heads input_spec masks ops planning tensor_checks",
    "adaattn/checkpoint": "adaattn archive attention checks errors input_spec system",
    "adaattn/conversion": "attention checks errors parameters planning",
    "adaattn/encoder": "attention checks input_spec planning",
    "adaattn/calibration": "attention checkpoint checks errors masks parameters planning",
    "adaattn/integrations": "calibration checks errors functional masks ops planning tensor_checks",
    "plugins/native": "onnx_file op_variants plugins ptx",
    "plugins/python": "op_variants plugins ptx",
    "export/allocation": "capture formats golden onnx parity rewrite targets",
    "export/engines": "artifacts",
    "export/onnx": "artifacts formats targets",
    "export/parity": "artifacts",
    "export/sources": "artifacts",
    "export/golden": "artifacts capture onnx parity",
    "export/options": "allocation engines formats onnx targets",
    "export/targets": "formats",
    "export/report": "artifacts capture parity",
    "export/rewrite": "capture golden",
    "export/runtime": "artifacts engines",
    "export/serving": "engines",
    "export/prepare": "artifacts capture engines options",
    "export/verification": "artifacts engines parity runtime",
    "export/pipeline": (
        "allocation artifacts capture engines formats golden onnx options parity prepare report rewrite serving "
        "sources verification"
    ),
    "export/testing": "export verification",
    "export/cli": "artifacts engines options pipeline report runtime sources verification",
    "export": "allocation pipeline",
}
"""For each folder, or module outside of one, the others of the same top folder that it may import."""

NO_TORCH = (
    "export/artifacts",
    "export/cli",
    "export/engines",
    "export/parity",
    "export/runtime",
    "export/verification",
)
"""Folders whose modules import no torch when they are imported, nor does anything that they import."""


@dataclass
class Module:
    """The imports of one file: other modules of the project, and whether torch is one of those at import time."""

    place: str  # its folder, or itself, as ARROWS names it
    anywhere: set[str] = field(default_factory=set)
    at_import: set[str] = field(default_factory=set)


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def sources() -> dict[str, str]:
    """Return the text of every file below the top folders, by its path."""
    files = (file for home in HOMES for file in (ROOT / home).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def modules_of(texts: Mapping[str, str]) -> dict[str, Module]:
    """Return the modules of some files by their names."""
    names_of = {}
    for path in texts:
        home, *parts = path.removesuffix(".py").split("/")
        names_of[path] = ".".join([HOMES[home], *parts]).removesuffix(".__init__")
    known, found = set(names_of.values()), {}
    for path, name in names_of.items():
        module = found[name] = Module("/".join(path.removesuffix(".py").split("/")[:2]).removesuffix("/__init__"))
        for node, deferred in imports_of(parsed(texts[path]), False):
            names = imported(node, known)
            module.anywhere |= names
            if not deferred:
                module.at_import |= names
    return found


def imports_of(node: ast.AST, deferred: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield each import, and whether it waits for a call; those for type checkers are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, deferred
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            inside = isinstance(child, (ast.FunctionDef, ast.Lambda))
            yield from imports_of(child, deferred or inside)


def imported(node: ast.Import | ast.ImportFrom, known: Collection[str]) -> set[str]:
    """Return the modules of the project that an import names, and "torch"."""
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    else:
        base = node.module or ""
        names = {full if (full := f"{base}.{alias.name}") in known else base for alias in node.names}
    torch = {"torch"} if any(name.split(".")[0] == "torch" for name in names) else set()
    return {name for name in names if name in known} | torch


def closure(start: str, modules: Mapping[str, Module]) -> set[str]:
    """Return all that importing a module imports, packages above it included."""
    seen, left = set[str](), [start]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        above = [name.rpartition(".")[0]] if "." in name else []
        left += [x for x in (*modules[name].at_import, *above) if x in modules] if name in modules else []
        seen |= {"torch"} & (modules[name].at_import if name in modules else set())
    return seen


def circles(modules: Mapping[str, Module]) -> Iterable[str]:
    """Yield each module from which imports, made at any time, lead back to it."""
    for start in modules:
        seen, left = set[str](), [*modules[start].anywhere]
        while left:
            name = left.pop()
            if name == start:
                yield f"{start}: its imports lead back to it"
                break
            if name not in seen:
                seen.add(name)
                left += modules[name].anywhere if name in modules else ()


def faults(texts: Mapping[str, str]) -> list[str]:
    """Return a line for each import that the layers forbid."""
    modules, found = modules_of(texts), []
    order = list(HOMES)
    for name, module in modules.items():
        home = module.place.split("/")[0]
        for other in sorted(module.anywhere & modules.keys()):
            to = modules[other].place
            if (top := to.split("/")[0]) != home:
                if order.index(top) > order.index(home):
                    found.append(f"{name} imports {other}: {home} is below {top}")
            elif to != module.place and to.removeprefix(f"{home}/") not in ARROWS.get(module.place, "").split():
                found.append(f"{name} imports {other}: no arrow from {module.place} to {to}")
        if module.place in NO_TORCH and "torch" in closure(name, modules):
            found.append(f"{name} needs torch")
    return [*found, *circles(modules)]


def test_the_layers() -> None:
    texts = sources()
    assert faults(texts) == []
    places = {module.place for module in modules_of(texts).values()}
    assert places >= ARROWS.keys()  # the table names nothing that is gone


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("adaattn/masks.py", "from adaattn.export import pipeline", "adaattn is below export"),
        ("plugins/ptx.py", "import adaattn.export.options", "plugins is below export"),
        ("export/parity/metrics.py", "from adaattn.export.verification import verify", "no arrow from export/parity"),
        ("export/parity/criterion.py", "import torch", "adaattn.export.parity.criterion needs torch"),
        ("export/artifacts/files.py", "from torch import nn", "adaattn.export.verification.verify needs torch"),
        ("adaattn/errors.py", "def late():\n    from adaattn import checks", "adaattn.errors: its imports lead back"),
    ],
)
def test_a_wrong_import_is_found(file: str, line: str, fault: str) -> None:
    texts = sources()
    found = faults(texts | {file: f"{texts[file]}\n{line}\n"})
    assert any(fault in each for each in found), found
