"""Find attention in the graph of a program: calls of `scaled_dot_product_attention`, and products around a softmax.

One file, though long: one walk from a softmax back to its scores and on to its values, step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default  # what programs that were decomposed hold
CHECK = aten._assert_tensor_metadata.default  # torch.export asserts a type before each cast; nothing reads it

_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
# Of the same numbers: casts of floating-point types, copies, dropout in evaluation.
_SAME = (
    *(aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default),
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.dropout.default),
    *(aten.native_dropout.default, aten.lift_fresh_copy.default),
)
_VIEW = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
)
_MUL = (aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar)
_DIV = (aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar)
_ADD = (aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.add_.Scalar)
_SUB = (aten.sub.Tensor, aten.sub_.Tensor, aten.sub.Scalar, aten.sub_.Scalar)
_FILL = (*(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor),)
_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
_PRODUCT = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
NAMES: dict[Any, str] = {
    aten.tanh.default: "a cap (tanh)",
    aten.cat.default: "a concatenation (cat), as of attention sinks",
    aten.clamp.default: "limits (clamp)",
    aten.topk.default: "a choice of keys (topk)",
}


@dataclass(frozen=True)
class Step:
    """What happens to scores on their way to the softmax.

    Args:
        kind: "multiply", "add", "hide" (a mask that is True where it hides, and the number that it puts there),
            "attend" (True where a query attends) or "view" (a shape).
        given: the operands: nodes or numbers.
    """

    kind: str
    given: tuple[Any, ...]


@dataclass
class Site:
    """One attention of a program.

    Args:
        node: whose value is the output of the attention.
        was: how the program computes it.
        query, key, value: (…, Sq, D), (…, Sk, D), (…, Sk, D) once their dimensions are permuted by `orders`.
        orders: a permutation of the dimensions of each of these three and of the output, or None.
        scale: softmax scale, before the steps.
        is_causal: whether query i attends to keys j ≤ i alone.
        steps: what happens to the scores, in order.
        inner: nodes that nothing else needs.
        viewed: whether the weights have another shape than the scores.
    """

    node: Node
    was: str
    query: Node
    key: Node
    value: Node
    orders: tuple[tuple[int, ...] | None, ...] = (None, None, None, None)
    scale: float = 1.0
    is_causal: bool = False
    steps: Sequence[Step] = ()
    inner: Sequence[Node] = ()
    viewed: bool = False


@dataclass
class Left:
    """Attention that stays as it is, and why."""

    node: Node
    was: str
    reason: str


@dataclass
class Found:
    """What a program has of attention."""

    sites: list[Site] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)


CALL, DECOMPOSED = "scaled_dot_product_attention", "matmul, softmax, matmul"


def find(graph: torch.fx.Graph) -> Found:
    """Return the attention of a graph, in order."""
    found = Found()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (SDPA, FLASH):
            _call(node, found)
        elif node.target in _SOFTMAX and value_of(node).dim() >= 2:
            _decomposed(node, found)
    found.sites = [_of_kv_heads(site) for site in found.sites]
    return found


def path_of(node: Node) -> str:
    """Return the path of the module that a node is of, or the name of the node."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return (paths[-1] if paths else "") or node.name


def value_of(node: Node) -> Tensor:
    """Return the tensor without numbers that stands for a node's value."""
    value = node.meta["val"]
    found: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return found


def users(node: Node) -> list[Node]:
    """Return what reads a node, apart from assertions about its type."""
    return [user for user in node.users if user.target is not CHECK]


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a call by their names, with defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return given | dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)


def _call(node: Node, found: Found) -> None:
    given = arguments(node)
    output = node
    if node.target is FLASH:
        parts = [user for user in users(node) if user.args[1] == 0]
        if len(parts) != 1 or len(users(node)) != 1:
            found.left.append(Left(node, CALL, "its sums are used too"))
            return
        output = parts[0]
    if given.get("dropout_p"):
        found.left.append(Left(node, CALL, "it has dropout"))
        return
    mask, scale = given.get("attn_mask"), given.get("scale")
    steps = []
    if mask is not None:
        steps.append(Step("attend" if value_of(mask).dtype == torch.bool else "add", (mask,)))
    head_dim = value_of(given["query"]).shape[-1]
    if scale is None:
        if not isinstance(head_dim, int):
            found.left.append(Left(node, CALL, "its head size is dynamic"))
            return
        scale = 1 / math.sqrt(head_dim)
    operands = (given["query"], given["key"], given["value"])
    site = Site(output, CALL, *operands, scale=scale, is_causal=given["is_causal"])
    site.steps = steps
    site.inner = [node] if output is not node else []
    found.sites.append(site)


class _NoMatchError(Exception):
    """Attention, but not of a form that is known."""


@dataclass
class _Scores:
    product: Node
    steps: list[Step]
    inner: list[Node]


def _decomposed(softmax: Node, found: Found) -> None:
    given = arguments(softmax)
    weights = _product_with_values(softmax)
    if weights is None:
        return
    output, inner, viewed = weights
    try:
        dim = given.get("dim", -1)
        if dim not in (-1, value_of(softmax).dim() - 1):
            raise _NoMatchError("its softmax is over another dimension than the last")
        if output is None:
            raise _NoMatchError("its weights are used elsewhere too")
        scores = _scores(given["self"])
        if any(node.target is aten.slice.Tensor for node in inner):
            raise _NoMatchError("only some of its weights meet values")
        found.sites.append(_site(scores, softmax, output, [*scores.inner, softmax, *inner], viewed))
    except _NoMatchError as error:
        if _looks_like_attention(given["self"]):
            found.left.append(Left(softmax, DECOMPOSED, str(error)))


def _product_with_values(softmax: Node) -> tuple[Node | None, list[Node], bool] | None:
    """Follow weights to their product with the values; None where there is none, and None within where others read."""
    inner: list[Node] = []
    node, viewed, shared = softmax, False, False
    while True:
        readers = users(node)
        products = [x for x in readers if x.target in _PRODUCT and _first_factor(x) is node]
        if products:
            return (products[0] if len(readers) == 1 and not shared else None), inner, viewed
        onward = [x for x in readers if x.target in (*_SAME, *_VIEW) and x.args[0] is node and not _drops(x)]
        onward += [x for x in readers if x.target is aten.slice.Tensor]  # of sinks, which its scores show
        onward += [x for x in readers if x.target is aten.expand.default and value_of(x).shape == value_of(node).shape]
        if not onward:
            return None
        shared |= len(readers) > 1
        node = onward[0]
        if node.target in _VIEW:
            if value_of(node).shape[-2:] != value_of(softmax).shape[-2:]:
                return None
            viewed = True
        inner.append(node)


def _first_factor(product: Node) -> Node | None:
    if product.target is aten.einsum.default:
        operands = product.args[1]
        return operands[0] if len(operands) == 2 else None  # type: ignore[index, arg-type, return-value]
    at = 1 if product.target is aten.baddbmm.default else 0
    factor = product.args[at]
    return factor if isinstance(factor, Node) else None


def _drops(node: Node) -> bool:
    """Return whether a node is dropout that is on."""
    return node.target is aten.dropout.default and bool(arguments(node)["train"])


def _looks_like_attention(scores: Node, depth: int = 12) -> bool:
    """Return whether scores come, by a few operators of one number each, from a product."""
    if scores.target in _PRODUCT:
        return True
    if depth == 0 or scores.op != "call_function":
        return False
    same = [x for x in scores.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
    shape = value_of(scores).shape[-2:]
    return any(_looks_like_attention(x, depth - 1) for x in same if value_of(x).shape[-2:-1] == shape[:1])


def _scores(node: Node) -> _Scores:
    """Follow scores back from the softmax to their product.

    Raises:
        _NoMatchError: they are not a product with numbers added, multiplied or hidden.
    """
    if node.target in _PRODUCT:
        return _of_product(node)
    if node.op != "call_function":
        raise _NoMatchError("its scores come from elsewhere")
    if len(users(node)) > 1:
        others = [user for user in users(node) if user.target not in (*_SUB, aten.amax.default, aten.max.dim)]
        if others:
            raise _NoMatchError("its scores are used elsewhere too")
    given = arguments(node)
    first = given.get("self")
    if node.target in _SAME and not _drops(node):
        if not value_of(node).is_floating_point():
            raise _NoMatchError("its scores are no floating-point numbers")
        return _onward(first, node)
    if node.target in _VIEW:
        if value_of(node).shape[-2:] != value_of(first).shape[-2:]:  # type: ignore[arg-type]
            raise _NoMatchError("its scores take another shape")
        return _onward(first, node, Step("view", tuple(_shape(node))))
    if node.target in _MUL:
        return _either(node, first, given["other"], lambda x: Step("multiply", (x,)))
    if node.target in _DIV and given.get("rounding_mode") is None:
        return _onward(first, node, Step("multiply", (_reciprocal(given["other"]),)))
    if node.target in _ADD and given.get("alpha", 1) == 1:
        return _either(node, first, given["other"], lambda x: Step("add", (x,)))
    if node.target in _SUB and given.get("alpha", 1) == 1:
        other = given["other"]
        if isinstance(other, Node) and value_of(other).shape[-1] == 1:
            return _onward(first, node)  # what is the same for all keys, a softmax does not see
        return _onward(first, node, Step("add", (_Negative(other),)))
    if node.target in _FILL:
        return _onward(first, node, Step("hide", (given["mask"], given["value"])))
    if node.target in _WHERE:
        condition, other = given["condition"], given["other"]
        if isinstance(first, Node) and _reaches(first):
            return _onward(first, node, Step("hide", (Not(condition), other)))
        if isinstance(other, Node) and _reaches(other):
            return _onward(other, node, Step("hide", (condition, first)))
    raise _NoMatchError(f"its scores go through {NAMES.get(node.target, str(node.target).removeprefix('aten.'))}")


@dataclass(frozen=True)
class Not:
    """The opposite of a mask."""

    mask: Node


@dataclass(frozen=True)
class _Negative:
    """The opposite of a number or a tensor."""

    of: Any


@dataclass(frozen=True)
class _Inverse:
    """One over a tensor."""

    of: Node


def _reciprocal(x: Any) -> Any:
    return _Inverse(x) if isinstance(x, Node) else 1 / x


def resolved(x: Any, of: Mapping[Node, Any]) -> Any:
    """Return an operand of a step, with values for nodes."""
    if isinstance(x, Not):
        return ~resolved(x.mask, of)
    if isinstance(x, _Negative):
        return -resolved(x.of, of)
    if isinstance(x, _Inverse):
        return 1 / resolved(x.of, of)
    return of[x] if isinstance(x, Node) else x


def nodes_in(x: Any) -> list[Node]:
    """Return the nodes that an operand of a step is made from."""
    if isinstance(x, Node):
        return [x]
    inside = getattr(x, "mask", None) or getattr(x, "of", None)
    return nodes_in(inside) if inside is not None else []


def _onward(node: Any, here: Node, *steps: Step) -> _Scores:
    if not isinstance(node, Node):
        raise _NoMatchError("its scores come from elsewhere")
    scores = _scores(node)
    return _Scores(scores.product, [*scores.steps, *steps], [*scores.inner, here])


def _either(here: Node, first: Any, other: Any, step: Callable[[Any], Step]) -> _Scores:
    """Follow the operand that comes from a product; the left one where both do."""
    if isinstance(first, Node) and _reaches(first):
        return _onward(first, here, step(other))
    if isinstance(other, Node) and _reaches(other):
        return _onward(other, here, step(first))
    return _onward(first, here, step(other))  # which says where it ends


def _reaches(node: Node) -> bool:
    try:
        _scores(node)
    except _NoMatchError:
        return False
    return True


def _shape(view: Node) -> list[Any]:
    """Return the shape that a view asks for."""
    given = arguments(view)
    if "size" in given and view.target is not aten.unflatten.int:
        return list(given["size"])
    if "shape" in given:
        return list(given["shape"])
    shape = list(value_of(view).shape)
    if sum(not isinstance(size, int) for size in shape) > 1:
        raise _NoMatchError("its scores take a shape that is not known")
    return [size if isinstance(size, int) else -1 for size in shape]


def _of_product(node: Node) -> _Scores:
    if len(users(node)) > 1 and any(user.target not in (*_SUB, aten.amax.default) for user in users(node)):
        raise _NoMatchError("its scores are used elsewhere too")
    steps = []
    if node.target is aten.baddbmm.default:
        given = arguments(node)
        steps.append(Step("multiply", (given["alpha"],)))
        if given["beta"] == 1:
            steps.append(Step("add", (given["self"],)))
        elif given["beta"] != 0:
            raise _NoMatchError("its product adds a multiple of a tensor (baddbmm)")
    return _Scores(node, steps, [node])


def _factors(product: Node) -> tuple[Node, Node]:
    if product.target is aten.einsum.default:
        operands: Any = product.args[1]
        if len(operands) != 2:
            raise _NoMatchError("its product has more than two factors (einsum)")
        return operands[0], operands[1]
    at = 1 if product.target is aten.baddbmm.default else 0
    return product.args[at], product.args[at + 1]  # type: ignore[return-value]


def _site(scores: _Scores, softmax: Node, output: Node, inner: list[Node], viewed: bool) -> Site:
    query, columns = _factors(scores.product)
    _, value = _factors(output)
    if output.target is aten.baddbmm.default and arguments(output)["beta"] != 0:
        raise _NoMatchError("its output is a sum with another tensor (baddbmm)")
    if min(value_of(x).dim() for x in (query, columns, value)) < 2:
        raise _NoMatchError("its operands have no tokens")
    of_query = of_key = of_value = of_output = None
    while scores.steps and scores.steps[-1].kind == "view":  # the values take the shape of before as well
        scores.steps.pop()
        viewed = True
    key = columns
    if scores.product.target is aten.einsum.default:
        of_query, of_key = _orders_of_scores(str(scores.product.args[0]))
    else:
        key, of_key = _transposed(columns)
    if output.target is aten.einsum.default:
        of_value, of_output = _orders_of_output(str(output.args[0]))
    return Site(
        output,
        DECOMPOSED,
        query,
        key,
        value,
        orders=(of_query, of_key, of_value, of_output),
        steps=scores.steps,
        inner=[x for x in inner if x is not output],
        viewed=viewed,
    )


def _of_kv_heads(site: Site) -> Site:
    """Return a site with the keys and values of before they were repeated for the query heads that share them."""
    key, value = _unrepeated(site.key), _unrepeated(site.value)
    if key is None or value is None or any(site.orders) or site.viewed or any(x.kind == "view" for x in site.steps):
        return site
    return replace(site, key=key, value=value)


def _unrepeated(node: Node) -> Node | None:
    """Return what (B, H·G, S, D) was repeated from by an expansion of (B, H, 1, S, D), or by repeat_interleave."""
    while node.target in (aten.clone.default, aten.contiguous.default):
        node = node.args[0]  # type: ignore[assignment]
    if (
        node.target is aten.repeat_interleave.self_int
        and arguments(node)["dim"] in (1, -3)
        and value_of(node).dim() == 4
    ):
        return node.args[0]  # type: ignore[return-value]
    if node.target not in _VIEW or value_of(node).dim() != 4:
        return None
    expanded: Any = node.args[0]
    while expanded.target in (aten.clone.default, aten.contiguous.default):
        expanded = expanded.args[0]
    one = expanded.args[0] if expanded.target is aten.expand.default else None
    if one is None or one.target is not aten.unsqueeze.default or value_of(one).dim() != 5 or one.args[1] % 5 != 2:
        return None
    wide, narrow = value_of(expanded).shape, value_of(one).shape
    same = all(value_of(node).shape[at] == wide[dim] for at, dim in ((0, 0), (2, 3), (3, 4)))
    return one.args[0] if same and wide[1] == narrow[1] else None


def _transposed(columns: Node) -> tuple[Node, tuple[int, ...] | None]:
    """Return the keys that were transposed for the product, or the permutation that undoes it."""
    rank = value_of(columns).dim()
    swapped = (*range(rank - 2), rank - 1, rank - 2)
    args: Any = columns.args
    if columns.target is aten.transpose.int:
        undone = {dim % rank for dim in args[1:3]} == {rank - 2, rank - 1}
    elif columns.target is aten.permute.default:
        undone = tuple(dim % rank for dim in args[1]) == swapped
    else:
        undone = columns.target is aten.mT.default
    return (args[0], None) if undone else (columns, swapped)


def _letters(equation: str) -> tuple[str, str, str]:
    sides = equation.replace(" ", "").split("->")
    operands = sides[0].split(",")
    if len(sides) != 2 or len(operands) != 2 or "." in equation:
        raise _NoMatchError(f"its product is einsum({equation!r})")
    return operands[0], operands[1], sides[1]


def _orders_of_scores(equation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    left, right, out = _letters(equation)
    batch, row, column = out[:-2], out[-2:-1], out[-1:]
    inner = [x for x in left if x in right and x not in out]
    if (
        len(inner) != 1
        or sorted(left) != sorted(batch + row + inner[0])
        or sorted(right) != sorted(batch + column + inner[0])
    ):
        raise _NoMatchError(f"its product is einsum({equation!r})")
    return tuple(left.index(x) for x in batch + row + inner[0]), tuple(
        right.index(x) for x in batch + column + inner[0]
    )


def _orders_of_output(equation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    left, right, out = _letters(equation)
    batch, row, column = left[:-2], left[-2:-1], left[-1:]
    width = [x for x in right if x not in left]
    if (
        len(width) != 1
        or sorted(right) != sorted(batch + column + width[0])
        or sorted(out) != sorted(batch + row + width[0])
    ):
        raise _NoMatchError(f"its product with the values is einsum({equation!r})")
    whole = batch + row + width[0]
    return tuple(right.index(x) for x in batch + column + width[0]), tuple(whole.index(x) for x in out)
