"""`adaattn-run`: run an artifact on arrays from files, and time it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import click

from adaattn.interrupts import raise_on_signals

HELP = """Run PATH: a folder of adaattn-export, an ONNX file, or an engine.

\b
Examples
  adaattn-run model-export --input query=@q.npy --input key=@k.npy --input value=@v.npy --output out.npz
  adaattn-run model-export --input x=1,128,256 --time
  adaattn-run model-export --target tensorrt --input x=1,128,256 --time --cuda-graph

An input is a file, NAME=@FILE.npy, or sizes, NAME=1,128,256, which are filled with normal numbers (integers: 0 and 1;
booleans: true). It prints a line for each output; --output keeps them.
"""


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--input", "inputs", multiple=True, metavar="NAME=@FILE|SIZES", help="An input; repeatable.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Keep the outputs in an .npz.")
@click.option("--target", type=click.Choice(["onnx", "tensorrt", "tensorrt-rtx"]), help="In a folder.  [default: onnx]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of ONNX Runtime.")
@click.option("--cuda-graph", is_flag=True, help="Of an engine: record the launches once and replay them.")
@click.option(
    "--plugin-library",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Of an engine of --plugins native; loading it runs its code.",
)
@click.option("--time", "timed", is_flag=True, help="Time calls: median and 99th percentile.")
@click.option("--calls", type=click.IntRange(min=1), default=100, show_default=True, help="How many to time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the numbers that fill sizes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
@click.version_option(package_name="adaattn")
def main(
    path: Path,
    inputs: tuple[str, ...],
    output: Path | None,
    target: str | None,
    device: str,
    cuda_graph: bool,
    plugin_library: Path | None,
    timed: bool,
    calls: int,
    seed: int,
    as_json: bool,
) -> None:
    import numpy as np

    from adaattn.atomic_file import write
    from adaattn.errors import AdaAttnError
    from adaattn.export.golden import save_arrays
    from adaattn.export.runtime import open_runtime

    raise_on_signals()
    random = np.random.default_rng(seed)
    try:
        with open_runtime(path, target, device=device, cuda_graph=cuda_graph, plugin_library=plugin_library) as model:
            arrays: dict[str, Any] = {}
            for text in inputs:
                name, equals, given = text.partition("=")
                if not equals or name not in model.inputs:
                    known = ", ".join(str(info) for info in model.inputs.values())
                    raise click.UsageError(f"{text!r} is no input; write NAME=@FILE.npy or NAME=SIZES of {known}")
                arrays[name] = _array(name, given, model.inputs[name].dtype, random)
            found = model(**arrays)
            timing = model.measure(calls, **arrays) if timed else None
        if output is not None:
            archive = io.BytesIO()
            save_arrays(archive, found)
            write(output, archive.getbuffer())
    except AdaAttnError as error:
        click.echo(f"adaattn-run: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    rows: list[dict[str, Any]] = [
        {"name": name, "type": str(x.dtype), "shape": list(x.shape), "mean": _mean(x), "finite": _finite(x)}
        for name, x in found.items()
    ]
    if as_json:
        measured = None if timing is None else vars(timing)
        click.echo(json.dumps({"outputs": rows, "milliseconds": measured}, indent=1))
        return
    for row in rows:
        note = "" if row["finite"] else "  holds NaN or Inf"
        sizes = ", ".join(map(str, row["shape"]))
        click.echo(f"{row['name']}: {row['type']}({sizes}), mean {row['mean']:.6g}{note}")
    if timing is not None:
        click.echo(f"{timing.median:.3f} ms median, {timing.p99:.3f} ms 99th percentile of {timing.calls} calls")


def _array(name: str, given: str, dtype: str, random: Any) -> Any:
    import numpy as np

    if given.startswith("@"):
        try:
            return np.load(given[1:], allow_pickle=False)
        except (OSError, ValueError) as error:
            raise click.UsageError(f"{name}: {given[1:]} is no array that numpy reads: {error}") from error
    try:
        shape = tuple(int(size) for size in given.split(","))
    except ValueError as error:
        raise click.UsageError(f"{name}={given}: give @FILE.npy, or sizes such as 1,128,256") from error
    if dtype == "bool":
        return np.ones(shape, bool)
    if "int" in dtype:
        return random.integers(0, 2, shape).astype(dtype)
    if dtype == "bfloat16":
        raise click.UsageError(f"{name} is bfloat16, which numpy has no type for: use open_runtime with torch tensors")
    return random.standard_normal(shape).astype(dtype)


def _mean(x: Any) -> float:
    import numpy as np

    return float(np.mean(x, dtype=np.float64))


def _finite(x: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(x).all())


if __name__ == "__main__":
    main()
