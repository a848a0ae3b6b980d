"""What report.json and manifest.json say of an export, apart from the comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaattn.calibration import Calibration
from adaattn.export.artifacts.manifest import versions
from adaattn.export.capture.captured import Captured

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


def calibration(found: Calibration) -> dict[str, Any]:
    """What a calibration did: for each layer the energy that the dimensions beyond each rank hold, before and after.

    Shares of the whole, means over heads, for ranks 0 to head_dim - 1; and the mean rank that holds all but RESIDUE.
    """
    attention_statistics = []
    for name, spectrum in found.layers.items():
        before, after = spectrum.ranks(1 - RESIDUE)
        attention_statistics.append(
            {
                "name": name,
                "tokens": spectrum.tokens,
                "ranks": [sum(before) / len(before), sum(after) / len(after)],
                "beyond": [_beyond(spectrum.before), _beyond(spectrum.after)],
            }
        )
    return {
        "batches": found.batches,
        "residue": RESIDUE,
        "layers": attention_statistics,
        "refused": dict(found.refused),
    }


def _beyond(energies: Tensor) -> list[float]:
    total = energies.sum(-1, keepdim=True).clamp_min(1e-300)
    shares: list[float] = (energies.flip(-1).cumsum(-1).flip(-1) / total).mean(0).tolist()
    return shares
