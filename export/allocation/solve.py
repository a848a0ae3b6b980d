"""Choose a format for each site: the least cost at which the predicted error of the output stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from adaattn.export.formats import FORMATS, FP32, Device

SWEEPS = 8  # over all sites, each given its best format beside its neighbours'; few change after the third
STEPS = 30  # bisections of the multiplier's logarithm


@dataclass(frozen=True)
class Choice:
    """A site as the solver sees it.

    Args:
        seconds: for each format the time of the operator. A number may follow the format's name, as in "plugin 3",
            where it stands for several plans.
        errors: for each format the relative error that it makes in the model's output, squared; infinite where it
            overflows.
    """

    name: str
    seconds: Mapping[str, float]
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Edge:
    """Numbers that go from one operator to others; None is an operator whose type is fp32.

    Args:
        size: how many numbers a cast converts; there is one for each type that the consumers want.
    """

    source: str | None
    consumers: tuple[str | None, ...]
    size: float

    def casts(self, plan: Mapping[str, str]) -> set[tuple[str, str]]:
        """Return from what format to what the numbers are cast."""
        source, *others = (
            FP32 if name is None else FORMATS[plan[name].split()[0]].carrier for name in (self.source, *self.consumers)
        )
        return {(source, other) for other in others if other != source}


class Problem:
    """The sites, what their types cost, and what casts between them cost.

    The objective is cost + multiplier · error², with the error's square a sum over sites: Σ A²e². For a multiplier,
    sweeps over the sites give each the format that is best beside those of its neighbours.
    """

    def __init__(self, choices: Sequence[Choice], edges: Sequence[Edge], device: Device) -> None:
        self._choices, self._device = {choice.name: choice for choice in choices}, device
        self._edges = edges
        self._of: dict[str, list[Edge]] = {choice.name: [] for choice in choices}
        for edge in edges:
            for name in {edge.source, *edge.consumers}:
                if name is not None:
                    self._of[name].append(edge)

    def square(self, name: str, form: str) -> float:
        """Return the squared relative error that a site makes in the output at a format."""
        return self._choices[name].errors[form]

    def cost(self, plan: Mapping[str, str]) -> float:
        """Return the seconds of a plan, casts among them."""
        return sum(choice.seconds[plan[name]] for name, choice in self._choices.items()) + sum(
            self._cast(edge, plan) for edge in self._edges
        )

    def casts(self, plan: Mapping[str, str]) -> int:
        """Return how many casts a plan needs."""
        return sum(len(edge.casts(plan)) for edge in self._edges)

    def error(self, plan: Mapping[str, str]) -> float:
        """Return the predicted relative error of the model's output."""
        return math.sqrt(sum(choice.errors[plan[name]] for name, choice in self._choices.items()))

    def least(self) -> dict[str, str]:
        """Return the plan with the least error."""
        return dict.fromkeys(self._choices, FP32)

    def solve(self, budget: float) -> dict[str, str]:
        """Return the cheapest plan that is found within a budget of the output's relative error.

        What float32 everywhere is predicted to make is in every plan, and does not count.
        """
        best = self.least()
        budget = math.hypot(budget, self.error(best))
        low, high = math.log(1e-12), math.log(1e12)  # seconds, over a squared relative error
        for _ in range(STEPS):
            middle = (low + high) / 2
            plan = self._at(math.exp(middle))
            if self.error(plan) <= budget:
                high = middle
                if self.cost(plan) < self.cost(best):
                    best = plan
            else:
                low = middle
        return self._filled(best, budget)

    def _filled(self, plan: dict[str, str], budget: float) -> dict[str, str]:
        """Return a plan that spends what a multiplier leaves of the budget, on single sites and on neighbours."""
        plan, left = dict(plan), budget**2 - self.error(plan) ** 2
        pairs = [(edge.source, each) for edge in self._edges for each in edge.consumers]
        groups = [(name,) for name in self._choices] + [(a, b) for a, b in pairs if a is not None and b is not None]
        improved = left > 0
        while improved:
            improved = False
            for group in groups:
                cost, error, forms = self._best_change(group, plan, left)
                if cost < 0:
                    plan.update(zip(group, forms, strict=True))
                    left -= error
                    improved = True
        return plan

    def _best_change(
        self, group: tuple[str, ...], plan: dict[str, str], left: float
    ) -> tuple[float, float, tuple[str, ...]]:
        """Return what the cheapest change of some sites' formats adds to cost and error, and the formats."""
        edges = {id(edge): edge for name in group for edge in self._of[name]}.values()

        def cost_and_error() -> tuple[float, float]:
            cost = sum(self._cast(edge, plan) for edge in edges)
            cost += sum(self._choices[name].seconds[plan[name]] for name in group)
            return cost, sum(self._choices[name].errors[plan[name]] for name in group)

        before, kept = cost_and_error(), [plan[name] for name in group]
        best: tuple[float, float, tuple[str, ...]] = (0.0, 0.0, ())
        for forms in product(*(self._choices[name].seconds for name in group)):
            plan.update(zip(group, forms, strict=True))
            saved, more = (after - old for after, old in zip(cost_and_error(), before, strict=True))
            # A saving of less than this share is a rounding of the sum.
            if more <= left and saved < min(best[0], -1e-9 * before[0]):
                best = saved, more, forms
        plan.update(zip(group, kept, strict=True))
        return best

    def _at(self, multiplier: float) -> dict[str, str]:
        # Two starts, of which the better result counts: from fp32 a cast on each side hides what a chain would gain.
        starts = (self.least(), {name: self._alone(choice, multiplier) for name, choice in self._choices.items()})
        plans = [self._swept(start, multiplier) for start in starts]
        return min(plans, key=lambda plan: self.cost(plan) + multiplier * self.error(plan) ** 2)

    def _alone(self, choice: Choice, multiplier: float) -> str:
        return min(choice.seconds, key=lambda form: choice.seconds[form] + multiplier * choice.errors[form])

    def _swept(self, plan: dict[str, str], multiplier: float) -> dict[str, str]:
        plan = dict(plan)
        for _ in range(SWEEPS):
            before = dict(plan)
            for name, choice in self._choices.items():
                scores = {}
                for form in choice.seconds:
                    plan[name] = form
                    casts = sum(self._cast(edge, plan) for edge in self._of[name])
                    scores[form] = choice.seconds[form] + casts + multiplier * choice.errors[form]
                plan[name] = min(scores, key=scores.__getitem__)
            if plan == before:
                break
        return plan

    def _cast(self, edge: Edge, plan: Mapping[str, str]) -> float:
        return sum(self._device.cast(edge.size, *pair) for pair in edge.casts(plan))
