"""Define `adaattn-parity`, which gives the verdict where an export runs. It needs neither the model nor torch."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from adaattn.command_line import Group, printable, verbose_option

NAME = "adaattn-parity"
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
HELP = """Compare the artifacts of an export with its golden results, on this machine.

\b
  adaattn-parity DIR                          every backend that DIR has an artifact for
  adaattn-parity DIR --backend ort-cuda       one of them
  adaattn-parity bisect DIR                   the first node that departs from eager PyTorch

DIR is a folder that adaattn-export made. Options of a check: adaattn-parity check --help.

\b
Exit status
  0  at least one backend ran, and none failed; bisect: no value departs
  1  a backend failed, or none could run; bisect: a value departs
  2  the arguments or the folder cannot be used, or the command was interrupted
"""


class Checks(Group):
    """A group that runs `check` where a folder stands in place of a command."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Insert the command `check` where none is named."""
        if not arguments or arguments[0] not in (*self.commands, "-h", "--help", "--version"):
            arguments = ["check", *arguments]
        return super().parse_args(context, arguments)


@click.group(NAME, cls=Checks, help=HELP)
@click.version_option(package_name="adaattn")
def main() -> None:
    """Run `adaattn-parity`; HELP is its help."""


def _names(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for value in values for name in value.split(",") if name.strip()))
    if values and not names:
        raise click.BadParameter("no backend is named")
    return names


@main.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option(
    "--backend",
    "names",
    multiple=True,
    metavar="NAME,...",
    callback=_names,
    help="ort-cpu, ort-cuda, ort-tensorrt, tensorrt or tensorrt-rtx.  [default: all that DIR has an artifact for]",
)
@click.option(
    "--plugin-library", type=FILE, help="Plugin library for an engine of --plugins native; loading it runs its code."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON and nothing else.")
@click.option("--junit", type=FILE, help="Write a JUnit file, a test case for each output of each golden case.")
@click.option("--html", type=FILE, help="Write the report as a page.")
@verbose_option
def check(
    folder: Path,
    names: tuple[str, ...],
    plugin_library: Path | None,
    as_json: bool,
    junit: Path | None,
    html: Path | None,
) -> int:
    """Run the artifacts in DIR on its golden inputs and print the verdict."""
    from rich.console import Console

    from adaattn.export.artifacts.manifest import refuse_to_overwrite
    from adaattn.export.verification.verify import verify_export as run
    from adaattn.system.atomic_file import write

    if junit is not None and html is not None and junit.absolute() == html.absolute():
        raise click.UsageError(f"--junit and --html are one file, {junit}")
    for output in (junit, html):
        refuse_to_overwrite(folder, output)
    with Console(stderr=True).status("") as status:
        report = run(folder, names or None, lambda name: status.update(name), plugin_library)
    report["command"] = shlex.join([NAME, *sys.argv[1:]])
    if junit is not None:
        from adaattn.export.report.junit import junit_xml

        write(junit, junit_xml(report))
    if html is not None:
        from adaattn.export.report.html import render

        write(html, render(report).encode())
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        from adaattn.export.report.console import print_report

        print_report(report, str(html or folder))
    return 0 if report["verdict"] == "passed" else 1


@main.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option(
    "--backend",
    type=click.Choice(["ort-cpu", "ort-cuda", "ort-tensorrt"]),
    default="ort-cpu",
    show_default=True,
    help="Execution provider of ONNX Runtime.",
)
@click.option(
    "--output",
    "-o",
    type=FILE,
    default="departure.onnx",
    show_default=True,
    help="File for the departing nodes, as a model.",
)
@verbose_option
def bisect(folder: Path, backend: str, output: Path) -> int:
    """Find the first node of DIR/model.onnx whose output departs from eager PyTorch's.

    The values of eager PyTorch on a small case lie in DIR/trace.npz. The nodes between the last values that agree and
    the first that does not are printed and written as a model of their own.
    """
    from adaattn.export.artifacts.manifest import refuse_to_overwrite
    from adaattn.export.runtime.session import PROVIDERS
    from adaattn.export.verification.bisect import bisect as run
    from adaattn.export.verification.verify import verify_export as check_all
    from adaattn.system.atomic_file import write

    refuse_to_overwrite(folder, output)
    departure = run(folder, PROVIDERS[backend])
    if departure is None:
        return _say_where_else(check_all(folder, [backend]))
    write(output, departure.model.SerializeToString())
    at = f" with all plans at {departure.plans}" if departure.plans else ""
    _say(f"first mismatch{at}: {departure.value}, relative error {departure.error:.1e} (limit {departure.limit:.1e})")
    for line in departure.nodes:
        _say(f"  {line}")
    _say(f"written to {output}")
    return 1


def _say(line: str) -> None:
    """Print a line that holds names from a file."""
    click.echo(printable(line))


def _say_where_else(report: Mapping[str, Any]) -> int:
    """Print that nothing departs on the small case, and whether something does on the golden inputs."""
    _say("no output departs on the small case")
    if report["verdict"] != "failed":
        return 0
    _say(f"but on the golden inputs: {report['targets'][0]['reason']}; maybe it takes their sizes or numbers")
    return 1


if __name__ == "__main__":
    main()
