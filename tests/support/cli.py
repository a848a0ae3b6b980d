"""`adaattn-export` as tests call it: in this process, where it takes a fraction of a second, or as a shell does."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from click.testing import CliRunner, Result

from adaattn.export.cli import export as export_command
from adaattn.system.interrupts import SIGNALS
from tests.support.paths import ROOT


def run(*arguments: object) -> Result:
    """Call the command here: exit_code, stdout, stderr."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        return CliRunner().invoke(export_command.main, [str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def alive(process: subprocess.Popen[str]) -> list[str]:
    """Return the command lines of a process of `start` and of its running descendants."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if MARK.format(process.token).encode() in (place / "environ").read_bytes():
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX":
                    found.append((place / "cmdline").read_text().replace("\0", " "))
    return found


MARK = "ADAATTN_TEST={}"


def start(
    *arguments: object, folder: Path, path: Path | None = None, command: str = "adaattn-export", **variables: str
) -> subprocess.Popen[str]:
    """Start an installed command in a process group of its own.

    Args:
        folder: where it runs.
        path: a folder of modules that come before those installed.
        variables: of its environment.
    """
    words = [str(Path(sysconfig.get_path("scripts"), command)), *(str(argument) for argument in arguments)]
    token = secrets.token_hex(8)
    modules = os.pathsep.join(str(place) for place in (path, ROOT) if place)
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env={
            **os.environ,
            **{"PYTHONPATH": modules, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "ADAATTN_TEST": token},
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite that runs in the background ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.token = token
    return process


def refused(result: Result, *words: str) -> None:
    """Assert that a call of `run` with -q was wrong use: status 2, one line with these words, nothing else printed."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("adaattn-export: ")
    assert len(line) < 600
    for word in words:
        assert word in line
