"""Files that are no models, or not wholly, or not safely, as they turn up on a user's disk."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

import adaattn
from tests.support import models


class Trap:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("sprung",)


Records = dict[str, bytes]  # of a zip file, by name
SPRING = "__import__('os').mkdir('sprung')"


def read_records(path: Path) -> Records:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_records(records: Records, path: Path, method: int = zipfile.ZIP_STORED) -> None:
    """Write a zip file with right checksums, whatever is in it."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def saved_bytes(value: object) -> bytes:
    torch.save(value, stream := io.BytesIO())
    return stream.getvalue()


def _edited(ending: str, edit: Callable[[Any, Records], object]) -> Callable[[Records], object]:
    """Change the JSON of a record, and others with it."""

    def change(records: Records) -> None:
        name = next(name for name in records if name.endswith(ending))
        content = json.loads(records[name])
        edit(content, records)
        records[name] = json.dumps(content).encode()

    return change


def _pickled_weight(config: Any, records: Records) -> None:
    config["config"]["weight"]["use_pickle"] = True
    records["good/data/weights/weight_0"] = saved_bytes(Trap())


def _opaque_constant(config: Any, records: Records) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    config["config"]["trap"] = entry
    records["good/data/constants/opaque_obj_0"] = pickle.dumps(Trap())


def _size(program: Any, records: Records) -> None:
    """Return the text of every symbolic size, which sympy evaluates."""
    for values in program["graph_module"]["graph"]["tensor_values"].values():
        for size in values["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = SPRING


def _older_format(records: Records) -> None:
    model = records["good/models/model.json"]
    records.clear()
    records |= {"version": b"8.8", "serialized_exported_program.json": model}
    records |= {f"serialized_{part}.pt": saved_bytes({}) for part in ("state_dict", "constants")}
    records["serialized_example_inputs.pt"] = saved_bytes(Trap())


# A .pt2 made from good.pt2 runs code: where, and the change.
PROGRAM_TRAPS: dict[str, Callable[[Records], object]] = {
    "inputs": lambda records: records.update({"good/data/sample_inputs/model.pt": saved_bytes(Trap())}),
    "old weights": lambda records: records.update({"good/data/weights/model.pt": saved_bytes(Trap())}),
    "old constants": lambda records: records.update({"good/data/constants/model.pt": saved_bytes(Trap())}),
    "weight": _edited("model_weights_config.json", _pickled_weight),
    "constant": _edited("model_constants_config.json", _opaque_constant),
    "size": _edited("models/model.json", _size),
    "guard": _edited("models/model.json", lambda program, _: program.update(guards_code=[f"{SPRING} is None"])),
    "older format": _older_format,
}


def build_shelf(shelf: Path) -> Path:
    """Write all of them into a folder, and good.pt and good.pt2, which are sound."""
    model = models.tiny()
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
