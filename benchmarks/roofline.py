"""The least time that attention can take on a GPU, so that a measured time reads as a fraction of the possible.

    python -m benchmarks.roofline [--gpu h100] [--head-dim 128] [--tokens 16384] [--dtype bf16] [--causal]

Assumes that every unit runs at its data sheet's peak and that within the attention kernel tensor cores, exponentials
and memory overlap completely; that the kernels before it (statistics, packing) are bound by memory and overlap with
nothing; that each of them reads a tensor once from memory, the statistics of k twice; that a head multiplies q·k at the
width of its class of rank, and only pairs that are attended. Launches, the plan itself and partial blocks cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import click
from rich.console import Console
from rich.table import Table

from adaattn.planning.ladder import rank_classes
from adaattn.planning.precision import PRECISIONS

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

Shares = Mapping[tuple[str, int], float]
"""A plan: the share of the heads that has each (precision, rank)."""


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU: dense tensor-core FLOP/s with sums in float32 (int32 for int8), exponentials/s, bytes/s."""

    name: str  # as the driver gives it
    capability: int
    fp16: float  # and bf16
    int8: float
    fp8: float | None
    tf32: float
    exponentials: float  # multiprocessors × 16 a clock × boost clock
    bytes: float


# NVIDIA's data sheets of the A100 80GB SXM, L40S, H100 SXM, H200 SXM and HGX B200, their figures with sparsity halved;
# multiprocessors and clocks from the architectures' white papers, for the B200 the clock that its peak implies.
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80, 312e12, 624e12, None, 156e12, 108 * 16 * 1.41e9, 2.039e12),
    "l40s": Gpu("NVIDIA L40S", 89, 362e12, 733e12, 733e12, 183e12, 142 * 16 * 2.52e9, 0.864e12),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 90, 989e12, 1979e12, 1979e12, 494e12, 132 * 16 * 1.83e9, 3.35e12),
    "h200": Gpu("NVIDIA H200", 90, 989e12, 1979e12, 1979e12, 494e12, 132 * 16 * 1.83e9, 4.8e12),
    "b200": Gpu("NVIDIA B200", 100, 2250e12, 4500e12, 4500e12, 1100e12, 148 * 16 * 1.86e9, 8.0e12),
}


@dataclass(frozen=True)
class Roofline:
    """Seconds that each resource needs: of the attention kernel the first three, of those before it the others."""

    tensor: float
    exponentials: float
    traffic: float
    statistics: float
    packing: float

    @property
    def attend(self) -> float:
        """The attention kernel alone, which is all that a peer has."""
        return max(self.tensor, self.exponentials, self.traffic)

    @property
    def seconds(self) -> float:
        """All kernels, one after the other."""
        return self.attend + self.statistics + self.packing

    @property
    def binds(self) -> str:
        """What the attention kernel waits for."""
        needs = {"tensor cores": self.tensor, "exponentials": self.exponentials, "memory": self.traffic}
        return max(needs, key=lambda name: needs[name])


def gpu_named(name: str) -> Gpu | None:
    """Return the GPU that the driver calls so, if its rates are known."""
    return next((gpu for gpu in GPUS.values() if gpu.name == name), None)


def attended_pairs(queries: int, keys: int, causal: bool) -> int:
    """Pairs of query and key that attend to each other, causal being aligned at the top left.

    Example:
        >>> attended_pairs(3, 3, True), attended_pairs(3, 2, True), attended_pairs(3, 3, False)
        (6, 5, 9)
    """
    if not causal:
        return queries * keys
    square = min(queries, keys)
    return square * (square + 1) // 2 + (queries - square) * keys


def roofline(
    gpu: Gpu,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    causal: bool,
    dtype: str,
    plan: Shares,
) -> Roofline:
    """Return the least time of one call with more than a block of queries, of inputs of `dtype` (a key of BYTES).

    Example:
        >>> least = roofline(GPUS["h100"], 1, 16, 16, 16384, 16384, 128, False, "bf16", {("bf16", 128): 1})
        >>> f"{least.seconds * 1e3:.1f} ms, bound by {least.binds}"
        '2.3 ms, bound by tensor cores'
    """
    size = BYTES[dtype]
    flop = 2.0 * batch * heads * attended_pairs(queries, keys, causal)
    q_elements, kv_elements = batch * heads * queries * head_dim, batch * kv_heads * keys * head_dim
    tensor, traffic, packed = 0.0, 2.0 * q_elements * size, 0.0
    for (precision, rank), share in plan.items():
        width = min(width for width in rank_classes(head_dim) if width >= rank)
        of_scores, of_values = _seconds_a_flop(gpu, dtype, precision)
        tensor += share * flop * (width * of_scores + head_dim * of_values)
        for stored in _stored(gpu, dtype, precision, head_dim):
            traffic += share * kv_elements * (stored or size)
            packed += share * kv_elements * (size + stored if stored else 0)
    return Roofline(
        tensor=tensor,
        exponentials=flop / 2 / gpu.exponentials,
        traffic=traffic / gpu.bytes,
        statistics=(q_elements + 3 * kv_elements) * size / gpu.bytes,
        packing=packed / gpu.bytes,
    )


def _seconds_a_flop(gpu: Gpu, dtype: str, precision: str) -> tuple[float, float]:
    """Of q·k and of P·v, as the kernel multiplies them."""
    if precision == "fp32" and dtype == "fp32":
        return 3 / gpu.tf32, 3 / gpu.tf32
    if precision == "fp32":  # products of 16-bit inputs are exact; P is cut into parts of their type
        return 1 / gpu.fp16, (2 if dtype == "fp16" else 3) / gpu.fp16
    of_scores = 1 / (gpu.int8 if precision.startswith("int8") else gpu.fp16)
    return of_scores, 1 / (gpu.fp8 if precision == "int8_fp8" and gpu.fp8 else gpu.fp16)


def _stored(gpu: Gpu, dtype: str, precision: str, head_dim: int) -> tuple[float, float]:
    """Bytes of a packed element of k and of v; 0 where the kernel reads the input itself."""
    fp16 = 0 if dtype == "fp16" else 2
    if precision in ("fp32", "bf16"):
        return 0, 0
    if precision == "fp16":
        return fp16, fp16
    return 1 + 4 / head_dim, 1 if precision == "int8_fp8" and gpu.fp8 else fp16  # a float32 step for each key


@click.command(help=__doc__)
@click.option("--gpu", type=click.Choice(list(GPUS)), default="h100", show_default=True)
@click.option("--head-dim", type=click.IntRange(1, 256), default=128, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=16384, show_default=True, help="Queries and keys.")
@click.option("--dtype", type=click.Choice(list(BYTES)), default="bf16", show_default=True, help="Of the inputs.")
@click.option("--causal", is_flag=True)
def main(gpu: str, head_dim: int, tokens: int, dtype: str, causal: bool) -> None:
    heads = 16
    table = Table(
        title=f"{GPUS[gpu].name}: 1 × {heads} heads, {tokens} tokens, head_dim {head_dim}, {dtype} inputs", box=None
    )
    for column in ("precision", "rank", "tensor", "exp", "memory", "statistics", "packing", "all, ms", "TFLOP/s"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    table.add_column("bound by")
    flop = 4 * heads * head_dim * attended_pairs(tokens, tokens, causal)
    for precision in PRECISIONS:
        for rank in rank_classes(head_dim):
            least = roofline(
                GPUS[gpu], 1, heads, heads, tokens, tokens, head_dim, causal, dtype, {(precision, rank): 1}
            )
            parts = (least.tensor, least.exponentials, least.traffic, least.statistics, least.packing, least.seconds)
            cells = [f"{1e3 * part:.3f}" for part in parts]
            table.add_row(precision, str(rank), *cells, f"{flop / least.seconds / 1e12:.0f}", least.binds)
    Console().print(table)


if __name__ == "__main__":
    main()
