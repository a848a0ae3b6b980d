"""Explain why torch.export refused a model: one line, with the user's names of dimensions and what to do."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from adaattn.errors import AdaAttnError, ConfigError, DtypeError, ExportError, ShapeError
from adaattn.input_spec import Dimension, InputSpec

# Before a dimension's name where torch sees it: torch reads names as sympy's, for which S, N, E and others are taken.
PREFIX = "dim_"


# Words by which an error of a model is known to be about the shapes of its inputs, or about their types.
SHAPES = re.compile(
    r"shape|\bsizes?\b|dimension|\bdims?\b|\bmat[12]\b|broadcast|channel|unpack|indices|\b\dD\b|length|element", re.I
)
TYPES = re.compile(r"d(ata)?type|scalar type|\btorch\.\w*(float|int)\d+|floating.point", re.I)


def explain_dimension_error(message: str, dims: Mapping[str, Dimension], elsewhere: Collection[str] = ()) -> str:
    """Return torch.export's report on violated constraints as one line of advice.

    Args:
        elsewhere: dimensions that torch.export fixed, though the model runs at other sizes of them.
    """
    text = _plain(message)
    equal = re.search(r"values of (\w+) = .+ and (\w+) = .+ must always be equal", text)
    if equal:
        return _same(equal[1], equal[2])
    for name, size in dims.items():
        fixed = re.search(rf"marked {name} as dynamic but your code specialized it to be a constant \((\d+)\)", text)
        advice = re.search(rf"^ *{name} = (.+)$", text, re.MULTILINE)
        if fixed or (advice and advice[1].isdecimal()):
            if name in elsewhere:
                return (
                    f"torch.export captures the model at one size of dimension {name} alone; write the size that you "
                    "need in its place in --input"
                )
            return fixes(name, int((fixed or advice)[1]))  # type: ignore[index]  # one of them there is
        if not advice:
            continue
        if advice[1] in dims:
            return _same(name, advice[1])
        limits = {end: int(value) for end, value in re.findall(r"(min|max)=(\d+)", advice[1])}
        if not limits:
            return f"the model takes only {name} = {advice[1]}; write a number in its place in --input"
        low, high = max(size.min, limits.get("min", 1)), min(size.max, limits.get("max", size.max))
        return _wants(Dimension(name, low, min(max(size.opt, low), high), high), size)
    guard = re.search(rf"Not all values of ({'|'.join(dims)}) = .* generated guard (.+?)\.?$", text, re.MULTILINE)
    if guard:
        return (
            f"{guard[1]}={dims[guard[1]]} does not fit: the model wants {guard[2]}; choose other sizes with --dim, or "
            "write a number in its place in --input"
        )
    return f"the model does not take these dimensions: {text.strip().splitlines()[0]}"


def narrowed(message: str, dims: Mapping[str, Dimension]) -> dict[str, Dimension]:
    """Return the dimensions as torch.export's report on violated constraints limits them."""
    text = _plain(message)
    found = dict(dims)
    for name, size in dims.items():
        lows, highs = [size.min], [size.max]
        for guard in re.findall(rf"Not all values of {name} = .* generated guard (.+?)\.?$", text, re.MULTILINE):
            if re.fullmatch(rf"(\d+ <= {name})?( and )?({name} <= \d+)?", guard):
                lows += map(int, re.findall(r"(\d+) <=", guard))
                highs += map(int, re.findall(r"<= (\d+)", guard))
        low, high = max(lows), min(highs)
        if low < high:
            found[name] = Dimension(name, low, min(max(size.opt, low), high), high)
    return found


def related(message: str) -> tuple[str, str, int, int] | None:
    """Return K, S, 2 and 1 where torch.export's report says that K = 2*S + 1."""
    match = re.search(
        r"values of (\w+) = .+ must always be related to the values of (\w+) = .+ "
        r"by \1 = (?:(\d+)\*)?\2(?: ([+-]) (\d+))?",
        _plain(message),
    )
    if match is None:
        return None
    return match[1], match[2], int(match[3] or 1), int((match[4] or "") + (match[5] or "0"))


def check_fitted(size: Dimension, asked: Dimension, given: bool) -> list[str]:
    """Return a line for the user where the model does not take a dimension as it was asked for.

    Args:
        given: by the user, who then has to change it.

    Raises:
        ConfigError: the user gave the dimension, or only one size is left.
    """
    if size == asked:
        return []
    if size.min == size.max:
        raise ConfigError(fixes(size.name, size.min))
    if given:
        raise ConfigError(_wants(size, asked))
    return [f"dimension {size.name} is {size}, since the model does not take all of {asked}"]


def fixes(name: str, size: int) -> str:
    """Return what to do where a model takes one size of a dimension."""
    return f"the model fixes dimension {name} to {size}; write {size} in its place in --input"


def explain_capture_error(
    error: Exception, model: nn.Module, specs: Sequence[InputSpec], inputs: Mapping[str, Tensor]
) -> AdaAttnError:
    """Return the error to raise where a model was not captured: its own, if it does not run on the inputs either."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as own:  # the user's own code
        shown = ", ".join(f"{spec.name} ({_named_shape(spec, inputs[spec.name])})" for spec in specs)
        return ExportError(f"the model does not run on inputs of shape {shown}: {_line(own)}{_remedy(own)}")
    where = re.search(r'raised this error:\s+File "([^"]+)", line (\d+)', str(error))
    place = f", at {where[1]}:{where[2]}" if where else ""
    return ExportError(f"torch.export cannot capture the model: {_line(error)}{place}")


def _remedy(error: Exception) -> str:
    if isinstance(error, DtypeError) or (TYPES.search(str(error)) and not SHAPES.search(str(error))):
        return "; correct the inputs: the last part of a specification is the type, as in x=B,S,512:float32"
    if isinstance(error, ShapeError) or SHAPES.search(str(error)):
        return "; correct the inputs: dimensions that must agree share a name, and one that the model fixes is a number"
    return ""


def _plain(message: str) -> str:
    """Return torch.export's report with the user's names of dimensions."""
    text = re.sub(rf"\b_{PREFIX}\w+", "n", message.split("\nThe error above")[0])
    text = re.sub(rf"\b{PREFIX}", "", text)
    for name, axis in re.findall(r"\b(\w+) = (L\['\w+'\]\.size\(\)\[\d+\])", text):
        text = text.replace(axis, name)
    return text


def _wants(size: Dimension, asked: Dimension) -> str:
    name = size.name
    return f"the model takes {name} from {size.min} to {size.max}, not {asked}; give --dim {name}={size}"


def _same(one: str, other: str) -> str:
    return f"the model wants dimensions {one} and {other} to be the same; give them one name in --input"


def _named_shape(spec: InputSpec, x: Tensor) -> str:
    pairs = zip(spec.shape, x.shape, strict=True)
    sizes = ", ".join(f"{size}={n}" if isinstance(size, str) else str(n) for size, n in pairs)
    return f"{sizes}:{str(x.dtype).removeprefix('torch.')}"


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    kind = "" if isinstance(error, (RuntimeError, AdaAttnError)) else f"{type(error).__name__}: "
    return kind + lines[0].rstrip(".")
