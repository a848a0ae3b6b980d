"""Parity for a user's own tests: one assertion, and the pytest fixtures that `pip install adaattn` brings.

    def test_my_model(assert_parity):
        assert_parity(MyModel(), {"x": "B,S,512", "mask": "B,S:bool"}, dims={"S": "1:128:1024"})

pytest loads this file at every start, so it imports nothing until it is called.
"""

from __future__ import annotations

import tempfile
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
    """Export a model and assert that its artifacts agree with eager PyTorch; or assert it of an export that is there.

    Args:
        model: a module, or a folder that `adaattn-export` made.
        inputs, dims: as of `adaattn.export.export`.
        options: of the export; by default it makes the ONNX file alone.
        backends: for a folder, those that must pass, of `adaattn.export.backends.BACKENDS`; None for all that can run.
        folder: where to export to; by default a folder that is deleted.

    Returns:
        The report.

    Example:
        >>> assert_parity(adaattn.DenseAttention(64, 4))["verdict"]
        'passed'

    Raises:
        AssertionError: a target failed; the message has a line for each output that is wrong.
        ConfigError: arguments that do not go together.
    """
    if isinstance(model, (str, Path)):
        from adaattn.export.verify import check

        report = check(Path(model), backends)
        wanted = set(backends or ())
    else:
        from adaattn.export import Options, export

        with tempfile.TemporaryDirectory(prefix="adaattn-") as scratch:
            out = folder or Path(scratch) / "export"
            report = export(model, inputs, out, dims=dims, options=options or Options(("onnx",))).report
        wanted = set()
    bad = [each for each in report["targets"] if each["verdict"] == "failed"]
    bad += [each for each in report["targets"] if each["name"] in wanted and each["verdict"] == "not run"]
    if bad or report["verdict"] != "passed":
        raise AssertionError("\n".join(_lines(bad)) or "no backend could run the artifacts")
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
    """`adaattn.export.testing.assert_parity`, whose exports pytest keeps, the last three runs' worth, in tmp_path."""
    count = iter(range(1_000_000))

    def call(model: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        if not isinstance(model, (str, Path)):
            options.setdefault("folder", tmp_path / f"export{next(count)}")
        return assert_parity(model, *arguments, **options)

    return call


@pytest.fixture
def adaattn_export(tmp_path: Path) -> Callable[..., Path]:
    """`adaattn.export.export` into tmp_path: the folder of a verified export, for tests of what becomes of it."""
    count = iter(range(1_000_000))

    def call(model: Any, inputs: Any = None, **arguments: Any) -> Path:
        from adaattn.export import Options, export

        arguments.setdefault("options", Options(("onnx",)))
        return export(model, inputs, tmp_path / f"exported{next(count)}", **arguments).directory

    return call
