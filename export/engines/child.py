"""Build and run engines in a child process: TensorRT can end the process that it is in."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaattn.errors import TargetError
from adaattn.export.artifacts.arrays import Array, save_arrays
from adaattn.export.engines.options import versions_found
from adaattn.system import children
from adaattn.system.atomic_file import scratch_folder, write

Progress = Callable[[str, float], None]
"""Called with the builder's phase and the share of the build that is done, 0 to 1."""


def run_engine(
    target: str, engine: Path, log: Path, inputs: Mapping[str, Array], plugin_library: Path | None = None
) -> dict[str, Array]:
    """Return the outputs of an engine on the GPU of this machine, by name; bfloat16 goes in and comes out as float32.

    Args:
        log: of the run.
        plugin_library: for an engine that was built with plugins="native".

    Raises:
        TargetError: the engine does not load or run.
    """
    with scratch_folder() as scratch:
        files = {"inputs": scratch / "inputs.npz", "outputs": scratch / "outputs.npz"}
        save_arrays(files["inputs"], inputs)
        job: dict[str, Any] = {"do": "run", "target": target, "engine": str(engine.absolute())}
        job |= {"plugin_library": None if plugin_library is None else str(plugin_library.absolute())}
        job |= {name: str(file) for name, file in files.items()}
        run_child(job, scratch, log)
        with np.load(files["outputs"]) as outputs:
            return dict(outputs)


def run_child(
    job: Mapping[str, Any], scratch: Path, log: Path, on_progress: Progress = lambda phase, share: None
) -> None:
    """Do a job in a child process, which writes what it prints to a log.

    Raises:
        TargetError: the child fails or crashes; the message is the first error of its log.
    """
    reading, writing = os.pipe()
    job_file, said_file = scratch / "job.json", scratch / "log"
    with os.fdopen(reading) as progress, os.fdopen(writing, "wb") as end, said_file.open("wb") as stream:
        job_file.write_text(json.dumps({**job, "progress": writing}))
        command = [*children.python(), "-m", "adaattn.export.engines.worker", str(job_file)]
        with children.child(command, stream, stream, pass_fds=(writing,)) as process:
            end.close()
            for line in progress:  # until the child has ended
                on_progress(*json.loads(line))
            code = process.wait()
    write(log, said_file.read_bytes())
    if code:
        if code < 0:
            said = f"the process that had to {job['do']} the engine crashed with {signal.Signals(-code).name}"
        else:
            said = _first_error(log.read_text(errors="replace"))
        raise TargetError(f"{said} ({versions_found(job['target'])})")


def _first_error(log: str) -> str:
    """Return the line of a TensorRT log that says what went wrong."""
    # Without a GPU each log starts with complaints about CUDA that are of no consequence.
    lines = [line for line in log.splitlines() if line.strip() and "catchCudaError" not in line]
    errors = [line for line in lines if "[E]" in line]
    return re.sub(r"^.*?\[E\]\s*", "", errors[0]) if errors else (lines or ["the log is empty"])[-1].strip()
