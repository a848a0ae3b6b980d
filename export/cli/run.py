"""Define `adaattn-run`, which runs an artifact on arrays from files and times it."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import click

from adaattn.command_line import Command, complain, printable, verbose_option
from adaattn.errors import ConfigError

NAME = "adaattn-run"
HELP = """Run PATH: a folder of adaattn-export, an ONNX file, or an engine.

\b
Examples
  adaattn-run model-export --input query=@q.npy --input key=@k.npy --input value=@v.npy --output out.npz
  adaattn-run model-export --input x=1,128,256 --time
  adaattn-run model-export --target tensorrt --input x=1,128,256 --time --cuda-graph

An input is a file, NAME=@FILE.npy, or sizes, NAME=1,128,256, which are filled with normal numbers (integers: 0 and 1;
booleans: true). It prints a line for each output; --output keeps them.

\b
Exit status
  0  the model ran
  2  the arguments or the files cannot be used, the model did not run, or the command was interrupted
"""


@click.command(NAME, cls=Command, help=HELP)
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
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the numbers that fill sizes."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
@verbose_option
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
) -> int:
    """Run `adaattn-run`; HELP is its help."""
    import numpy as np

    from adaattn.export.artifacts.arrays import save_arrays
    from adaattn.export.artifacts.manifest import refuse_to_overwrite
    from adaattn.export.runtime.open import open_runtime
    from adaattn.system.atomic_file import write

    refuse_to_overwrite(path, output)
    if output is not None and os.path.realpath(output) == os.path.realpath(path):
        raise ConfigError(f"{output} is the model; give another file")
    random = np.random.default_rng(seed)
    with open_runtime(path, target, device=device, cuda_graph=cuda_graph, plugin_library=plugin_library) as model:
        arrays: dict[str, Any] = {}
        for text in inputs:
            name, equals, given = text.partition("=")
            if not equals or name not in model.inputs:
                known = ", ".join(str(info) for info in model.inputs.values())
                raise ConfigError(f"{text!r} is not an input; write NAME=@FILE.npy or NAME=SIZES of {known}")
            if name in arrays:
                raise ConfigError(f"the input {name} is given twice")
            arrays[name] = _array(name, given, model.inputs[name].dtype, random)
        found = model(**arrays)
        timing = model.measure(calls, **arrays) if timed else None
    _warn_of_changes(path, "model.onnx" if target in (None, "onnx") else f"{target}.engine")
    if output is not None:
        archive = io.BytesIO()
        save_arrays(archive, found)
        write(output, archive.getbuffer())
    rows: list[dict[str, Any]] = [
        {"name": name, "type": str(x.dtype), "shape": list(x.shape), "mean": _mean(x), "finite": _finite(x)}
        for name, x in found.items()
    ]
    if as_json:
        measured = None if timing is None else vars(timing)
        click.echo(json.dumps({"outputs": rows, "milliseconds": measured}, indent=1, allow_nan=False))
        return 0
    for row in rows:
        note = "" if row["finite"] else "  holds NaN or Inf"
        sizes = ", ".join(map(str, row["shape"]))
        mean = math.nan if row["mean"] is None else row["mean"]
        click.echo(printable(f"{row['name']}: {row['type']}({sizes}), mean {mean:.6g}{note}"))
    if timing is not None:
        click.echo(f"{timing.median:.3f} ms median, {timing.p99:.3f} ms 99th percentile of {timing.calls} calls")
    return 0


def _warn_of_changes(path: Path, artifact: str) -> None:
    """Say where the artifact in a folder is not the one that was exported and verified."""
    from adaattn.export.artifacts.manifest import MARKER, changed_files

    if not (path / MARKER).is_file():
        return
    lines = [line for line in changed_files(path) if line.startswith(artifact)]
    if lines:
        complain(NAME, f"warning: {'; '.join(lines)}")


def _array(name: str, given: str, dtype: str, random: Any) -> Any:
    import numpy as np

    if given.startswith("@"):
        return _load(name, Path(given[1:]))
    parts = [part.strip() for part in given.split(",")]
    # More digits than these no size has, and numbers of thousands of digits take long.
    if not all(part.isdecimal() and len(part) <= 18 for part in parts):
        raise ConfigError(f"{name}={given}: give @FILE.npy, or sizes such as 1,128,256")
    shape = tuple(int(part) for part in parts)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 8 * math.prod(shape) > memory:  # numbers are drawn in 8 bytes each; a system may promise more than it has
        raise ConfigError(f"{name}={given} is more than the memory of this machine holds; give smaller sizes")
    if dtype == "bool":
        return np.ones(shape, bool)
    if "int" in dtype:
        return random.integers(0, 2, shape).astype(dtype)
    if dtype == "bfloat16":
        raise ConfigError(f"{name} is bfloat16, which numpy has no type for: use open_runtime with torch tensors")
    return random.standard_normal(shape).astype(dtype)


def _load(name: str, path: Path) -> Any:
    """Return the array of an .npy file."""
    import numpy as np

    from adaattn.export.artifacts.arrays import UNREADABLE

    if not path.is_file():  # a pipe or a device could be read without an end
        raise ConfigError(f"{name}: {path} cannot be read as a NumPy array: it is not a file")
    try:
        found = np.load(path, allow_pickle=False)
    except UNREADABLE as error:
        raise ConfigError(f"{name}: {path} cannot be read as a NumPy array: {error}") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise ConfigError(f"{name}: {path} is an archive of arrays; give an array that numpy.save wrote")
    return found


def _mean(x: Any) -> float | None:
    """Return the mean, or None where it is not finite, since JSON has no NaN."""
    import numpy as np

    mean = float(np.mean(x, dtype=np.float64)) if x.size else math.nan
    return mean if math.isfinite(mean) else None


def _finite(x: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(x).all())


if __name__ == "__main__":
    main()
