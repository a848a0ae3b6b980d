"""Run the artifacts of an export and compare them with its golden cases, in the export and where it is deployed.

Nothing here needs torch or the model: `verify_export` repeats the export's verdict on the machine of deployment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adaattn.errors import ConfigError, TargetError
from adaattn.export.artifacts import manifest
from adaattn.export.artifacts.files import plain, read_checked
from adaattn.export.artifacts.manifest import MARKER, as_exported, changed_files, versions
from adaattn.export.artifacts.report import FAILED, NOT_RUN, PASSED, TargetResult, artifacts
from adaattn.export.engines import description
from adaattn.export.engines.description import profile_of, read_engine_info
from adaattn.export.parity import compare, criterion, golden_case
from adaattn.export.parity.golden_case import GoldenCase
from adaattn.export.runtime import session
from adaattn.export.verification import backends
from adaattn.plugins import onnx_file
from adaattn.system.atomic_file import scratch_folder


def verify_target(
    target: TargetResult,
    backend: str,
    folder: Path,
    goldens: Sequence[GoldenCase],
    exact_at: compare.ExactAt | None = None,
    plugin_library: Path | None = None,
) -> TargetResult:
    """Return a target with its verdict.

    Args:
        backend: of `backends.BACKENDS`.
        folder: of the export.
        exact_at: float64 outputs at other plans than eager's, where the model is at hand.
        plugin_library: for an engine that was built with plugins="native".
    """
    try:
        with scratch_folder() as scratch:
            run = backends.open_backend(backend, folder, scratch / "run.log", plugin_library)
            served, others = _served(folder / f"{backend}.engine", goldens)
            if not served:
                raise session.CannotRun(f"built, not run: no profile takes the golden inputs {', '.join(others)}")
            notes = [f"not run on the golden inputs {', '.join(others)}, which no profile takes"] if others else []
            if isinstance(run, backends.EngineBackend) and any(golden.forced for golden in served):
                try:
                    run.build_exact(Path(scratch))
                except TargetError as error:
                    notes.append(f"not run with all plans at fp32, whose engine cannot be built: {error}")
                    served = [golden for golden in served if not golden.forced]
            found = replace(target, **compare.compare(served, run, exact_at))
            shows = not (found.verdict == NOT_RUN and criterion.NOTHING_SHOWS in (found.reason or ""))
            if not shows and isinstance(run, backends.OnnxRuntimeBackend):
                found = replace(found, **_inside(folder, run, found.reason))
        return replace(found, reason="; ".join(notes)) if notes and found.reason is None else found
    except session.CannotRun as error:
        return replace(target, reason=str(error))
    except TargetError as error:
        return replace(target, verdict=FAILED, reason=str(error))


def compare_inside(path: Path, run: backends.OnnxRuntimeBackend, trace: GoldenCase) -> dict[str, dict[str, Any]]:
    """Return the verdict on each value inside a graph that a trace knows, by its name."""
    names = [name for node in onnx_file.load(path).graph.node for name in node.output if name in trace.outputs]
    found = run.values(trace, names)
    return {name: compare.compare_output(trace, name, trace.outputs[name], found[name]) for name in names}


def _inside(folder: Path, run: backends.OnnxRuntimeBackend, reason: str | None) -> dict[str, Any]:
    """Return the verdict on the values inside the graph in the small case, where the outputs prove nothing."""
    file = as_exported(folder, "trace.npz") if (folder / MARKER).is_file() else folder / "trace.npz"
    if not file.is_file():
        return {}
    count = 0
    for trace in golden_case.load(file, "trace of eager PyTorch"):
        for name, row in compare_inside(folder / "model.onnx", run, trace).items():
            if row["verdict"] == "failed":
                return {"verdict": "failed", "reason": f"{name}, inside the graph ({trace.name}): {row['reason']}"}
            count += row["verdict"] == "passed"
    return {"verdict": "passed", "reason": f"{reason}; {count} values inside it agree on the small case instead"}


def verify_export(
    folder: Path,
    names: Sequence[str] | None = None,
    on_backend: Callable[[str], None] = lambda name: None,
    plugin_library: Path | None = None,
) -> dict[str, Any]:
    """Run an export's artifacts on this machine and return the report.

    Args:
        folder: that `adaattn-export` made; its golden.npz says what is right.
        names: of `backends.BACKENDS`; None for all that have an artifact.
        on_backend: called with the name of each backend as it begins.
        plugin_library: for an engine that was built with plugins="native".

    Returns:
        The content of `report.json` with a target for each backend; its verdict is "failed" where a backend failed or
        none could run.

    Example:
        >>> verify_export(Path("model-export"), ["ort-cpu"])["verdict"]  # doctest: +SKIP
        'passed'

    Raises:
        ConfigError: no such backend, or the folder does not have the golden results that were exported.
    """
    for name in names or ():
        if name not in backends.BACKENDS:
            raise ConfigError(f"backend {name!r} is unknown; choose one of {', '.join(backends.BACKENDS)}")
    goldens = golden_case.load(as_exported(folder, "golden.npz"))
    report = read_checked(folder / "report.json", manifest.REPORT)
    targets = []
    for name in names or backends.BACKENDS:
        files = [folder / "model.onnx" if name in session.PROVIDERS else folder / f"{name}.engine"]
        if names is None and not files[0].exists():
            continue
        on_backend(name)
        start = time.perf_counter()
        target = TargetResult(name, artifacts(folder, [file for file in files if file.exists()]))
        target = verify_target(target, name, folder, goldens, plugin_library=plugin_library)
        targets.append(replace(target, seconds=time.perf_counter() - start))
    if not targets:
        raise ConfigError(f"{folder} has neither a model.onnx nor an engine")
    targets = withhold(targets, report.get("unproven", []))
    verdicts = {target.verdict for target in targets}
    found: dict[str, Any] = plain(
        report
        | {
            "targets": [asdict(target) for target in targets],
            "verdict": PASSED if PASSED in verdicts and FAILED not in verdicts else FAILED,
            "warnings": changed_files(folder),
            "versions": versions(),
            "seconds": {},
        }
    )
    return found


def withhold(targets: Sequence[TargetResult], unproven: Sequence[str]) -> list[TargetResult]:
    """Return targets without the verdict "passed" where an export has lines about what its inputs do not prove."""
    return [
        replace(target, verdict=NOT_RUN, reason=unproven[0]) if unproven and target.verdict == PASSED else target
        for target in targets
    ]


def _served(path: Path, goldens: Sequence[GoldenCase]) -> tuple[list[GoldenCase], list[str]]:
    """Return the cases that a backend takes, and the names of the others, whose shapes no profile of an engine takes.

    A forced plan needs an engine with that plan: only the one of fp32, where limits are tight, is built.
    """
    if not description.sidecar(path).exists():
        return list(goldens), []
    profiles = read_engine_info(path).profiles
    served, others = [], []
    for each in goldens:
        if not each.whole and each.forced != criterion.EXACT:
            continue
        try:
            profile_of(profiles, each.shapes)
        except ConfigError:
            others.append(each.name)
        else:
            served.append(each)
    return served, others
