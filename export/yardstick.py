"""What a model should compute: eager PyTorch in float64, with plans that are recorded, replayed, or set aside.

A torch dispatch mode sees every operator of a run, whatever the model's source, so the model needs no hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from adaattn.budget import Moments, plan_of
from adaattn.config import FP32, INT8
from adaattn.functional import as_exported
from adaattn.masks import attended_keys

PlanPair = tuple[Tensor, Tensor]  # precision and rank, (B, H) each
LARGE = 2**23  # numbers of an attention's output, above which it is not kept


@dataclass(frozen=True)
class HeadErrors:
    """Relative errors (B, H) of one attention call at its plan; `rounding` is what would be predicted at full rank."""

    head_dim: int
    predicted: Tensor
    rounding: Tensor
    measured: Tensor


class PlanMode(TorchDispatchMode):
    """Watches the attention ops of a run, in order.

    Args:
        double: compute in float64 whatever type the program asks for.
        plans: replay these, one a call, instead of the plans that the program makes.
        measure: compare each call with exact attention on its own operands.
        nudge: move all moments by this share first, to see which plans hang on their last digits.
        tilt: move the first dimensions so and the last ones the other way.
        shake: move each number of q and k up or down, seeded, by this share of the usual size at its place.
        noise: move every number that an operator makes, but whole ones, up or down by this share, at random by `seed`.

    What it saw is in `plans`, `errors` (with `measure`) and `outputs`, of each call; an output larger than LARGE is
    None.
    """

    supports_higher_order_operators = True  # torch asks

    def __init__(
        self,
        double: bool = False,
        plans: Sequence[PlanPair] | None = None,
        measure: bool = False,
        nudge: float = 0.0,
        tilt: bool = False,
        shake: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.plans: list[PlanPair] = []
        self.errors: list[HeadErrors] = []
        self.outputs: list[Tensor | None] = []
        self._double, self._replay, self._measure, self._nudge, self._tilt = double, plans, measure, nudge, tilt
        self.branched = False
        self._shake, self._noise, self._seed = shake, noise, seed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._double:
            args, kwargs = tree_map(_as_double_dtype, (args, kwargs))
        if isinstance(func, HigherOrderOperator):  # torch.cond and its like
            self.branched = True
            return func(*tree_map(self._within, args), **kwargs)
        if func is torch.ops.adaattn.token_moments.default:
            moments = func(*args[:3])  # without `impl`: in float64 only the reference runs
            return tuple(self._nudged(x) for x in moments) if self._nudge else moments
        if func is not torch.ops.adaattn.adaptive_attention.default:
            return self._noised(func, func(*args, **kwargs))
        args = args[:10]
        if self._replay is not None:
            args = (*args[:5], *self._replay[len(self.plans)], *args[7:])
        if self._shake:
            args = (*self._shaken(args[0], args[1], args[3], args[5], args[6]), *args[2:])
        self.plans.append((args[5], args[6]))
        output: Tensor = self._noised(func, func(*args, **kwargs))
        self.outputs.append(output if output.numel() <= LARGE else None)
        if self._measure:
            self.errors.append(_head_errors(output, *args))
        return output

    def _within(self, x: Any) -> Any:
        """A branch of an operator, run under this mode."""
        if isinstance(x, Tensor) or not callable(x):
            return x

        def call(*arguments: Any) -> Any:
            with self:
                return x(*arguments)

        return call

    def _noised(self, func: Any, result: Any) -> Any:
        """Not of views and of what is written in place: what they show was made by another operator."""
        if not self._noise or any(x.alias_info is not None for x in func._schema.returns):
            return result
        return tree_map(self._moved, result)

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        # The same signs for all results of a shape: of a chain of operators they add up, and cancel nothing.
        signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(self._seed)) * 2 - 1
        return x.where(x == x.round(), x * (1 + self._noise * signs))  # counts, masks and what was rounded are exact

    def _nudged(self, x: Tensor) -> Tensor:
        slope = torch.linspace(1, -1, x.shape[-1], dtype=x.dtype) if self._tilt else 1
        return x * (1 + self._nudge * slope)

    def _shaken(
        self, query: Tensor, key: Tensor, key_mean: Tensor, precision: Tensor, rank: Tensor
    ) -> tuple[Tensor, Tensor]:
        kept = torch.arange(query.shape[3]) < rank[:, :, None, None]
        integers = precision >= INT8
        generator = torch.Generator().manual_seed(len(self.plans))
        return (
            query + self._shake * _move(query, query * kept, integers, generator),
            key + self._shake * _move(key, key - key_mean.unsqueeze(2), integers, generator),
        )


def _move(x: Tensor, rounded: Tensor, integers: Tensor, generator: torch.Generator) -> Tensor:
    """Up or down by the usual size of a number at its place, of what is rounded to integers in some heads."""
    # Sums err by the size of their terms, whatever is left of them: by that of the token and of the dimension.
    token, dim, all_of_them = (x.square().mean(axes, keepdim=True).sqrt() for axes in (-1, -2, (-1, -2)))
    size = token * dim / all_of_them.clamp_min(torch.finfo(x.dtype).tiny)
    noise = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
    move = size * (noise + noise.sign() / 2)  # equal ones could leave a tie a tie
    # The largest number of a token is 127 steps; if it moved, another could stay on its side of an edge.
    steps = integers.unflatten(1, (x.shape[1], -1)).any(-1)[:, :, None, None]
    return move.where(~steps | (rounded.abs() < rounded.abs().amax(-1, keepdim=True)), 0)


def run(eager: Callable[..., Any], inputs: Mapping[str, Tensor], mode: PlanMode | None = None) -> list[Tensor]:
    """The tensors that a model returns, in order; it may write into its inputs, which are copies."""
    inputs = {name: x.clone() for name, x in inputs.items()}
    with torch.no_grad(), as_exported():
        if mode is None:
            outputs = eager(**inputs)
        else:
            with mode:
                outputs = eager(**inputs)
            if mode.branched:  # what torch compiled of torch.cond under the mode would be used without it
                torch._dynamo.reset()
    return [x.detach() for x in tree_leaves(outputs) if isinstance(x, Tensor)]


def to_double(x: Tensor) -> Tensor:
    """float64 of a floating-point tensor; others as they are."""
    return x.double() if x.is_floating_point() else x


def _as_double_dtype(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def _head_errors(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_peak: Tensor,
    precision: Tensor,
    rank: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    is_causal: bool,
) -> HeadErrors:
    ops = torch.ops.adaattn
    keys = attended_keys(attn_mask, key.shape[1])
    wanted = ((query, None, False), (key, keys, True), (value, keys, False))
    q, k, v = (Moments(*ops.token_moments(x, mask, center)) for x, mask, center in wanted)
    exact = ops.adaptive_attention(
        query.double(),
        key.double(),
        value.double(),
        key_mean,
        value_peak,
        torch.full_like(precision, FP32),
        torch.full_like(rank, query.shape[3]),
        attn_mask,
        scale,
        is_causal,
    )
    difference = (output.double() - exact).square().mean(dim=(2, 3)).sqrt()
    size = exact.square().mean(dim=(2, 3)).sqrt()
    predicted = plan_of(precision, rank, q, k, v, scale).predicted_error
    rounding = plan_of(precision, torch.full_like(rank, query.shape[3]), q, k, v, scale).predicted_error
    assert predicted is not None
    assert rounding is not None
    # Where a head attends to nothing there is nothing to round, and the model divides by next to nothing.
    predicted, rounding = (torch.where(size > 0, x, 0) for x in (predicted, rounding))
    return HeadErrors(query.shape[3], predicted, rounding, torch.where(size > 0, difference / size, difference))
