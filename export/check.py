"""`adaattn-parity`: an export's verdict on the machine where it is to run. It needs neither the model nor torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import click

from adaattn.interrupts import raise_on_signals

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
  0  at least one backend ran, and none failed
  1  a backend failed, or none could run
  2  the arguments or the folder are not usable
"""


class Checks(click.Group):
    """A folder in place of a command is checked."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        if arguments and arguments[0] not in (*self.commands, "-h", "--help", "--version"):
            arguments = ["check", *arguments]
        return super().parse_args(context, arguments)


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@click.group(cls=Checks, help=HELP, context_settings=SETTINGS)
@click.version_option(package_name="adaattn")
def main() -> None:
    raise_on_signals()


def _names(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for value in values for name in value.split(",") if name.strip()))
    if values and not names:
        raise click.BadParameter("it names no backend")
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
@click.option("--plugin-library", type=FILE, help="Of an engine of --plugins native; loading it runs its code.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and nothing else.")
@click.option("--junit", type=FILE, help="Write a JUnit file, a test case for each output of each golden case.")
@click.option("--html", type=FILE, help="Write the report as a page.")
def check(
    folder: Path,
    names: tuple[str, ...],
    plugin_library: Path | None,
    as_json: bool,
    junit: Path | None,
    html: Path | None,
) -> None:
    """Run the artifacts in DIR on its golden inputs and give the verdict."""
    from rich.console import Console

    from adaattn.atomic_file import write
    from adaattn.errors import AdaAttnError
    from adaattn.export.verify import check as run

    if junit is not None and html is not None and junit.absolute() == html.absolute():
        raise click.UsageError(f"--junit and --html are one file, {junit}")
    console = Console(stderr=True)
    try:
        with console.status("") as status:
            report = run(folder, names or None, lambda name: status.update(name), plugin_library)
        report["command"] = " ".join([NAME, *sys.argv[1:]])
        if junit is not None:
            write(junit, _junit(report))
        if html is not None:
            from adaattn.export.html import render

            write(html, render(report).encode())
    except AdaAttnError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or folder}: {error.strerror or error}")
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        from adaattn.export.show import show

        show(report, str(html or folder))
    sys.exit(0 if report["verdict"] == "passed" else 1)


@main.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option(
    "--backend",
    type=click.Choice(["ort-cpu", "ort-cuda", "ort-tensorrt"]),
    default="ort-cpu",
    show_default=True,
    help="Which of ONNX Runtime's providers.",
)
@click.option(
    "--output", "-o", type=FILE, default="departure.onnx", show_default=True, help="The nodes that depart, as a model."
)
def bisect(folder: Path, backend: str, output: Path) -> None:
    """Find the first node of DIR/model.onnx whose output departs from eager PyTorch's.

    The values of eager PyTorch on a small case lie in DIR/trace.npz. The nodes between the last values that agree and
    the first that does not are printed and written as a model of their own.
    """
    from adaattn.atomic_file import write
    from adaattn.errors import AdaAttnError
    from adaattn.export.backends import PROVIDERS
    from adaattn.export.bisect import bisect as run
    from adaattn.export.verify import check as check_all

    try:
        departure = run(folder, PROVIDERS[backend])
        if departure is None:
            _say_where_else(check_all(folder, [backend]))
            return
        write(output, departure.model.SerializeToString())
    except AdaAttnError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or folder}: {error.strerror or error}")
    click.echo(f"{departure.value} departs: error {departure.error:.1e}, at most {departure.limit:.1e} was expected")
    for line in departure.nodes:
        click.echo(f"  {line}")
    click.echo(f"written to {output}")
    sys.exit(1)


def _say_where_else(report: Mapping[str, Any]) -> None:
    """Nothing departs on the small case; exits where something does on the golden inputs."""
    click.echo("no output departs on the small case")
    reason = report["targets"][0]["reason"]
    if report["verdict"] == "failed":
        click.echo(f"but on the golden inputs: {reason}; maybe it takes their sizes or numbers")
        sys.exit(1)


def _junit(report: Mapping[str, Any]) -> bytes:
    """The report in the form that CI servers read."""
    root = ElementTree.Element("testsuites", name=NAME)
    for target in report["targets"]:
        suite = ElementTree.SubElement(root, "testsuite", name=target["name"])
        rows = target["outputs"] or [{"case": "all", **target, "name": "run"}]
        for row in rows:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"{target['name']}.{row['case']}", name=row["name"]
            )
            tag = {"failed": "failure", "not run": "skipped"}.get(row["verdict"])
            if tag:
                ElementTree.SubElement(case, tag, message=row["reason"] or target["reason"] or "")
        for key, verdict in (("tests", None), ("failures", "failed"), ("skipped", "not run")):
            suite.set(key, str(sum(verdict is None or row["verdict"] == verdict for row in rows)))
    if report["verdict"] == "failed" and all(target["verdict"] != "failed" for target in report["targets"]):
        suite = ElementTree.SubElement(root, "testsuite", name="verdict", tests="1", failures="1")
        case = ElementTree.SubElement(suite, "testcase", classname="verdict", name="some backend ran")
        ElementTree.SubElement(case, "failure", message="no backend could run the artifacts")
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content


def _fail(message: str) -> NoReturn:
    click.echo(f"{NAME}: {' '.join(message.split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
