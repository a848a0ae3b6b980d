"""Every form of attention becomes one op, what only looks like it stays, and nothing is replaced that is not proven."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from adaattn.export.capture.captured import Captured
from adaattn.export.capture.module import capture_module
from adaattn.export.capture.saved_program import capture_program
from adaattn.export.golden import cases
from adaattn.export.golden.plan_mode import PlanMode, run_eager, to_double
from adaattn.export.rewrite import emit
from adaattn.export.rewrite import program as rewriting
from adaattn.export.rewrite.match import CALL, DECOMPOSED
from adaattn.export.rewrite.program import ADAPTIVE, ATTEND, Rewritten, departures, rewrite
from adaattn.input_spec import Dimension, InputSpec
from adaattn.ops.signatures import OPS

H, D = 4, 8
T3 = torch.ones(3)  # fits no model here
SDPA = torch.ops.aten.scaled_dot_product_attention.default
LOWEST = torch.finfo(torch.float32).min
SIZES = {"B": Dimension("B", 1, 2, 4), "S": Dimension("S", 1, 9, 24)}
Form = Callable[["Model", Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Attention of a form, between projections; the form gets q, k and v as (B, H, S, D) and a mask of tokens."""

    def __init__(self, form: Form, kv_heads: int) -> None:
        super().__init__()
        self.form, self.kv_heads = form, kv_heads
        self.q, self.kv, self.out = nn.Linear(H * D, H * D), nn.Linear(H * D, 2 * kv_heads * D), nn.Linear(H * D, H * D)
        self.register_buffer("causal", torch.ones(32, 32, dtype=torch.bool).tril().view(1, 1, 32, 32))
        self.register_buffer("table", torch.randn(63, H))
        self.factor = nn.Parameter(torch.rand(H, 1, 1) + 0.5)
        self.sinks = nn.Parameter(torch.randn(H))
        self.dropout = nn.Dropout(0.1)

    def bias(self, tokens: int) -> Tensor:
        places = torch.arange(tokens)
        return self.table[places[:, None] - places[None] + 31].permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, D)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.out(self.form(self, q, k, v, mask).transpose(1, 2).flatten(2))
        return y


class Model(nn.Module):
    def __init__(self, form: Form, kv_heads: int = H) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = Attention(form, kv_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = x + self.layer(x, mask)
        return y


def repeated(x: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, 2, tokens, width).reshape(batch, 2 * heads, tokens, width)


def plain(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(D), dim=-1) @ v


def nano_gpt(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(m.causal[:, :, : q.size(2), : q.size(2)] == 0, float("-inf"))
    return m.dropout(F.softmax(att, dim=-1)) @ v  # type: ignore[no-any-return]


def made_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores *= 0.3
    scores += m.bias(q.shape[2])
    scores.masked_fill_(~mask[:, None, None], LOWEST)
    return torch.matmul(scores.softmax(-1), v)


def gpt2_of_old(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], D**0.5)
    tokens = q.shape[2]
    scores = torch.where(m.causal[:, :, :tokens, :tokens], scores, torch.full([], LOWEST))
    scores = scores + (1.0 - mask[:, None, None].float()) * LOWEST
    return torch.matmul(scores.softmax(-1).type(v.dtype), v)


def in_float32(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def flat_batches(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    batch, _, tokens, _ = q.shape
    flat = [x.reshape(batch * H, tokens, D) for x in (q * D**-0.5, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(batch, H, tokens, tokens)
    scores = scores.masked_fill(~mask[:, None, None], LOWEST).view(batch * H, tokens, tokens)
    return torch.bmm(scores.softmax(-1), flat[2]).view(batch, H, tokens, D)


def alibi(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    batch, _, tokens, _ = q.shape
    flat = [x.reshape(batch * H, tokens, D) for x in (q, k, v)]
    slopes = m.bias(tokens)[None].expand(batch, -1, -1, -1).reshape(batch * H, tokens, tokens)
    scores = torch.baddbmm(slopes, flat[0], flat[1].transpose(1, 2), beta=1.0, alpha=0.2)
    return torch.bmm(scores.softmax(-1), flat[2]).view(batch, H, tokens, D)


def by_einsum(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, S, H, D)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.2
    scores = scores.masked_fill(~mask[:, None, None], LOWEST)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def of_windows(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend as Swin does: add a bias of places, then a mask of windows in another view."""
    batch, _, tokens, _ = q.shape
    scores = (q * D**-0.5) @ k.transpose(-2, -1) + m.bias(tokens).unsqueeze(0)
    windows = torch.zeros(1, 1, 1, tokens, tokens).masked_fill(~m.causal[:, :, :tokens, :tokens], -100.0)
    scores = (scores.view(batch, 1, H, tokens, tokens) + windows).view(-1, H, tokens, tokens)
    return scores.softmax(dim=-1) @ v


def with_a_factor(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As Swin v2: cosines, with a factor for each head that is learned."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return ((scores * m.factor.clamp(max=10)) + m.bias(q.shape[2])).softmax(-1) @ v  # type: ignore[no-any-return]


def stable_by_hand(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def disentangled(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As DeBERTa: a second product, gathered, is added."""
    scores = q @ k.mT / math.sqrt(3 * D)
    places = (torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None]).clamp(-3, 3) + 3
    other = torch.gather(q @ m.table[:8, 0:1].expand(8, 7), -1, places.expand(q.shape[0], H, -1, -1))
    return (scores + other).masked_fill(~mask[:, None, None], LOWEST).softmax(-1) @ v


def shared_keys(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ repeated(k).transpose(2, 3) * 0.2).softmax(-1) @ repeated(v)


def one_kv_head(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) * 0.2).softmax(-1) @ v


def call(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def call_with_padding(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As transformers: causality and padding in one mask for every query."""
    rows, columns = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    whole = torch.ones((), dtype=torch.bool) & (columns[None] <= rows[:, None]) & mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, whole.expand(-1, -1, q.shape[2], -1), scale=0.2)


def call_of_groups(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), m.bias(q.shape[2])[None])


def call_with_narrow_values(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([F.scaled_dot_product_attention(q, k, v[..., :3]), v[..., 3:]], -1)


def wide_values(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q[..., :6] @ k[..., :6].mT).softmax(-1) @ v


def call_of_three_axes(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, H))


FORMS: dict[str, tuple[Form, int, bool, str]] = {  # form, kv heads, whether it is causal, shape of the mask
    "plain": (plain, H, False, ""),
    "nanoGPT": (nano_gpt, H, True, ""),
    "made in place": (made_in_place, H, False, "B,H,S,S"),
    "GPT-2 of old": (gpt2_of_old, H, True, "B,1,1,S"),
    "softmax in float32": (in_float32, H, False, ""),
    "flat batches": (flat_batches, H, False, "B,1,1,S"),
    "alibi": (alibi, H, False, "N,1,S,S"),
    "einsum": (by_einsum, H, False, "B,1,1,S"),
    "windows": (of_windows, H, False, "B,H,S,S"),
    "a factor": (with_a_factor, H, False, "1,H,S,S"),
    "stable by hand": (stable_by_hand, H, False, ""),
    "disentangled": (disentangled, H, False, "B,H,S,S"),
    "shared keys": (shared_keys, 2, False, ""),
    "one kv head": (one_kv_head, 1, False, ""),
    "wide values": (wide_values, H, False, ""),
    "call": (call, H, True, ""),
    "call with narrow values": (call_with_narrow_values, H, False, ""),
    "call with padding": (call_with_padding, H, True, "B,1,1,S"),
    "call of groups": (call_of_groups, 2, False, "1,H,S,S"),
    "call of three axes": (call_of_three_axes, H, False, ""),
}


SIMILAR = (
    "plain",
    "GPT-2 of old",
    "softmax in float32",
    "a factor",
    "stable by hand",
    "one kv head",
    "wide values",
    "call",
)


def forms(*names: str) -> list[Any]:
    """Return forms as parameters of a test, those that others resemble only with --thorough."""
    return [pytest.param(name, marks=pytest.mark.thorough) if name in SIMILAR else name for name in names]


def captured(form: Form, kv_heads: int = H) -> Captured:
    specs = [InputSpec("x", ("B", "S", H * D)), InputSpec("mask", ("B", "S"), "bool", meaning="attend")]
    return cases.settle(capture_module(Model(form, kv_heads).eval(), specs, SIZES), [])


def rewritten(before: Captured, tolerance: float | None = 1e-2) -> tuple[Captured, list[Rewritten]]:
    return rewrite(before, tolerance, lambda: cases.proof(before))


def nodes(program: Captured, target: Any) -> list[Node]:
    return [node for node in program.program.graph.nodes if node.target is target]


@pytest.mark.parametrize("name", forms(*FORMS))
def test_every_form_becomes_one_op(name: str) -> None:
    form, kv_heads, is_causal, of_mask = FORMS[name]
    before = captured(form, kv_heads)
    was = CALL if name.startswith("call") else DECOMPOSED
    after, found = rewritten(before)
    assert [(each.path, each.was, each.became, each.reason) for each in found] == [("layer", was, ADAPTIVE, None)]
    assert found[0].error is not None
    assert found[0].error < 1e-12
    assert not nodes(after, SDPA)
    assert not [node for node in after.program.graph.nodes if "softmax" in str(node.target)]
    (node,) = nodes(after, ATTEND)
    given = OPS["adaptive_attention"].bound(node.args, node.kwargs)
    assert given["is_causal"] == is_causal
    assert given["key"].meta["val"].shape[1] == (1 if name in ("alibi", "call of three axes") else kv_heads)
    mask = given["attn_mask"]
    if not of_mask:
        assert mask is None
    else:
        rows = [not isinstance(size, int) for size in mask.meta["val"].shape[2:]]
        assert rows == [size == "S" for size in of_mask.split(",")[2:]]
    assert departures(after, after.in_double()) == []

    for case in cases.cases(before):
        inputs = {key: to_double(x) for key, x in case.inputs.items()}
        (want,) = run_eager(before.in_double(), inputs, PlanMode(double=True, dtype=torch.float32))
        (got,) = run_eager(after.in_double(), inputs, PlanMode(double=True, dtype=torch.float32, exact=True))
        known = want.isfinite()
        torch.testing.assert_close(got[known], want[known], rtol=1e-9, atol=1e-9)
        (rounded,) = run_eager(after.eager, case.inputs, PlanMode())
        error = float((rounded.double() - want)[known].norm() / want[known].norm())
        assert error < 1e-2, case.name


@pytest.mark.parametrize("name", ["nanoGPT", "flat batches", "made in place"])
def test_without_a_tolerance_it_becomes_one_call(name: str) -> None:
    form, kv_heads, _, _ = FORMS[name]
    before = captured(form, kv_heads)
    after, found = rewritten(before, None)
    assert [(each.became, each.reason) for each in found] == [(CALL, None)]
    assert len(nodes(after, SDPA)) == 1
    assert after.original is None  # the model itself stays what everything is compared with
    for case in cases.proof(before):
        (want,), (got,) = (run_eager(eager, case.inputs) for eager in (before.eager, after.eager))
        torch.testing.assert_close(got, want, equal_nan=True)


def test_programs_take_a_tolerance_too() -> None:
    before = captured(plain)
    again = capture_program(before.program, {})
    after, found = rewrite(again, 1e-2, lambda: cases.proof(again), replan=True)
    assert [each.became for each in found] == [ADAPTIVE]
    tighter = capture_program(after.program, {})
    last, found = rewrite(tighter, 1e-4, lambda: cases.proof(tighter), replan=True)
    assert [(each.was, each.became) for each in found] == [(ADAPTIVE, ADAPTIVE)]
    limits = [
        OPS["plan"].bound(node.args, node.kwargs)["limit"] for node in nodes(last, torch.ops.adaattn.plan.default)
    ]
    assert limits == [pytest.approx(1e-4 / 1.25)]


@pytest.mark.parametrize("name", forms("plain", "flat batches"))
def test_programs_that_were_decomposed_are_read_too(name: str) -> None:
    form, kv_heads, _, _ = FORMS[name]
    program = capture_program(captured(form, kv_heads).program.run_decompositions(), {})
    after, found = rewritten(program)
    assert [(each.became, each.reason) for each in found] == [(ADAPTIVE, None)]
    assert len(nodes(after, ATTEND)) == 1


def capped(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (50 * torch.tanh(q @ k.mT / 50)).softmax(-1) @ v


def with_sinks(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    sinks = m.sinks.view(1, H, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., :-1] @ v


def shown_weights(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.sum(-1, keepdim=True)


def shown_scores(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.mean(-1, keepdim=True)


def over_queries(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def low_but_not_hidden(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~m.causal[:, :, : q.shape[2], : q.shape[2]], -1.0).softmax(-1) @ v


def some_keys(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)[..., :1] @ v[..., :1, :]


def multiplied_scores(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT) * m.bias(q.shape[2])).softmax(-1) @ v


STAYS: dict[str, tuple[Form, str]] = {
    "cap": (capped, "a cap (tanh)"),
    "sinks": (with_sinks, "as of attention sinks"),
    "some keys": (some_keys, "only some of its weights"),
    "weights": (shown_weights, "its weights are used elsewhere too"),
    "scores": (shown_scores, "its scores are used elsewhere too"),
    "over queries": (over_queries, "over another dimension"),
    "finite": (low_but_not_hidden, "computes something else: it differs by"),
    "multiplied": (multiplied_scores, "multiplied by a tensor"),
}


@pytest.mark.parametrize("name", STAYS)
def test_other_attention_stays_with_the_reason(name: str) -> None:
    form, reason = STAYS[name]
    before = captured(form)
    after, found = rewritten(before)
    assert after is before
    (each,) = found
    assert each.became is None
    assert each.reason is not None
    assert reason in each.reason


def gated(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Mix by weights that come from no product, and take a softmax of which nothing is made."""
    gates = m.out(q.transpose(1, 2).flatten(2)).unflatten(-1, (H, D)).transpose(1, 2).softmax(-1)
    return gates @ torch.eye(D) * v.softmax(-1)


def test_a_softmax_that_is_no_attention_is_not_listed() -> None:
    before = captured(gated)
    after, found = rewritten(before)
    assert after is before
    assert found == []


@pytest.mark.parametrize("fault", ["scale", "mask", pytest.param("key", marks=pytest.mark.thorough)])
def test_what_is_not_proven_is_not_replaced(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault planted in the code that writes the op is found on the golden inputs."""
    original = emit._compute

    def faulty(site: Any, values: Any, attend: Any) -> Tensor:
        def wrong(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
            if fault == "scale":
                scale *= 1 + 1e-6
            elif fault == "mask":
                mask = None
            else:
                k = k.roll(1, 2)
            return attend(q, k, v, mask, is_causal, scale)

        return original(site, values, wrong)

    monkeypatch.setattr(emit, "_compute", faulty)
    before = captured(by_einsum)
    after, found = rewritten(before)
    assert after is before
    assert [each.became for each in found] == [None]
    assert "computes something else: it differs by" in str(found[0].reason)


def test_a_mask_that_is_causal_at_some_sizes_alone_stays_a_mask() -> None:
    def form(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        rows, columns = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        near = columns[None] <= rows[:, None] + rows[:, None] // 20
        return F.scaled_dot_product_attention(q, k, v, near)

    after, found = rewritten(captured(form))
    (node,) = nodes(after, ATTEND)
    given = OPS["adaptive_attention"].bound(node.args, node.kwargs)
    assert not given["is_causal"]
    assert given["attn_mask"] is not None
    assert [each.became for each in found] == [ADAPTIVE]


def test_departures_of_a_program_from_its_model_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    before = captured(plain)
    after, _ = rewritten(before)
    assert after.original is not None
    wrong = captured(by_einsum)
    monkeypatch.setattr(rewriting, "DEPARTURE", 1e-6)
    lines = departures(rewriting.replace(after, original=wrong.in_double), after.in_double())
    assert lines
    assert "differs from the model by" in lines[0]


def test_causality_that_ends_at_the_last_key_stays_a_mask() -> None:
    """With a dimension for queries and one for keys: where both are alike, it is causality from the top left."""

    class Cross(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            rows, columns = torch.arange(q.shape[2]), torch.arange(k.shape[2])
            seen = columns[None] <= rows[:, None] + (k.shape[2] - q.shape[2])
            return F.scaled_dot_product_attention(q, k, k, seen)

    dims = {name: Dimension(name, 1, 9, 24) for name in ("S", "T")} | {"B": SIZES["B"]}
    specs = [InputSpec(name, ("B", H, size, D)) for name, size in (("q", "S"), ("k", "T"))]
    after, _ = rewritten(capture_module(Cross().eval(), specs, dims))
    (node,) = nodes(after, ATTEND)
    given = OPS["adaptive_attention"].bound(node.args, node.kwargs)
    assert not given["is_causal"]
    assert given["attn_mask"] is not None


@pytest.mark.parametrize("runs", ["none", "fails"])
def test_without_numbers_to_compare_nothing_is_proven(runs: str) -> None:
    before = captured(nano_gpt)
    proof = [] if runs == "none" else [replace(case, inputs={"x": T3, "mask": T3}) for case in cases.proof(before)]
    after, (each,) = rewrite(before, 1e-2, lambda: proof)
    assert after is before
    assert each.became is None
    assert str(each.reason).startswith("it is not proven: ")
