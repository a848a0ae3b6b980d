"""Replace the attention of a captured program by one op each, where that is proven to compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from adaattn.errors import AdaAttnError, first_line
from adaattn.export.capture.captured import Captured, with_graph
from adaattn.export.capture.saved_program import eager_of
from adaattn.export.golden import cases
from adaattn.export.golden.cases import Case
from adaattn.export.golden.plan_mode import PlanMode, run_eager, to_double
from adaattn.export.rewrite import masks
from adaattn.export.rewrite.emit import NotExpressibleError, write
from adaattn.export.rewrite.match import CALL, CHECK, DECOMPOSED, Site, find, path_of
from adaattn.export.rewrite.prove import LIMIT, Runs, difference, worst_errors
from adaattn.ops.signatures import OPS
from adaattn.planning.budget import Budget

ADAPTIVE, ATTEND = "adaptive_attention", torch.ops.adaattn.adaptive_attention.default

DEPARTURE = 1e-6  # of the largest number of an output: roundings of float64, however deep the model


@dataclass(frozen=True)
class Rewritten:
    """One attention of a program: what it was and what it became, or why it stays.

    Args:
        path: of its module.
        became: the op, or None.
        error: how far the op is from the attention in float64, over its largest output.
    """

    path: str
    was: str
    became: str | None = None
    reason: str | None = None
    error: float | None = None


def rewrite(
    captured: Captured, tolerance: float | None, proof: Callable[[], Sequence[Case]], replan: bool = False
) -> tuple[Captured, list[Rewritten]]:
    """Return a program in which attention is one op each, and what became of each attention.

    Args:
        tolerance: of adaptive attention; None for `scaled_dot_product_attention`.
        proof: makes inputs on which old and new attention are compared.
        replan: whether adaptive attention that the program has already takes the tolerance too.
    """
    budget = None if tolerance is None else Budget(tolerance)
    module = copy.deepcopy(captured.program.graph_module)
    order = {node.name: place for place, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:  # of sizes; `captured.sizes` knows which are taken
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    replanned = _replan(module.graph, budget) if budget is not None and replan else 0
    done = [(node, _as_it_is(node, ADAPTIVE)) for node in module.graph.nodes if node.target is ATTEND]
    found = find(module.graph)
    done += [(left.node, Rewritten(path_of(left.node), left.was, reason=left.reason)) for left in found.left]
    sites = found.sites
    if budget is None:
        done += [(site.node, _as_it_is(site.node, CALL)) for site in sites if site.was == CALL]
        sites = [site for site in sites if site.was == DECOMPOSED]
    proven = _proven(module, sites, budget, captured, proof) if sites else {}
    for site in sites:
        result, path = proven[site.node], path_of(site.node)
        if isinstance(result, float):
            done.append((site.node, Rewritten(path, site.was, CALL if budget is None else ADAPTIVE, error=result)))
        else:
            done.append((site.node, Rewritten(path, site.was, reason=result)))
    if replanned or any(isinstance(result, float) for result in proven.values()):
        captured = _with_module(captured, module, adaptive=budget is not None)
    return captured, [each for _, each in sorted(done, key=lambda pair: order[pair[0].name])]


def _as_it_is(node: Node, op: str) -> Rewritten:
    return Rewritten(path_of(node), op, op)


def _replan(graph: Graph, budget: Budget) -> int:
    """Let plans that a program makes already fit a budget; return how many there are."""
    nodes = [node for node in graph.nodes if node.target is torch.ops.adaattn.plan.default]
    for node in nodes:
        given = OPS["plan"].bound(node.args, node.kwargs) | {"limit": budget.limit}
        node.args, node.kwargs = tuple(given.values()), {}
    return len(nodes)


def _proven(
    module: GraphModule,
    sites: Sequence[Site],
    budget: Budget | None,
    captured: Captured,
    proof: Callable[[], Sequence[Case]],
) -> dict[Node, float | str]:
    """Replace sites, first with cheap masks and then, where that is not proven, with the masks that they have."""
    sizes = masks.Sizes(captured.program, captured.dims, captured.sizes.nearest)
    runs = Runs(captured.program, [case.inputs for case in proof()])
    double = partial(PlanMode, double=True, dtype=captured.dtype, exact=True)
    cheap = [masks.simplified(site, sizes) for site in sites]
    proven = _replace(module, cheap, budget, runs, double)
    again = [
        site for site, other in zip(sites, cheap, strict=True) if isinstance(proven[site.node], str) and other != site
    ]
    return proven | _replace(module, again, budget, runs, double)


def _replace(
    module: GraphModule,
    sites: Sequence[Site],
    budget: Budget | None,
    runs: Runs,
    double: Callable[[], PlanMode],
) -> dict[Node, float | str]:
    """Replace those sites for which it is proven; return its error for each, or why it is not replaced."""
    graph, results = module.graph, dict[Node, float | str]()
    pairs: dict[Node, Node] = {}
    for site in sites:
        try:
            pairs[site.node] = write(graph, site, budget)
        except (NotExpressibleError, AdaAttnError) as error:
            results[site.node] = first_line(error)
        except (RuntimeError, ValueError, TypeError) as error:  # of torch, for shapes that do not go together
            results[site.node] = f"the op does not take its operands: {first_line(error)}"
    if pairs:
        module.recompile()
        errors, failed = dict[Node, float](), "it had no numbers on the golden inputs"
        try:
            errors = worst_errors(module, pairs, runs, double())
        except Exception as error:  # the user's own model, on inputs that it may not take
            failed = f"the model fails on the golden inputs: {first_line(error)}"
        for old, new in pairs.items():
            if old not in errors:
                results[old] = f"it is not proven: {failed}"
            elif errors[old] <= LIMIT:
                results[old] = errors[old]
                old.replace_all_uses_with(new)
            else:
                results[old] = f"the op computes something else: it differs by {errors[old]:.1e} in float64"
        _remove_unused(graph, [site for site in sites if isinstance(results[site.node], float)])
        graph.eliminate_dead_code()
        module.recompile()
    return results


def departures(captured: Captured, program: Callable[..., Any]) -> list[str]:
    """Return a line for each case in which a rewritten program computes something else than the model.

    Both run in float64, the program unrounded and at full rank. What is found is a fault of the capture: the rewriting
    itself is proven.

    Args:
        captured: the rewritten program, and the model that it was captured from.
        program: the program in float64.
    """
    if captured.original is None:
        return []
    model = captured.original()
    lines = []
    for case in cases.proof(captured):
        inputs = {name: to_double(x) for name, x in case.inputs.items()}
        wanted, got = (
            run_eager(eager, inputs, PlanMode(double=True, dtype=captured.dtype, exact=True), captured.written)
            for eager in (model, program)
        )
        worst = max((difference(to_double(a), to_double(b)) for a, b in zip(wanted, got, strict=True)), default=0.0)
        if worst > DEPARTURE:
            lines.append(f"case {case.name}: the captured program differs from the model by {worst:.1e} in float64")
    return lines


def _remove_unused(graph: Graph, sites: Iterable[Site]) -> None:
    """Remove assertions about the types of values that nothing else needs: torch keeps them otherwise."""
    for site in sites:
        for node in reversed([*site.inner, site.node]):
            if all(user.target is CHECK for user in node.users):
                for user in list(node.users):
                    graph.erase_node(user)
                if not node.users:
                    graph.erase_node(node)


def _with_module(captured: Captured, module: GraphModule, adaptive: bool) -> Captured:
    """Return a captured program with another graph of the same inputs and outputs."""
    program = with_graph(captured.program, module)
    if not adaptive:
        return replace(captured, program=program)
    eager, in_double = eager_of(program, program.module(check_guards=False), captured.inputs)
    return replace(captured, program=program, eager=eager, in_double=in_double, original=captured.in_double)
