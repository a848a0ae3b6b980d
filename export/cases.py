"""Inputs that a model must survive: the shortest, odd and longest sizes, masked rows, outliers. Seeded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adaattn.export.capture import Captured, CapturedInput
from adaattn.input_spec import Dimension

SEED = 20260101
SMALL = 9  # tokens


@dataclass(frozen=True)
class Case:
    """Named inputs of a model, on the CPU and in its types."""

    name: str
    inputs: Mapping[str, Tensor]


def cases(captured: Captured) -> list[Case]:
    """Golden inputs of a captured program, and the user's own where there are some."""
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
    if captured.example is not None:
        found.append(Case("example", captured.example))
    return found


def length(case: Case, captured: Captured) -> int | None:
    """The largest size, in a case, of a dynamic dimension that is no batch; None where there is none."""
    dims = {symbol for symbol, dim in captured.dims.items() if not dim.is_batch}
    sizes = [
        size
        for item in captured.inputs
        for symbolic, size in zip(item.shape, case.inputs[item.name].shape, strict=True)
        if {str(symbol) for symbol in getattr(symbolic, "free_symbols", ())} & dims
    ]
    return max(sizes, default=None)


def small(captured: Captured) -> Case:
    """A case whose intermediate values are few enough to keep."""
    generator = torch.Generator().manual_seed(SEED)
    sizes = {name: min(max(dim.min, 2 if dim.is_batch else SMALL), dim.max) for name, dim in captured.dims.items()}
    sizes = captured.sizes.nearest(sizes)
    return Case("small", {item.name: _values(item, sizes, "small", generator) for item in captured.inputs})


def _between(dim: Dimension) -> int:
    """An odd size between the least and the usual one, by their ratio: errors are looked at over the length."""
    return _odd(Dimension(dim.name, dim.min, round((dim.min * dim.opt) ** 0.5), dim.max))


def _odd(dim: Dimension) -> int:
    size = min(max(dim.opt, 3), dim.max)
    return max(dim.min, size if size % 2 else size - 1)


def _values(item: CapturedInput, sizes: Mapping[str, int], case: str, generator: torch.Generator) -> Tensor:
    shape = item.sizes(sizes)
    hide = case in ("odd", "outliers")
    named = re.search(r"(^|_)(mask|bias)$", item.name) is not None
    # Tokenizers write masks as integers, ones where there is a token.
    if item.dtype == torch.bool or (item.below == 2 and named):
        mask = (
            torch.rand(shape, generator=generator) < 0.8 if case != "shortest" else torch.ones(shape, dtype=torch.bool)
        )
        return (_hide_first_row(mask, False) if hide else mask).to(item.dtype)
    if not item.dtype.is_floating_point:
        return torch.randint(0, item.below or 2, shape, generator=generator).to(item.dtype)
    if named:
        mask = torch.where(torch.rand(shape, generator=generator) < 0.8, 0.0, -torch.inf if hide else 0.0)
        return (_hide_first_row(mask, -torch.inf) if hide else mask).to(item.dtype)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case == "outliers":
        x += 10 * torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.001)
    return x.to(item.dtype)


def _hide_first_row(mask: Tensor, nothing: bool | float) -> Tensor:
    """A query, or for a mask (batch, keys) a sequence, that may attend to nothing."""
    mask[(0,) * (mask.dim() - 1)] = nothing
    return mask
