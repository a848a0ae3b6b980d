"""`adaattn-export`. Nothing heavy is imported until the arguments are known to be in order: help must be instant."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Export MODEL to ONNX and TensorRT, and verify every artifact against eager PyTorch.

\b
MODEL is one of
  model.pt                 saved by adaattn.save
  program.pt2              saved by torch.export.save; trust its origin: torch runs code that such a file carries
  package.module:factory   a function without arguments that returns an nn.Module; with --weights
  pickled.pt               a pickled nn.Module, only with --allow-pickle

The output folder gets model.onnx (it runs in stock ONNX Runtime), an engine for each TensorRT target, golden.npz
(inputs and their float64 outputs), report.html, report.json and manifest.json. It appears only when all is done.

\b
Examples
  adaattn-export model.pt
  adaattn-export model.pt --dim "S=1:128:4096" --tolerance 1e-2 --output out
  adaattn-export shop.models:ranker --weights ranker.safetensors --input "x=B,S,512" --input "mask=B,S:bool"
  adaattn-export model.pt --target onnx --json | jq .verdict

\b
Exit status
  0  every target was made and none that this machine can run failed
  1  a target failed, or its numbers did not agree
  2  the arguments or the model are not usable
"""


def _assignments(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{value!r} has no name; write NAME=..., see --help")
        if name.strip() in found:
            raise click.BadParameter(f"{name.strip()} is given twice")
        found[name.strip()] = text.strip()
    return found


def _list(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    parts = tuple(part.strip() for part in value.split(",") if part.strip())
    if not parts:
        raise click.BadParameter("it is empty; write one or more, such as 8.9,12.0")
    return parts


class OneLineErrors(click.Command):
    """Answers wrong arguments with one line, as it does a wrong model."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        try:
            return super().parse_args(context, arguments)
        except click.UsageError as error:
            _fail(f"{error.format_message().rstrip('.')}; see --help", verbose=False)


@click.command(
    cls=OneLineErrors, help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.argument("model")
@click.option("--output", "-o", metavar="DIR", help="Folder for the artifacts.  [default: MODEL's name and -export]")
@click.option("--force", is_flag=True, help="Replace DIR if an earlier export made it.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=SHAPE[:TYPE]",
    callback=_assignments,
    help='An input, such as "query=B,S,512:float32"; letters are dynamic dimensions. Integers: "ids=B,S:int64<30522".  '
    "[default: what MODEL says]",
)
@click.option(
    "--dim",
    "dims",
    multiple=True,
    metavar="NAME=MIN:OPT:MAX",
    callback=_assignments,
    help="Sizes of a dynamic dimension, also TensorRT's profile.  [default: 1:1:8 for B… and N…, else 1:128:512]",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(["onnx", "tensorrt-rtx", "tensorrt"]),
    help="What to make; repeatable.  [default: onnx and every target whose package is installed]",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    metavar="8.9,12.0",
    callback=_list,
    help="GPUs that the tensorrt-rtx engine is built for, ahead of time.  [default: 8.6,8.9,12.0]",
)
@click.option("--opset", type=click.IntRange(18, 24), help="ONNX opset.  [default: the newest that all targets take]")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Convert the model first.")
@click.option("--tolerance", type=float, help="Relative error that adaptive attention may make, such as 1e-2.")
@click.option("--emit-plan", is_flag=True, help="Add each layer's precision and rank to the graph's outputs.")
@click.option(
    "--external-data-threshold",
    type=click.IntRange(min=0),
    metavar="BYTES",
    help="Put larger tensors in model.onnx.data.  [default: all of them, where they exceed 1 GiB together]",
)
@click.option("--weights", metavar="FILE", help="State dict for a factory: .safetensors or .pt.")
@click.option("--allow-pickle", is_flag=True, help="Let a pickled module run the code that it carries.")
@click.option("--no-verify", is_flag=True, help="Do not run anything.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and nothing else.")
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
@click.option("--verbose", "-v", is_flag=True, help="Show warnings of the tools underneath, and tracebacks.")
@click.version_option(package_name="adaattn")
def main(model: str, as_json: bool, quiet: bool, verbose: bool, **arguments: Any) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        # Standard output is for the result alone, whatever the user's model prints.
        with _quiet_tools(verbose), redirect_stdout(sys.stderr):
            report, directory = _export(model, quiet or as_json, **arguments)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", verbose)
    except click.ClickException:
        raise
    except OSError as error:
        _fail(f"{error.filename or 'the output'}: {error.strerror or error}; nothing was written", verbose)
    except Exception as error:
        from adaattn.errors import AdaAttnError

        known = isinstance(error, AdaAttnError)
        _fail(str(error) if known else f"unexpected {type(error).__name__}: {error} (-v shows where)", verbose)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    elif not quiet:
        _show(report, str(directory))
    sys.exit(0 if report["verdict"] == "passed" else 1)


def _export(
    model: str,
    quiet: bool,
    *,
    output: str | None,
    force: bool,
    inputs: dict[str, str],
    dims: dict[str, str],
    targets: tuple[str, ...],
    compute_capabilities: tuple[str, ...] | None,
    opset: int | None,
    dtype: str | None,
    tolerance: float | None,
    emit_plan: bool,
    external_data_threshold: int | None,
    weights: str | None,
    allow_pickle: bool,
    no_verify: bool,
) -> tuple[Mapping[str, Any], Path]:
    from rich.console import Console

    console = Console(file=sys.stderr, quiet=quiet)  # this one, even while torch's own words are held back
    with _progress(console) as on_stage:
        on_stage("import torch")
        from adaattn.export.pipeline import Options, export
        from adaattn.export.source import load
        from adaattn.input_spec import Dimension, InputSpec

        options = Options(
            targets=targets or None,
            opset=opset,
            dtype=dtype,
            tolerance=tolerance,
            emit_plan=emit_plan,
            verify=not no_verify,
            external_data_threshold=external_data_threshold,
            force=force,
            **({} if compute_capabilities is None else {"compute_capabilities": compute_capabilities}),
        )
        for name, text in inputs.items():
            InputSpec.parse(name, text)
        for name, text in dims.items():
            Dimension.parse(name, text)
        on_stage("load")
        source = load(model, weights, allow_pickle)
        described = {spec.name: str(spec) for spec in source.inputs} | inputs
        used = {size for name, text in described.items() for size in InputSpec.parse(name, text).shape}
        saved = {dim.name: str(dim) for dim in source.dims if dim.name in used}
        result = export(
            source.model,
            described,
            output or _default_output(model),
            dims=saved | dims,
            options=options,
            source=model,
            command=shlex.join(["adaattn-export", *sys.argv[1:]]),
            on_stage=on_stage,
        )
    return result.report, result.directory


def _default_output(model: str) -> str:
    name = model.rpartition(":")[2] if ":" in model and not Path(model).exists() else Path(model).stem
    return f"{name}-export"


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """A spinner with the stage at work; each stage that is done stays as a line with its time."""
    current: list[tuple[str, float]] = []

    def finish() -> None:
        if current:
            name, start = current.pop()
            console.print(f"  {name:<22}{time.perf_counter() - start:7.1f} s", highlight=False)

    with console.status("") as status:

        def on_stage(name: str) -> None:
            finish()
            current.append((name, time.perf_counter()))
            status.update(name)

        yield on_stage
        finish()


def _show(report: Mapping[str, Any], directory: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for column in ("target", "verdict", "error", "eager's", "limit", "size", "time"):
        table.add_column(column, justify="left" if column in ("target", "verdict") else "right")
    colors = {"passed": "green", "failed": "red", "not run": "yellow"}
    for target in report["targets"]:
        measured = [row for row in target["outputs"] if row["error"] is not None]
        worst = max(measured, key=lambda row: row["error"] / max(row["limit"], 1e-300), default=None)
        numbers = [f"{worst[key]:.1e}" if worst else "" for key in ("error", "eager_error", "limit")]
        size = sum(artifact["bytes"] for artifact in target["artifacts"]) / 2**20
        color = colors[target["verdict"]]
        table.add_row(
            target["name"],
            f"[{color}]{target['verdict']}[/]",
            *numbers,
            f"{size:.1f} MiB",
            f"{target['seconds']:.1f} s",
        )
    console.print(table)
    for target in report["targets"]:
        if target["reason"]:
            console.print(f"{target['name']}: {target['reason']}", style="dim", highlight=False, markup=False)
        plans = target["plans"]
        if plans and plans["differ"]:
            console.print(
                f"{target['name']}: {plans['differ']} of {plans['heads']} plans differ from eager's, "
                f"{plans['excused']} of them on the edge of their limit",
                highlight=False,
            )
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    console.print(f"[bold]{report['verdict']}[/bold]  {directory}/report.html", highlight=False)


@contextmanager
def _quiet_tools(verbose: bool) -> Iterator[None]:
    """Keep the logs and warnings of torch from the console: they are about its own code, or repeat what it raises."""
    import logging
    import warnings

    if verbose:
        yield
        return
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _fail(message: str, verbose: bool) -> NoReturn:
    if verbose:
        import traceback

        traceback.print_exc()
    click.echo(f"adaattn-export: {' '.join(message.split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
