"""Run eager PyTorch in float64, with plans that are recorded, replayed or set aside.

A torch dispatch mode sees every operator of a run, whatever the model's source, so the model needs no hooks.

One file, though long: one dispatch mode, and what it needs to run a model in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

import adaattn.ops  # noqa: F401  # registers the ops that a mode watches
from adaattn.export.capture.module import without_fast_paths
from adaattn.functional import as_exported
from adaattn.masks import attended_keys
from adaattn.ops.signatures import OPS
from adaattn.planning.error_model import Moments, plan_of
from adaattn.planning.precision import FP32, INT8

PlanPair = tuple[Tensor, Tensor]  # precision and rank, (B, H) each
LARGE = 2**23  # numbers of an attention's output, above which it is not kept
FLOAT32_STEP = 2.0**-23
SCORES_AT_ONCE = 2**24  # scores of a block of queries that exist at one time
# What torch computes scaled_dot_product_attention with on a CPU; all its other ways are made of smaller operators.
ATTENTION = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
_WITH_ATTRIBUTES = (torch.ops.aten.leaky_relu, torch.ops.aten.elu, torch.ops.aten.celu)


class _AttentionInDouble(TorchFunctionMode):
    """Gives attention masks of float64: torch checks their type before a dispatch mode sees them."""

    def __init__(self, mode: PlanMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.functional.scaled_dot_product_attention, *ATTENTION):
            args, kwargs = tree_map(self._mode.in_double, (args, kwargs))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class HeadErrors:
    """Relative errors (B, H) of one attention call at its plan; `rounding` is what would be predicted at full rank."""

    head_dim: int
    predicted: Tensor
    rounding: Tensor
    measured: Tensor


@dataclass(frozen=True)
class PlanCall:
    """One call of the op `plan`: the moments, the ladder, scale and limit that it took, and what it returned."""

    moments: Mapping[str, Tensor]
    ladder: Tensor
    scale: float
    limit: float
    precision: Tensor
    rank: Tensor
    predicted: Tensor

    def within(self, share: float) -> PlanPair:
        """Return the plans that the same moments make within a limit larger by a share."""
        limit = self.limit * (1 + share)
        made = reference("plan", **self.moments, ladder=self.ladder, scale=self.scale, limit=limit)
        return made[0], made[1]


class PlanMode(TorchDispatchMode):
    """Watches the attention ops of a run, in order.

    Args:
        double: compute in float64 whatever type the program asks for; attention by its formula, not torch's kernel.
        dtype: the model's own type. Where the program takes a number from the limits of its type (torch.finfo), float64
            computes with those of this one.
        plans: replay these, one a call, instead of the plans that the program makes.
        exact: set all plans aside: fp32 at full rank.
        measure: compare each call with exact attention on its own operands.
        perturb_moments: move all moments by this share first, to see which plans hang on their last digits.
        tilt: move the first dimensions so and the last ones the other way.
        perturb_qk: move each number of q and k up or down, seeded, by this share of the usual size at its place.
        narrow: move the numbers that an operator has as attributes by FLOAT32_STEP: ONNX keeps them in float32.
        perturb_results: move every result of an operator, but whole numbers, up or down by this share, by `seed`.
        keep: keep the arguments of each attention, in `calls`.

    What it saw is in `plans`, `key_means`, `planned`, `errors` (with `measure`) and `outputs`, of each call: `planned`
    is the call of `plan` that made its plan, or None; an output larger than LARGE is None.
    """

    supports_higher_order_operators = True  # torch asks

    def __init__(
        self,
        double: bool = False,
        dtype: torch.dtype | None = None,
        plans: Sequence[PlanPair] | None = None,
        exact: bool = False,
        measure: bool = False,
        perturb_moments: float = 0.0,
        tilt: bool = False,
        perturb_qk: float = 0.0,
        narrow: bool = False,
        perturb_results: float = 0.0,
        seed: int = 0,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []
        self._keep = keep
        self.plans: list[PlanPair] = []
        self.key_means: list[Tensor] = []
        self.planned: list[PlanCall | None] = []
        self._made: list[PlanCall] = []
        self.errors: list[HeadErrors] = []
        self.outputs: list[Tensor | None] = []
        self._exact = exact
        self._replay, self._measure, self._perturb_moments, self._tilt = plans, measure, perturb_moments, tilt
        self.branched = False
        self.double = double
        # float64 copies of tensors that the model keeps outside its parameters and buffers, such as a mask.
        self._copies = WeakTensorKeyDictionary()
        self._limits = _limits_of(dtype) if double and dtype is not None else {}
        self._perturb_qk, self._narrow, self._perturb_results, self._seed = perturb_qk, narrow, perturb_results, seed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.double:
            args, kwargs = tree_map(self.in_double, (args, kwargs))
        if isinstance(func, HigherOrderOperator):  # torch.cond and its like
            self.branched = True
            return func(*tree_map(self._within, args), **kwargs)
        if func is torch.ops.adaattn.token_moments.default:
            moments = reference("token_moments", **_bound("token_moments", args, kwargs))
            return tuple(self._perturbed_moments(x) for x in moments) if self._perturb_moments else moments
        if func is torch.ops.adaattn.plan.default:
            given = _bound("plan", args, kwargs)
            made = reference("plan", **given)
            ladder, scale, limit = (given.pop(name) for name in ("ladder", "scale", "limit"))
            self._made.append(PlanCall(given, ladder, scale, limit, *made))
            return made
        if self._narrow:
            args, kwargs = _narrowed(func, args, kwargs)
        if self.double and func in ATTENTION:
            return self._perturbed(func, _attention_of(func, args, kwargs, self._narrow))
        if self.double and func is torch.ops.aten.view.default:
            return args[0].reshape(args[1])  # a captured program counts on the strides of torch's own attention
        if func is not torch.ops.adaattn.adaptive_attention.default:
            return self._perturbed(func, func(*args, **kwargs))
        given = _bound("adaptive_attention", args, kwargs)
        self.planned.append(next((call for call in self._made if call.precision is given["precision"]), None))
        self.key_means.append(given["key_mean"])
        if self._keep:
            self.calls.append(dict(given))
        if self._exact:
            given["precision"] = torch.full_like(given["precision"], FP32)
            given["rank"] = torch.full_like(given["rank"], given["query"].shape[3])
        if self._replay is not None:
            given["precision"], given["rank"] = self._replay[len(self.plans)]
        if self._perturb_qk:
            given |= self._perturbed_qk(given)
        self.plans.append((given["precision"], given["rank"]))
        output: Tensor = self._perturbed(func, reference("adaptive_attention", **given))
        self.outputs.append(output if output.numel() <= LARGE else None)
        if self._measure:
            self.errors.append(_head_errors(output, **given))
        return output

    def in_double(self, x: Any) -> Any:
        """Return an argument of an operator, whatever type it has or names, in float64."""
        if isinstance(x, torch.dtype):
            return torch.float64 if x.is_floating_point else torch.complex128 if x.is_complex else x
        if isinstance(x, float):
            return self._limits.get(x, x)
        if not isinstance(x, Tensor) or x.dtype not in _NARROW:
            return x
        # One copy for each tensor: an operator may write into it, and the next one reads what was written.
        if x not in self._copies:
            self._copies[x] = x.to(_NARROW[x.dtype])
        return self._copies[x]

    def _within(self, x: Any) -> Any:
        """Return a branch of an operator that runs under this mode."""
        if isinstance(x, Tensor) or not callable(x):
            return x

        def call(*arguments: Any) -> Any:
            with self:
                return x(*arguments)

        return call

    def _perturbed(self, func: Any, result: Any) -> Any:
        """Perturb a result, but not views and tensors written in place, which another operator made."""
        if not self._perturb_results or any(x.alias_info is not None for x in func._schema.returns):
            return result
        return tree_map(self._moved, result)

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        # The same signs for all results of a shape: of a chain of operators they add up, and cancel nothing.
        signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(self._seed)) * 2 - 1
        return x.where(
            x == x.round(), x * (1 + self._perturb_results * signs)
        )  # counts, masks and what was rounded are exact

    def _perturbed_moments(self, x: Tensor) -> Tensor:
        slope = torch.linspace(1, -1, x.shape[-1], dtype=x.dtype) if self._tilt else 1
        return x * (1 + self._perturb_moments * slope)

    def _perturbed_qk(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        query, key = given["query"], given["key"]
        kept = torch.arange(query.shape[3]) < given["rank"][:, :, None, None]
        integers = given["precision"] >= INT8
        generator = torch.Generator().manual_seed(len(self.plans))
        centered = key - given["key_mean"].unsqueeze(2)
        return {
            "query": query + self._perturb_qk * _move(query, query * kept, integers, generator),
            "key": key + self._perturb_qk * _move(key, centered, integers, generator),
        }


def _bound(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names, without `impl`: the reference computes all that is compared."""
    given = OPS[op].bound(args, kwargs)
    given.pop("impl", None)
    return given


def reference(op: str, **given: Any) -> Any:
    """Compute an op by its reference, which rounds as its plan says."""
    return getattr(torch.ops.adaattn, op)(**given, impl="reference")


def _move(x: Tensor, rounded: Tensor, integers: Tensor, generator: torch.Generator) -> Tensor:
    """Return moves up or down by the usual size of a number at its place, which respect int8 rounding in some heads."""
    # Sums err by the size of their terms, whatever is left of them: by that of the token and of the dimension.
    token, dim, all_of_them = (x.square().mean(axes, keepdim=True).sqrt() for axes in (-1, -2, (-1, -2)))
    size = token * dim / all_of_them.clamp_min(torch.finfo(x.dtype).tiny)
    noise = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
    move = size * (noise + noise.sign() / 2)  # equal ones could leave a tie a tie
    # The largest number of a token is 127 steps; if it moved, another could stay on its side of an edge.
    steps = integers.unflatten(1, (x.shape[1], -1)).any(-1)[:, :, None, None]
    return move.where(~steps | (rounded.abs() < rounded.abs().amax(-1, keepdim=True)), 0)


def run_eager(
    eager: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    mode: PlanMode | None = None,
    written: Sequence[str] = (),
) -> list[Tensor]:
    """Return a model's output tensors in order, and the `written` inputs as it leaves them.

    It may write into its inputs, which are copies.
    """
    inputs = {name: x.clone() for name, x in inputs.items()}
    with torch.no_grad(), as_exported(), without_fast_paths(), _default_dtype(mode is not None and mode.double):
        if mode is None:
            outputs = eager(**inputs)
        else:
            with _AttentionInDouble(mode) if mode.double else nullcontext(), mode:
                outputs = eager(**inputs)
            if mode.branched:  # what torch compiled of torch.cond under the mode would be used without it
                torch._dynamo.reset()
    found = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    return [x.detach() for x in (*found, *(inputs[name] for name in written))]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return scaled_dot_product_attention by its formula, and the logarithm of each row's sum.

    A query that may attend to nothing gives zeros. Where the query has more heads than the key, each of the key's
    serves as many in turn.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.dim() > 3 and query.shape[-3] != key.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    queries, keys = query.shape[-2], key.shape[-2]
    rows = max(1, SCORES_AT_ONCE // max(1, math.prod(query.shape[:-2]) * keys))
    outputs, sums = [], []
    for start in range(0, max(queries, 1), rows):  # one block at least, if an empty one
        block = slice(start, min(start + rows, queries))
        scores = query[..., block, :] @ key.mT * scale
        if is_causal:
            hidden = torch.arange(keys) > torch.arange(queries)[block].unsqueeze(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        if attn_mask is not None:
            mask = attn_mask if attn_mask.dim() < 2 or attn_mask.shape[-2] == 1 else attn_mask[..., block, :]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        peak = scores.amax(-1, keepdim=True) if keys else scores.new_zeros(*scores.shape[:-1], 1)
        weights = (scores - peak.clamp_min(torch.finfo(scores.dtype).min)).exp()
        total = weights.sum(-1, keepdim=True)
        outputs.append(weights @ value / total.where(total != 0, 1))
        sums.append((total.log() + peak).squeeze(-1))
    return torch.cat(outputs, dim=-2), torch.cat(sums, dim=-1)


def _narrowed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return an operator's arguments, with ONNX attributes among them moved by a last place of float32."""
    # Of other operators, numbers that are of any type (`Scalar`) become tensors of the operand's own type.
    kinds = ("float", "number") if func.overloadpacket in _WITH_ATTRIBUTES else ("float",)
    known = {argument.name: any(kind in str(argument.type) for kind in kinds) for argument in func._schema.arguments}

    def rounded(name: str, x: Any) -> Any:
        return x * (1 + FLOAT32_STEP) if known[name] and isinstance(x, float) else x

    return (
        tuple(rounded(name, x) for name, x in zip(known, args, strict=False)),
        {name: rounded(name, x) for name, x in kwargs.items()},
    )


def _attention_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], narrow: bool) -> Any:
    """Compute an operator of ATTENTION by its formula."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    wanted = {name: given[name] for name in ("attn_mask", "is_causal", "scale") if name in given}
    if narrow and wanted.get("scale") is None:
        wanted["scale"] = given["query"].shape[-1] ** -0.5 * (1 + FLOAT32_STEP)
    output, sums = attention(given["query"], given["key"], given["value"], **wanted)
    return output if func is ATTENTION[0] else (output, sums)


@contextmanager
def _default_dtype(double: bool) -> Iterator[None]:
    """Let float64 be the type of what a program makes without saying of which type."""
    before = torch.get_default_dtype()
    try:
        if double:
            torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_dtype(before)


def to_double(x: Tensor) -> Tensor:
    """Return a floating-point tensor in float64; others as they are."""
    return x.double() if x.is_floating_point() else x


_NARROW = {
    dtype: torch.complex128 if dtype.is_complex else torch.float64
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and (dtype.is_floating_point or dtype.is_complex)
    and dtype not in (torch.float64, torch.complex128)
}


def _limits_of(dtype: torch.dtype) -> dict[float, float]:
    """Return for each limit of float64 that of a type."""
    double, own = torch.finfo(torch.float64), torch.finfo(dtype)
    return {getattr(double, name): getattr(own, name) for name in ("min", "max", "eps", "tiny", "smallest_normal")}


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
    keys = attended_keys(attn_mask, key.shape[1])
    wanted = ((query, None, False), (key, keys, True), (value, keys, False))
    q, k, v = (Moments(*reference("token_moments", x=x, key_mask=mask, center=center)) for x, mask, center in wanted)
    exact = reference(
        "adaptive_attention",
        query=query.double(),
        key=key.double(),
        value=value.double(),
        key_mean=key_mean,
        value_peak=value_peak,
        precision=torch.full_like(precision, FP32),
        rank=torch.full_like(rank, query.shape[3]),
        attn_mask=attn_mask,
        scale=scale,
        is_causal=is_causal,
    )
    difference = (output.double() - exact).square().mean(dim=(2, 3)).sqrt()
    size = exact.square().mean(dim=(2, 3)).sqrt()
    predicted = plan_of(precision, rank, q, k, v, scale).predicted_error
    rounding = plan_of(precision, torch.full_like(rank, query.shape[3]), q, k, v, scale).predicted_error
    # Where a head attends to nothing there is nothing to round, and the model divides by next to nothing.
    predicted, rounding = (torch.where(size > 0, x, 0) for x in (predicted, rounding))
    return HeadErrors(query.shape[3], predicted, rounding, torch.where(size > 0, difference / size, difference))
