"""The process in which `test_fuzz` calls the commands: one call a line on standard input, one answer a line.

A call may hang, run out of memory or end the process; the test then starts another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from click.testing import CliRunner

import adaattn.export.pipeline
import adaattn.ops
from adaattn.export.artifacts import folder
from adaattn.export.cli import export as export_command
from adaattn.export.cli import parity as parity_command
from adaattn.export.cli import run as run_command
from adaattn.plugins.native import cli as plugins

COMMANDS = {
    "export": export_command.main,
    "parity": parity_command.main,
    "run": run_command.main,
    "plugins": plugins.main,
}
ROOM = 6 << 30  # bytes above what the imports take
loaded: dict[str, str] = {}
real_export = adaattn.export.pipeline.export


def fingerprint(model: Any, *told: object) -> str:
    """Return a hash of all that an export depends on: the model's weights and code, and what it was asked for."""
    digest = hashlib.sha256(repr(told).encode())
    program = isinstance(model, torch.export.ExportedProgram)
    digest.update((model.graph_module.code if program else repr(model)).encode())
    for name, x in sorted({**model.state_dict, **model.constants}.items() if program else model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def only_loaded(model: Any, inputs: Any, output_dir: Any, *, dims: Any, options: Any, **others: Any) -> Any:
    """Take the place of `export` where it is the loading that is tested: each export takes seconds."""
    folder.check_output(Path(output_dir), options.force, others["reads"])
    loaded["fingerprint"] = fingerprint(model, sorted(inputs.items()), sorted(dims.items()), options.tolerance)
    report = {"verdict": "passed", "targets": [], "warnings": []}
    return SimpleNamespace(report=report, directory=output_dir, leftover=None)


def call(command: str, arguments: list[str], where: str, whole: bool) -> dict[str, Any]:
    """Call a command in a folder and return what it did.

    Args:
        whole: export indeed, and not only load.
    """
    adaattn.export.pipeline.export = real_export if whole else only_loaded
    loaded.clear()
    os.chdir(where)
    done = CliRunner().invoke(COMMANDS[command], arguments)
    escaped = None if isinstance(done.exception, SystemExit | None) else repr(done.exception)
    return {"status": done.exit_code, "out": done.stdout, "err": done.stderr, "escaped": escaped, **loaded}


def main() -> None:
    """Answer calls until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    said = os.memfd_create("said")  # what C and C++ print, which no runner of Python sees
    os.dup2(said, 1)
    os.dup2(said, 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))
    for line in sys.stdin:
        os.ftruncate(said, 0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = call(**json.loads(line))
        answer["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        answer["said"] = os.pread(said, 10_000, 0).decode(errors="replace")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
