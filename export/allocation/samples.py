"""Read samples for an allocation: named tensors that a captured program takes, in halves that choose and certify."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaattn.errors import ConfigError
from adaattn.export.capture.captured import Captured, CapturedInput

LEAST = 8  # samples: of fewer, half says nothing of a quantile
WANTED = "an .npz of inputs by name, FILE.py or package.module:function"

Sample = Mapping[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Samples that choose a plan, and others that certify it: every second one."""

    choosing: tuple[Sample, ...]
    certifying: tuple[Sample, ...]


def read(captured: Captured, batches: Iterable[Any]) -> Samples:
    """Return the samples of some batches.

    Where the first dimension of every input is a dynamic batch, each of its entries is a sample.

    Args:
        batches: each a mapping of inputs by name, a tuple or list of them in order, or one tensor.

    Raises:
        ConfigError: wrong names, shapes, types or sizes, NaN or Inf, too few, or an iterator that fails.
    """
    single = _batch_symbol(captured)
    found: list[Sample] = []
    iterator, place = iter(batches), 0
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            break
        except ConfigError:
            raise
        except Exception as error:  # the user's own code
            raise ConfigError(f"the samples fail after {place} batches: {type(error).__name__}: {error}") from error
        place += 1
        named = _named(captured, batch, place)
        checked = {item.name: _checked(item, named[item.name], place) for item in captured.inputs}
        sizes = _sizes(captured, checked, place, single)
        if single is None:
            found.append(checked)
        else:
            rows = range(sizes[single])
            found += [{name: x[row : row + 1] for name, x in checked.items()} for row in rows]
    if len(found) < LEAST:
        raise ConfigError(f"{len(found)} samples are too few to choose types and to certify them; give {LEAST} or more")
    return Samples(tuple(found[::2]), tuple(found[1::2]))


def _batch_symbol(captured: Captured) -> str | None:
    """Return the symbol of a dynamic batch that every input starts with, if it may be 1."""
    first = {str(item.shape[0]) if item.shape else "" for item in captured.inputs}
    symbol = first.pop() if len(first) == 1 else ""
    size = captured.dims.get(symbol)
    if size is None or size.min > 1:
        return None
    wanted = {name: dim.opt for name, dim in captured.dims.items()} | {symbol: 1}
    return symbol if captured.sizes.nearest(wanted)[symbol] == 1 else None


def _named(captured: Captured, batch: Any, place: int) -> Mapping[str, Any]:
    names = [item.name for item in captured.inputs]
    if isinstance(batch, Mapping):
        unknown = [str(name) for name in batch if name not in names]
        missing = [name for name in names if name not in batch]
        if unknown or missing:
            wrong = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is no input"
            raise ConfigError(f"batch {place} of the samples {wrong}; the inputs are {', '.join(names)}")
        return batch
    values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if len(values) != len(names):
        raise ConfigError(f"batch {place} of the samples has {len(values)} tensors; the inputs are {', '.join(names)}")
    return dict(zip(names, values, strict=True))


def _checked(item: CapturedInput, x: Any, place: int) -> Tensor:
    where = f"{item.name} in batch {place} of the samples"
    if not isinstance(x, Tensor):
        try:
            x = torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"{where} is a {type(x).__name__}; give a tensor or an array") from None
    if x.dim() != len(item.shape):
        raise ConfigError(f"{where} has {x.dim()} dimensions, {tuple(x.shape)}; the input has {len(item.shape)}")
    kinds = [(each.is_floating_point, each == torch.bool) for each in (x.dtype, item.dtype)]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"{where} is of type {_text(x.dtype)}; the input is {_text(item.dtype)}")
    if x.dtype.is_floating_point and not x.isfinite().all():
        raise ConfigError(f"{where} has NaN or Inf; types are chosen by errors, of which such numbers have none")
    found: Tensor = x.detach().cpu().to(item.dtype)
    return found


def _sizes(captured: Captured, given: Mapping[str, Tensor], place: int, single: str | None) -> dict[str, int]:
    """Return the sizes of the dynamic dimensions in a batch.

    Args:
        single: the dimension whose entries come one at a time, of any number.
    """
    sizes: dict[str, int] = {}
    for item in captured.inputs:
        for wanted, size in zip(item.shape, given[item.name].shape, strict=True):
            symbol = str(wanted)
            if symbol in captured.dims:
                dim = captured.dims[symbol]
                if symbol != single and not dim.min <= size <= dim.max:
                    raise ConfigError(f"batch {place} of the samples has {dim.name}={size}; the export takes {dim}")
                if sizes.setdefault(symbol, size) != size:
                    raise ConfigError(f"batch {place} of the samples has {dim.name}={sizes[symbol]} and {size}")
            elif isinstance(wanted, int) and wanted != size:
                shape = captured.shape_text(item)
                raise ConfigError(f"{item.name} in batch {place} of the samples has {size} where it takes {shape}")
    return sizes


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def split_evenly(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Return at most so many samples, taken evenly."""
    step = max(1, -(-len(samples) // most))
    return list(samples[::step])
