"""Prove that what replaces an attention computes the same: both in float64, unrounded and at full rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import GraphModule, Interpreter, Node

LIMIT = 1e-9  # of the largest number of an output: sums of a few thousand terms in float64 err by 1e-13


class Proof(Interpreter):
    """Runs a graph that holds old and new attention side by side, and compares each pair of outputs.

    Args:
        module: the graph.
        pairs: for each old output the new one, which comes before it.
    """

    def __init__(self, module: GraphModule, pairs: Mapping[Node, Node]) -> None:
        super().__init__(module)
        self.worst: dict[Node, float] = {}  # of those that had numbers to compare
        self._pairs, self._made = pairs, dict[Node, Tensor]()
        self._new = set(pairs.values())

    def run_node(self, n: Node) -> Any:
        """Run a node, and compare it with its replacement."""
        value = super().run_node(n)
        if n in self._new:
            self._made[n] = value
        if n in self._pairs:
            made = self._made.pop(self._pairs[n])
            if value.isfinite().any():
                self.worst[n] = max(self.worst.get(n, 0.0), difference(value, made))
        return value


def difference(old: Tensor, new: Tensor) -> float:
    """Return the largest difference, over the largest number, where the old output has numbers."""
    if old.shape != new.shape:
        return float("inf")
    known = old.isfinite()
    if not known.any():
        return 0.0
    if not new[known].isfinite().all():
        return float("inf")
    size = float(old[known].abs().max())
    return float((old - new)[known].abs().max()) / size if size else float(new[known].abs().max())


def arguments_of(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> list[Any]:
    """Return the arguments of a program's graph, floating-point weights in float64."""
    found: list[Any] = []
    for item in program.graph_signature.input_specs:
        if isinstance(item.arg, ConstantArgument):
            found.append(item.arg.value)
        elif item.kind is InputKind.USER_INPUT:
            found.append(inputs[item.arg.name])
        else:
            state = program.state_dict if item.target in program.state_dict else program.constants
            found.append(state[item.target])
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in found]


def worst_errors(
    module: GraphModule,
    pairs: Mapping[Node, Node],
    runs: Sequence[Sequence[Any]],
    in_double: AbstractContextManager[Any],
) -> dict[Node, float]:
    """Return for each old output that had numbers how far the new one is from it, over all runs."""
    proof = Proof(module, pairs)
    for arguments in runs:
        with torch.no_grad(), in_double:
            proof.run(*(x.clone() if isinstance(x, Tensor) else x for x in arguments), enable_io_processing=False)
    return proof.worst
