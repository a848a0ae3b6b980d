"""Answer `torch.nn.functional.scaled_dot_product_attention` of any model within a tolerance."""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, TracebackType
from typing import Any, ParamSpec, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaattn.checks import as_choice, check_instance
from adaattn.errors import ConfigError
from adaattn.functional import attend_within, in_autocast_type
from adaattn.masks import mask_with_four_axes, with_four_axes
from adaattn.ops.adaptive_attention.api import as_scale
from adaattn.ops.dispatch import IMPLEMENTATIONS, LARGEST_HEAD_DIM
from adaattn.planning.budget import Budget
from adaattn.planning.error_model import Plan
from adaattn.planning.precision import PRECISIONS
from adaattn.planning.statistics import PlanStatistics
from adaattn.tensor_checks import FLOATS

P = ParamSpec("P")
R = TypeVar("R")
Place = tuple[str, int]  # the path of a module, and the line that calls
# Methods of Tensor in Python: torch.compile cannot trace them where a mode calls them as functions.
_METHODS = tuple(name for name, x in vars(Tensor).items() if isinstance(x, FunctionType) and name[0] != "_")
_CALL = nn.Module._call_impl.__code__  # of the frames in which a module is called
_LOCK = threading.Lock()  # of all counts
_HERE = threading.local()  # `open`: the blocks that a thread is in
_FUSED: list[bool] = []  # for each open block whether torch's fused layers were in use before
_PATHS: WeakKeyDictionary[nn.Module, dict[int, str]] = WeakKeyDictionary()


def adaptive_sdpa(
    tolerance: float,
    *,
    safety: float = Budget.safety,
    precisions: tuple[str, ...] = PRECISIONS,
    low_rank: bool = True,
    impl: str = "auto",
) -> AdaptiveSDPA:
    """Answer each call of `F.scaled_dot_product_attention` within a block, or a decorated function, within a tolerance.

    The model needs no change. Calls that adaptive attention cannot answer go to torch as they are and are counted with
    the reason: dropout, nested tensors, types and head sizes that it does not take. `torch.nn.MultiheadAttention` does
    not take its fused path in the block. The block holds for the thread that opened it. A function that
    `torch.compile` made is called within it. Where activations are recomputed in the backward pass
    (`torch.utils.checkpoint`), call `backward` within it too, or use `adapt`.

    Args:
        tolerance, safety, precisions, low_rank, impl: as in `adaattn.adaptive_attention`.

    Returns:
        The block. `with … as used` gives it a name; `used.calls`, `used.left` and `used.plans` say what happened.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
        >>> with adaptive_sdpa(tolerance=1e-2) as used:
        ...     output = layer(torch.randn(2, 10, 64))
        >>> used.calls, used.left, used.plans["self_attn"]["plans"]
        (1, {}, 8)

    Raises:
        ConfigError: an option out of range.
    """
    return AdaptiveSDPA(Budget(tolerance, safety, precisions, low_rank), impl)


def adapt(
    model: nn.Module,
    tolerance: float,
    *,
    safety: float = Budget.safety,
    precisions: tuple[str, ...] = PRECISIONS,
    low_rank: bool = True,
    impl: str = "auto",
) -> Adapted:
    """Let a model attend as within `adaptive_sdpa` from now on, in any thread and in recomputed activations.

    Args:
        model: changed in place: each of its modules that may attend gets a `forward` that opens the block. Its copies
            attend likewise.
        tolerance, safety, precisions, low_rank, impl: as in `adaptive_sdpa`.

    Returns:
        What undoes it, by `remove()`, or as a context manager at the end of its block; `used` says what happened.

    Example:
        >>> model = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
        >>> adapted = adapt(model, tolerance=1e-2)
        >>> output = model(torch.randn(2, 10, 64))
        >>> adapted.used.calls
        1
        >>> adapted.remove()

    Raises:
        ConfigError: an option out of range, or a model that is adapted already.
    """
    check_instance("model", model, nn.Module, "a torch.nn.Module")
    return Adapted(model, adaptive_sdpa(tolerance, safety=safety, precisions=precisions, low_rank=low_rank, impl=impl))


class AdaptiveSDPA(TorchFunctionMode):
    """A block that `adaptive_sdpa` makes, and what happened in it since `reset`.

    Calls within `torch.compile` and `torch.export` are answered and not counted. A copy of it begins anew.
    """

    def __init__(self, budget: Budget, impl: str = "auto") -> None:
        super().__init__()
        self.budget, self.impl = budget, as_choice("impl", impl, IMPLEMENTATIONS)
        self._compiled: list[bool] = []  # as _FUSED, while code that opens the block is compiled
        self.reset()

    def __reduce__(self) -> tuple[Any, ...]:
        return AdaptiveSDPA, (self.budget, self.impl)

    def reset(self) -> None:
        """Forget what happened so far."""
        self._left: Counter[str] = Counter()
        self._calls: Counter[Place] = Counter()
        self._statistics: dict[tuple[Place, int, int], PlanStatistics] = {}

    @property
    def calls(self) -> int:
        """The number of calls that were answered."""
        return self._calls.total()

    @property
    def left(self) -> dict[str, int]:
        """The number of calls that went to torch, by the reason."""
        return dict(self._left)

    @property
    def plans(self) -> dict[str, dict[str, Any]]:
        """For each place that calls, by the path of its module: calls, plans, precisions, ranks and predicted errors.

        Where a module calls at several lines or with several sizes, the name says which. Reading waits for the device.
        """
        lines, sizes = defaultdict(set), defaultdict(set)
        for (path, line), *size in self._statistics:
            lines[path].add(line)
            sizes[path, line].add(tuple(size))
        found = {}
        for (place, heads, head_dim), statistics in self._statistics.items():
            name = f"{place[0]}:{place[1]}" if len(lines[place[0]]) > 1 else place[0]
            name += f" ({heads} heads of {head_dim})" if len(sizes[place]) > 1 else ""
            found[name] = statistics.precisions() | statistics.ranks() | {"calls": self._calls[place]}
        return found

    def __str__(self) -> str:
        lines = [f"{self.calls} calls answered within {self.budget.tolerance:g}, {self._left.total()} left to torch"]
        for name, made in self.plans.items():
            share = ", ".join(f"{name} {share:.0%}" for name, share in made["share"].items() if share)
            lines.append(f"{name}: {share}; mean rank {made['mean_rank']:.0f} of {made['head_dim']}")
        return "\n".join(lines + [f"left {count}: {reason}" for reason, count in self._left.items()])

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function: each call of it runs in the block."""

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return call

    def __enter__(self) -> Self:
        before = torch.backends.mha.get_fastpath_enabled()
        _use_fused_layers(False)
        if torch.compiler.is_compiling():
            self._compiled.append(before)
        else:
            vars(_HERE).setdefault("open", []).append(self)
            _FUSED.append(before)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if torch.compiler.is_compiling():
            _use_fused_layers(self._compiled.pop())
        else:
            _HERE.open.remove(self)
            before = _FUSED.pop()
            _use_fused_layers(before and not _FUSED)  # not while another thread is in a block

    @property
    def is_open(self) -> bool:
        """Whether this thread is in the block."""
        return self in getattr(_HERE, "open", ())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _UNASKED:
            within = _UNASKED["Tensor.backward" if func is Tensor.backward else name]
            with self:
                return within(*args, **kwargs)
        if torch.compiler.is_compiling() and name in _METHODS:
            return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        counts = not torch.compiler.is_compiling()
        reason = _refusal(query, key, value, attn_mask, dropout_p, enable_gqa)
        if reason is not None:
            if counts:
                with _LOCK:
                    self._left[reason] += 1
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        q, k, v = (with_four_axes(x, enable_gqa) for x in in_autocast_type(query, key, value))
        mask = None if attn_mask is None else mask_with_four_axes(attn_mask, query, enable_gqa)
        factor = as_scale(scale, query.shape[-1])
        output, plan = attend_within(self.budget, q, k, v, mask, is_causal, factor, self.impl)
        if counts:
            self._record(plan, query.shape[-1])
        return output.reshape(query.shape)

    def _record(self, plan: Plan, head_dim: int) -> None:
        place, heads = _place(), plan.rank.shape[1]
        with _LOCK:
            self._calls[place] += 1
            if plan.rank.is_meta or not plan.rank.shape[0]:
                return
            at = (place, heads, head_dim)
            if at not in self._statistics:
                with torch.inference_mode(False):  # they are written outside of it, too
                    self._statistics[at] = PlanStatistics(heads, head_dim, plan.rank.device)
            self._statistics[at].record(plan)


class Adapted:
    """A model that attends within a tolerance, until `remove`.

    Args:
        model: the model.
        used: the block that it attends in, and what happened in it.
    """

    def __init__(self, model: nn.Module, used: AdaptiveSDPA) -> None:
        # A module of torch.nn without children does not attend; wrapping its forward would only cost time.
        modules = [m for m in model.modules() if next(m.children(), None) or m.__module__.split(".")[0] != "torch"]
        modules = [m for m in modules if type(m).forward is not nn.Module.forward]  # a container
        if any(isinstance(vars(module).get("forward"), _Within) for module in modules):
            raise ConfigError(f"{type(model).__name__} is adapted already; call remove() of what adapt returned first")
        self.used = used
        self._modules = modules
        for module in modules:
            vars(module)["forward"] = _Within(used, module.forward)

    def remove(self) -> None:
        """Let the model attend as before."""
        for module in self._modules:
            within = vars(module).pop("forward")
            if getattr(within.forward, "__self__", None) is not module:  # the user had replaced forward
                vars(module)["forward"] = within.forward
        self._modules = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class _Within:
    """A module's forward, in a block."""

    def __init__(self, block: AdaptiveSDPA, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self.block, self.forward = block, forward

    @property
    def __code__(self) -> CodeType:
        """Where the model is defined: torch.export asks."""
        code: CodeType = self.forward.__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling and self.block.is_open:
            return self.forward(*args, **kwargs)
        before = torch.backends.mha.get_fastpath_enabled()
        if compiling:  # where a mode that was there before is entered without its own method
            _use_fused_layers(False)
        with self.block:
            output = self.forward(*args, **kwargs)
        if compiling:
            _use_fused_layers(before)
        return output


def _use_fused_layers(use: bool) -> None:
    """Say whether `torch.nn.MultiheadAttention` and its like take their fused path, which calls no function of torch.

    A mode turns it off in eager mode alone, this in compiled code too. Torch's own setter cannot be compiled.
    """
    torch.backends.mha._is_fastpath_enabled = use


def _unasked(function: Any) -> FunctionType:
    """Return a function of torch without its question whether a mode would rather answer.

    What it calls from within is then seen by the mode, as what a model calls is.
    """
    # Without the name by which torch.compile would find the globals.
    names = {name: x for name, x in function.__globals__.items() if name != "__name__"}
    names |= dict.fromkeys(("has_torch_function", "has_torch_function_unary"), _never)
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _never(operands: object) -> bool:
    return False


# By name, since torch.compile passes other objects for these functions. The first calls attention; the others call it
# again where activations are recomputed.
_UNASKED = {
    function.__name__: _unasked(function)
    for function in (F.multi_head_attention_forward, torch.autograd.backward, torch.autograd.grad)
} | {"Tensor.backward": _unasked(Tensor.backward)}


def _refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> str | None:
    """Return why adaptive attention cannot answer a call as torch would, or None."""
    operands = (query, key, value) if mask is None else (query, key, value, mask)
    if dropout_p > 0:
        return "dropout"
    if any(x.is_nested for x in operands):
        return "nested tensors"
    if any(x.layout is not torch.strided for x in operands):
        return "tensors that are not dense"
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    q, k, v = in_autocast_type(query, key, value)
    if q.dtype not in FLOATS or q.dtype != k.dtype or q.dtype != v.dtype:
        return f"operands of {q.dtype}, {k.dtype} and {v.dtype}"
    head_dim, axes = query.shape[-1], query.dim()
    if not 2 <= axes == key.dim() == value.dim() or key.shape[-1] != head_dim or key.shape[-2] != value.shape[-2]:
        return "shapes that torch refuses too"
    if value.shape[-1] != head_dim:
        return "a head size of the values that is not that of the queries"
    if head_dim > LARGEST_HEAD_DIM:
        return f"a head size above {LARGEST_HEAD_DIM}"
    if 0 in (head_dim, query.shape[-2], key.shape[-2]):
        return "no tokens"
    if key.shape[:-2] != value.shape[:-2] or query.shape[:-3] != key.shape[:-3]:
        return "batch sizes that broadcast"
    if axes > 2 and query.shape[-3] != key.shape[-3] and not (enable_gqa and query.shape[-3] % key.shape[-3] == 0):
        return "heads that broadcast"
    if mask is not None and mask.dtype != torch.bool and mask.dtype not in FLOATS:
        return "a mask that torch refuses too"
    if mask is not None and mask.dim() > max(axes, 2):
        return "a mask with more axes than the queries"
    return None


def _place() -> Place:
    """Return the path, from the outermost module, of the module that calls attention, and the line that does."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    line, caller, modules = frame.f_lineno, frame, []
    above: Any = frame
    while above is not None:
        if above.f_code is _CALL:
            modules.append(above.f_locals["self"])
        above = above.f_back
    if not modules:
        return caller.f_code.co_qualname, line
    inner, root = modules[0], modules[-1]
    if root not in _PATHS or id(inner) not in _PATHS[root]:
        _PATHS[root] = {id(module): name for name, module in root.named_modules()}
    return _PATHS[root].get(id(inner)) or type(inner).__name__, line
