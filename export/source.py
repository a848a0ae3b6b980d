"""Where a model comes from: a file, a factory with weights, a folder of transformers, or, with permission, a pickle."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.export import ExportedProgram

import adaattn.ops  # noqa: F401  a program that uses the ops loads only when they are registered
from adaattn.checkpoint import assign_weights, from_payload, is_payload
from adaattn.errors import AdaAttnError, CheckpointError, ConfigError
from adaattn.input_spec import Dimension, InputSpec

EXPECTED = (
    "give a model.pt saved by adaattn.save, a .pt2 program, package.module:factory, or hf:FOLDER of Hugging Face "
    "transformers"
)
PICKLE_DANGER = (
    "is a pickled module; loading it runs whatever code it carries. Pass --allow-pickle if you trust its origin, "
    "or save it with adaattn.save, or as weights for package.module:factory"
)
# How torch.save began before it wrote zip files; other pickles come from pickle.dump.
LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


@dataclass(frozen=True)
class Source:
    """A loaded model and what its file says about its inputs."""

    model: nn.Module | ExportedProgram
    inputs: tuple[InputSpec, ...] = ()
    dims: tuple[Dimension, ...] = ()


def load(model: str, weights: str | None = None, allow_pickle: bool = False) -> Source:
    """The model that a command line names.

    Args:
        model: a file, package.module:factory, or hf:FOLDER.
        weights: state dict for a factory, .safetensors or .pt.
        allow_pickle: whether a pickled module may run its code.

    Raises:
        CheckpointError: the file is missing, damaged, or no model.
        ConfigError: arguments that do not go together, or a factory that does not work.
    """
    path = Path(model)
    if model.startswith("hf:") and not path.exists():
        from adaattn.export import huggingface

        if weights is not None:
            raise ConfigError(f"--weights goes with package.module:factory; {model} has weights of its own")
        return huggingface.load(Path(model.removeprefix("hf:")), allow_pickle)
    if ":" in model and not path.exists():
        return Source(_from_factory(model, weights))
    if weights is not None:
        raise ConfigError(f"--weights goes with package.module:factory; {model} has weights of its own")
    if not path.exists():
        raise CheckpointError(f"{model} does not exist; {EXPECTED}")
    if path.is_dir():
        raise CheckpointError(f"{model or 'MODEL'} is a folder; {EXPECTED}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{model} is empty; {EXPECTED}")
    return _from_program(path) if _is_program(path) else _from_saved(path, allow_pickle)


def _is_program(path: Path) -> bool:
    if path.suffix == ".pt2":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("archive_format") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _from_program(path: Path) -> Source:
    try:
        return Source(torch.export.load(path))
    except Exception as error:  # whatever a damaged archive raises, it means this
        raise CheckpointError(
            f"{path} is not a program saved by torch.export.save: it is damaged, of another kind or version, or uses "
            "operators of a package that is not imported; save it again, or see why with -v"
        ) from error


def _from_saved(path: Path, allow_pickle: bool) -> Source:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error) or not _looks_pickled(path):
            raise CheckpointError(f"{path} is not a model: it is damaged or of another kind; {EXPECTED}") from error
        if not allow_pickle:
            raise CheckpointError(f"{path} {PICKLE_DANGER}") from None
        loaded = _unpickle(path)
    except Exception as error:  # torch.load has no error of its own
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript program, which torch.export cannot capture; {EXPECTED} of the model itself"
            ) from error
        raise CheckpointError(f"{path} is not a model: it is damaged or of another kind; {EXPECTED}") from error
    if is_payload(loaded):
        checkpoint = from_payload(loaded, path)
        return Source(checkpoint.module, checkpoint.inputs, checkpoint.dims)
    if isinstance(loaded, nn.Module):
        return Source(loaded)
    if isinstance(loaded, dict) and loaded and all(isinstance(x, torch.Tensor) for x in loaded.values()):
        raise CheckpointError(f"{path} holds weights without a model; use package.module:factory --weights {path}")
    raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a model; {EXPECTED}")


def _looks_pickled(path: Path) -> bool:
    """Whether there is a pickle to speak of: torch's zip with one in it, or the bytes that one starts with."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    with path.open("rb") as stream:
        start = stream.read(2)
        return start[:1] == b"\x80" and start[1:] in (b"\2", b"\3", b"\4", b"\5")  # protocol


def _unpickle(path: Path) -> object:
    sys.path.insert(0, os.getcwd())  # a pickle names its classes as the script that made it saw them
    try:
        with path.open("rb") as stream:
            of_torch = zipfile.is_zipfile(path) or stream.read(len(LEGACY_START)) == LEGACY_START
        if of_torch:
            return torch.load(path, map_location="cpu", weights_only=False)
        with path.open("rb") as stream:
            return pickle.load(stream)
    except (Exception, SystemExit) as error:  # the user's own code
        raise CheckpointError(f"{path} cannot be unpickled: {_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())


def _from_factory(name: str, weights: str | None) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ConfigError(f"{name} is no file that exists, and not of the form package.module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        if isinstance(factory, nn.Module):
            raise ConfigError(f"{name} is a {type(factory).__name__}; name a function that returns it")
        model = factory()
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name}: no module named {error.name!r}; run where it lies, or install it") from error
    except AttributeError as error:
        raise ConfigError(f"{name}: {_line(error)}") from error
    except AdaAttnError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code
        raise ConfigError(f"{name} raised {type(error).__name__}: {_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned a {type(model).__name__}; it must return an nn.Module")
    model = cast(nn.Module, getattr(model, "_orig_mod", model))  # what torch.compile wraps takes inputs by their names
    if weights is not None:
        _load_weights(model, Path(weights), name)
    return model


def _load_weights(model: nn.Module, path: Path, name: str) -> None:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; --weights takes a state dict, .safetensors or .pt")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # neither format has an error of its own
        raise CheckpointError(
            f"{path} is not a file of weights: it is damaged or of another kind; give a state dict, .safetensors or .pt"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not weights by name; give a state dict")
    _fill_shared(model, state)
    try:
        assign_weights(model, state, name)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error


def _fill_shared(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give parameters that are one tensor in the model all their names: safetensors keeps only one of them."""
    names: dict[int, list[str]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        names.setdefault(id(x), []).append(name)
    for same in names.values():
        known = [state[name] for name in same if name in state]
        if known:
            state |= {name: known[0] for name in same if name not in state}


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
