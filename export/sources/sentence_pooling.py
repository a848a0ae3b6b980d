"""Pool token states to the embedding of a sentence, as modules.json of sentence-transformers says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from adaattn.errors import CheckpointError

MODES = ("mean", "cls")


@dataclass(frozen=True)
class Pooling:
    """How token states become one vector: their mean over the mask, or the first; then of length 1, or as it is."""

    mode: str
    normalize: bool

    def __call__(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool (B, S, D) by a mask (B, S) of ones and zeros to (B, D); zeros for a sentence without a token."""
        if self.mode == "cls":
            pooled = states[:, 0]
        else:
            weights = attention_mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1).clamp_min(1)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


def pooling_of(folder: Path) -> Pooling | None:
    """Return the pooling that modules.json names; None where there is no such file.

    Raises:
        CheckpointError: modules or modes that are not known here.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = _read(path)
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        places = [str(module["path"]) for module in modules]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a list of modules with type and path") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or places[0]:
        raise CheckpointError(
            f"{path} lists {', '.join(kinds) or 'nothing'}; known here are Transformer, in the folder itself, Pooling "
            "and Normalize. Delete modules.json from a copy to export the model without them"
        )
    settings = folder / places[1] / "config.json"
    mode = _mode(_read(settings))
    if mode not in MODES:
        raise CheckpointError(f"{settings} asks for pooling by {mode}; known here are {' and '.join(MODES)}")
    return Pooling(mode, "Normalize" in kinds)


def _mode(settings: Any) -> str:
    """Return the modes by name, from flags such as pooling_mode_mean_tokens or the text that newer files have."""
    if not isinstance(settings, dict):
        return repr(settings)
    if "pooling_mode" in settings:
        return str(settings["pooling_mode"])
    names = [key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in settings]
    chosen = [n for n, (key, on) in zip(names, settings.items(), strict=True) if key.startswith("pooling_mode_") and on]
    return " and ".join(chosen) or "nothing"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
