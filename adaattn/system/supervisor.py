"""Run one program and end it, with all processes that it has started, when the process that asked for it ends.

Started by `children.child` as a script, `supervisor.py PIPE PROGRAM ARGUMENT...`, in its own process group. The
pipe's other end is open in that process alone, so it is closed however that process ends; Linux sends a signal too.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int) -> None:
    """Ask Linux to send this process a signal when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def main(pipe: int, command: list[str]) -> None:
    """Run the command and end as it ends: with its exit status, or by the signal that ended it."""
    end_with_parent(signal.SIGTERM)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    os.set_inheritable(pipe, False)
    try:
        # A program that Python starts would ignore these, as Python does.
        child = os.posix_spawnp(command[0], command, os.environ, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    while True:
        ready, _, _ = select.select([pipe, reading], [], [])
        if pipe in ready or signal.SIGTERM in os.read(reading, 64):
            os.killpg(0, signal.SIGKILL)  # this process too
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
    if os.WIFSIGNALED(status):
        _end_by(os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _end_by(number: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the program has left its core dump
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
