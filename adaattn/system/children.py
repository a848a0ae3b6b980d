"""Start processes that import nothing from the current folder and end when this one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from adaattn.system.interrupts import held, surely

SUPERVISOR = Path(__file__).with_name("supervisor.py")


def python() -> list[str]:
    """Return how to start Python so that it imports no module from the current folder.

    What this process was told about its environment holds for its children: PYTHONPATH, and the user's packages.
    """
    flags = ["-P"]
    if sys.flags.ignore_environment:
        flags.append("-E")
    if sys.flags.no_user_site:
        flags.append("-s")
    return [sys.executable, *flags]


@contextmanager
def child(
    command: Sequence[str],
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program; at the end of the block it is dead, with all processes that it has started.

    It runs in its own process group, so Ctrl-C in a terminal reaches only this process, which ends the group.

    Args:
        stdout, stderr, pass_fds: as of subprocess.Popen.
        environment: variables that the program gets besides those of this process.
    """
    started: list[subprocess.Popen[bytes]] = []
    pipe = list(os.pipe())
    reading = pipe[0]

    def end() -> None:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        while pipe:
            os.close(pipe.pop())

    try:
        with held():
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SUPERVISOR), str(reading), *command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(reading, *pass_fds),
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
            started.append(process)
        yield process
    finally:
        surely(end)


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a program to its end; return its exit status and what it printed."""
    with child(command, subprocess.PIPE, subprocess.STDOUT, environment=environment) as process:
        said, _ = process.communicate()
    return process.returncode, said.decode(errors="replace")
