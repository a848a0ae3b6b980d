"""Define `adaattn-export`. Heavy packages are imported only after the arguments are checked: help must be instant."""

from __future__ import annotations

import ast
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adaattn.command_line import Command, complain, printable, verbose_option
from adaattn.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from rich.console import Console

    from adaattn.input_spec import Dimension, InputSpec

T = TypeVar("T")

NAME = "adaattn-export"
PATH = click.Path(dir_okay=False, path_type=Path)
HELP = """Export MODEL to ONNX and TensorRT, and verify every artifact against eager PyTorch.

\b
MODEL is one of
  model.pt                 saved by adaattn.save
  program.pt2              saved by torch.export.save, only with --allow-pickle: torch runs code that it carries
  package.module:factory   a function without arguments that returns an nn.Module; with --weights
  hf:FOLDER                what save_pretrained of Hugging Face transformers wrote, or a sentence-transformers folder
  pickled.pt               a pickled nn.Module, only with --allow-pickle

The output folder gets model.onnx (it runs in stock ONNX Runtime), an engine for each TensorRT target, golden.npz
(inputs and their float64 outputs), report.html, report.json and manifest.json. It appears only when all is done.
--serve triton adds a model repository of Triton Inference Server: of the tensorrt engine where that is a target, else
of model.onnx.

\b
Examples
  adaattn-export model.pt
  adaattn-export model.pt --dim "S=1:128:4096" --tolerance 1e-2 --output out
  adaattn-export shop.models:ranker --weights ranker.safetensors --input "x=B,S,512" --input "mask=B,S:bool"
  adaattn-export hf:all-MiniLM-L6-v2 --tolerance 1e-3
  adaattn-export hf:all-MiniLM-L6-v2 --output-tolerance 1e-2 --samples texts.npz
  adaattn-export model.pt --target onnx --json | jq .verdict
  adaattn-export model.pt --target tensorrt --serve triton --profile B=1:1:1 --profile B=2:8:8

\b
Exit status
  0  every target was made, and none that runs on this machine failed
  1  a target failed: it could not be made, or its numbers do not agree with eager PyTorch
  2  the arguments or the model cannot be used, or the command was interrupted
"""


def _parsed(parse: Callable[[str, str], T], values: tuple[str, ...]) -> dict[str, T]:
    """Parse options of the form NAME=TEXT."""
    found: dict[str, T] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{value!r} has no name; write NAME=..., see --help")
        if name.strip() in found:
            raise click.BadParameter(f"{name.strip()} is given twice")
        try:
            found[name.strip()] = parse(name.strip(), text.strip())
        except ConfigError as error:
            raise click.BadParameter(str(error)) from error
    return found


def _inputs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, InputSpec]:
    from adaattn.input_spec import InputSpec

    return _parsed(InputSpec.parse, values)


def _constants(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    def constant(name: str, text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # as ast.literal_eval has it
            return text

    return _parsed(constant, values)


def _dims(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Dimension]:
    from adaattn.input_spec import Dimension

    return _parsed(Dimension.parse, values)


def _profiles(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[dict[str, Dimension], ...]:
    return tuple(_dims(context, parameter, tuple(value.split(","))) for value in values)


def _list(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    parts = tuple(part.strip() for part in value.split(",") if part.strip())
    if not parts:
        raise click.BadParameter("it is empty; write one or more, such as 8.9,12.0")
    return parts


SECTIONS = {
    "Model": (
        "inputs",
        "constants",
        "dims",
        "dtype",
        "tolerance",
        "output_tolerance",
        "samples",
        "quantile",
        "formats",
        "attention",
        "metric",
        "allocation",
        "balance",
        "state",
        "weights",
        "allow_pickle",
    ),
    "Artifacts": (
        "targets",
        "servers",
        "output",
        "force",
        "opset",
        "emit_plan",
        "external_data_threshold",
        "no_verify",
    ),
    "Engines": (
        *("compute_capabilities", "profiles", "plugins", "plugin_library", "workspace", "optimization_level"),
        *("timing_cache", "version_compatible", "hardware_compatible", "weight_streaming", "strip_weights"),
    ),
}


class ExportCommand(Command):
    """A command whose help has sections."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by section."""
        title = {name: title for title, names in SECTIONS.items() for name in names}
        found: dict[str, list[tuple[str, str]]] = {name: [] for name in (*SECTIONS, "Other")}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None and isinstance(parameter, click.Option):
                found[title.get(str(parameter.name), "Other")].append(record)
        for name, records in found.items():
            with formatter.section(name):
                formatter.write_dl(records)


@click.command(NAME, cls=ExportCommand, help=HELP)
@click.argument("model")
@click.option("--output", "-o", metavar="DIR", help="Folder for the artifacts.  [default: MODEL's name and -export]")
@click.option("--force", is_flag=True, help="Replace DIR if an earlier export made it.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=SHAPE[:TYPE[:MEANING]]",
    callback=_inputs,
    help='An input, such as "query=B,S,512:float32"; letters are dynamic dimensions. Integers: "ids=B,S:int64<30522". '
    'Masks: "mask=B,S:bool:masked"; attend: true or 1 attends, masked: true or 1 does not, bias: added to the scores, '
    'values: any other. Within a tuple or a dictionary: "pair.0=B,S", "batch.ids=B,S:int64".  '
    "[default: what MODEL says]",
)
@click.option(
    "--set",
    "constants",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_constants,
    help="Another argument of forward, a constant of the file: a number, a text, True, False or None.",
)
@click.option(
    "--dim",
    "dims",
    multiple=True,
    metavar="NAME=MIN:OPT:MAX",
    callback=_dims,
    help="Sizes of a dynamic dimension, also the engines' profile.  [default: 1:1:8 for B… and N…, else 1:128:512]",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(["onnx", "tensorrt-rtx", "tensorrt"]),
    help="What to make; repeatable.  [default: onnx and every TensorRT that is installed]",
)
@click.option(
    "--serve",
    "servers",
    multiple=True,
    type=click.Choice(["triton", "onnxruntime"]),
    help="Package for a server; repeatable. triton: a model repository of Triton Inference Server. onnxruntime: an "
    "ONNX file by which its TensorRT execution provider opens the tensorrt engine.",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    metavar="8.9,12.0",
    callback=_list,
    help="GPUs that the tensorrt-rtx engine is built for, ahead of time.  [default: 8.6,8.9,12.0]",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="NAME=MIN:OPT:MAX,...",
    callback=_profiles,
    help="A profile that is narrower in these dimensions; repeatable.  [default: one, of all sizes]",
)
@click.option(
    "--plugins",
    type=click.Choice(["python", "native", "none"]),
    help="What computes the custom ops in a tensorrt engine: python embeds their kernels, native loads a library of "
    "plugins, none compiles their ONNX functions.  [default: python]",
)
@click.option("--plugin-library", type=PATH, help="The library for --plugins native, from adaattn-plugins build.")
@click.option("--workspace", type=click.IntRange(min=1), metavar="MIB", help="Largest workspace of an engine.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="0 builds fast, 5 makes the fastest engine.")
@click.option("--timing-cache", type=PATH, help="TensorRT timing cache: read if present, then updated.")
@click.option("--version-compatible", is_flag=True, help="Build a version-compatible engine.")
@click.option(
    "--hardware-compatible",
    is_flag=True,
    help="Build a hardware-compatible engine (Ampere and newer); requires --plugins none.",
)
@click.option(
    "--weight-streaming",
    is_flag=True,
    help="Keep weights in host memory where the GPU has too little, and stream them.",
)
@click.option(
    "--strip-weights",
    is_flag=True,
    help="Build engines without weights, which are refitted from model.onnx when they run.",
)
@click.option("--opset", type=click.IntRange(18, 24), help="ONNX opset.  [default: the newest that all targets take]")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Convert the model first.")
@click.option("--tolerance", type=float, help="Accepted relative error of adaptive attention, such as 1e-2.")
@click.option(
    "--output-tolerance",
    type=float,
    metavar="T",
    help="Accepted relative error of what MODEL returns, such as 1e-2: each operator gets the cheapest type with which "
    "--samples keep it.",
)
@click.option(
    "--samples",
    metavar="DATA",
    help="Sample data, like what MODEL will meet: an .npz of inputs by name, or FILE.py or package.module:function "
    "that yields batches. Every second sample chooses, the others certify.",
)
@click.option(
    "--quantile", type=float, metavar="Q", help="Share of samples that must keep the output tolerance.  [default: 0.95]"
)
@click.option(
    "--formats",
    metavar="fp32,bf16,fp16,fp8",
    callback=_list,
    help="Types that operators may have.  [default: those that the engines' GPUs compute fast]",
)
@click.option(
    "--attention",
    type=click.Choice(["operators", "plugin"]),
    default="operators",
    help="What attention becomes where the output tolerance allows less than fp32. operators: ONNX's own, which every "
    "compiler takes. plugin: adaptive_attention, with a constant precision and rank for each head.  "
    "[default: operators]",
)
@click.option(
    "--metric",
    metavar="MODULE:FUNCTION",
    help="What the output tolerance bounds instead of the relative error: a function of outputs and reference outputs, "
    "tensors by name, that returns a number, smaller is better.",
)
@click.option("--allocation", type=PATH, help="Take the types of this file, the allocation.json of an earlier export.")
@click.option(
    "--balance", is_flag=True, help="Fold into the weights the basis of queries and keys that --samples show."
)
@click.option("--state", type=PATH, help="Checkpoint what --samples show in this file and resume from it.")
@click.option("--emit-plan", is_flag=True, help="Add each layer's precision and rank to the graph's outputs.")
@click.option(
    "--external-data-threshold",
    type=click.IntRange(min=0),
    metavar="BYTES",
    help="Put larger tensors in model.onnx.data.  [default: all of them, where they exceed 1 GiB together]",
)
@click.option("--weights", metavar="FILE", help="State dict for a factory: .safetensors or .pt.")
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Let a .pt2, a pickled module or pickled weights run the code that they carry.",
)
@click.option("--no-verify", is_flag=True, help="Do not run the artifacts.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON and nothing else.")
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
@verbose_option
@click.version_option(package_name="adaattn")
def main(model: str, as_json: bool, quiet: bool, **arguments: Any) -> int:
    """Run `adaattn-export`; HELP is its help."""
    written: list[str] = []

    def outcome() -> str:
        return f"{written[0]} is written and whole" if written else "nothing was written"

    try:
        # Standard output is for the result alone; what the user's model prints goes to standard error.
        with redirect_stdout(sys.stderr):
            report, directory = _export(model, quiet or as_json, written.append, **arguments)
    except KeyboardInterrupt as error:
        state = None if written else arguments["state"]
        kept = f" but {state}, which a next run goes on from" if state is not None and state.exists() else ""
        raise ExportError(f"interrupted; {outcome()}{kept}") from error
    except OSError as error:
        raise ExportError(f"{error.filename or 'the output'}: {error.strerror or error}; {outcome()}") from error
    failed = bool(report["verdict"] == "failed")
    if as_json:
        click.echo(json.dumps(report, indent=1))
    elif not quiet:
        from adaattn.export.report.console import print_report

        print_report(report, f"{directory}/report.html")
    elif failed:
        reasons = [f"{each['name']}: {each['reason']}" for each in report["targets"] if each["verdict"] == "failed"]
        complain(NAME, "; ".join(reasons))
    return int(failed)


def _export(
    model: str,
    quiet: bool,
    on_written: Callable[[str], None],
    *,
    output: str | None,
    force: bool,
    inputs: dict[str, InputSpec],
    constants: dict[str, Any],
    dims: dict[str, Dimension],
    targets: tuple[str, ...],
    servers: tuple[str, ...],
    opset: int | None,
    dtype: str | None,
    tolerance: float | None,
    emit_plan: bool,
    external_data_threshold: int | None,
    output_tolerance: float | None,
    samples: str | None,
    quantile: float | None,
    formats: tuple[str, ...] | None,
    attention: str,
    metric: str | None,
    allocation: Path | None,
    balance: bool,
    state: Path | None,
    profiles: tuple[dict[str, Dimension], ...],
    weights: str | None,
    allow_pickle: bool,
    no_verify: bool,
    **build: Any,
) -> tuple[Mapping[str, Any], Path]:
    from rich.console import Console

    # This stream, even while the messages of torch are captured.
    console = Console(file=sys.stderr, quiet=quiet, markup=False, emoji=False)
    with _progress(console) as (on_stage, on_progress):
        on_stage("import torch")
        from adaattn.export.artifacts.folder import model_name
        from adaattn.export.engines.options import BuildOptions
        from adaattn.export.options import Options
        from adaattn.export.pipeline import export
        from adaattn.export.sources.model import load
        from adaattn.export.sources.sample_data import batches, function_of

        options = Options(
            targets=targets or None,
            serve=servers,
            opset=opset,
            dtype=dtype,
            tolerance=tolerance,
            emit_plan=emit_plan,
            verify=not no_verify,
            external_data_threshold=external_data_threshold,
            output_tolerance=output_tolerance,
            samples=None if samples is None else batches(samples),
            formats=formats,
            attention=attention,
            metric=None if metric is None else function_of(metric),
            allocation=allocation,
            balance=balance,
            state=state,
            **({} if quantile is None else {"quantile": quantile}),
            build=BuildOptions(**build),
            profiles=profiles,
            force=force,
        )
        on_stage("load")
        source = load(model, weights, allow_pickle)
        if options.tolerance is None and source.tolerance is not None and not options.typed:
            options = replace(options, tolerance=source.tolerance)
        described = {spec.name: spec for spec in source.inputs} | inputs
        used = {size for spec in described.values() for size in spec.shape}
        saved = {dim.name: dim for dim in source.dims if dim.name in used}
        directory = output or f"{model_name(model)}-export"
        result = export(
            source.model,
            described,
            directory,
            dims=saved | dims,
            constants=constants,
            options=options,
            source=model,
            command=shlex.join([NAME, *sys.argv[1:]]),
            reads=[Path(str(given).removeprefix("hf:")) for given in (model, weights, samples, allocation) if given],
            on_written=lambda: on_written(directory),
            on_stage=on_stage,
            on_progress=on_progress,
        )
    if result.leftover is not None:
        rest = printable(str(result.leftover))
        console.print(f"  the replaced folder could not be deleted completely; the rest is in {rest}")
    return result.report, result.directory


@contextmanager
def _progress(console: Console) -> Iterator[tuple[Any, Any]]:
    """Show a bar for the current stage, and keep a line with the time of each finished stage."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    current: list[tuple[str, float]] = []
    columns = (TextColumn("  {task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def finish() -> None:
        if current:
            name, start = current.pop()
            console.print(f"  {name:<22}{time.perf_counter() - start:7.1f} s", highlight=False)

    with bar:
        task = bar.add_task("")

        def on_stage(name: str) -> None:
            finish()
            current.append((name, time.perf_counter()))
            bar.reset(task, description=name, total=None)

        def on_progress(phase: str, share: float) -> None:
            total = 1.0 if share else None
            bar.update(task, description=f"{current[-1][0]}: {phase}", completed=share, total=total)

        yield on_stage, on_progress
        finish()


if __name__ == "__main__":
    main()
