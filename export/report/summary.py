"""Summarise the model and its calibration for the report."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adaattn.calibration import Calibration
from adaattn.export.artifacts.dtypes import dtype_name
from adaattn.export.capture.captured import Captured

RESIDUE = 1e-3  # share of a head's energy that a rank may leave out, where ranks are compared


def about(captured: Captured, source: str) -> dict[str, Any]:
    """Return what a report says of a model: its source, class, dtype and number of parameters."""
    weights = [x for x in captured.program.state_dict.values() if isinstance(x, Tensor)]
    return {
        "source": source,
        "class": captured.model_name,
        "dtype": dtype_name(captured.dtype),
        "parameters": sum(x.numel() for x in weights),
    }


def calibration(found: Calibration) -> dict[str, Any]:
    """Return for each layer the energy in the dimensions beyond each rank, before and after a calibration.

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
    return {
        "batches": found.batches,
        "residue": RESIDUE,
        "layers": layers,
        "refused": dict(found.refused),
    }


def _beyond(energies: Tensor) -> list[float]:
    total = energies.sum(-1, keepdim=True).clamp_min(1e-300)
    shares: list[float] = (energies.flip(-1).cumsum(-1).flip(-1) / total).mean(0).tolist()
    return shares
