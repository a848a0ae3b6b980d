"""Define what report.json holds: an export, the result of each target, the packages for servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adaattn.export.artifacts.files import plain

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
"""The verdicts."""


@dataclass(frozen=True)
class Artifact:
    """A file of an export: its path in the folder, and its size."""

    path: str
    bytes: int


def artifacts(folder: Path, files: Sequence[Path]) -> list[Artifact]:
    """Return files of an export as its report lists them."""
    return [Artifact(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files]


@dataclass(frozen=True)
class TargetResult:
    """An artifact that was made, and what its comparison with eager PyTorch found.

    Args:
        name: of the target, or of the backend that ran it.
        artifacts: its files.
        verdict: PASSED, FAILED or NOT_RUN.
        reason: for the verdict.
        seconds: that it took to make, or to compare.
        ops: what custom ops and attention in fp8 became, as `EngineInfo.ops`; None where there is no engine.
        outputs: a row for each output of each golden case; see `adaattn.export.parity.compare.compare` for these and
            the rest.
    """

    name: str
    artifacts: Sequence[Artifact] = ()
    verdict: str = NOT_RUN
    reason: str | None = None
    seconds: float = 0.0
    ops: Mapping[str, str] | None = None
    outputs: Sequence[Mapping[str, Any]] = ()
    heads: Sequence[Mapping[str, Any]] = ()
    histogram: Mapping[str, Any] | None = None
    plans: Mapping[str, Any] | None = None
    compared: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Package:
    """What was written for a server, of `adaattn.export.options.SERVERS`.

    Args:
        name: of the server.
        artifacts: its files; none where the engine to serve was not built.
        command: that starts or opens it.
    """

    name: str
    artifacts: Sequence[Artifact]
    command: str


@dataclass(frozen=True)
class Report:
    """An export, as report.json has it.

    Args:
        model: its source, class, dtype and number of parameters.
        inputs, dims: by name, as the command line writes them.
        layers: what each planned attention did over all cases.
        allocation: the compile-time plan, where one was chosen.
        attentions: of the model, each with its module, what it was, and what it became or why it stays.
        tokens: of each case by name; None where no input has tokens.
        unproven: why the verdict "passed" is withheld from targets whose numbers agree.
        seconds: of each stage.
    """

    model: Mapping[str, Any]
    inputs: Mapping[str, str]
    dims: Mapping[str, str]
    opset: int
    versions: Mapping[str, str]
    command: str
    warnings: Sequence[str] = ()
    unproven: Sequence[str] = ()
    targets: Sequence[TargetResult] = ()
    serving: Sequence[Package] = ()
    layers: Sequence[Mapping[str, Any]] = ()
    attentions: Sequence[Mapping[str, Any]] = ()
    allocation: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    tokens: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """FAILED where a target failed, else PASSED where one passed."""
        verdicts = {target.verdict for target in self.targets}
        return next((each for each in (FAILED, PASSED) if each in verdicts), NOT_RUN)

    def as_json(self) -> dict[str, Any]:
        """Return the content of report.json, with None for NaN and Inf."""
        found: dict[str, Any] = plain(asdict(self) | {"verdict": self.verdict})
        return found
