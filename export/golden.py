"""Golden results: all that a verdict needs of eager PyTorch, in numpy, for machines that have no torch."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from adaattn.errors import ConfigError

Array: TypeAlias = np.ndarray[Any, Any]
UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, MemoryError, OverflowError, RuntimeError),
    *(NotImplementedError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, struct.error),
)
"""What numpy and zipfile raise for a damaged .npy or .npz."""


@dataclass(frozen=True)
class Output:
    """What an output should be.

    Args:
        exact: float64, at eager's plans; integers as they are.
        dtype: of the model's output, in numpy's words, or "bfloat16".
        eager_error: relative error of eager PyTorch in the model's type.
        limit: what a backend may have.
        fill_limit: what it may have of each fill value (`parity.judged`).
        lost: elements that are not compared: eager has NaN, or Inf where float64 has a number; of integers those that
            hang on a rounding. None where there are none.
    """

    exact: Array
    dtype: str
    eager_error: float
    limit: float
    fill_limit: float = 0.0
    lost: Array | None = None


@dataclass(frozen=True)
class Layer:
    """What a planned attention should do.

    Args:
        precision, rank: (B, H), of eager.
        edge: (B, H), whether eager itself changes the plan when its moments move by a rounding or two.
        exact: (B, H, S, D), its output in float32 at these plans; None where it is too large to keep.
        eager_error: (H,), relative error of eager's output.
        dtype: of its output.
    """

    precision: Array
    rank: Array
    edge: Array
    exact: Array | None = None
    eager_error: Array | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Golden:
    """A case, what should come of it, and of each planned attention by its name; bfloat16 inputs as float32."""

    name: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Output]
    layers: Mapping[str, Layer] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: x.shape for name, x in self.inputs.items()}


def save(path: Path, goldens: Sequence[Golden]) -> None:
    """Write `CASE/input/NAME`, `CASE/output/NAME` and the rest as arrays of one .npz."""
    arrays: dict[str, Array] = {}
    for golden in goldens:
        at = golden.name
        arrays |= {f"{at}/input/{name}": x for name, x in golden.inputs.items()}
        for name, output in golden.outputs.items():
            arrays[f"{at}/output/{name}"] = output.exact
            arrays[f"{at}/limit/{name}"] = np.array([output.eager_error, output.limit, output.fill_limit])
            arrays[f"{at}/dtype/{name}"] = np.array(output.dtype)
            if output.lost is not None:
                arrays[f"{at}/lost/{name}"] = output.lost
        for name, layer in golden.layers.items():
            arrays |= {f"{at}/layer.{key}/{name}": x for key, x in vars(layer).items() if x is not None}
    save_arrays(path, arrays)


def save_arrays(file: Path | IO[bytes], arrays: Mapping[str, Array]) -> None:
    """An .npz of arrays; numpy.savez would take names such as `file` for its own."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, x in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asanyarray(x), allow_pickle=False)


def load(path: Path) -> list[Golden]:
    """Read what `save` wrote.

    Raises:
        ConfigError: there is no such file, or it is none of ours.
    """
    found: dict[str, dict[str, dict[str, Array]]] = {}
    arrays = load_arrays(path, "golden results")
    try:
        for key, x in arrays.items():
            case, kind, name = key.split("/", 2)
            found.setdefault(case, {}).setdefault(kind, {})[name] = x
        return [_golden(case, kinds) for case, kinds in found.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no golden results: {error}") from error


def load_arrays(path: Path, what: str) -> dict[str, Array]:
    """Read what `save_arrays` wrote.

    Raises:
        ConfigError: there is no such file, or it holds no arrays; it says that it should hold `what`.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError("it is not a file")  # a pipe or a device could be read without an end
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except UNREADABLE as error:
        raise ConfigError(
            f"{path} holds no {what} ({error}); it is cut off, or the export was made with --no-verify"
        ) from error
    if not arrays:
        raise ConfigError(f"{path} holds no {what}: it is empty")
    return arrays


def _golden(case: str, kinds: Mapping[str, Mapping[str, Array]]) -> Golden:
    outputs = {name: _output(name, exact, kinds) for name, exact in kinds["output"].items()}
    of_layers: dict[str, dict[str, Any]] = {}
    for kind, arrays in kinds.items():
        for name, x in arrays.items() if kind.startswith("layer.") else ():
            of_layers.setdefault(name, {})[kind.removeprefix("layer.")] = str(x) if kind == "layer.dtype" else x
    layers = {name: Layer(**fields) for name, fields in of_layers.items()}
    for name, layer in layers.items():
        shapes = {layer.precision.shape, layer.rank.shape, layer.edge.shape}
        heads = layer.precision.shape[1:]
        fits = layer.exact is None or (layer.exact.ndim == 4 and layer.exact.shape[:2] in shapes)
        if len(shapes) != 1 or len(heads) != 1 or not fits or getattr(layer.eager_error, "shape", heads) != heads:
            raise ValueError(f"the arrays of {name} do not fit together")
    return Golden(case, kinds["input"], outputs, layers)


def _output(name: str, exact: Array, kinds: Mapping[str, Mapping[str, Array]]) -> Output:
    dtype, limits, lost = str(kinds["dtype"][name]), kinds["limit"][name], kinds.get("lost", {}).get(name)
    if limits.shape != (3,) or limits.dtype.kind != "f" or not (limits >= 0).all():
        raise ValueError(f"the limits of {name} are {limits.tolist()}")
    kept = "float64" if "float" in dtype else dtype
    if str(exact.dtype) != kept or (lost is not None and (lost.shape, lost.dtype) != (exact.shape, np.bool_)):
        raise ValueError(f"{name} is {exact.dtype}{exact.shape}, of {dtype}")
    eager_error, limit, fill_limit = limits.tolist()
    return Output(exact, dtype, eager_error, limit, fill_limit, lost)
