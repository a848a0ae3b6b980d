"""Define what `benchmarks.attention` compares: AdaAttn's plans, and every other attention that is installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.roofline import Shares

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTH = 2048  # heads times head_dim
TOKENS = 16384  # batch times tokens, and the length at which everything is compared
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """A contender that this machine or this setting does not have; its message is the reason."""


@dataclass(frozen=True)
class Setting:
    """What all contenders are given."""

    head_dim: int
    tokens: int
    causal: bool
    dtype: str
    heads: int
    batch: int

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def __str__(self) -> str:
        masked = ", causal" if self.causal else ""
        return f"{self.dtype}, head_dim {self.head_dim}, {self.tokens} tokens{masked}"


def settings() -> list[Setting]:
    """All settings, the most telling first."""
    every = [
        Setting(head_dim, tokens, causal, dtype, WIDTH // head_dim, max(1, TOKENS // tokens))
        for tokens in (TOKENS, 4096, 65536, 1024)
        for head_dim in (128, 64, 256)
        for dtype in DTYPES
        for causal in (False, True)
    ]
    return sorted(every, key=lambda s: (s.tokens != TOKENS) + (s.head_dim != 128) + (s.dtype != "bf16") + s.causal)


def inputs(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    shape = (setting.batch, setting.heads, setting.tokens, setting.head_dim)

    def draw() -> Tensor:
        outlier = torch.rand(shape, device=DEVICE) < 1e-3
        x = torch.randn(shape, device=DEVICE)
        return x.add_(10 * torch.randn(shape, device=DEVICE) * outlier).to(DTYPES[setting.dtype])

    return draw(), draw(), draw()


def planned(setting: Setting, precision: str, low_rank_heads: float) -> tuple[Run, Shares]:
    """Ours at a fixed plan: some of the heads at half the rank."""
    from adaattn.functional import attend_by_plan, operand_moments
    from adaattn.planning.error_model import Plan
    from adaattn.planning.precision import PRECISIONS

    shape = (setting.batch, setting.heads)
    code = torch.full(shape, PRECISIONS.index(precision), dtype=torch.int32, device=DEVICE)
    rank = torch.full_like(code, setting.head_dim)
    few = round(low_rank_heads * setting.heads)
    rank[:, :few] = setting.head_dim // 2
    plan = Plan(code, rank, torch.zeros(shape, device=DEVICE))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            moments = operand_moments(q, k, v, None, "triton")
        return attend_by_plan(q, k, v, moments, plan, None, setting.causal, setting.scale, "triton")

    whole = {(precision, setting.head_dim): 1 - few / setting.heads}
    return run, whole | ({(precision, setting.head_dim // 2): few / setting.heads} if few else {})


def plan_of_budget(setting: Setting, tolerance: float, qkv: tuple[Tensor, Tensor, Tensor]) -> Any:
    from adaattn.functional import operand_moments
    from adaattn.ops.plan.api import plan_within
    from adaattn.planning.budget import Budget
    from adaattn.planning.ladder import ladder_table_for

    q, k, v = qkv
    budget = Budget(tolerance)
    table = ladder_table_for(budget, setting.head_dim, q.device)
    moments = operand_moments(q, k, v, None, "triton")
    return plan_within(budget, table, *moments, setting.scale, "triton")


def within(setting: Setting, tolerance: float) -> tuple[Run, Shares]:
    """Ours at the plan that the budget chooses; that of the first inputs stands for all."""
    import adaattn
    from adaattn.planning.precision import PRECISIONS

    torch.manual_seed(0)
    plan = plan_of_budget(setting, tolerance, inputs(setting))
    codes, ranks = plan.precision.flatten().tolist(), plan.rank.flatten().tolist()
    counts = Counter((PRECISIONS[code], rank) for code, rank in zip(codes, ranks, strict=True))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return adaattn.adaptive_attention(q, k, v, is_causal=setting.causal, tolerance=tolerance, impl="triton")

    return run, {step: n / len(codes) for step, n in counts.items()}


def statistics_alone(setting: Setting) -> tuple[Run, Shares]:
    """Run only what comes before the attention kernels: moments and plan."""
    return lambda *qkv: plan_of_budget(setting, 5e-3, qkv).predicted_error, {}


def sdpa(setting: Setting, *backends: SDPBackend) -> tuple[Run, Shares]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=setting.causal)

    return run, {(setting.dtype, setting.head_dim): 1}


def flex(setting: Setting) -> tuple[Run, Shares]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if DEVICE == "cpu":
        raise Unavailable("compiled for a GPU alone")
    if setting.tokens != TOKENS:
        raise Unavailable(f"measured at {TOKENS} tokens alone: each length is compiled anew")
    torch._dynamo.reset()
    mask = None
    if setting.causal:
        tokens = setting.tokens
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask), {(setting.dtype, setting.head_dim): 1}


def flash_attn(setting: Setting) -> tuple[Run, Shares]:
    """Dao's package: FlashAttention-3 where it is installed, else 2."""
    if setting.dtype == "fp32":
        raise Unavailable("takes 16-bit inputs alone")
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        try:
            from flash_attn import flash_attn_func
        except ImportError:
            raise Unavailable("not installed") from None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=setting.causal)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return run, {(setting.dtype, setting.head_dim): 1}


def sage(setting: Setting) -> tuple[Run, Shares]:
    if setting.dtype == "fp32":
        raise Unavailable("takes 16-bit inputs alone")
    try:
        from sageattention import sageattn
    except ImportError:
        raise Unavailable("not installed") from None
    return (
        lambda q, k, v: sageattn(q, k, v, tensor_layout="HND", is_causal=setting.causal),
        {("int8_fp8", setting.head_dim): 1},
    )


DENSE, INT8, INT8_FP8, HALF_RANK = "ours, dense", "ours, int8", "ours, int8_fp8", "ours, dense, rank D/2"
WITHIN, STATISTICS = "ours, tolerance {:g}", "ours, statistics and plan alone"
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
PEERS |= {"efficient": SDPBackend.EFFICIENT_ATTENTION}
CONTENDERS: dict[str, Callable[[Setting], tuple[Run, Shares]]] = {
    DENSE: lambda s: planned(s, s.dtype, 0),
    INT8: lambda s: planned(s, "int8", 0),
    INT8_FP8: lambda s: planned(s, "int8_fp8", 0),
    "ours, dense, half the heads at D/2": lambda s: planned(s, s.dtype, 0.5),
    HALF_RANK: lambda s: planned(s, s.dtype, 1),
    WITHIN.format(5e-2): lambda s: within(s, 5e-2),
    WITHIN.format(5e-3): lambda s: within(s, 5e-3),
    STATISTICS: statistics_alone,
    **{f"SDPA, {name}": lambda s, backend=backend: sdpa(s, backend) for name, backend in PEERS.items()},
    "flex_attention": flex,
    "flash-attn": flash_attn,
    "SageAttention": sage,
}
