"""Read the `.engine.json` beside an engine, which describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaattn.errors import ConfigError
from adaattn.export.artifacts.files import read_json
from adaattn.export.engines.options import PACKAGES

Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""For each input of the model its least, usual and largest shape."""


def sidecar(engine: Path) -> Path:
    """The file that says what an engine is."""
    return engine.with_name(engine.name + ".json")


def profile_of(profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]], shapes: Mapping[str, Sequence[int]]) -> int:
    """The first profile that all shapes lie in.

    Example:
        >>> profile_of([{"x": [[1, 8], [1, 8], [1, 8]]}, {"x": [[1, 8], [4, 8], [9, 8]]}], {"x": (3, 8)})
        1

    Raises:
        ConfigError: none of them.
    """

    def within(profile: Mapping[str, Sequence[Sequence[int]]]) -> bool:
        return all(
            name in profile
            and len(shape) == len(profile[name][0])
            and all(
                low <= size <= high for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True)
            )
            for name, shape in shapes.items()
        )

    for place, profile in enumerate(profiles):
        if within(profile):
            return place
    ranges = "; or ".join(
        ", ".join(f"{name} {tuple(sizes[0])} to {tuple(sizes[2])}" for name, sizes in each.items()) for each in profiles
    )
    given = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    raise ConfigError(f"the engine has no profile for {given}; it takes {ranges}")


def read_description(engine: Path) -> dict[str, Any]:
    """Return what the `.engine.json` beside an engine says; all of it is there and of the right type.

    Raises:
        ConfigError: there is no such file, or it is not what an export writes.
    """
    file = sidecar(engine)
    if not file.is_file():
        raise ConfigError(f"{engine.name} has no {file.name} beside it, which says what it is")
    about = read_json(file)
    wrong = _first_wrong(about, _DESCRIPTION, "")
    if wrong is None and (about["target"] not in PACKAGES or about["package"] != PACKAGES[about["target"]]):
        wrong = "target"
    if wrong is None and about["package"] not in about["versions"]:
        wrong = "versions"
    if wrong is None:
        wrong = _first_wrong_profile(about)
    if wrong is not None:
        raise ConfigError(
            f"{file} is not what adaattn-export wrote: {wrong} is missing or wrong; export the model again"
        )
    return about


def _first_wrong_profile(about: Mapping[str, Any]) -> str | None:
    """The name of the first profile that does not give each input a least, a usual and a largest shape."""
    ranks = {x["name"]: [len(x["shape"])] * 3 for x in about["inputs"]}
    for place, profile in enumerate(about["profiles"]):
        if {name: [len(shape) for shape in shapes] for name, shapes in profile.items()} != ranks:
            return f"profiles[{place}]"
    return None


_FLAG, _NUMBER, _TEXT = (bool, type(None)), (int, type(None)), (str, type(None))
_OPTIONS: dict[str, Any] = {
    **{"plugins": _TEXT, "plugin_library": _TEXT, "timing_cache": _TEXT},
    **{"workspace": _NUMBER, "optimization_level": _NUMBER},
    **dict.fromkeys(("version_compatible", "hardware_compatible", "weight_streaming", "strip_weights"), _FLAG),
}
_TENSORS = [{"name": (str,), "type": (str,), "shape": [(int,)]}]
_DESCRIPTION: dict[str, Any] = {
    "target": (str,),
    "package": (str,),
    "versions": {...: (str,)},
    "compute_capabilities": [(str,)],
    "options": _OPTIONS,
    "model": (str,),
    "inputs": _TENSORS,
    "outputs": _TENSORS,
    "profiles": [{...: [[(int,)]]}],
    "ops": {...: (str,)},
}
"""Types of what a description holds: of a list's items, of an object's fields, of all fields (...) of an object."""


def _first_wrong(value: Any, wanted: Any, name: str) -> str | None:
    """The name of the first part of a description that is missing or of another type."""
    if isinstance(wanted, tuple):
        fits = isinstance(value, wanted) and not (isinstance(value, bool) and bool not in wanted)
        return None if fits else name or "all of it"
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return name
        parts: list[tuple[Any, Any, str]] = [(item, wanted[0], f"{name}[{at}]") for at, item in enumerate(value)]
    else:
        if not isinstance(value, dict):
            return name or "all of it"
        if ... in wanted:
            parts = [(item, wanted[...], f"{name}.{key}".lstrip(".")) for key, item in value.items()]
        else:
            missing = [key for key in wanted if key not in value]
            if missing:
                return f"{name}.{missing[0]}".lstrip(".")
            parts = [(value[key], part, f"{name}.{key}".lstrip(".")) for key, part in wanted.items()]
    return next((found for part in parts if (found := _first_wrong(*part)) is not None), None)
