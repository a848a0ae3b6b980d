"""Load sample data for `--samples`: an .npz of inputs, or batches from a user's function."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from adaattn.errors import ConfigError
from adaattn.export.artifacts.arrays import UNREADABLE

BATCH = 16  # samples of an .npz at a time
EXPECTED = (
    "give an .npz of arrays by the names of the inputs, or FILE.py or package.module:function that yields batches"
)


def batches(source: str) -> Iterable[Any]:
    """Return the batches that a command line names.

    Args:
        source: an .npz with an array (samples, ...) for each input, which come BATCH at a time; a Python file with a
            function `batches`; or package.module:function. Functions take no arguments and yield what
            `adaattn.calibrate` takes.

    Raises:
        ConfigError: there is no such file or function, or it is not what it should be.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return _from_arrays(path)
    if path.suffix == ".py":
        if not path.is_file():
            raise ConfigError(f"{source} does not exist; {EXPECTED}")
        with _importing(path.parent):
            try:
                function = runpy.run_path(source).get("batches")
            except (Exception, SystemExit) as error:  # the user's own code
                raise _failure(source, error) from error
        if not callable(function):
            raise ConfigError(f"{source} has no function batches; {EXPECTED}")
        return _made(source, function)
    if ":" not in source:
        raise ConfigError(f"{source!r} is not sample data; {EXPECTED}")
    return _made(source, _imported(source, EXPECTED))


def function_of(source: str) -> Callable[..., Any]:
    """Return the function that a command line names as package.module:function.

    Raises:
        ConfigError: there is no such function.
    """
    wanted = "give a function as package.module:function"
    if ":" not in source:
        raise ConfigError(f"{source!r} is not a function; {wanted}")
    found = _imported(source, wanted)
    if not callable(found):
        raise ConfigError(f"{source} is a {type(found).__name__}; {wanted}")
    return cast(Callable[..., Any], found)


def _imported(source: str, wanted: str) -> Any:
    module, _, name = source.partition(":")
    with _importing(Path()):  # as python -m does: modules of the current folder
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{source} cannot be imported: {error}; {wanted}") from error
        except (Exception, SystemExit) as error:
            raise _failure(source, error) from error


@contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """Put the folder on Python's path, as for a script in it."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def _failure(source: str, error: BaseException) -> ConfigError:
    said = "it ends the program" if isinstance(error, SystemExit) else str(error)
    return ConfigError(f"{source} fails: {type(error).__name__}: {said}")


def _made(source: str, function: Any) -> Iterable[Any]:
    try:
        found = function()
    except (Exception, SystemExit) as error:
        raise _failure(source, error) from error
    if not isinstance(found, Iterable):
        raise ConfigError(f"{source} returns a {type(found).__name__}; it must yield batches")
    return _each(source, found)


def _each(source: str, batches: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except (Exception, SystemExit) as error:
        raise _failure(source, error) from error


def _from_arrays(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    try:
        if not path.is_file():
            raise FileNotFoundError("it is not a file")  # a pipe or a device could be read without an end
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except UNREADABLE as error:
        raise ConfigError(f"{path} cannot be read ({error}); {EXPECTED}") from error
    counts = {name: len(x) if x.ndim else 0 for name, x in arrays.items()}
    if len(set(counts.values())) != 1 or not next(iter(counts.values())):
        sizes = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConfigError(f"{path} needs as many samples of each input, and at least one; it has {sizes or 'none'}")
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    return (
        {name: x[start : start + BATCH] for name, x in tensors.items()}
        for start in range(0, max(counts.values()), BATCH)
    )
