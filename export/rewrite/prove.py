"""Prove that what replaces an attention computes the same: both in float64, unrounded and at full rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec
from torch.fx import GraphModule, Interpreter, Node

from adaattn.export.capture.captured import tensors_held
from adaattn.export.golden.plan_mode import to_double

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


class Runs:
    """Iterate over the arguments of a program's graph in each case, floating-point tensors in float64.

    A run may write into its arguments: all but parameters are copies.

    Args:
        cases: inputs of the program, by name.
        convert: makes the type of a tensor.
    """

    def __init__(
        self,
        program: ExportedProgram,
        cases: Sequence[Mapping[str, Tensor]] = (),
        convert: Callable[[Tensor], Tensor] = to_double,
    ) -> None:
        self._specs = program.graph_signature.input_specs
        self._convert = convert
        self._held = {name: convert(x.detach()) for name, x in tensors_held(program).items()}
        self._cases = cases

    def __iter__(self) -> Iterator[list[Any]]:
        """Return the arguments of each case in turn."""
        for inputs in self._cases:
            yield self.arguments(inputs)

    def arguments(self, inputs: Mapping[str, Tensor]) -> list[Any]:
        """Return the arguments of one case."""
        return [self._argument(item, inputs) for item in self._specs]

    def _argument(self, item: InputSpec, inputs: Mapping[str, Tensor]) -> Any:
        if isinstance(item.arg, ConstantArgument):
            return item.arg.value
        if item.kind is InputKind.USER_INPUT:
            return self._convert(inputs[item.arg.name]).clone()
        held = self._held[item.arg.name]
        return held if item.kind is InputKind.PARAMETER or not isinstance(held, Tensor) else held.clone()


def worst_errors(
    module: GraphModule,
    pairs: Mapping[Node, Node],
    runs: Iterable[Sequence[Any]],
    in_double: AbstractContextManager[Any],
) -> dict[Node, float]:
    """Return for each old output that had numbers how far the new one is from it, over all runs."""
    proof = Proof(module, pairs)
    for arguments in runs:
        with torch.no_grad(), in_double:
            proof.run(*arguments, enable_io_processing=False)
    return proof.worst
