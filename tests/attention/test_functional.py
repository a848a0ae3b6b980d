"""`adaattn.adaptive_attention` can stand where `scaled_dot_product_attention` stood: same names, same meaning."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adaattn
from adaattn import ops
from adaattn.errors import AdaAttnError, ConfigError, DtypeError, ShapeError
from tests.support import oracle

B, H, HK, SQ, SK, D = 2, 4, 2, 17, 19, 20


def operands(kv_heads: int = H, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(B, H, SQ, D), torch.randn(B, kv_heads, SK, D) + 3, torch.randn(B, kv_heads, SK, D)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def boolean(*shape: int) -> Tensor:
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


MASKS = {
    "none": lambda: None,
    "1-D": lambda: boolean(SK),
    "2-D": lambda: boolean(SQ, SK),
    "2-D additive": lambda: torch.randn(SQ, SK),
    "3-D": lambda: boolean(H, SQ, SK),
    "3-D, one head": lambda: boolean(1, SQ, SK),
    "4-D": lambda: boolean(B, H, SQ, SK),
    "4-D padding": lambda: boolean(B, 1, 1, SK),
    "4-D additive": lambda: torch.randn(B, H, 1, SK),
    "4-D, of a query": lambda: torch.randn(B, H, SQ, 1),
    "empty row": lambda: boolean(SQ, SK) & (torch.arange(SQ) != 3).unsqueeze(1),
    "minus infinity": lambda: torch.where(boolean(SQ, SK) & (torch.arange(SQ) > 0).unsqueeze(1), 0.0, -torch.inf),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [H, HK])
def test_output_is_exact_at_full_precision(mask: str, causal: bool, kv_heads: int) -> None:
    q, k, v = operands(kv_heads)
    given = MASKS[mask]()
    options = {"precisions": ("fp32",), "low_rank": False, "enable_gqa": kv_heads != H}
    output = adaattn.adaptive_attention(q, k, v, given, 0.0, causal, scale=0.3, tolerance=1e-3, **options)
    assert output.shape == (B, H, SQ, D)
    assert (oracle.error(output, oracle.attention(q, k, v, given, causal, 0.3)) <= oracle.SUMS).all()


@pytest.mark.parametrize("mask", ["none", "2-D additive", "4-D", "empty row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_output_is_within_the_tolerance(mask: str, dtype: torch.dtype) -> None:
    q, k, v = operands(dtype=dtype)
    given = MASKS[mask]()
    output = adaattn.adaptive_attention(q, k, v, given, tolerance=2e-2, impl="reference")
    error = oracle.error(output, oracle.attention(q, k, v, given))
    assert output.dtype == dtype
    assert (error <= 2e-2 + oracle.OUTPUT[dtype]).all()
    assert (error > 1e-4).all()  # and was spent


def test_arguments_are_those_of_sdpa() -> None:
    assert F.scaled_dot_product_attention.__doc__ is not None
    ours = inspect.signature(adaattn.adaptive_attention).parameters
    theirs = "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False"
    assert theirs in " ".join(F.scaled_dot_product_attention.__doc__.split())
    names = [each.partition("=")[0] for each in theirs.split(", ")]
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == names[: len(positional)]  # torch takes the rest by keyword alone, too
    assert set(names) <= set(ours)
    assert all(f"{n}={ours[n].default}" in theirs for n in names[3:])
    q, k, v = operands()
    named = {"query": q, "key": k, "value": v, "attn_mask": boolean(SQ, SK), "scale": 0.3, "enable_gqa": True}
    output = adaattn.adaptive_attention(**named, tolerance=1e-6)
    want = F.scaled_dot_product_attention(**named)
    torch.testing.assert_close(output, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("given", [(), (None,), (None, 0.0), (None, 0.0, False), (None, 0, True)], ids=str)
def test_positional_arguments_mean_what_they_do_in_sdpa(given: tuple[Any, ...]) -> None:
    q, k, v = operands()
    output = adaattn.adaptive_attention(q, k, v, *given, tolerance=1e-6)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, *given), rtol=2e-5, atol=2e-5)
    with pytest.raises(TypeError, match="positional"):
        adaattn.adaptive_attention(q, k, v, None, 0.0, True, 0.3, tolerance=1e-2)  # type: ignore[misc]


BAD: list[tuple[dict[str, Any], type[AdaAttnError], str]] = [
    ({"tolerance": 0}, ConfigError, "tolerance is 0; give"),
    ({"tolerance": -1.0}, ConfigError, "tolerance is -1.0; give"),
    ({"safety": 0}, ConfigError, "safety is 0; give"),
    ({"dropout_p": 0.1}, ConfigError, "dropout_p is 0.1; give 0.0: adaptive attention has no dropout"),
    ({"dropout_p": True}, ConfigError, "dropout_p is True; give 0.0"),  # is_causal, in its place of earlier releases
    ({"is_causal": 0.3}, ConfigError, "is_causal is 0.3; give True or False"),
    ({"precisions": ("fp8",)}, ConfigError, "fp8.*choose at least one of fp32"),
    ({"query": torch.zeros(B, SQ, D)}, ShapeError, r"query has shape \(2, 17, 20\); expected \(batch, heads"),
    ({"query": torch.zeros(B, H, SQ, D + 1)}, ShapeError, r"key has shape.*expected \(2, kv heads, keys, 21\)"),
    ({"query": torch.zeros(B + 1, H, SQ, D)}, ShapeError, r"key has shape.*expected \(3,"),
    ({"query": torch.zeros(B, H, 0, D)}, ShapeError, "query has 0 tokens"),
    (dict.fromkeys(("query", "key", "value"), torch.zeros(B, H, SQ, 0)) | {"scale": 1.0}, ShapeError, "0 dimensions"),
    ({"query": torch.zeros(B, H, SQ, D).long()}, DtypeError, "query is torch.int64; expected a floating"),
    ({"query": torch.zeros(B, H, SQ, D).half()}, DtypeError, "key is torch.float32 and query torch.float16"),
    ({"value": torch.zeros(B, H, SK + 1, D)}, ShapeError, "value has shape.*expected that of key"),
    ({"key": torch.zeros(B, 2, SK, D), "value": torch.zeros(B, 2, SK, D)}, ShapeError, "pass enable_gqa=True"),
    (
        {"key": torch.zeros(B, 3, SK, D), "value": torch.zeros(B, 3, SK, D), "enable_gqa": True},
        ShapeError,
        "query has 4 heads and key 3",
    ),
    ({"attn_mask": torch.zeros(SQ, SK).long()}, DtypeError, "attn_mask is torch.int64; give bool"),
    (
        {"attn_mask": torch.zeros(SQ, SK + 1)},
        ShapeError,
        r"attn_mask has shape .*keys\) = \(2, 4, 17, 19\), or 1 for any size",
    ),
    ({"attn_mask": torch.zeros(1, B, H, SQ, SK)}, ShapeError, "attn_mask has shape"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_says_what_was_expected(change: dict[str, Any], kind: type[AdaAttnError], message: str) -> None:
    q, k, v = operands()
    with pytest.raises(kind, match=message) as caught:
        adaattn.adaptive_attention(**{"query": q, "key": k, "value": v, "tolerance": 1e-2, **change})
    assert isinstance(caught.value, AdaAttnError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"precision": torch.zeros(B, H)}, DtypeError, "precision is torch.float32; expected int32"),
        ({"rank": torch.ones(B, 1, dtype=torch.int32)}, ShapeError, r"rank has shape \(2, 1\); expected \(2, 4\)"),
        ({"key_mean": torch.zeros(B, H, 1)}, ShapeError, r"key_mean has shape \(2, 4, 1\); expected \(2, 4, 20\)"),
        ({"value_peak": torch.zeros(B, H)}, ShapeError, r"value_peak has shape \(2, 4\); expected"),
        ({"attn_mask": boolean(SQ, SK)}, ShapeError, r"attn_mask has shape \(17, 19\)"),
    ],
)
def test_bad_plans_say_what_was_expected(change: dict[str, Any], kind: type[AdaAttnError], message: str) -> None:
    q, k, v = operands()
    per_head = torch.ones(B, H, dtype=torch.int32)
    statistics = {"key_mean": k.mean(2), "value_peak": v.abs().amax(2)}
    with pytest.raises(kind, match=message):
        ops.adaptive_attention(
            **{"query": q, "key": k, "value": v, "precision": per_head, "rank": per_head, **statistics, **change}
        )


@pytest.mark.parametrize(
    ("x", "mask", "kind"),
    [
        (torch.zeros(2, 3, 4), None, ShapeError),
        (torch.zeros(2, 3, 4, 5).long(), None, DtypeError),
        (torch.zeros(2, 3, 4, 5), torch.ones(2, 4).bool(), ShapeError),
        (torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4), DtypeError),
    ],
)
def test_bad_moments_say_what_was_expected(x: Tensor, mask: Tensor | None, kind: type[AdaAttnError]) -> None:
    with pytest.raises(kind, match=r"expected|give bool"):
        ops.token_moments(x, mask)


@pytest.mark.parametrize("mask", ["none", "4-D additive"])
def test_compiles_whole(mask: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return adaattn.adaptive_attention(q, k, v, mask, is_causal=True, enable_gqa=True, tolerance=1e-2)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for queries in (SQ, 5):  # the second length makes it compile anew, for any length
        q, k, v = operands(HK)
        args = (q[:, :, :queries], k, v, MASKS[mask]())
        torch.testing.assert_close(compiled(*args), attend(*args), rtol=0, atol=0)


def test_gradients_reach_every_operand() -> None:
    q, k, v = (x.double().requires_grad_() for x in operands(HK))
    mask = torch.randn(B, H, SQ, SK, dtype=torch.float64, requires_grad=True)
    ours = adaattn.adaptive_attention(q, k, v, mask, enable_gqa=True, tolerance=1e-2, low_rank=False)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    got = torch.autograd.grad(ours.square().sum(), (q, k, v, mask))
    want = torch.autograd.grad((theirs * ours.detach() * 2).sum(), (q, k, v, mask))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
