"""The solver keeps its budget, comes near the best of all plans, and counts casts as the program has them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from adaattn.errors import ConfigError
from adaattn.export.allocation.allocate import quantile_of
from adaattn.export.allocation.solve import Choice, Edge, Problem
from adaattn.export.formats import BF16, FP8, FP16, FP32, Device, device_of, formats_of

FORMS = (FP32, BF16, FP16, FP8)
DEVICE = Device("test", 1.0, 8.0, 8.0, 16.0, 16.0, 1000.0)
ERRORS = {FP32: 1e-7, BF16: 3e-3, FP16: 4e-4, FP8: 4e-2}


def problem(seed: int, sites: int, forms: Sequence[str] = FORMS) -> tuple[Problem, list[Choice]]:
    """Return a chain of sites with a few longer edges."""
    draw = random.Random(seed)
    choices = []
    for place in range(sites):
        flops, size, gain = 10 ** draw.uniform(6, 9), 10 ** draw.uniform(4, 6), 10 ** draw.uniform(-2, 0)
        errors = {form: (gain * ERRORS[form] * draw.uniform(0.5, 2)) ** 2 for form in forms}
        choices.append(
            Choice(f"s{place}", {form: DEVICE.seconds(flops, size, size / 9, form) for form in forms}, errors)
        )
    edges = [Edge(None, ("s0",), 1e5), Edge(f"s{sites - 1}", (None,), 1e5)]
    for place in range(sites - 1):
        takers = (f"s{place + 1}", *((f"s{place + 2}",) if place + 2 < sites and draw.random() < 0.5 else ()))
        edges.append(Edge(f"s{place}", takers, 10 ** draw.uniform(4, 6)))
    return Problem(choices, edges, DEVICE), choices


@pytest.mark.parametrize("budget", [1e-1, 1e-2, 1e-3, 1e-4])
def test_plans_keep_the_budget_and_are_nearly_the_cheapest(budget: float) -> None:
    shares = []
    for seed in range(12):
        given, choices = problem(seed, 5)
        plan = given.solve(budget)
        assert given.error(plan) <= budget
        every = (
            dict(zip((choice.name for choice in choices), forms, strict=True))
            for forms in itertools.product(FORMS, repeat=len(choices))
        )
        best = min(given.cost(each) for each in every if given.error(each) <= budget)
        shares.append(given.cost(plan) / best)
    assert max(shares) < 1.25
    assert sum(shares) / len(shares) < 1.05


def test_a_larger_budget_costs_no_more() -> None:
    given, _ = problem(3, 9)
    costs = [given.cost(given.solve(10**-exponent)) for exponent in range(7)]
    assert costs == sorted(costs)


def test_what_overflows_is_never_chosen() -> None:
    errors = {FP32: 0.0, FP16: math.inf, BF16: 1e-6, FP8: math.inf}
    choice = Choice("s0", {form: DEVICE.seconds(1e9, 1e3, 1e3, form) for form in FORMS}, errors)
    assert Problem([choice], [], DEVICE).solve(1.0) == {"s0": BF16}


def test_nothing_fits_but_fp32() -> None:
    given, choices = problem(1, 4)
    assert given.solve(1e-12) == {choice.name: FP32 for choice in choices}


def test_casts_are_counted_once_for_each_type() -> None:
    choices = [Choice(name, dict.fromkeys(FORMS, 1.0), dict.fromkeys(FORMS, 0.0)) for name in "abc"]
    given = Problem(choices, [Edge("a", ("b", "c", None), 100.0), Edge(None, ("a",), 10.0)], DEVICE)
    assert given.casts({"a": FP32, "b": FP32, "c": FP32}) == 0
    assert given.casts({"a": FP32, "b": FP16, "c": FP16}) == 1
    assert given.casts({"a": FP32, "b": FP16, "c": FP8}) == 1  # what fp8 quantizes has the type of fp16
    assert given.casts({"a": FP32, "b": FP16, "c": BF16}) == 2
    assert given.casts({"a": FP16, "b": FP16, "c": FP16}) == 2  # in, and to what has no type


def test_a_quantile_says_what_a_new_sample_stays_under() -> None:
    errors = [float(x) for x in range(1, 20)]
    assert quantile_of(errors, 0.95) == 19.0
    assert quantile_of(errors, 0.5) == 10.0
    assert quantile_of([3.0], 0.95) == 3.0
    draw, kept, tries = random.Random(0), 0, 4000
    for _ in range(tries):
        sample = [draw.expovariate(1) for _ in range(20)]
        kept += sample[-1] <= quantile_of(sample[:-1], 0.9)
    assert kept / tries > 0.89


def test_a_device_of_several_has_what_all_of_them_have() -> None:
    assert formats_of(device_of(["8.9"]), None) == (FP32, BF16, FP16, FP8)
    assert formats_of(device_of(["8.6", "8.9", "12.0"]), None) == (FP32, BF16, FP16)
    assert formats_of(device_of(["7.5"]), None) == (FP32, FP16)
    assert formats_of(device_of([]), [FP16]) == (FP32, FP16)
    with pytest.raises(ConfigError, match=r"A10 has no fp8; leave it out"):
        formats_of(device_of(["8.6"]), [FP8])
    with pytest.raises(ConfigError, match=r"compute capability 5\.0 is not known; choose one of 7\.5"):
        device_of(["5.0"])


def test_an_error_of_float32_alone_forbids_nothing_elsewhere() -> None:
    """As of a norm of a token that is zero, which answers to any change of it."""
    shaky = Choice("shaky", {FP32: 8.0, FP16: 1.0}, {FP32: 0.5, FP16: 1e4})
    calm = Choice("calm", {FP32: 8.0, FP16: 1.0}, {FP32: 1e-14, FP16: 1e-7})
    assert Problem([shaky, calm], [], DEVICE).solve(1e-2) == {"shaky": FP32, "calm": FP16}
