"""Read the `.engine.json` beside an engine, which describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaattn.errors import ConfigError
from adaattn.export.artifacts.files import mismatch, read_json
from adaattn.export.engines.options import PACKAGES, BuildOptions

Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""For each input of the model its least, usual and largest shape."""


@dataclass(frozen=True)
class EngineTensor:
    """An input or an output of an engine: name, TensorRT's name of the type, shape with -1 for a dynamic dimension."""

    name: str
    type: str
    shape: Sequence[int]


@dataclass(frozen=True)
class EngineInfo:
    """An engine as its `.engine.json` describes it.

    Args:
        target: of `adaattn.export.engines.options.PACKAGES`.
        package: that built it.
        versions: of packages, by name.
        compute_capabilities: of the GPUs that run it, such as "8.9".
        options: that it was built with.
        model: name of the ONNX file.
        inputs, outputs: in order.
        profiles: in the order of the engine.
        ops: for each custom op of the graph "plugin" or "body", the function that was compiled; for each attention in
            fp8 "fused" or "half precision"; "unknown" without a GPU that opens the engine.
    """

    target: str
    package: str
    versions: Mapping[str, str]
    compute_capabilities: Sequence[str]
    options: BuildOptions
    model: str
    inputs: Sequence[EngineTensor]
    outputs: Sequence[EngineTensor]
    profiles: Sequence[Profile]
    ops: Mapping[str, str]

    def runs_on(self, capability: int | None) -> bool:
        """Return whether a GPU of a compute capability, 89 for 8.9, runs the engine."""
        if capability is None:
            return False
        return str(capability / 10) in self.compute_capabilities or self.options.hardware_compatible

    def as_json(self) -> dict[str, Any]:
        """Return the content of the `.engine.json`."""
        options = asdict(self.options)
        del options["compute_capabilities"]
        paths = {name: str(value) for name, value in options.items() if isinstance(value, Path)}
        return asdict(self) | {"options": options | paths}


def sidecar(engine: Path) -> Path:
    """Return the path of the file that describes an engine."""
    return engine.with_name(engine.name + ".json")


def profile_of(profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]], shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the position of the first profile that all shapes lie in.

    Example:
        >>> profile_of([{"x": [[1, 8], [1, 8], [1, 8]]}, {"x": [[1, 8], [4, 8], [9, 8]]}], {"x": (3, 8)})
        1

    Raises:
        ConfigError: no profile has all of them.
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


def read_engine_info(engine: Path) -> EngineInfo:
    """Return what the `.engine.json` beside an engine says.

    Raises:
        ConfigError: there is no such file, or it is not what an export writes.
    """
    file = sidecar(engine)
    if not file.is_file():
        raise ConfigError(f"{engine.name} has no {file.name} beside it, which says what it is")
    found = read_json(file)
    wrong = mismatch(found, _SCHEMA) or _contradiction(found)
    if wrong is None:
        try:
            options = BuildOptions(**{name: found["options"][name] for name in _given(found["options"])})
        except ConfigError as error:
            wrong = str(error)
    if wrong is not None:
        raise ConfigError(f"{file} is not what adaattn-export wrote: {wrong}; export the model again")
    tensors = {
        kind: [EngineTensor(**{name: x[name] for name in _TENSORS[0]}) for x in found[kind]]
        for kind in ("inputs", "outputs")
    }
    return EngineInfo(**{name: found[name] for name in _SCHEMA} | tensors | {"options": options})


def _given(options: Mapping[str, Any]) -> list[str]:
    return [name for name in _OPTIONS if options[name] is not None]


def _contradiction(found: Mapping[str, Any]) -> str | None:
    """Return what does not go together in a description whose parts are of the right types."""
    if PACKAGES.get(found["target"]) != found["package"]:
        return f"target is {found['target']}, which is not of package {found['package']}"
    if found["package"] not in found["versions"]:
        return f"versions.{found['package']} is missing"
    ranks = {x["name"]: [len(x["shape"])] * 3 for x in found["inputs"]}
    for place, profile in enumerate(found["profiles"]):
        if {name: [len(shape) for shape in shapes] for name, shapes in profile.items()} != ranks:
            return f"profiles[{place}] does not give each input a least, a usual and a largest shape"
    return None


_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("plugins", "plugin_library", "timing_cache"), (str, None)),
    **dict.fromkeys(("workspace", "optimization_level"), (int, None)),
    **dict.fromkeys(("version_compatible", "hardware_compatible", "weight_streaming", "strip_weights"), (bool, None)),
}
_TENSORS = [{"name": str, "type": str, "shape": [int]}]
_SCHEMA: dict[str, Any] = {
    "target": str,
    "package": str,
    "versions": {str: str},
    "compute_capabilities": [str],
    "options": _OPTIONS,
    "model": str,
    "inputs": _TENSORS,
    "outputs": _TENSORS,
    "profiles": [{str: [[int]]}],
    "ops": {str: str},
}
