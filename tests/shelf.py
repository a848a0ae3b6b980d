"""Files that are no models, or not wholly, or not safely, as they turn up on a user's disk."""

from __future__ import annotations

import pickle
import random
import zipfile
from pathlib import Path

import foreign
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

import adaattn


class Trap:
    """Unpickled, it writes a file."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("sprung", "w")


def build_shelf(shelf: Path) -> Path:
    """Write all of them into a folder, and good.pt and good.pt2, which are sound."""
    model = foreign.tiny()
    adaattn.save(model, shelf / "good.pt")
    good = torch.load(shelf / "good.pt", weights_only=True)
    state, first = good["state"], next(iter(good["state"]))
    width = Dim("width")
    program = torch.export.export(nn.Linear(16, 8), (torch.ones(3, 16),), dynamic_shapes={"input": {0: width}})
    torch.export.save(program, shelf / "good.pt2")
    torch.export.save(program, shelf / "program.pt")

    noise = random.Random(0).randbytes(2000)
    for ending in ("pt", "pt2"):
        whole = (shelf / f"good.{ending}").read_bytes()
        (shelf / f"empty.{ending}").touch()
        (shelf / f"half.{ending}").write_bytes(whole[: len(whole) // 2])
        (shelf / f"header.{ending}").write_bytes(whole[:20])
        (shelf / f"text.{ending}").write_text("not a model\n" * 20)
        (shelf / f"noise.{ending}").write_bytes(noise)
        with zipfile.ZipFile(shelf / f"photos.{ending}", "w") as archive:
            archive.writestr("photos/1.txt", "a cat")
    (shelf / "pickle_noise.pt").write_bytes(b"\x80\x99" + noise)
    (shelf / "folder").mkdir()

    held: dict[str, object] = {
        "tensor.pt": torch.ones(3),
        "list.pt": [1, 2],
        "weights.pt": state,
        "training.pt": {"state_dict": state, "epoch": 3},
        "module.pt": model,
        "trap.pt": Trap(),
        "version.pt": good | {"version": 99},
        "no_version.pt": {key: value for key, value in good.items() if key != "version"},
        "class.pt": good | {"class": "shop.models:Ranker"},
        "not_ours.pt": good | {"class": "os:system"},
        "no_config.pt": {key: value for key, value in good.items() if key != "config"},
        "config.pt": good | {"config": good["config"] | {"embed_dim": 17}},
        "missing.pt": good | {"state": {key: x for key, x in state.items() if key != first}},
        "more.pt": good | {"state": state | {"more": torch.ones(1)}},
        "shape.pt": good | {"state": state | {first: torch.ones(3)}},
        "other_input.pt": good | {"inputs": {"y": "B,S,16"}},
        "numbered.pt": {1: torch.ones(2)},
        "texts.pt": {"weight": "heavy", "bias": "strong"},
    }
    for name, value in held.items():
        torch.save(value, shelf / name)
    torch.save(model, shelf / "old_module.pt", _use_new_zipfile_serialization=False)
    (shelf / "plain.pkl").write_bytes(pickle.dumps(model))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), shelf / "script.pt")

    weights = nn.Linear(16, 8).state_dict()
    fits: dict[str, dict[str, Tensor]] = {
        "fits": weights,
        "no_bias": {"weight": weights["weight"]},
        "more": weights | {"more": torch.ones(1)},
        "prefix": {f"module.{name}": x for name, x in weights.items()},
        "narrow": weights | {"weight": torch.ones(8, 15)},
    }
    for name, tensors in fits.items():
        save_file(tensors, shelf / f"{name}.safetensors")
    (shelf / "noise.safetensors").write_bytes(noise)
    return shelf
