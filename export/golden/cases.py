"""Make inputs that a model must survive, seeded: shortest, odd and longest sizes, masked rows, outliers.

What a mask means to the model is stated, or found by trying: the first meaning with which eager PyTorch has numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product

import torch
from torch import Tensor

from adaattn.export.capture.captured import Captured, CapturedInput
from adaattn.export.golden.plan_mode import run_eager
from adaattn.input_spec import MEANINGS, Dimension

SEED = 20260101
SMALL = 9  # tokens
MASK = re.compile(r"(?:^|_)(?i:mask|bias|pad|padding)s?$|[a-z](?:Mask|Bias|Pad|Padding)s?$")  # a hint, no more
TRIES = 64  # combinations of meanings that are tried


@dataclass(frozen=True)
class Case:
    """Named inputs of a model, on the CPU and in its types."""

    name: str
    inputs: Mapping[str, Tensor]


def cases(captured: Captured) -> list[Case]:
    """Return golden inputs of a captured program, and the user's own where there are some."""
    generator = torch.Generator().manual_seed(SEED)
    dims = captured.dims
    first = {str(s) for item in captured.inputs if item.shape for s in getattr(item.shape[0], "free_symbols", ())}
    # Attention grows with the square of its lengths: with them, one batch entry is enough.
    batch = first if first != set(dims) else set()
    sizes = {
        "shortest": {name: dim.min for name, dim in dims.items()},
        "short": {name: _between(dim) for name, dim in dims.items()},
        "odd": {name: _odd(dim) for name, dim in dims.items()},
        "outliers": {name: _odd(dim) for name, dim in dims.items()},
        "longest": {name: dim.min if name in batch else dim.max for name, dim in dims.items()},
    }
    sizes = {name: captured.sizes.nearest(values) for name, values in sizes.items()}
    # Where the program may compute something else than the model, as its tracing knew nothing of such sizes.
    sizes |= {f"unproven {place}": values for place, values in enumerate(captured.sizes.unproven(), 1)}
    found = [
        Case(name, {item.name: _values(item, values, name, generator) for item in captured.inputs})
        for name, values in sizes.items()
        if dims or name in ("odd", "outliers")  # others would repeat the one size there is
    ]
    if any(_hides_all(item, sizes["odd"]) for item in captured.inputs):
        inputs = {item.name: _values(item, sizes["odd"], "hidden", generator) for item in captured.inputs}
        found.append(Case("hidden", inputs))
    if captured.example is not None:
        found.append(Case("example", captured.example))
    return found


def proof(captured: Captured) -> list[Case]:
    """Return the golden inputs on which a program is compared with a rewritten one: those of small sizes."""
    return [case for case in cases(captured) if case.name not in ("outliers", "longest")]


def length(case: Case, captured: Captured) -> int | None:
    """Return the largest size, in a case, of a dynamic dimension other than the batch; None where there is none."""
    dims = {symbol for symbol, dim in captured.dims.items() if not dim.is_batch}
    sizes = [
        size
        for item in captured.inputs
        for symbolic, size in zip(item.shape, case.inputs[item.name].shape, strict=True)
        if {str(symbol) for symbol in getattr(symbolic, "free_symbols", ())} & dims
    ]
    return max(sizes, default=None)


def small(captured: Captured) -> Case:
    """Return a case whose intermediate values are few enough to keep."""
    generator = torch.Generator().manual_seed(SEED)
    sizes = {name: min(max(dim.min, 2 if dim.is_batch else SMALL), dim.max) for name, dim in captured.dims.items()}
    sizes = captured.sizes.nearest(sizes)
    return Case("small", {item.name: _values(item, sizes, "small", generator) for item in captured.inputs})


def _between(dim: Dimension) -> int:
    """Return an odd size between the least and the usual one, by their ratio; the report shows errors over length."""
    return _odd(Dimension(dim.name, dim.min, round((dim.min * dim.opt) ** 0.5), dim.max))


def _odd(dim: Dimension) -> int:
    size = min(max(dim.opt, 3), dim.max)
    return max(dim.min, size if size % 2 else size - 1)


def _values(item: CapturedInput, sizes: Mapping[str, int], case: str, generator: torch.Generator) -> Tensor:
    shape = item.sizes(sizes)
    hide = item.hides and (case == "hidden" or (case in ("odd", "outliers") and not _hides_all(item, sizes)))
    meaning = _meanings(item)[0]
    if meaning in ("attend", "masked"):
        mask = (
            torch.rand(shape, generator=generator) < 0.8 if case != "shortest" else torch.ones(shape, dtype=torch.bool)
        )
        if not item.hides and shape:
            mask[..., 0] = True  # a query may attend to one key at least
        mask = _hide_first_row(mask, False) if hide else mask
        return (mask if meaning == "attend" else ~mask).to(item.dtype)
    if item.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not item.dtype.is_floating_point:
        return _integers(shape, item.limit(sizes) or 2, item.distinct, generator).to(item.dtype)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if meaning == "bias":
        drop = torch.rand(shape, generator=generator) < 0.2
        if case == "shortest" or not shape:
            return x.to(item.dtype)
        drop[..., 0] = False
        x = x.masked_fill(drop, -torch.inf)
        return (_hide_first_row(x, -torch.inf) if hide else x).to(item.dtype)
    if case == "outliers":
        x += 10 * torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.001)
    return x.to(item.dtype)


def _hides_all(item: CapturedInput, sizes: Mapping[str, int]) -> bool:
    """Return whether a mask has one row, so that hiding it hides everything: that is a separate case."""
    return item.hides and _meanings(item)[0] in ("attend", "masked", "bias") and math.prod(item.sizes(sizes)[:-1]) == 1


def _integers(shape: Sequence[int], below: int, distinct: bool, generator: torch.Generator) -> Tensor:
    """Draw integers of [0, below): the largest, 0, and all others where there is room; else at random."""
    count, below = math.prod(shape), max(below, 1)
    known = torch.tensor([below - 1, 0])[: min(count, below)]
    if distinct or below <= count:
        known = torch.cat([known, 1 + torch.randperm(max(below - 2, 0), generator=generator)])[:count]
    rest = torch.randint(0, below, (count - len(known),), generator=generator)
    return torch.cat([known, rest])[torch.randperm(count, generator=generator)].reshape(tuple(shape))


def _hide_first_row(mask: Tensor, nothing: bool | float) -> Tensor:
    """Mask one query, or for a mask (batch, keys) one sequence, completely."""
    if mask.numel():
        mask[(0,) * (mask.dim() - 1)] = nothing
    return mask


def _meanings(item: CapturedInput) -> tuple[str, ...]:
    """Return the possible meanings of an input's values, the likeliest first."""
    named = MASK.search(item.name) is not None
    first, second = ("masked", "attend") if named and "pad" in item.name.lower() else ("attend", "masked")
    if item.meaning is not None:
        return (item.meaning,)
    if item.dtype == torch.bool:
        return (first, second, "values")
    if not item.dtype.is_floating_point:
        # Tokenizers write masks as integers, ones where there is a token.
        return (first, second, "values") if named and item.below in (None, 2) else ("values",)
    if not named:
        return ("values",)
    return (first, "bias", second, "values") if first == "masked" else ("bias", first, second, "values")


def settle(captured: Captured, notes: list[str]) -> Captured:
    """Find what masks mean to a model where it is not stated, and whether a query may attend to nothing.

    Args:
        notes: get a line for each assumption.
    """
    masks = [item for item in captured.inputs if _meanings(item) != ("values",)]
    if not masks:
        return captured
    every = list(islice(product(*map(_meanings, masks)), TRIES))
    # Plain values would do for most masks, and show little of them: they are tried when nothing else is left.
    masking = [meanings for meanings in every if "values" not in meanings] or every
    tries = [(meanings, hides) for hides in (True, False) for meanings in masking]
    tries += [(meanings, True) for meanings in every if meanings not in masking]
    best, fewest = None, math.inf
    for meanings, hides in tries:
        tried = _with_meanings(captured, dict(zip((item.name for item in masks), meanings, strict=True)), hides)
        lost = _lost(tried, fewest)
        if lost < fewest:
            best, fewest = (tried, hides), lost
        if not fewest:
            break
    if best is None:
        return captured  # it fails whatever they mean: the first case will say how
    found, hides = best
    for item, settled in zip(captured.inputs, found.inputs, strict=True):
        meaning = settled.meaning
        if item.meaning is None and meaning is not None and (item.name, meaning) != ("attention_mask", "attend"):
            other = next(other for other in _meanings(item) if other != meaning)
            notes.append(
                f"input {item.name} is taken as {meaning} ({MEANINGS[meaning]}); if it is not, say what it is, as in "
                f"--input {item.name}={captured.shape_text(item)}:{other}"
            )
    if not hides:
        names = ", ".join(item.name for item in masks)
        notes.append(f"masks ({names}) always leave a key to attend to: eager PyTorch has no numbers where they do not")
    return found


def _with_meanings(captured: Captured, meanings: Mapping[str, str], hides: bool) -> Captured:
    inputs = tuple(
        replace(item, meaning=meanings[item.name], hides=hides) if item.name in meanings else item
        for item in captured.inputs
    )
    return replace(captured, inputs=inputs)


def _lost(captured: Captured, enough: float) -> float:
    """Count the numbers that are NaN or Inf in eager PyTorch, until there are `enough`; Inf where it fails."""
    lost = 0.0
    for case in cases(captured):
        if case.name in ("longest", "example"):
            continue
        try:
            outputs = run_eager(captured.eager, case.inputs)
        except Exception:  # the user's own code, which may refuse such inputs
            return math.inf
        lost += sum(int((~x.isfinite()).sum()) for x in outputs if x.is_floating_point())
        if lost >= enough:
            break
    return lost


def unproven(captured: Captured) -> list[str]:
    """Return a line for each input of integers of which only some values were tried."""
    lines = []
    for item in captured.inputs:
        whole = not item.dtype.is_floating_point and item.dtype != torch.bool and not item.dtype.is_complex
        if not whole or item.ranged or _meanings(item)[0] in ("attend", "masked"):
            continue
        text = captured.shape_text(item)
        lines.append(
            f"input {item.name}: only integers below {item.below or 2} were tried, and nothing says how large they may "
            f"be; give their range, as in --input {item.name}={text}<512"
        )
    return lines
