"""model.pt without pickle's powers: class, configuration, weights and inputs, readable by `weights_only=True`."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaattn.atomic_file import replacing
from adaattn.errors import AdaAttnError, CheckpointError, ConfigError
from adaattn.input_spec import Dimension, InputSpec

FORMAT, VERSION = "adaattn", 1
FIELDS = {"class": str, "config": dict, "state": dict, "training": bool, "inputs": dict, "dims": dict}


@dataclass(frozen=True)
class Checkpoint:
    """A model.pt as read: the module, and what was saved about its inputs."""

    module: nn.Module
    inputs: tuple[InputSpec, ...]
    dims: tuple[Dimension, ...]


def save(
    module: nn.Module,
    path: str | os.PathLike[str],
    inputs: Mapping[str, str | Tensor] | None = None,
    dims: Mapping[str, str] | None = None,
) -> None:
    """Save a module so that `adaattn.load` and `adaattn-export` can build it again.

    Args:
        module: an instance of a class whose every constructor argument is an attribute of the same name, as in all
            modules of this package.
        path: the file; it appears whole or not at all.
        inputs: for each argument of forward a specification such as "B,S,512:float32", or an example tensor.
        dims: for each name in them the sizes it may take, such as "1:128:4096" (min:opt:max).

    Example:
        >>> save(adaattn.DenseAttention(64, 4), "model.pt", inputs={n: "B,S,64" for n in ("query", "key", "value")})

    Raises:
        CheckpointError: the module's class or configuration cannot be written, or the file cannot.
        ConfigError: a specification that cannot be read.
    """
    specs = [_spec(name, given) for name, given in (inputs or {}).items()]
    sizes = [Dimension.parse(name, given) for name, given in (dims or {}).items()]
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "class": f"{type(module).__module__}:{type(module).__qualname__}",
        "config": _config(module),
        "state": dict(module.state_dict()),
        "training": module.training,
        "inputs": {spec.name: str(spec) for spec in specs},
        "dims": {dimension.name: str(dimension) for dimension in sizes},
    }
    write_whole(payload, path)


def write_whole(payload: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """`torch.save` to a file that appears whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with replacing(Path(path)) as file:
            torch.save(payload, file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:
        # torch's writer answers a full disk with an error of its own, behind which the system's stands
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise CheckpointError(f"{path} cannot be written: {cause.strerror or cause}") from error
        raise


def load(path: str | os.PathLike[str], classes: Sequence[type[nn.Module]] = ()) -> nn.Module:
    """The module of a file that `save` wrote.

    Args:
        path: the file.
        classes: your own classes that it may hold; those of this package need no mention.

    Example:
        >>> load("model.pt")
        DenseAttention(...)

    Raises:
        CheckpointError: no such file, or one that is not, or not wholly, a model of this format.
    """
    return read(path, classes).module


def read(path: str | os.PathLike[str], classes: Sequence[type[nn.Module]] = ()) -> Checkpoint:
    """`load`, with what was saved about the inputs."""
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except Exception as error:  # torch.load has no error of its own: whatever a damaged file raises, it means this
        raise CheckpointError(
            f"{path} is not a model saved by adaattn.save: it is damaged or of another kind"
        ) from error
    return from_payload(payload, path, classes)


def is_payload(loaded: object) -> bool:
    """Whether what `torch.load` returned was written by `save`."""
    return isinstance(loaded, dict) and loaded.get("format") == FORMAT


def from_payload(payload: Any, path: str | os.PathLike[str], classes: Sequence[type[nn.Module]] = ()) -> Checkpoint:
    """The checkpoint in what `torch.load` returned.

    Raises:
        CheckpointError: it is none, of another version, of an unknown class, or incomplete.
    """
    if not is_payload(payload):
        raise CheckpointError(f"{path} is not a model saved by adaattn.save; it holds a {type(payload).__name__}")
    if payload.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {payload.get('version')!r} and this release reads version {VERSION}; "
            "save the model again, or install the release that wrote it"
        )
    damaged = [name for name, kind in FIELDS.items() if not isinstance(payload.get(name), kind)]
    if damaged:
        raise CheckpointError(f"{path} is damaged: its {damaged[0]!r} is missing or of another type; save it again")
    try:
        module = _find_class(payload["class"], classes)(**payload["config"])
        assign_weights(module, payload["state"], type(module).__name__)
        module.train(payload["training"])
        inputs = tuple(InputSpec.parse(name, text) for name, text in payload["inputs"].items())
        dims = tuple(Dimension.parse(name, text) for name, text in payload["dims"].items())
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    except (AdaAttnError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} does not fit together: {reason}") from error
    return Checkpoint(module, inputs, dims)


def assign_weights(module: nn.Module, state: Mapping[str, Any], name: str) -> None:
    """`load_state_dict` that keeps the file's tensors and their types instead of copying them into fresh ones.

    Raises:
        CheckpointError: they do not fit; a predicate for which the file's name is the subject.
    """
    if not all(isinstance(key, str) for key in state):
        raise CheckpointError("holds a dict whose keys are no names, not weights by name")
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        # Each line is a list of keys, maybe of all: one of missing ones, one of unexpected ones, then wrong shapes.
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        shown = " ".join(line if len(line) <= 200 else line[:197] + "..." for line in lines)
        raise CheckpointError(f"does not fit {name}: {shown}") from error


def _spec(name: str, given: str | Tensor) -> InputSpec:
    if isinstance(given, str):
        return InputSpec.parse(name, given)
    return InputSpec(name, tuple(given.shape), str(given.dtype).removeprefix("torch."))


def _config(module: nn.Module) -> dict[str, Any]:
    config = {}
    for name in inspect.signature(type(module)).parameters:
        if not hasattr(module, name):
            raise CheckpointError(
                f"{type(module).__name__} has no attribute {name!r}; keep each constructor argument as an attribute of "
                "the same name, or export with package.module:factory and --weights"
            )
        config[name] = getattr(module, name)
        if not _plain(config[name]):
            raise CheckpointError(
                f"{type(module).__name__}.{name} is a {type(config[name]).__name__}; only numbers, texts, booleans, "
                "None and lists of them can be saved"
            )
    return config


def _plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _find_class(name: str, classes: Sequence[type[nn.Module]]) -> type[nn.Module]:
    """A class by its name: one that the caller names, or one of this package. Nothing else is ever imported."""
    for known in classes:
        if name == f"{known.__module__}:{known.__qualname__}":
            return known
    module_name, _, qualname = name.partition(":")
    if module_name.split(".")[0] == "adaattn" and qualname.isidentifier():
        try:
            found = getattr(importlib.import_module(module_name), qualname, None)
        except ImportError:
            found = None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise CheckpointError(
        f"holds a {name}, which is no class of this package; pass it to adaattn.load(classes=[…]), or export with "
        "package.module:factory and --weights"
    )
