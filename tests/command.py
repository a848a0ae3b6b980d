"""`adaattn-export` as tests call it: in this process, where it takes a fraction of a second, or as a shell does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

from click.testing import CliRunner, Result

from adaattn.export import cli

TESTS = Path(__file__).parent


def run(*arguments: object) -> Result:
    """Call the command here: exit_code, stdout, stderr."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, handler)


def start(*arguments: object, folder: Path, path: Path | None = None) -> subprocess.Popen[str]:
    """Start the installed command in a process group of its own.

    Args:
        folder: where it runs.
        path: a folder of modules that come before those installed.
    """
    command = [str(Path(sysconfig.get_path("scripts"), "adaattn-export")), *(str(argument) for argument in arguments)]
    modules = os.pathsep.join(str(place) for place in (path, TESTS) if place)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite that runs in the background ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


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
