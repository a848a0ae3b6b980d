"""The statistics of a calibration in a file of plain tensors, so that one that was interrupted goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaattn.balance import SecondMoments
from adaattn.checkpoint import write_whole
from adaattn.errors import CheckpointError
from adaattn.pairs import Pair

FORMAT, VERSION = "adaattn-calibration", 1


def write(
    path: str | os.PathLike[str], done: int, chosen: Mapping[str, Pair], sums: Mapping[str, SecondMoments]
) -> None:
    """Write the sums over so many batches; the file appears whole or not at all."""
    layers = {name: {"weights": _fingerprint(pair), **sums[name].state()} for name, pair in chosen.items()}
    write_whole({"format": FORMAT, "version": VERSION, "batches": done, "layers": layers}, path)


def read(path: str | os.PathLike[str], chosen: Mapping[str, Pair], sums: dict[str, SecondMoments]) -> int:
    """Fill in the sums from a file; how many batches it has counted.

    Raises:
        CheckpointError: it is no such file, or of other weights.
    """
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own: whatever a damaged file raises, it means this
        raise CheckpointError(
            f"{path} holds no statistics of a calibration: it is damaged or of another kind"
        ) from error
    if not isinstance(payload, dict) or (payload.get("format"), payload.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path} holds no statistics of a calibration of version {VERSION}; delete it, or give another"
        )
    done = payload.get("batches")
    expected = {name: {"weights": _fingerprint(pair), **sums[name].state()} for name, pair in chosen.items()}
    if not isinstance(done, int) or _form(payload.get("layers")) != _form(expected):
        raise CheckpointError(
            f"{path} was made of another model or other weights, maybe of this model before its calibration; delete it "
            "to begin anew"
        )
    for name, layer in payload["layers"].items():
        sums[name] = SecondMoments(**{field: x for field, x in layer.items() if field != "weights"})
    return done


def _form(statistics: Any) -> Any:
    """What the statistics of two runs over the same model have in common: all but the numbers."""
    if isinstance(statistics, dict):
        return {name: _form(x) for name, x in statistics.items()}
    return (statistics.dtype, statistics.shape) if isinstance(statistics, Tensor) else statistics


def _fingerprint(pair: Pair) -> str:
    """Statistics are worthless for other weights than those they were made with."""
    hashes = (torch.hash_tensor(linear.weight.detach().cpu().double()) for linear in (pair.query, pair.key))
    return " ".join(str(x.view(torch.int64).item()) for x in hashes)
