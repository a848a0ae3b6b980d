"""Write the op that a site becomes into the graph: traced from the code that eager mode runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from adaattn.export.rewrite.match import Site, Step, nodes_in, resolved, value_of
from adaattn.functional import attend_within
from adaattn.masks import mask_with_four_axes, with_four_axes
from adaattn.ops.dispatch import LARGEST_HEAD_DIM
from adaattn.planning.budget import Budget
from adaattn.planning.ladder import ladder_by_operators

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], Tensor]


class NotExpressibleError(Exception):
    """The op does not compute what a site does."""


def write(graph: Graph, site: Site, budget: Budget | None) -> Node:
    """Insert, before a site's output, the node that computes it by one op, and return it.

    Args:
        budget: of adaptive attention; None for `scaled_dot_product_attention`.

    Raises:
        NotExpressibleError: the op cannot compute it.
    """
    operands = list(dict.fromkeys(_operands(site)))
    traced = _traced(site, budget, operands)
    with graph.inserting_before(site.node):
        copies: dict[Node, Any] = {}
        names = iter(operands)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(names)
            elif node.op == "output":
                made = copies[node.args[0]]
            elif node.op == "get_attr":
                raise NotExpressibleError("it needs a constant that the program has not")
            else:
                copies[node] = graph.node_copy(node, lambda x: copies[x])
                _describe(copies[node], site.node)
    assert isinstance(made, Node)
    return made


def _describe(node: Node, like: Node) -> None:
    """Say of a new node what torch.export says of all: of which module it is, and where it comes from."""
    for name in ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack"):
        if name in like.meta and name not in node.meta:
            node.meta[name] = like.meta[name]
    node.meta["nn_module_stack"] = like.meta.get("nn_module_stack", {})


def _operands(site: Site) -> list[Node]:
    inside = [x for step in site.steps for given in step.given for x in nodes_in(given)]
    return [site.query, site.key, site.value, *inside]


def _traced(site: Site, budget: Budget | None, operands: Sequence[Node]) -> GraphModule:
    attend = _by_sdpa if budget is None else _within(budget)

    def compute(*values: Any) -> Tensor:
        return _compute(site, dict(zip(operands, values, strict=True)), attend)

    with torch.no_grad(), value_of(site.query).fake_mode:  # type: ignore[attr-defined]
        traced = make_fx(compute, tracing_mode="real", pre_dispatch=budget is None, _allow_non_fake_inputs=True)(
            *(node.meta["val"] for node in operands)
        )
    for node in list(traced.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    return traced


def _within(budget: Budget) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        table = ladder_by_operators(budget, q.shape[-1], q.device)
        return attend_within(budget, q, k, v, mask, is_causal, scale, table=table)[0]

    return attend


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    if mask is not None and is_causal:
        raise NotExpressibleError("scaled_dot_product_attention takes a mask or causality, not both")
    gqa = bool(q.shape[1] != k.shape[1])
    if mask is not None:
        mask = mask.expand(-1, -1, q.shape[2], k.shape[2])
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=gqa)


def _compute(site: Site, values: Mapping[Node, Any], attend: Attend) -> Tensor:
    """Compute a site from its operands by one call of `attend`."""
    of_query, of_key, of_value, of_output = site.orders
    q, k, v = (
        values[node] if order is None else values[node].permute(order)
        for node, order in ((site.query, of_query), (site.key, of_key), (site.value, of_value))
    )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or not q.is_floating_point():
        raise NotExpressibleError(f"its operands are of {q.dtype}, {k.dtype} and {v.dtype}")
    lead = v.shape[:-2]
    q, k, mask, scale = _applied(site, q, k, values)
    if site.viewed or v.dim() != q.dim():
        v = v.reshape(*q.shape[:-2], *v.shape[-2:])
    _check(q, k, v)
    width, widest = _width(v), max(map(_width, (q, k, v)))
    q, k, v = (_widened(x, widest) for x in (q, k, v))  # zeros add nothing
    grouped = q.dim() == 3 and bool(q.shape[0] != k.shape[0])
    mask = None if mask is None else mask_with_four_axes(mask, q, grouped)
    of_heads = (with_four_axes(q, grouped), with_four_axes(k, grouped), with_four_axes(v, grouped))
    output = attend(*of_heads, mask, site.is_causal, scale).reshape(q.shape)
    output = output if width == widest else output[..., :width]
    if site.viewed:
        output = output.reshape(*lead, *output.shape[-2:])
    return output if of_output is None else output.permute(of_output)


def _width(x: Tensor) -> int:
    """Return the head size of an operand, which torch may have written as an expression of other sizes: 8·B/B'.

    Raises:
        NotExpressibleError: it is dynamic.
    """
    width = x.shape[-1]
    if isinstance(width, int):
        return width
    if width.node.expr.args and width.node.hint is not None:  # an expression, and its value at the traced sizes
        return int(width.node.hint)
    raise NotExpressibleError("its head size is dynamic")


def _widened(x: Tensor, width: int) -> Tensor:
    missing = width - _width(x)
    return x if not missing else torch.cat([x, x.new_zeros(*x.shape[:-1], missing)], -1)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    widest = max(map(_width, (q, k, v)))
    if widest > LARGEST_HEAD_DIM:
        raise NotExpressibleError(f"its head size is {widest}, above {LARGEST_HEAD_DIM}")
    if not q.dim() == k.dim() == v.dim() or k.shape[:-2] != v.shape[:-2]:
        raise NotExpressibleError("its keys and values have different batches or heads")
    if q.dim() > 2 and (q.shape[:-3] != k.shape[:-3] or not _divides(k.shape[-3], q.shape[-3])):
        raise NotExpressibleError("its queries and keys have different batches or heads")


def _divides(kv_heads: Any, heads: Any) -> bool:
    if isinstance(kv_heads, int) and isinstance(heads, int):
        return heads % kv_heads == 0
    return bool(kv_heads == heads)


def _applied(
    site: Site, q: Tensor, k: Tensor, values: Mapping[Node, Any]
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Return queries and keys in the shape that scores have at the softmax, and mask and scale that the steps make."""
    scale, mask = site.scale, None
    if any(step.kind == "view" for step in site.steps):
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        q, k = (x.expand(*lead, *x.shape[-2:]) for x in (q, k))
    for step in site.steps:
        given = [resolved(x, values) for x in step.given]
        if step.kind == "view":
            lead = given[:-2]
            if mask is not None:
                mask = _expanded(mask, q, k).reshape(*lead, q.shape[-2], k.shape[-2])
            q, k = (x.reshape(*lead, *x.shape[-2:]) for x in (q, k))
        elif step.kind == "multiply":
            q, mask, scale = _multiplied(given[0], q, mask, scale)
        elif mask is not None or step.kind != "add" or isinstance(given[0], Tensor):
            mask = _masked(step, given, mask)
    return q, k, mask, scale


def _expanded(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return mask.expand(*q.shape[:-1], k.shape[-2])


def _multiplied(factor: Any, q: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None, float]:
    if not isinstance(factor, Tensor):
        if mask is not None and mask.dtype != torch.bool:
            mask = mask * factor
        if not (isinstance(factor, (int, float)) and factor > 0) and mask is not None:
            raise NotExpressibleError("its scores are multiplied by a number that is not positive")
        return q, mask, scale * float(factor)
    if any(size != 1 for size in factor.shape[-2:]):
        raise NotExpressibleError("its scores are multiplied by a tensor")
    if mask is not None:
        raise NotExpressibleError("its masked scores are multiplied by a tensor")
    return q * factor.to(q.dtype), None, scale


def _masked(step: Step, given: Sequence[Any], mask: Tensor | None) -> Tensor | None:
    """Return a mask after one more step: boolean, True where a query attends, or added to the scores."""
    if step.kind == "attend":
        attends = given[0]
    elif step.kind == "hide":
        hides, number = given
        hides = hides if hides.dtype == torch.bool else hides.bool()
        if not isinstance(number, Tensor) and number == -torch.inf:
            attends = ~hides
        else:  # where all of a row is hidden it stays a row of equal scores
            base = torch.zeros((), device=hides.device) if mask is None else _added(mask)
            return torch.where(hides, number, base)
    else:
        bias = given[0]
        if not isinstance(bias, Tensor):
            return mask  # the same for all keys
        if bias.dtype == torch.bool:
            bias = bias.float()
        return bias if mask is None else _added(mask) + bias
    if mask is None:
        return attends  # type: ignore[no-any-return]
    return mask & attends if mask.dtype == torch.bool else torch.where(attends, mask, -torch.inf)


def _added(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
