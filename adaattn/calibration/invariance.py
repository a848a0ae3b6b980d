"""Check that a change of basis leaves an attention's output unchanged, in float64 and at full rank.

Third-party attention may use q and k in ways that its signature does not show, such as a scale for each dimension or a
second product, and calibration would break it silently. So a random basis is tried on a copy, with real inputs, before
any weight changes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from adaattn.calibration.balancing import fold
from adaattn.calibration.projections import QueryKeyProjections
from adaattn.planning.precision import FP32

MOVED = 1e-3  # of what a basis for the queries alone does; an attention that a basis moves by more must keep its own
SEEN = 1e-11  # relative: scores that move the output by less are lost in float64's rounding, as those of a single token
CLEAR = 1e-5  # and less than this in float32's, in which some code computes
UNTRIED = "no batch shows whether a basis of its queries and keys would change its output"


def check_invariance(
    pair: QueryKeyProjections, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[bool, str | None]:
    """Return whether a call of the attention decides if a basis may be folded into it; and why not, or why not yet."""
    try:
        moved, control = _moved(pair, args, kwargs)
    except Exception as error:  # another library's code, on a copy that it may not expect
        return False, f"a copy of it in float64 does not run: {type(error).__name__}: {error}"
    if control > SEEN and moved <= MOVED * control:  # not so where either is NaN
        return True, None
    if control < CLEAR:
        return False, UNTRIED
    said = f"another basis of its queries and keys changes its output (by {moved:.1e})"
    return True, f"{said}: it uses them for more than their products"


def _moved(pair: QueryKeyProjections, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, float]:
    """Return the relative change of a copy's output with a basis, and with one for the queries alone."""
    outputs = []
    basis, inverse, one = _random_basis(pair)
    for matrices in ((one, one), (basis, inverse), (basis, one)):
        module, query, key = copy.deepcopy((pair.module, pair.query, pair.key))
        for each in (module, query, key):
            each.double()
        fold(replace(pair, module=module, query=query, key=key), *matrices)
        projected: list[int] = []
        key.register_forward_hook(lambda module, args, output, seen=projected: seen.append(output.shape[-2]))
        with FullRank() as mode:
            outputs.append(_tensors(module.forward(*_doubled(args), **_doubled(dict(kwargs)))))
        if not projected or mode.keys - set(projected):  # keys of an earlier call are in the basis of then
            return 0.0, 0.0
    before, after, wrong = outputs
    return _distance(after, before), _distance(wrong, before)


def _random_basis(pair: QueryKeyProjections) -> tuple[Tensor, Tensor, Tensor]:
    """Return a well-conditioned A of each key head, its inverse, and the identity; float64."""
    size, generator = (pair.num_kv_heads, pair.head_dim, pair.head_dim), torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(size, generator=generator, dtype=torch.float64))[0]
    stretch = torch.linspace(0.5, 2, pair.head_dim, dtype=torch.float64)
    one = torch.eye(pair.head_dim, dtype=torch.float64).expand(size)
    return turn * stretch, (turn / stretch).mT, one


def _doubled(arguments: Any) -> Any:
    """Return copies of arguments, which a call may change (caches do), with tensors in float64."""

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return copy.deepcopy(x)
        return x.to(torch.float64, copy=True) if x.is_floating_point() else x.clone()

    return tree_map(copied, arguments)


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output without those in caches, whose keys are in the new basis."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if is_dataclass(output):
        output = [getattr(output, field.name) for field in fields(output)]
    elif isinstance(output, Mapping):
        output = list(output.values())
    return [x for item in output for x in _tensors(item)] if isinstance(output, (tuple, list)) else []


def _distance(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest relative difference, of what is finite without a basis; NaN is larger than all."""
    if not want:
        raise ValueError("its output holds no tensor")
    distances = []
    for a, b in zip(got, want, strict=True):
        finite = b.isfinite()  # a row that attends to nothing may be NaN
        size, difference = float(b[finite].norm()), float((a - b)[finite].norm())
        distances.append(difference / size if size > 0 else difference)
    return max(distances, key=lambda x: (x != x, x))


class FullRank(TorchDispatchMode):
    """Every plan is of all dimensions, in the precision of the operands; `keys` are the numbers of keys that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.adaattn.adaptive_attention.default or "scaled_dot_product" in str(func):
            given = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
            self.keys.add(given["key"].shape[2])
            if "rank" in given:
                full = torch.full_like(given["rank"], given["query"].shape[-1])
                given |= {"precision": torch.full_like(given["precision"], FP32), "rank": full}
                return func(**given)
        return func(*args, **kwargs)
