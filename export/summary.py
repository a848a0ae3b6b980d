"""What report.json and manifest.json say of an export, apart from the comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaattn.attention.base import PlannedAttention
from adaattn.calibration import Calibration
from adaattn.config import PRECISIONS
from adaattn.export.capture import Captured
from adaattn.export.folder import FORMAT, MARKER, VERSION, sha256
from adaattn.export.reference import Expected
from adaattn.export.versions import versions
from adaattn.integrations.transformers import tolerance_of

RESIDUE = 1e-3  # share of a head's energy that a rank may leave out, where ranks are compared


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
        "versions": versions(),
        "command": command or "",
    }


def write_manifest(folder: Path, report: Mapping[str, Any]) -> None:
    """Hashes of all files, versions and command."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "files": files,
        "versions": report["versions"],
        "command": report["command"],
        "verdict": report["verdict"],
    }
    (folder / MARKER).write_text(json.dumps(content, indent=1) + "\n")


def layers(names: Sequence[str], expected: Sequence[Expected], module: nn.Module | None) -> list[dict[str, Any]]:
    """What each planned attention did, over all cases: its usual precision, mean rank and worst errors a head."""
    found = []
    for index, name in enumerate(names):
        modes = [want.mode for want in expected if len(want.mode.plans) == len(names)]
        calls = [(mode.plans[index], mode.errors[index]) for mode in modes]
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


def calibration(found: Calibration) -> dict[str, Any]:
    """What a calibration did: for each layer the energy that the dimensions beyond each rank hold, before and after.

    Shares of the whole, means over heads, for ranks 0 to head_dim - 1; and the mean rank that holds all but RESIDUE.
    """
    layers = []
    for name, spectrum in found.layers.items():
        before, after = spectrum.ranks(1 - RESIDUE)
        layers.append(
            {
                "name": name,
                "tokens": spectrum.tokens,
                "ranks": [sum(before) / len(before), sum(after) / len(after)],
                "beyond": [_beyond(spectrum.before), _beyond(spectrum.after)],
            }
        )
    return {"batches": found.batches, "residue": RESIDUE, "layers": layers, "refused": dict(found.refused)}


def _beyond(energies: Tensor) -> list[float]:
    total = energies.sum(-1, keepdim=True).clamp_min(1e-300)
    shares: list[float] = (energies.flip(-1).cumsum(-1).flip(-1) / total).mean(0).tolist()
    return shares
