"""Recognise masks that are cheap: causality that a model builds as a tensor, and padding that is a row per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from adaattn.export.capture.captured import tensors_held
from adaattn.export.rewrite.match import Not, Site, Step, aten, value_of
from adaattn.input_spec import Dimension

LOW = -1e4  # a score that much lower has a probability of zero
LARGEST = 1 << 24  # numbers of a mask that are looked at
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.__iand__.Tensor)
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default)


class _UnknownError(Exception):
    """A value hangs on the inputs of the model, or is too large to look at."""


class Sizes:
    """Compute what follows from sizes and constants alone, at several sizes."""

    def __init__(self, program: ExportedProgram, dims: Mapping[str, Dimension], fitted: Callable[..., Any]) -> None:
        self._constants = tensors_held(program)
        self._points = [fitted(point) for point in _points(dims)]
        self._found: dict[tuple[Node, int], Any] = {}

    def everywhere(self, node: Node) -> list[Tensor] | None:
        """Return a node's value at each of the sizes; None where it hangs on more than sizes."""
        try:
            with torch.no_grad():
                return [self._at(node, place) for place in range(len(self._points))]
        except _UnknownError:
            return None

    def _at(self, node: Node, place: int) -> Any:
        if (node, place) not in self._found:
            self._found[node, place] = self._compute(node, place)
        return self._found[node, place]

    def _compute(self, node: Node, place: int) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return self._number(value, place)
        if node.op == "placeholder":
            if node.name in self._constants:
                return self._constants[node.name]
            raise _UnknownError
        if node.op != "call_function" or getattr(node.target, "_schema", None) is None:
            raise _UnknownError
        if isinstance(value, Tensor):
            count = 1
            for size in value.shape:
                count *= self._number(size, place)
            if count > LARGEST:
                raise _UnknownError
        if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
            raise _UnknownError

        def known(x: Node) -> Any:
            return self._at(x, place)

        args, kwargs = map_arg(node.args, known), map_arg(node.kwargs, known)
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except _UnknownError:
            raise
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise _UnknownError from error

    def _number(self, value: Any, place: int) -> Any:
        if not isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return value
        expression = value.node.expr
        try:
            values = {symbol: self._points[place][str(symbol)] for symbol in expression.free_symbols}
            found = expression.subs(values)
            kind = {torch.SymBool: bool, torch.SymFloat: float}.get(type(value), int)
            return kind(found)
        except (KeyError, TypeError) as error:
            raise _UnknownError from error


def _points(dims: Mapping[str, Dimension]) -> Iterator[dict[str, int]]:
    """Return sizes to compute at: least, largest, and odd ones between, of all dimensions alike and each of another.

    Where queries and keys have dimensions of their own, sizes that are always alike would not tell causality from the
    top left from causality that ends at the last key.
    """
    seen = []
    for wanted in (1, 2, 3, 7, 16, 33, None):
        for apart in (0, 5, -5):
            point = {}
            for place, (name, dim) in enumerate(dims.items()):
                ask = 2 if dim.is_batch else dim.max if wanted is None else wanted + apart * place
                point[name] = min(max(ask, dim.min), dim.max)
            if point not in seen:
                seen.append(point)
                yield point


def simplified(site: Site, sizes: Sizes) -> Site:
    """Return a site with causality said as such, and masks without what hides nothing."""
    causal, steps = site.is_causal, []
    for step in site.steps:
        if step.kind == "add":
            if isinstance(step.given[0], Node) and _all(sizes.everywhere(step.given[0]), _adds_causality):
                causal = True
                continue
            steps.append(step)
        elif step.kind == "attend":
            found, parts = _split(step.given[0], sizes)
            causal |= found
            steps += [Step("attend", (part,)) for part in parts]
        elif step.kind == "hide":
            mask, number = step.given
            low = isinstance(number, (int, float)) and number <= LOW
            if isinstance(number, Node):
                low = _all(sizes.everywhere(number), lambda x: x.numel() == 1 and bool((x <= LOW).all()))
            attends = mask.mask if isinstance(mask, Not) else None
            if (low and attends is not None and _all(sizes.everywhere(attends), _is_causality)) or (
                low and attends is None and _all(sizes.everywhere(mask), lambda x: _is_causality(~x.bool()))
            ):
                causal = True
            else:
                steps.append(step)
        else:
            steps.append(step)
    return replace(site, is_causal=causal, steps=steps)


def _all(values: Sequence[Tensor] | None, accepts: Any) -> bool:
    return values is not None and all(isinstance(x, Tensor) and accepts(x) for x in values)


def _split(mask: Node, sizes: Sizes) -> tuple[bool, list[Node]]:
    """Return whether a mask contains causality, and its other parts, all of which must be true."""
    values = sizes.everywhere(mask)
    if _all(values, lambda x: x.dtype == torch.bool and bool(x.all())):
        return False, []
    if _all(values, _is_causality):
        return True, []
    first: Any = mask.args[0] if mask.args else None
    if mask.target in _AND:
        parts = [_split(part, sizes) for part in mask.args if isinstance(part, Node)]
        return any(causal for causal, _ in parts), [x for _, several in parts for x in several]
    if mask.target in _COPIES or (mask.target in _CASTS and value_of(first).dtype == torch.bool):
        return _split(first, sizes)
    if mask.target is aten.expand.default and value_of(first).dim() == value_of(mask).dim():
        return _split(first, sizes)
    return False, [mask]


def _is_causality(mask: Tensor) -> bool:
    """Return whether a mask, True where a query attends, is that of causality from the top left, for all heads."""
    if mask.dtype != torch.bool or mask.dim() < 2 or mask.shape[:-2].numel() != 1:
        return False
    return torch.equal(mask.reshape(mask.shape[-2:]), torch.ones(mask.shape[-2:], dtype=torch.bool).tril())


def _adds_causality(bias: Tensor) -> bool:
    """Return whether numbers added to scores are zero, and low where causality hides."""
    if not bias.is_floating_point() or bias.dim() < 2 or bias.shape[:-2].numel() != 1:
        return False
    return bool(((bias == 0) | (bias <= LOW)).all()) and _is_causality(bias == 0)
