"""What report.json and manifest.json say of an export, apart from the comparisons."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaattn.attention.base import PlannedAttention
from adaattn.config import PRECISIONS
from adaattn.export.capture import Captured
from adaattn.export.folder import MARKER
from adaattn.export.parity import Expected
from adaattn.integrations.transformers import tolerance_of

PACKAGES = (
    *("adaattn", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt", "tensorrt-rtx-cu13"),
)


def report(captured: Captured, source: str, opset: int, command: str | None, notes: Sequence[str]) -> dict[str, Any]:
    """What is known of an export before its targets: the model, its inputs, the versions."""
    weights = [x for x in captured.program.state_dict.values() if isinstance(x, Tensor)]
    return {
        "model": {
            "source": source,
            "class": captured.model_name,
            "dtype": str(captured.dtype).removeprefix("torch."),
            "parameters": sum(x.numel() for x in weights),
        },
        "warnings": list(notes),
        "inputs": {item.name: captured.shape_text(item) for item in captured.inputs},
        "dims": {dim.name: str(dim) for dim in captured.dims.values()},
        "opset": opset,
        "versions": _versions(),
        "command": command or "",
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(folder: Path, report: Mapping[str, Any]) -> None:
    """Hashes of all files, versions and command."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = {
        "files": files,
        "versions": report["versions"],
        "command": report["command"],
        "verdict": report["verdict"],
    }
    (folder / MARKER).write_text(json.dumps(content, indent=1) + "\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """The value with NaN and Inf, which JSON has not, as None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def layers(names: Sequence[str], expected: Sequence[Expected], module: nn.Module | None) -> list[dict[str, Any]]:
    """What each planned attention did, over all cases: its usual precision, mean rank and worst errors a head."""
    found = []
    for index, name in enumerate(names):
        calls = [(want.plans[index], want.mode.errors[index]) for want in expected if len(want.plans) == len(names)]
        if not calls:
            continue
        precision = torch.cat([plan[0] for plan, _ in calls])
        rank = torch.cat([plan[1] for plan, _ in calls]).double()
        attention = dict(module.named_modules()).get(name) if module is not None else None
        if isinstance(attention, PlannedAttention):
            tolerance = attention.budget.tolerance if attention.budget is not None else None
        else:
            tolerance = tolerance_of(attention) if attention is not None else None
        found.append(
            {
                "name": name,
                "tolerance": tolerance,
                "head_dim": calls[0][1].head_dim,
                "precision": [PRECISIONS[int(code)] for code in precision.mode(dim=0).values],
                "rank": rank.mean(dim=0).tolist(),
                "predicted": torch.cat([error.predicted for _, error in calls]).amax(0).tolist(),
                "measured": torch.cat([error.measured for _, error in calls]).amax(0).tolist(),
            }
        )
    return found
