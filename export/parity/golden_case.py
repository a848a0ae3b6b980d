"""Save and load golden cases: all that a verdict needs of eager PyTorch, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adaattn.errors import ConfigError
from adaattn.export.artifacts.arrays import Array, load_arrays, save_arrays


@dataclass(frozen=True)
class ExpectedOutput:
    """What an output should be.

    Args:
        exact: float64, at eager's plans; integers as they are.
        dtype: of the model's output, in numpy's words, or "bfloat16".
        eager_error: relative error of eager PyTorch in the model's type.
        limit: what a backend may have.
        fill_limit: what it may have of each fill value (`criterion.separate_fill_values`).
        excluded: elements that are not compared: eager has NaN, or Inf where float64 has a number; integers that a
            rounding decides. None where all are compared.
        broken: number of excluded elements that are NaN or Inf in eager, where the type holds float64's number.
    """

    exact: Array
    dtype: str
    eager_error: float
    limit: float
    fill_limit: float = 0.0
    excluded: Array | None = None
    broken: int = 0


@dataclass(frozen=True)
class ExpectedAttention:
    """What a planned attention should do.

    Args:
        precision, rank: (B, H), of eager.
        edge: (B, H), whether eager itself changes the plan when its moments move by a rounding or two.
        exact: (B, H, S, D), its output in float32 at these plans; None where it is too large to keep.
        eager_error: (H,), relative error of eager's output.
        dtype: of its output.
        predicted: (B, H), the error that eager's plan predicts; None where no error model made the plan.
        predicted_limit: (B, H), by what share a backend's prediction may differ from it.
    """

    precision: Array
    rank: Array
    edge: Array
    exact: Array | None = None
    eager_error: Array | None = None
    dtype: str = "float32"
    predicted: Array | None = None
    predicted_limit: Array | None = None


@dataclass(frozen=True)
class GoldenCase:
    """A case, its expected outputs and planned attentions by name; bfloat16 inputs are stored as float32.

    Args:
        forced: what every plan is forced to, such as "fp32" or "int8"; empty where the model makes its own plans. The
            plans themselves are those of `layers`.
        probes: the layer of which one node alone is run, empty where the whole model is: the plan, with moments that
            `criterion.probe_inputs` derives from the inputs, or, with plans that are forced, the attention.
        trivial: whether every dynamic size is at its minimum.
    """

    name: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, ExpectedOutput]
    layers: Mapping[str, ExpectedAttention] = field(default_factory=dict)
    forced: str = ""
    probes: str = ""
    trivial: bool = False

    @property
    def case(self) -> str:
        """The name of the case that the inputs are of, whatever the plans are forced to."""
        return self.name.removesuffix(f" at {self.forced}") if self.forced else self.name

    @property
    def whole(self) -> bool:
        """Whether the artifact runs as it is, with the plans that it makes."""
        return not self.forced and not self.probes

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each input."""
        return {name: x.shape for name, x in self.inputs.items()}


def integer_ranges(goldens: Sequence[GoldenCase]) -> dict[str, tuple[int, int]]:
    """Return for each input of integers the smallest and the largest value that is compared, over all cases."""
    found: dict[str, tuple[int, int]] = {}
    for golden in goldens:
        for name, x in golden.inputs.items():
            if x.dtype.kind in "iu" and x.size:
                ends = (int(x.min()), int(x.max()))
                low, high = found.get(name, ends)
                found[name] = (min(low, ends[0]), max(high, ends[1]))
    return found


def save(path: Path, goldens: Sequence[GoldenCase]) -> None:
    """Write `CASE/input/NAME`, `CASE/output/NAME` and the rest as arrays of one .npz."""
    arrays: dict[str, Array] = {}
    written: dict[int, str] = {}  # inputs that several cases share are written once
    for golden in goldens:
        at = golden.name
        arrays[f"{at}/about/fields"] = np.array([golden.forced, golden.probes, str(golden.trivial)])
        base = written.setdefault(id(golden.inputs), at)
        if base == at:
            arrays |= {f"{at}/input/{name}": x for name, x in golden.inputs.items()}
        else:
            arrays[f"{at}/about/inputs of"] = np.array(base)
        for name, output in golden.outputs.items():
            arrays[f"{at}/output/{name}"] = output.exact
            arrays[f"{at}/limit/{name}"] = np.array(
                [output.eager_error, output.limit, output.fill_limit, output.broken]
            )
            arrays[f"{at}/dtype/{name}"] = np.array(output.dtype)
            if output.excluded is not None:
                arrays[f"{at}/lost/{name}"] = output.excluded
        for name, layer in golden.layers.items():
            arrays |= {f"{at}/layer.{key}/{name}": x for key, x in vars(layer).items() if x is not None}
    save_arrays(path, arrays)


def load(path: Path, what: str = "golden results") -> list[GoldenCase]:
    """Read what `save` wrote.

    Args:
        what: the file holds, for errors.

    Raises:
        ConfigError: there is no such file, or no export wrote it.
    """
    found: dict[str, dict[str, dict[str, Array]]] = {}
    arrays = load_arrays(path, what)
    try:
        for key, x in arrays.items():
            case, kind, name = key.split("/", 2)
            found.setdefault(case, {}).setdefault(kind, {})[name] = x
        for kinds in found.values():
            base = kinds["about"].get("inputs of")
            kinds["input"] = found[str(base)]["input"] if base is not None else kinds.get("input", {})
        return [_golden(case, kinds) for case, kinds in found.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no {what}: {error}") from error


def _golden(case: str, kinds: Mapping[str, Mapping[str, Array]]) -> GoldenCase:
    outputs = {name: _output(name, exact, kinds) for name, exact in kinds["output"].items()}
    of_layers: dict[str, dict[str, Any]] = {}
    for kind, arrays in kinds.items():
        for name, x in arrays.items() if kind.startswith("layer.") else ():
            of_layers.setdefault(name, {})[kind.removeprefix("layer.")] = str(x) if kind == "layer.dtype" else x
    layers = {name: ExpectedAttention(**fields) for name, fields in of_layers.items()}
    for name, layer in layers.items():
        _check_layer(name, layer)
    forced, probes, trivial = (str(x) for x in kinds["about"]["fields"].tolist())
    if probes and forced and probes not in layers:
        raise ValueError(f"{case} has no plan for {probes}")
    for name, x in kinds["input"].items() if probes and not forced else ():
        if x.dtype != np.float32 or x.ndim < 2:
            raise ValueError(f"the moment {name} of {case} is {x.dtype}{x.shape}")
    return GoldenCase(case, kinds["input"], outputs, layers, forced, probes, trivial == "True")


def _check_layer(name: str, layer: ExpectedAttention) -> None:
    heads = layer.precision.shape[1:]
    wanted = {"exact": None, "eager_error": heads, "dtype": None}
    for field_name, x in vars(layer).items():
        shape = wanted.get(field_name, layer.precision.shape)
        if isinstance(x, np.ndarray) and shape is not None and x.shape != shape:
            raise ValueError(f"the {field_name} of {name} has shape {x.shape}, its precision {layer.precision.shape}")
    if len(heads) != 1 or (
        layer.exact is not None and (layer.exact.ndim != 4 or layer.exact.shape[:2] != layer.precision.shape)
    ):
        raise ValueError(f"the arrays of {name} do not fit together")
    if layer.predicted_limit is not None and not (layer.predicted_limit >= 0).all():
        raise ValueError(f"a limit of {name} is {layer.predicted_limit.min()}")


def _output(name: str, exact: Array, kinds: Mapping[str, Mapping[str, Array]]) -> ExpectedOutput:
    dtype, numbers, lost = str(kinds["dtype"][name]), kinds["limit"][name], kinds.get("lost", {}).get(name)
    if numbers.shape != (4,) or numbers.dtype.kind != "f" or not (numbers >= 0).all():
        raise ValueError(f"the limits of {name} are {numbers.tolist()}")
    kept = "float64" if "float" in dtype else dtype
    if str(exact.dtype) != kept or (lost is not None and (lost.shape, lost.dtype) != (exact.shape, np.bool_)):
        raise ValueError(f"{name} is {exact.dtype}{exact.shape}, of {dtype}")
    eager_error, limit, fill_limit, broken = numbers.tolist()
    return ExpectedOutput(exact, dtype, eager_error, limit, fill_limit, lost, int(broken))
