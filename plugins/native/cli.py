"""Define the command `adaattn-plugins`."""

from __future__ import annotations

from pathlib import Path

import click

from adaattn.command_line import Group, verbose_option


@click.group("adaattn-plugins", cls=Group)
@click.version_option(package_name="adaattn")
def main() -> None:
    """Build AdaAttn's TensorRT plugins as a library, for trtexec, C++, Triton Inference Server and ONNX Runtime.

    An engine built from Python needs none of this: its kernels are embedded in it.

    \b
    Exit status
      0  the path of the library or of the copy was printed
      2  the arguments, the files or this machine cannot be used, or the command was interrupted
    """


@main.command()
@click.argument("models", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--arch", default="", help="Architectures, such as 80,89,90,120; by default that of this machine's GPU.")
@click.option("--tensorrt-include", type=click.Path(file_okay=False, path_type=Path), help="Where NvInfer.h is.")
@click.option("--cuda-include", type=click.Path(file_okay=False, path_type=Path), help="Where cuda_runtime_api.h is.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="The library; by default in a cache.")
@click.option("--force", is_flag=True, help="Build it though the cache has it.")
@verbose_option
def build(
    models: tuple[Path, ...],
    arch: str,
    tensorrt_include: Path | None,
    cuda_include: Path | None,
    output: Path | None,
    force: bool,
) -> None:
    """Build the plugins that the nodes of ONNX files need, and print the path of the library.

    \b
    adaattn-plugins build export/model.onnx --arch 90
    trtexec --onnx=export/model.onnx --staticPlugins=$(adaattn-plugins build export/model.onnx)

    Each kind of node (type, head_dim, causality, form of the mask) is compiled for each architecture, which takes some
    minutes. Without a model: fp16, head_dim 64 and 128, without a mask and with one of padding.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from adaattn.plugins.native import build as builder
    from adaattn.plugins.native.node_kinds import common_kinds, kinds

    wanted = list(dict.fromkeys(kind for model in models for kind in kinds(model))) if models else common_kinds()
    architectures = builder.architectures(arch)
    include = builder.tensorrt_headers(tensorrt_include)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("kernels", total=None)

        def on_kernel(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of)

        if output is None:
            place = builder.cached(wanted, architectures, include, cuda_include, on_kernel, force)
        else:
            place = builder.library(wanted, architectures, output, include, cuda_include, on_kernel)
    click.echo(place)


@main.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@verbose_option
def onnxruntime(model: Path) -> None:
    """Write MODEL in the form that ONNX Runtime's TensorRT provider takes, and print the path of the copy.

    That provider knows plugins only as ops of the domain trt.plugins. The copy, MODEL.trt.onnx, lies beside the model
    and runs with that provider alone, given the library as trt_extra_plugin_lib_paths and ADAATTN_REGISTER=1 in the
    environment.
    """
    from adaattn.plugins.native.onnxruntime_copy import for_onnxruntime

    click.echo(for_onnxruntime(model))


if __name__ == "__main__":
    main()
