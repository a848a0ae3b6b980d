"""Load a model from a file, a factory with weights, a folder of transformers or, with permission, a pickle."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

import adaattn.ops  # noqa: F401  a program that uses the ops loads only when they are registered
from adaattn import archive, checkpoint
from adaattn.errors import AdaAttnError, CheckpointError, ConfigError
from adaattn.export.sources.source import EXPECTED, Source, unwrapped, usable

PICKLE_DANGER = (
    "is a pickled module; loading it runs whatever code it carries. Pass --allow-pickle if you trust its origin, "
    "or save it with adaattn.save, or as weights for package.module:factory"
)
# torch.export.load unpickles example inputs, constants and some weights without limits and has no option to limit it;
# it also evaluates the text of sizes, and what it loads runs the text of guards.
PROGRAM_DANGER = (
    "is a .pt2 program, which torch can only load by running code that the file carries; nothing of it has been read. "
    "Pass --allow-pickle if you trust its origin, or export the model that it was made of"
)
WEIGHTS = "give a state dict, .safetensors or .pt"


def load(model: str, weights: str | None = None, allow_pickle: bool = False) -> Source:
    """Return the model that a command line names.

    Args:
        model: a file, package.module:factory, or hf:FOLDER.
        weights: state dict for a factory, .safetensors or .pt.
        allow_pickle: whether a pickled module may run its code.

    Raises:
        CheckpointError: the file is missing, damaged, or no model.
        ConfigError: arguments that do not go together, or a factory that does not work.
    """
    path = Path(model)
    there = os.path.lexists(model)
    if model.startswith("hf:") and not there:
        from adaattn.export.sources import huggingface

        if weights is not None:
            raise ConfigError(f"--weights goes with package.module:factory; {model} has its own weights")
        return huggingface.load(Path(model.removeprefix("hf:")), allow_pickle)
    if ":" in model and not there:
        return Source(_from_factory(model, weights))
    if weights is not None:
        raise ConfigError(f"--weights goes with package.module:factory; {model} has its own weights")
    try:
        size = archive.regular(path).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{model} does not exist; {EXPECTED}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{model or 'MODEL'} {error}; {EXPECTED}") from error
    if size == 0:
        raise CheckpointError(f"{model} is empty; {EXPECTED}")
    return _from_program(path, allow_pickle) if path.suffix == ".pt2" else _from_saved(path, allow_pickle)


def _from_program(path: Path, allow_pickle: bool) -> Source:
    if not allow_pickle:
        raise CheckpointError(f"{path} {PROGRAM_DANGER}")
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as records:
            _check_program(records)
            archive.check_zip(records, file)
        return Source(torch.export.load(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # whatever a damaged archive raises, it means this
        raise CheckpointError(
            f"{path} is not a program saved by torch.export.save: it is damaged, of another kind or version, or uses "
            "operators of a package that is not imported; save it again, or see why with -v"
        ) from error


def _check_program(records: zipfile.ZipFile) -> None:
    """Refuse programs that torch loads, but not as they were saved.

    Raises:
        CheckpointError: a predicate whose subject is the path.
    """
    inside = {name.partition("/")[2]: name for name in records.namelist()}
    programs = [name[7:-5] for name in inside if name.startswith("models/") and name.endswith(".json")]
    if programs != ["model"] and "serialized_exported_program.json" not in records.namelist():
        if not programs:
            raise CheckpointError("holds no program of torch.export.save, or a damaged one")
        raise CheckpointError(f"holds the programs {', '.join(programs)}; save one alone, by torch.export.save")
    if any(name.startswith("data/aotinductor/") for name in inside):
        raise CheckpointError("holds a library that AOTInductor compiled; save the program alone, by torch.export.save")
    for kind in ("weights", "constants"):
        config = inside.get(f"data/{kind}/model_{kind}_config.json")
        for name, entry in json.loads(records.read(config))["config"].items() if config else ():
            record = inside.get(f"data/{kind}/{entry['path_name']}")
            sizes = [size.get("as_int") for size in (entry["tensor_meta"] or {}).get("sizes", ())]
            # torch fills a weight whose record is empty with zeros.
            if record is None or (records.getinfo(record).file_size == 0 and 0 not in sizes):
                raise CheckpointError(f"is damaged or was saved without numbers: those of {name} are missing")


def _from_saved(path: Path, allow_pickle: bool) -> Source:
    try:
        file = archive.SavedFile(path)
        loaded = file.outline
        if checkpoint.is_payload(loaded):
            try:
                saved = checkpoint.from_file(file)
            except CheckpointError as error:
                raise CheckpointError(f"{path} {error}") from error
            return Source(saved.module, saved.inputs, saved.dims)
    except archive.CarriesCodeError:
        if not allow_pickle:
            raise CheckpointError(f"{path} {PICKLE_DANGER}") from None
        loaded = _unpickle(file)
    except CheckpointError as error:
        if str(error).startswith(str(path)):
            raise
        raise CheckpointError(f"{path} is not a model: it {error}; {EXPECTED}") from error
    if isinstance(loaded, nn.Module):
        return Source(cast(nn.Module, usable(loaded)))
    if isinstance(loaded, dict) and loaded and all(isinstance(x, torch.Tensor) for x in loaded.values()):
        raise CheckpointError(f"{path} holds weights without a model; use package.module:factory --weights {path}")
    raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a model; {EXPECTED}")


def _unpickle(file: archive.SavedFile) -> object:
    sys.path.insert(0, os.getcwd())  # a pickle names its classes as the script that made it saw them
    try:
        if file.is_torch:
            return torch.load(file.path, map_location="cpu", weights_only=False)
        with file.path.open("rb") as stream:
            return pickle.load(stream)
    except (Exception, SystemExit) as error:  # the user's own code
        raise CheckpointError(f"{file.path} cannot be unpickled: {_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())


def _from_factory(name: str, weights: str | None) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    hint = ""
    if (path := Path(module_name)).suffix == ".py":
        hint = f"; a function of that file is named {'.'.join(path.with_suffix('').parts)}:{attribute or 'FUNCTION'}"
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ConfigError(f"{name} is neither an existing file nor of the form package.module:factory{hint}")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        factory = getattr(module, attribute, None)
        if factory is None:
            raise ConfigError(f"{name}: module {module_name!r} has no attribute {attribute!r}")
        if isinstance(factory, nn.Module):
            raise ConfigError(f"{name} is a {type(factory).__name__}; name a function that returns it")
        model = factory()
    except ModuleNotFoundError as error:
        if error.name is None:  # raised by the user's own code, or on a relative import
            raise ConfigError(f"{name} raised ModuleNotFoundError: {_line(error)}") from error
        missing = f"no module named {error.name!r}{hint or '; run where it lies, or install it'}"
        if not f"{module_name}.".startswith(f"{error.name}."):
            missing = f"it imports what is missing: {missing}"
        raise ConfigError(f"{name}: {missing}") from error
    except AdaAttnError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code
        raise ConfigError(f"{name} raised {type(error).__name__}: {_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned a {type(model).__name__}; it must return an nn.Module")
    if weights is not None:
        _load_weights(model, Path(weights), name)
    return cast(nn.Module, usable(model))


def _load_weights(wrapped: nn.Module, path: Path, name: str) -> None:
    model = cast(nn.Module, unwrapped(wrapped))
    try:
        state = _read_weights(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; --weights takes a state dict, .safetensors or .pt") from None
    except archive.CarriesCodeError as error:
        raise CheckpointError(f"{path} {error}, not weights alone; {WEIGHTS}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a file of weights: it {error}; {WEIGHTS}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not weights by name; give a state dict")
    if model is not wrapped and all(isinstance(key, str) for key in state):
        prefix = next(name for name, module in wrapped.named_modules() if module is model)
        consume_prefix_in_state_dict_if_present(state, f"{prefix}.")
    try:
        checkpoint.assign_weights(model, state, name)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error


def _read_weights(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return archive.SavedFile(path).load()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    archive.regular(path)
    try:
        return load_file(path, backend="pread")  # mapped, it would crash the process when someone truncates it
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(archive.DAMAGED) from error


def _line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else line[:297] + "..."
