"""What a tolerance costs in eager PyTorch on a CPU, where nothing is rounded: time against dense attention, in one run.

    python -m benchmarks.eager [--quick]

Prints a table and writes benchmarks/results/eager.json. Each ratio is of medians of alternating calls.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).parent / "results"
WIDTH, HEADS = 512, 8


def ratio(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> float:
    """Return the time of one call over that of another."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 3):
        for call, spent in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return statistics.median(times[0][3:]) / statistics.median(times[1][3:])


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Few calls: shows that the script runs. Writes nothing.")
def main(quick: bool) -> None:
    import torch

    import adaattn

    torch.manual_seed(0)
    rounds, rows = 3 if quick else 200, []
    adaptive, dense = (adaattn.Encoder(WIDTH, HEADS, (kind,) * 2).eval() for kind in ("adaptive", "dense"))
    layers = [encoder.stack[0].attention for encoder in (adaptive, dense)]
    with torch.no_grad():
        for batch, tokens in ((1, 512), (8, 128), (1, 16)):
            x = torch.randn(batch, tokens, WIDTH)

            def within(x: torch.Tensor = x) -> None:
                with adaattn.adaptive_sdpa(tolerance=1e-2):
                    dense(x)

            shape = f"{batch} × {tokens} tokens, {HEADS} heads of {WIDTH // HEADS}"
            measured = ratio(lambda x=x: layers[0](x, x, x), lambda x=x: layers[1](x, x, x), rounds)
            rows.append((f"AdaptiveAttention / DenseAttention, {shape}", measured, 1.25 if tokens == 512 else None))
            measured = ratio(within, lambda x=x: dense(x), rounds // 2)
            rows.append((f"an encoder within adaptive_sdpa / as it is, {shape}", measured, None))
    for name, measured, limit in rows:
        click.echo(f"{measured:6.2f}   {f'at most {limit:4.2f}' if limit else ' ' * 12}   {name}")
    if not quick:
        content = {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
            "versions": {"torch": torch.__version__},
            "ratios": [{"name": name, "ratio": measured, "at_most": limit} for name, measured, limit in rows],
        }
        (RESULTS / "eager.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
