"""Find in a program how large the integers of an input may be, from where they are used as indices."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

Size: TypeAlias = int | sympy.Expr
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Operators whose results are values of their first tensors.
_KEEP = (
    "alias broadcast_tensors broadcast_to cat chunk clone concat contiguous constant_pad_nd copy detach detach_ "
    "diagonal expand expand_as flatten flip gather getitem hstack index index_select lift_fresh lift_fresh_copy "
    "masked_fill masked_fill_ movedim narrow pad permute ravel repeat repeat_interleave reshape roll select slice "
    "split split_with_sizes squeeze stack swapaxes t take_along_dim tile to transpose tril triu type_as unbind "
    "unflatten unsqueeze view view_as vstack where _to_copy _unsafe_view"
)
_SAME = frozenset(_KEEP.split())
_INERT = frozenset(("sym_size", "sym_numel", "_assert_tensor_metadata", "zeros_like", "ones_like", "empty_like"))
_TABLES = ("embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
_ALONG_DIM = {"gather": (2, 1), "index_select": (2, 1), "take_along_dim": (1, 2)}  # places of index and dimension
_WRITES = ("scatter", "index_copy")  # of indices that come twice it is left open which one stays
_ADDS = ("scatter_add", "scatter_reduce", "index_add", "index_fill", "index_reduce")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


@dataclass(frozen=True)
class Limit:
    """What a program says of an input of integers.

    Args:
        below: integers of [0, below) are all that it takes or tells apart; None where it says nothing.
        distinct: whether they are places that are written to.
    """

    below: Size | None = None
    distinct: bool = False


def index_limits(program: ExportedProgram) -> dict[str, Limit]:
    """Return for each input of integers how large they may be.

    An input is followed through operators that leave values as they are, and through sums and products with numbers,
    to the tables, dimensions and bounds that it meets.
    """
    users = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    limits = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users and isinstance(value, Tensor) and value.dtype in INTEGERS:
            follower = _Follower()
            follower.follow(node, 1, 0, program.graph_module)
            limits[node.name] = follower.limit()
    return limits


@dataclass
class _Follower:
    """How an input is used: sizes that it must stay below, sizes above which nothing changes, and whether more."""

    hard: list[Size] = field(default_factory=list)
    soft: list[Size] = field(default_factory=list)
    unknown: bool = False
    distinct: bool = False
    seen: set[Node] = field(default_factory=set)

    def limit(self) -> Limit:
        if self.hard:
            return Limit(_extreme(sympy.Min, self.hard), self.distinct)
        if self.unknown:
            return Limit(None, self.distinct)
        return Limit(_extreme(sympy.Max, [2, *self.soft]), self.distinct)

    def follow(self, node: Node, scale: int, shift: int, owner: GraphModule) -> None:
        """Add what the users of a node say; its value is that of the input times `scale` plus `shift`."""
        if node in self.seen:
            return
        self.seen.add(node)
        for user in node.users:
            if isinstance(user.target, HigherOrderOperator):
                self._into_branches(user, node, scale, shift, owner)
            elif user.target is operator.getitem or isinstance(user.target, OpOverload):
                self._look(user, node, scale, shift, owner)
            else:
                self.unknown = True  # it is a result itself

    def _look(self, user: Node, node: Node, scale: int, shift: int, owner: GraphModule) -> None:
        """Add what an operator says of the values of one of its arguments."""
        name = _name(user)
        base = name.rstrip("_")
        args = _arguments(user)
        first, other = args[0] if args else None, args[1] if len(args) > 1 else None

        def bound(size: Size | None, kind: list[Size]) -> None:
            if size is None:
                self.unknown = True
            else:
                kind.append((size - 1 - shift) // scale + 1)

        if name in _INERT:
            return
        indices = self._indexed(name, base, args, node)
        for size in indices or ():
            bound(size, self.hard)
        if indices is not None and first is not node:
            return
        number = other if isinstance(other, int) and not isinstance(other, bool) else None
        if name in ("remainder", "fmod") and first is node and number is not None:
            bound(2 * number, self.soft)
        elif base in ("clamp", "clip") and len(args) < 3:
            self.follow(user, scale, shift, owner)  # from below only
        elif base in ("clamp", "clip", "clamp_max") and first is node:
            bound(_plus(_expr(args[-1]), 2), self.soft)
        elif name in _COMPARISONS:
            peer = other if first is node else first
            bound(_reach(peer) if _dtype(peer) is not None else _plus(_expr(peer), 2), self.soft)
        elif base in ("add", "sub") and number is not None and first is node and len(args) < 3:
            self.follow(user, scale, shift + (number if base == "add" else -number), owner)
        elif base == "mul" and number is not None and number > 0:
            self.follow(user, scale * number, shift * number, owner)
        elif name in _SAME and _keeps_values(user):
            self.follow(user, scale, shift, owner)
        elif name in ("to", "_to_copy") and _dtype(user) == torch.bool:
            bound(2, self.soft)  # what is not zero is true
        else:
            self.unknown = True

    def _indexed(self, name: str, base: str, args: Sequence[Any], node: Node) -> list[Size | None] | None:
        """Return the sizes of the dimensions that a node indexes in an operator; None where it is no index of it."""
        if name in _TABLES and args[1] is node:
            return [_size(args[0], 0)]
        if name in _ALONG_DIM:
            index, dim = _ALONG_DIM[name]
            if args[index] is node:
                return [_size(args[0], args[dim] if len(args) > dim else None)]
        if base in (*_WRITES, *_ADDS) and args[2] is node:
            self.distinct |= base in _WRITES
            return [_size(args[0], args[1])]
        if base in ("index", "index_put", "_unsafe_index", "_index_put_impl"):
            axes = list(_axes(args[1], node))
            self.distinct |= "put" in base and bool(axes) and not (len(args) > 3 and args[3])
            return [_size(args[0], axis) for axis in axes] or None
        if name == "take" and args[1] is node:
            return [_numel(args[0])]
        if name == "one_hot":
            return [args[1] if len(args) > 1 and args[1] != -1 else None]
        if name in ("nll_loss", "nll_loss_nd", "cross_entropy_loss") and args[1] is node:
            return [_size(args[0], 1)]
        return None

    def _into_branches(self, user: Node, node: Node, scale: int, shift: int, owner: GraphModule) -> None:
        """Go on in the graphs that an operator such as torch.cond runs; the last of its arguments are theirs."""
        flat = list(torch.utils._pytree.tree_leaves((user.args, dict(user.kwargs))))
        found = [getattr(owner, str(x.target), None) for x in flat if isinstance(x, Node) and x.op == "get_attr"]
        graphs = [graph for graph in found if isinstance(graph, GraphModule)]
        self.unknown |= not graphs
        for graph in graphs:
            places = [x for x in graph.graph.nodes if x.op == "placeholder"]
            given = flat[len(flat) - len(places) :]
            matched = [inner for outer, inner in zip(given, places, strict=True) if outer is node]
            self.unknown |= not matched
            for inner in matched:
                self.follow(inner, scale, shift, graph)


def _name(user: Node) -> str:
    if user.target is operator.getitem:
        return "getitem"
    assert isinstance(user.target, OpOverload)
    return str(user.target.overloadpacket.__name__)


def _arguments(user: Node) -> list[Any]:
    """Return arguments by their places, as the operator's schema orders them."""
    if not isinstance(user.target, OpOverload):
        return list(user.args)
    names = [argument.name for argument in user.target._schema.arguments]
    named = dict(zip(names, user.args, strict=False)) | dict(user.kwargs)
    return [named[name] for name in names if name in named]


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _keeps_values(user: Node) -> bool:
    value = user.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(x, Tensor) and x.dtype in INTEGERS for x in values)


def _size(table: Any, axis: Any) -> Size | None:
    value = table.meta.get("val") if isinstance(table, Node) else None
    if not isinstance(value, Tensor) or not isinstance(axis, int) or not -value.dim() <= axis < max(value.dim(), 1):
        return None
    return _expr(value.shape[axis]) if value.dim() else 1


def _numel(table: Any) -> Size | None:
    value = table.meta.get("val") if isinstance(table, Node) else None
    return _expr(value.numel()) if isinstance(value, Tensor) else None


def _axes(indices: Sequence[Any], node: Node) -> Iterator[int]:
    """Return the dimensions that a node indexes among the indices of x[…]; a mask covers as many as it has."""
    axis = 0
    for index in indices:
        value = index.meta.get("val") if isinstance(index, Node) else None
        if index is node:
            yield axis
        masks = isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)
        axis += value.dim() if masks and isinstance(value, Tensor) else 1


def _reach(node: Any) -> Size | None:
    """Return the end of the range of a tensor made by torch.arange, in any shape."""
    while isinstance(node.target, OpOverload) and _name(node) in _SAME and isinstance(node.args[0], Node):
        node = node.args[0]
    if not isinstance(node.target, OpOverload) or _name(node) != "arange" or _dtype(node) not in INTEGERS:
        return None
    place = 0 if "start" not in str(node.target) else 1
    return _plus(_expr(node.args[place]) if len(node.args) > place else None, 1)


def _expr(x: Any) -> Size | None:
    if isinstance(x, Node):
        x = x.meta.get("val")
    if isinstance(x, bool):
        return None
    if isinstance(x, int):
        return x
    return x.node.expr if isinstance(x, torch.SymInt) else None


def _plus(size: Size | None, more: int) -> Size | None:
    return None if size is None else size + more


def _extreme(kind: Any, sizes: Sequence[Size]) -> Size:
    best = kind(*(sympy.sympify(size) for size in sizes))
    return int(best) if best.is_Integer else best
