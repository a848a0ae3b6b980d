"""The proof of a calibration: an attention's output in float64, at full rank, must not change with the basis.

What an attention makes of its queries and keys stands in its code, which is not ours: a scale for each dimension or a
second product would break in silence. So the basis is tried, on a copy and real inputs, before any weight changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from adaattn.balance import fold
from adaattn.config import FP32
from adaattn.pairs import Pair

Basis = tuple[Tensor, Tensor]  # A and its inverse
MOVED = 1e-5  # relative: float64 leaves less, and code that goes through float32 on its way as well


def try_bases(
    chosen: Mapping[str, Pair], bases: Mapping[str, Basis], call: Callable[[], None]
) -> dict[str, str | None]:
    """For each attention that a call of the model reaches None, or the reason why its basis must not be folded."""
    tried: dict[str, str | None] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, basis in bases.items():
            hook = partial(_try, tried, name, chosen[name], basis)
            hooks.enter_context(chosen[name].module.register_forward_pre_hook(hook, with_kwargs=True))
        call()
    return tried


def _try(
    tried: dict[str, str | None],
    name: str,
    pair: Pair,
    basis: Basis,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    if name not in tried:
        try:
            moved = _moved(pair, basis, args, kwargs)
        except Exception as error:  # another library's code, on a copy that it may not expect
            tried[name] = f"a copy of it in float64 does not run: {type(error).__name__}: {error}"
        else:
            said = f"another basis of its queries and keys changes its output (by {moved:.1e})"
            tried[name] = None if moved <= MOVED else f"{said}: more is made of them than their products"


def _moved(pair: Pair, basis: Basis, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """By how much the output of a copy changes, relatively, when the basis is folded into it."""
    module, query, key = copy.deepcopy((pair.module, pair.query, pair.key))
    for each in (module, query, key):
        each.double()
    with FullRank():
        before = module.forward(*_copied(args), **_copied(kwargs))  # not the copies of our own hooks
        fold(replace(pair, module=module, query=query, key=key), *basis)
        after = module.forward(*_copied(args), **_copied(kwargs))
    moved = 0.0
    for a, b in zip(_tensors(before), _tensors(after), strict=True):
        size = float(a.nan_to_num(0, 0, 0).norm())
        difference = float((a - b).nan_to_num(0, 0, 0).norm())
        moved = max(moved, difference / size if size > 0 else difference)
    return moved


def _copied(x: Any) -> Any:
    """Arguments that a call may change: caches, above all."""
    return tree_map(lambda leaf: _doubled(leaf) if isinstance(leaf, Tensor) else copy.deepcopy(leaf), x)


def _doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _tensors(output: Any) -> list[Tensor]:
    """Not what caches hold: keys are in the new basis there."""
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]


class FullRank(TorchDispatchMode):
    """Every plan is of all dimensions, in the precision of the operands."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.adaattn.adaptive_attention.default:
            precision, rank = torch.full_like(args[5], FP32), torch.full_like(args[6], args[0].shape[-1])
            args = (*args[:5], precision, rank, *args[7:])
        return func(*args, **(kwargs or {}))
