"""Find which sizes a captured program takes: what torch.export asserts of them, and where the model runs.

torch.export defers what it cannot prove of sizes into assertions. Some of them are facts of the model, such as that a
length is a multiple of 8; others only say how the program was traced, such as that a batch is not 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import sympy
import torch
from torch.export import ExportedProgram

from adaattn.input_spec import Dimension

Values = Mapping[str, int]  # by symbol of the program
TRIED = 4096  # sizes of one dimension that conditions are held against
RUNS = 256  # sizes of one dimension at which the model is run


@dataclass(frozen=True)
class Sizes:
    """Sizes that a program takes.

    Args:
        dims: by symbol of the program.
        conditions: relations of symbols that were asserted while the program was traced.
        traced: sizes that it was traced at, which fulfil all conditions; empty where they are unknown.
        runs: whether the model itself runs at given sizes, which has the last word; it returns None where that hangs on
            numbers. None for a program without its model, and where torch has proven all sizes.
    """

    dims: Mapping[str, Dimension]
    conditions: tuple[sympy.Basic, ...]
    traced: Values
    runs: Callable[[Values], bool | None] | None = None

    def takes(self, values: Values) -> bool:
        """Return whether the model runs at these sizes."""
        runs = self.runs(values) if self.runs is not None else None
        return not self._broken(values) if runs is None else runs

    def nearest(self, values: Values) -> dict[str, int]:
        """Return sizes that the model takes: these, or others near them."""
        if not self.traced or self.takes(values):
            return dict(values)
        found = dict(self.traced)
        # From the traced sizes, one dimension after the other: each step ends at sizes that the model takes.
        for symbol in sorted(self.dims, key=lambda name: not self.dims[name].is_batch):
            if self.takes({**found, symbol: values[symbol]}):
                found[symbol] = values[symbol]
                continue
            excused = set(self._broken(found))  # the model runs there all the same
            near = ({**found, symbol: size} for size in self._around(symbol, values[symbol]))
            likely = (sizes for sizes in near if set(self._broken(sizes)) <= excused)
            found = next((sizes for sizes in islice(likely, RUNS) if self.takes(sizes)), found)
        return found

    def fitted(self) -> dict[str, Dimension]:
        """Return the dimensions with ends and usual sizes that the model takes."""
        points = [self.nearest({s: getattr(dim, at) for s, dim in self.dims.items()}) for at in ("min", "opt", "max")]
        fitted = {}
        for symbol, dim in self.dims.items():
            low, opt, high = sorted(point[symbol] for point in points)
            fitted[symbol] = Dimension(dim.name, low, opt, high)
        return fitted

    def unproven(self) -> list[dict[str, int]]:
        """Return sizes at which the model runs though a condition does not hold, one for each such condition.

        There the program may compute something else than the model. The least sizes are not among them.
        """
        usual = self.nearest({symbol: dim.opt for symbol, dim in self.dims.items()})
        least = self.nearest({symbol: dim.min for symbol, dim in self.dims.items()})
        found: list[dict[str, int]] = []
        for condition in self.conditions:
            if any(not _holds(condition, values) for values in (least, *found)):
                continue
            symbols = sorted({str(symbol) for symbol in condition.free_symbols})
            broken = (
                {**usual, symbol: size}
                for symbol in symbols
                for size in self._around(symbol, usual[symbol])
                if not _holds(condition, {**usual, symbol: size})
            )
            trial = next((values for values in islice(broken, 3) if self.takes(values)), None)
            if trial is not None:
                found.append(trial)
        return found

    def gaps(self) -> list[str]:
        """Return a line for each dimension of which the model does not take every size between the ends."""
        lines = []
        usual = self.nearest({symbol: dim.opt for symbol, dim in self.dims.items()})
        for symbol, dim in self.dims.items():
            near = [{**usual, symbol: size} for size in range(dim.min, min(dim.max, dim.min + 32) + 1)]
            doubtful = near[1:3] + [values for values in near if self._broken(values)]
            gap = next((values[symbol] for values in doubtful if not self.takes(values)), None)
            if gap is not None:
                ends = f"from {dim.min} to {dim.max}"
                lines.append(f"dimension {dim.name}: the model does not take every size {ends}; it does not take {gap}")
        return lines

    def _broken(self, values: Values) -> list[sympy.Basic]:
        return [condition for condition in self.conditions if not _holds(condition, values)]

    def _around(self, symbol: str, size: int) -> Iterator[int]:
        """Return sizes of a dimension, the nearest first."""
        dim = self.dims[symbol]
        for distance in range(min(dim.max - dim.min + 1, TRIED)):
            yield from (near for near in {size - distance, size + distance} if dim.min <= near <= dim.max)


def conditions(program: ExportedProgram, symbols: Sequence[str]) -> tuple[sympy.Basic, ...]:
    """Return what a program asserts of symbols; what it asserts of its numbers is not among it."""
    found: dict[str, sympy.Basic] = {}
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.target is not torch.ops.aten._assert_scalar.default or not isinstance(node.args[0], torch.fx.Node):
                continue
            value = node.args[0].meta.get("val")
            expression = value.node.expr if isinstance(value, torch.SymBool) else None
            names = {str(symbol) for symbol in getattr(expression, "free_symbols", ())}
            if names and names <= set(symbols):
                found.setdefault(str(expression), expression)
    return tuple(found.values())


def _holds(condition: sympy.Basic, values: Values) -> bool:
    try:
        return bool(condition.subs({symbol: values[str(symbol)] for symbol in condition.free_symbols}))
    except (ZeroDivisionError, TypeError, ValueError):  # such as x modulo 0
        return False
