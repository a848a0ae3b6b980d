"""Save and load the statistics of a calibration, so that an interrupted one resumes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaattn.calibration.balancing import SecondMoments
from adaattn.checkpoint import write_whole
from adaattn.errors import CheckpointError

FORMAT, VERSION = "adaattn-calibration", 2
FIELDS = {"batches": int, "weights": str, "tried": dict, "layers": dict}


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
        CheckpointError: it is not a state file, or belongs to other weights.
    """
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error class: a damaged file may raise any
        raise CheckpointError(
            f"{path} holds no statistics of a calibration: it is damaged or of another kind"
        ) from error
    form = (payload.get("format"), payload.get("version")) if isinstance(payload, dict) else ()
    if [type(x) for x in form] != [str, int] or form != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path} holds no statistics of a calibration of version {VERSION}; delete it, or give another"
        )
    missing = [name for name, kind in FIELDS.items() if type(payload.get(name)) is not kind]
    if missing:
        raise CheckpointError(f"{path} is damaged: its {missing[0]!r} is missing or of another type; delete it")
    done: int = payload["batches"]
    layers = payload["layers"]
    expected = {name: moments.state() for name, moments in sums.items()}
    if payload["weights"] != weights or layers.keys() != expected.keys():
        raise CheckpointError(
            f"{path} was made of another model or other weights, maybe of this model before its calibration; delete it "
            "to begin anew"
        )
    damage = _damage(done, payload["tried"], layers, expected)
    if damage is not None:
        raise CheckpointError(f"{path} is damaged: {damage}; delete it to begin anew")
    tried.update(payload["tried"])
    for name, layer in layers.items():
        sums[name] = SecondMoments(**{field: x.detach().clone() for field, x in layer.items()})
    return done


def _damage(
    done: int, tried: dict[Any, Any], layers: Mapping[Any, Any], expected: Mapping[str, Mapping[str, Tensor]]
) -> str | None:
    """Return what no calibration can have written into a file, or None."""
    if not 0 <= done <= sys.maxsize:
        return "its number of batches is invalid"
    if not tried.keys() <= expected.keys() or not all(x is None or isinstance(x, str) for x in tried.values()):
        return "its 'tried' is not of this model's attention"
    for name, wanted in expected.items():
        layer = layers[name]
        if not isinstance(layer, dict) or layer.keys() != wanted.keys():
            return f"it lacks statistics of {name}"
        for field, want in wanted.items():
            x = layer[field]
            if not isinstance(x, Tensor) or (x.layout, x.device, x.dtype, x.shape) != (
                want.layout,
                want.device,
                want.dtype,
                want.shape,
            ):
                return f"{field!r} of {name} is not a {want.dtype} tensor of shape {tuple(want.shape)}"
        # Sums of squares: what is not finite came of the data, and `calibrate` says so, but nothing can be negative.
        powers = [layer["query"].diagonal(dim1=1, dim2=2), layer["key"].diagonal(dim1=1, dim2=2)]
        if any(bool((x < 0).any()) for x in (*powers, layer["queries"], layer["keys"], layer["key_power"])):
            return f"a sum of squares or a count of {name} is negative"
    return None


def fingerprint(model: nn.Module) -> str:
    """Return a hash of all weights: statistics are valid only for the weights that they were made with."""
    digest = hashlib.sha256()
    for name, x in model.state_dict().items():
        if isinstance(x, Tensor):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
