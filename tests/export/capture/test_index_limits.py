"""How large the integers of an input may be, as the program tells it; and the golden inputs that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaattn.export.capture.captured import Captured
from adaattn.export.capture.index_limits import index_limits
from adaattn.export.capture.module import capture_module
from adaattn.export.capture.saved_program import capture_program
from adaattn.export.golden import cases
from adaattn.export.golden.eager import array
from adaattn.export.parity import golden_case
from adaattn.input_spec import Dimension, InputSpec

SIZES = {"S": Dimension("S", 2, 9, 40)}


class Tables(nn.Module):
    """Tables of 100 and 50 rows and a buffer of 30 by 4, and what is done with them."""

    def __init__(self, then: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.words, self.places = nn.Embedding(100, 8), nn.Embedding(50, 8)
        self.register_buffer("table", torch.randn(30, 4))
        self.then = then

    def forward(self, ids: Tensor, x: Tensor) -> Any:
        return self.then(self, ids, x)


def captured(then: Callable[[Any, Tensor, Tensor], Any], below: int | None = None) -> Captured:
    specs = [InputSpec("ids", ("B", "S"), "int64", below), InputSpec("x", ("B", "S", 8))]
    return capture_module(Tables(then).eval(), specs, SIZES)


def without_grad(m: Any, i: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.words(i) * 2


def when_positive(m: Any, i: Tensor, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda i, e: e[i], lambda i, e: e[i] * 2, (i, m.table))


FOUND: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], Any]] = {
    "embedding": (lambda m, i, x: m.words(i), 100),
    "the smaller of two tables": (lambda m, i, x: m.words(i) + m.places(i), 50),
    "after a sum": (lambda m, i, x: m.words(i + 2), 98),
    "in place": (lambda m, i, x: m.words(i.clone().add_(2)), 98),
    "after a difference": (lambda m, i, x: m.table[i - 1], 31),
    "after a product": (lambda m, i, x: m.words(i * 3 + 1), 33),
    "views and casts": (lambda m, i, x: m.words(i.reshape(-1)[:2].unsqueeze(0).to(torch.int32)), 100),
    "beside others": (lambda m, i, x: m.words(torch.cat([torch.zeros_like(i[:, :1]), i], 1)), 100),
    "one of two": (lambda m, i, x: m.words(torch.where(x[..., 0] > 0, i, 0)), 100),
    "bag": (lambda m, i, x: F.embedding_bag(i, m.words.weight), 100),
    "rows": (lambda m, i, x: m.table[i], 30),
    "columns": (lambda m, i, x: m.table[:, i], 4),
    "gather": (lambda m, i, x: torch.gather(x, 1, i[..., None].expand(-1, -1, 8)), "S"),
    "take_along_dim": (lambda m, i, x: torch.take_along_dim(m.table[:, 0], i.reshape(-1), 0), 30),
    "index_copy": (lambda m, i, x: x.index_copy(1, i[0], x), "S"),
    "one_hot": (lambda m, i, x: F.one_hot(i, 17).float(), 17),
    "remainder": (lambda m, i, x: m.words(i % 37), 74),
    "clamp": (lambda m, i, x: m.words(i.clamp(0, 40)), 42),
    "clamp from below": (lambda m, i, x: m.words(i.clamp(min=3)), 100),
    "compared too": (lambda m, i, x: m.words(i) * (i != 1)[..., None], 100),
    "lengths": (lambda m, i, x: x * (torch.arange(x.shape[1])[None] < i)[..., None], "S + 1"),
    "true or false": (lambda m, i, x: x * i.bool()[..., None], 2),
    "without grad": (without_grad, 100),
    "in a branch": (when_positive, 30),
    "a number": (lambda m, i, x: x * i.float()[..., None], None),
    "a number and an index": (lambda m, i, x: m.words(i) * i[..., None], 100),
    "a remainder and a number": (lambda m, i, x: m.words(i % 37) * i[..., None], None),
    "returned": (lambda m, i, x: (i, x), None),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_range_is_what_the_program_indexes(name: str) -> None:
    then, want = FOUND[name]
    found = captured(then)
    item = found.inputs[0]
    symbol = next(symbol for symbol, dim in found.dims.items() if dim.name == "S")
    assert str(item.below) == str(want).replace("S", symbol)
    assert item.ranged == (want is not None)
    assert item.distinct == (name == "index_copy")
    assert bool(cases.unproven(found)) == (want is None)
    # A program that was saved says the same.
    saved = capture_program(found.program, dict(found.dims))
    if want is not None:
        assert str(saved.inputs[0].below) == str(item.below)
    assert bool(cases.unproven(saved)) == (want is None)


def test_integers_reach_both_ends_in_every_case() -> None:
    found = captured(lambda m, i, x: m.words(i))
    made = cases.cases(found)
    for case in made:
        ids = case.inputs["ids"]
        assert ids.max() == 99
        assert ids.min() == 0
    goldens = [
        golden_case.GoldenCase(case.name, {name: array(x) for name, x in case.inputs.items()}, {}) for case in made
    ]
    assert golden_case.integer_ranges(goldens) == {"ids": (0, 99)}
    assert golden_case.integer_ranges([]) == {}


def test_a_small_range_is_covered_and_places_are_distinct() -> None:
    found = captured(lambda m, i, x: x.index_copy(1, i[0], m.words(i)[0, :, :8].expand(x.shape)), 5)
    for case in cases.cases(found):
        ids = case.inputs["ids"].flatten()
        assert set(ids.tolist()) == set(range(5)) if len(ids) >= 5 else len(set(ids.tolist())) == len(ids)


@pytest.mark.parametrize(("count", "below", "distinct"), [(1, 1, False), (1, 9, True), (0, 9, False), (7, 7, True)])
def test_few_integers_have_their_range_too(count: int, below: int, distinct: bool) -> None:
    ids = cases._integers((count,), below, distinct, torch.Generator().manual_seed(1))
    assert ids.shape == (count,)
    assert ((ids >= 0) & (ids < below)).all()
    assert not distinct or len(set(ids.tolist())) == count


def test_what_is_stated_comes_first() -> None:
    found = captured(lambda m, i, x: m.words(i), 40)
    assert max(int(case.inputs["ids"].max()) for case in cases.cases(found)) == 39
    found = captured(lambda m, i, x: x * i.float()[..., None], 7)
    assert cases.unproven(found) == []


def test_an_unproven_range_is_named_with_its_remedy() -> None:
    (line,) = cases.unproven(captured(lambda m, i, x: x * i.float()[..., None]))
    assert line == (
        "input ids: only integers below 2 were tried, and nothing says how large they may be; give their range, as in "
        "--input ids=B,S:int64<512"
    )


def test_inputs_that_are_no_integers_have_no_limits() -> None:
    program = captured(lambda m, i, x: m.words(i) + x).program
    assert set(index_limits(program)) == {"ids"}
