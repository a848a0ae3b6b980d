"""Check parity in a user's tests: one assertion, and the pytest fixtures that `pip install adaattn` brings.

    def test_my_model(assert_parity):
        assert_parity(MyModel(), {"x": "B,S,512", "mask": "B,S:bool"}, dims={"S": "1:128:1024"})

pytest loads this file at every start, so it imports nothing until it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from adaattn.export import Options


def assert_parity(
    model: nn.Module | Path | str,
    inputs: Mapping[str, str | Tensor] | None = None,
    *,
    dims: Mapping[str, str] | None = None,
    options: Options | None = None,
    backends: Sequence[str] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Export a model and assert that its artifacts agree with eager PyTorch; or assert it of an existing export.

    Args:
        model: a module, or a folder that `adaattn-export` made.
        inputs, dims: as of `adaattn.export.export`.
        options: of the export; by default only the ONNX file is made.
        backends: names that must pass, of `adaattn.export.verification.backends.BACKENDS`; None for all that can run,
            at least one.
        folder: to export to; by default a temporary folder.

    Returns:
        The report.

    Example:
        >>> assert_parity(adaattn.DenseAttention(64, 4))["verdict"]
        'passed'

    Raises:
        AssertionError: a target failed, or nothing ran; the message has a line for each output that is wrong.
        ConfigError: arguments that do not go together.
    """
    from adaattn.errors import ConfigError
    from adaattn.export.verification.verify import verify_export
    from adaattn.system.atomic_file import scratch_folder

    if isinstance(backends, str):
        raise ConfigError(f"backends is {backends!r}; give a list of names")
    if isinstance(model, (str, Path)):
        if inputs is not None or dims is not None or options is not None or folder is not None:
            raise ConfigError("inputs, dims, options and folder are of an export, and a folder is exported already")
        return _passed(verify_export(Path(model), backends), backends)
    from adaattn.export import Options, export

    with scratch_folder() as scratch:
        out = folder or scratch / "export"
        report = _passed(export(model, inputs, out, dims=dims, options=options or Options(("onnx",))).report)
        return report if backends is None else _passed(verify_export(out, backends), backends)


def _passed(report: dict[str, Any], wanted: Sequence[str] | None = None) -> dict[str, Any]:
    bad = [
        each
        for each in report["targets"]
        if each["verdict"] == "failed" or (each["verdict"] == "not run" and each["name"] in (wanted or ()))
    ]
    if not bad and report["verdict"] != "passed":
        bad = report["targets"]  # none ran
    if bad:
        raise AssertionError("\n".join(_lines(bad)))
    return report


def _lines(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for target in targets:
        lines.append(f"{target['name']}: {target['reason']}")
        for row in target["outputs"]:
            if row["verdict"] == "failed":
                lines.append(f"  {row['name']} on {row['case']}: {row['reason']}")
    return lines


@pytest.fixture(name="assert_parity")
def _assert_parity(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return `assert_parity` with its exports in tmp_path, where pytest keeps those of the last three runs."""
    count = iter(range(1_000_000))

    def call(model: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        if not isinstance(model, (str, Path)):
            options.setdefault("folder", tmp_path / f"export{next(count)}")
        return assert_parity(model, *arguments, **options)

    return call


@pytest.fixture
def adaattn_export(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that exports into tmp_path, asserts that the export passed, and returns its folder."""
    count = iter(range(1_000_000))

    def call(model: Any, inputs: Any = None, **arguments: Any) -> Path:
        from adaattn.export import Options, export

        arguments.setdefault("options", Options(("onnx",)))
        made = export(model, inputs, tmp_path / f"exported{next(count)}", **arguments)
        _passed(made.report)
        return made.directory

    return call
