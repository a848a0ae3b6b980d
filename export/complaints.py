"""Why torch.export refused a model: one line, in the names of the user's own dimensions, that says what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adaattn.errors import AdaAttnError
from adaattn.input_spec import Dimension, InputSpec

# Before a dimension's name where torch sees it: torch reads names as sympy's, for which S, N, E and others are taken.
PREFIX = "dim_"


def of_dimensions(message: str, dims: Mapping[str, Dimension]) -> str:
    """What torch.export's report on violated constraints comes to."""
    text = re.sub(rf"\b_{PREFIX}\w+", "n", message.split("\nThe error above")[0])
    text = re.sub(rf"\b{PREFIX}", "", text)
    for name, axis in re.findall(r"\b(\w+) = (L\['\w+'\]\.size\(\)\[\d+\])", text):
        text = text.replace(axis, name)
    equal = re.search(r"values of (\w+) = .+ and (\w+) = .+ must always be equal", text)
    if equal:
        return _same(equal[1], equal[2])
    for name, size in dims.items():
        fixed = re.search(rf"marked {name} as dynamic but your code specialized it to be a constant \((\d+)\)", text)
        advice = re.search(rf"^ *{name} = (.+)$", text, re.MULTILINE)
        if fixed or (advice and advice[1].isdecimal()):
            number = (fixed or advice)[1]  # type: ignore[index]  # one of them there is
            return f"the model fixes dimension {name} to {number}; write {number} in its place in --input"
        if not advice:
            continue
        if advice[1] in dims:
            return _same(name, advice[1])
        limits = {end: int(value) for end, value in re.findall(r"(min|max)=(\d+)", advice[1])}
        if not limits:
            return f"the model takes only {name} = {advice[1]}; write a number in its place in --input"
        low, high = max(size.min, limits.get("min", 1)), min(size.max, limits.get("max", size.max))
        usual = min(max(size.opt, low), high)
        return f"the model takes {name} from {low} to {high}, not {size}; give --dim {name}={low}:{usual}:{high}"
    guard = re.search(rf"Not all values of ({'|'.join(dims)}) = .* generated guard (.+?)\.?$", text, re.MULTILINE)
    if guard:
        return (
            f"{guard[1]}={dims[guard[1]]} does not fit: the model wants {guard[2]}; choose other sizes with --dim, or "
            "write a number in its place in --input"
        )
    return f"the model does not take these dimensions: {text.strip().splitlines()[0]}"


def of_model(error: Exception, model: nn.Module, specs: Sequence[InputSpec], inputs: Mapping[str, Tensor]) -> str:
    """Any other error: that of the model itself, if it does not run on the inputs either."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as own:  # the user's own code
        shown = ", ".join(f"{spec.name} ({_named_shape(spec, inputs[spec.name])})" for spec in specs)
        return (
            f"the model does not run on inputs of shape {shown}: {_line(own)}; correct the inputs: dimensions that "
            "must agree share a name, and one that the model fixes is a number"
        )
    where = re.search(r'raised this error:\s+File "([^"]+)", line (\d+)', str(error))
    place = f", at {where[1]}:{where[2]}" if where else ""
    return f"torch.export cannot capture the model: {_line(error)}{place}"


def _same(one: str, other: str) -> str:
    return f"the model wants dimensions {one} and {other} to be the same; give them one name in --input"


def _named_shape(spec: InputSpec, x: Tensor) -> str:
    pairs = zip(spec.shape, x.shape, strict=True)
    sizes = ", ".join(f"{size}={n}" if isinstance(size, str) else str(n) for size, n in pairs)
    return f"{sizes}:{str(x.dtype).removeprefix('torch.')}"


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no more is said"]
    kind = "" if isinstance(error, (RuntimeError, AdaAttnError)) else f"{type(error).__name__}: "
    return kind + lines[0].rstrip(".")
