"""Make the golden cases of a typed program: what its file must compute, with its roundings and without."""

from __future__ import annotations

from collections.abc import Sequence

from adaattn.export.allocation.apply import Typed
from adaattn.export.allocation.samples import Sample
from adaattn.export.golden import cases
from adaattn.export.golden.cases import Case
from adaattn.export.golden.eager import EagerReference, Expected, ForcedPlan
from adaattn.export.parity.criterion import WARN_LIMIT
from adaattn.export.parity.golden_case import GoldenCase

SAMPLES = 4  # of the certifying ones, which become golden cases


def typed_goldens(typed: Typed, notes: list[str]) -> tuple[list[Expected], list[GoldenCase]]:
    """Return the runs of the emulated program, and the golden cases of both kinds.

    With its roundings a file may err FACTOR times as much as the emulated program, both against the model in float64.
    That says nothing sharp of the graph, so each case runs once more with every type forced to fp32: the weights are
    those of the file, nothing else is rounded, and the limits are those of float32.

    Args:
        notes: get a line for each case on which the types err so much that it shows nothing.
    """
    rounded, unrounded = EagerReference(typed.emulated), EagerReference(typed.unrounded)
    awkward = cases.cases(typed.emulated)
    samples = [Case(f"sample {place}", sample) for place, sample in enumerate(_spread(typed.samples), 1)]
    expected = [rounded.expect(case) for case in [*samples, *awkward]]
    found = []
    for want in expected:
        golden = rounded.golden(want, ())
        outputs = golden.outputs.values()
        if any(output.broken for output in outputs):
            notes.append(
                f"case {golden.name}: numbers overflow the types; it was compared only with every type at fp32"
            )
        elif max((output.eager_error for output in outputs), default=0.0) > WARN_LIMIT:
            worst = max(output.eager_error for output in outputs)
            notes.append(
                f"case {golden.name}: the types err by {worst:.0%} on these inputs, which are not like the samples; it "
                "was compared only with every type at fp32"
            )
        else:
            found.append(golden)
    exact = [unrounded.golden(unrounded.expect(case, ForcedPlan()), ()) for case in awkward]
    return expected, [*found, *exact]


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """Return some samples of different sizes."""
    ordered = sorted(samples, key=lambda sample: sum(x.numel() for x in sample.values()))
    last = len(ordered) - 1
    places = sorted({round(last * step / (SAMPLES - 1)) for step in range(SAMPLES)}) if ordered else []
    return [ordered[place] for place in places]
