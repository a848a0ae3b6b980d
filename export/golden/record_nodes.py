"""Record the values inside a graph from eager PyTorch on one small case, by which `bisect` finds a fault."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Interpreter, Node

from adaattn.export.golden.cases import Case
from adaattn.export.golden.eager import EagerReference, ForcedPlan, array, rounding_of
from adaattn.export.golden.plan_mode import PlanMode, run_eager, to_double
from adaattn.export.onnx.lower import Lowered
from adaattn.export.parity.golden_case import ExpectedAttention, GoldenCase


def record(reference: EagerReference, lowered: Lowered, case: Case, layers: Sequence[str]) -> list[GoldenCase]:
    """Return goldens whose outputs are the values of a graph by their names, each with its limit.

    The exporter names values after the nodes of the program; those that it adds or fuses have no counterpart.

    Args:
        layers: names of the planned attentions, in the order of their calls.

    Returns:
        One with all plans forced to fp32 at full rank, where the program plans, and one with its own plans.
    """
    natural, programs = PlanMode(measure=True), _Programs(lowered)
    found = [_golden(reference, programs, case, natural)]
    if natural.plans and len(natural.plans) == len(layers):
        exact = PlanMode(measure=True, plans=ForcedPlan().plans(natural))
        found.insert(0, _golden(reference, programs, case, exact, ForcedPlan(), layers))
    return found


def _golden(
    reference: EagerReference,
    programs: _Programs,
    case: Case,
    mode: PlanMode,
    forced: ForcedPlan | None = None,
    layers: Sequence[str] = (),
) -> GoldenCase:
    eager = programs.values(case, mode)
    exact = programs.values(case, reference.double_mode(plans=mode.plans))
    rounding = rounding_of(mode)
    outputs = {name: reference.output(x, exact[name], rounding) for name, x in eager.items()}
    plans = zip(layers, mode.plans, strict=True) if layers else ()
    of_layers = {
        name: ExpectedAttention(array(plan[0]), array(plan[1]), np.zeros(plan[0].shape, bool)) for name, plan in plans
    }
    return reference.assembled(case, forced, outputs, of_layers)


class _Programs:
    """Runs a program node by node, in its own type and in float64."""

    def __init__(self, lowered: Lowered) -> None:
        self._lowered = lowered
        self._known = {value.name for node in lowered.graph.graph for value in node.outputs}
        self._module = lowered.program.module()
        self._double = copy.deepcopy(self._module).double()

    def values(self, case: Case, mode: PlanMode) -> dict[str, Tensor]:
        """Return the values of the graph by their names, computed under a mode, in float64 where it asks for that."""
        known, values = self._known, dict[str, Tensor]()

        class Recorder(Interpreter):
            def run_node(self, node: Node) -> Any:
                result = super().run_node(node)
                if isinstance(result, Tensor) and node.op == "call_function" and node.name in known:
                    values[node.name] = result
                return result

        module = self._double if mode.double else self._module
        inputs = {name: to_double(x) if mode.double else x for name, x in case.inputs.items()}
        written = tuple(self._lowered.written)
        found = run_eager(lambda **given: Recorder(module).run(*given.values()), inputs, mode, written)
        # Outputs have names of their own in the graph.
        names = [str(output.name) for output in self._lowered.graph.graph.outputs]
        return values | dict(zip(names, found, strict=False))
