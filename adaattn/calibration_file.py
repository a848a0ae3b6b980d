"""The statistics of a calibration in a file of plain tensors, so that one that was interrupted goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaattn.balance import SecondMoments
from adaattn.checkpoint import write_whole
from adaattn.errors import CheckpointError

FORMAT, VERSION = "adaattn-calibration", 2


def write(
    path: str | os.PathLike[str],
    done: int,
    weights: str,
    sums: Mapping[str, SecondMoments],
    tried: Mapping[str, str | None],
) -> None:
    """Write the sums over so many batches; the file appears whole or not at all."""
    layers = {name: moments.state() for name, moments in sums.items()}
    content = {"format": FORMAT, "version": VERSION, "batches": done, "weights": weights, "tried": dict(tried)}
    write_whole({**content, "layers": layers}, path)


def read(
    path: str | os.PathLike[str], weights: str, sums: dict[str, SecondMoments], tried: dict[str, str | None]
) -> int:
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
    expected = {name: moments.state() for name, moments in sums.items()}
    same = payload.get("weights") == weights and _form(payload.get("layers")) == _form(expected)
    if not isinstance(done, int) or not same:
        raise CheckpointError(
            f"{path} was made of another model or other weights, maybe of this model before its calibration; delete it "
            "to begin anew"
        )
    tried.update(payload["tried"])
    for name, layer in payload["layers"].items():
        sums[name] = SecondMoments(**layer)
    return done


def _form(statistics: Any) -> Any:
    """What the statistics of two runs over the same model have in common: all but the numbers."""
    if isinstance(statistics, dict):
        return {name: _form(x) for name, x in statistics.items()}
    return (statistics.dtype, statistics.shape) if isinstance(statistics, Tensor) else statistics


def fingerprint(model: nn.Module) -> str:
    """Of all weights: statistics are worthless for others than those they were made with."""
    digest = hashlib.sha256()
    for name, x in model.state_dict().items():
        if isinstance(x, Tensor):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
