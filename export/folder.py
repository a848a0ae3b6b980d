"""The output folder: whole, or as it was before."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adaattn.errors import ConfigError

MARKER = "manifest.json"  # a folder that holds one was written by an export


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """A single file, in the same manner.

    Raises:
        ConfigError: the path is a folder or a device, which must not be replaced.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} cannot be written: it is a folder or a device; give a file")
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(content)
        new.replace(path)
    except OSError as error:
        error.filename = str(path)  # of the two names the one that was asked for
        raise
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """What an export wrote into a .json file.

    Raises:
        ConfigError: there is no such file, or it is cut off or none of ours.
    """
    if not path.is_file():  # a pipe or a device could be read without an end
        raise ConfigError(f"{path} does not exist")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not what adaattn-export wrote: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not what adaattn-export wrote: it holds a {type(found).__name__}")
    return found


def utf8(path: Path) -> str:
    """Return a path as the packages in C++ take it: in UTF-8, whatever the locale says.

    Raises:
        ConfigError: its bytes are not UTF-8.
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a name in UTF-8, as onnx needs it; rename it, or give another") from error


def model_name(source: str) -> str:
    """A name for what is made of a model, which is a file, `module:factory` or a class.

    Example:
        >>> model_name("a/model.pt"), model_name("shop.models:ranker"), model_name("hf:a/minilm")
        ('model', 'ranker', 'minilm')
    """
    if source.startswith("hf:") and not Path(source).exists():
        return Path(source.removeprefix("hf:")).resolve().name  # a folder's dots are no suffix
    return source.rpartition(":")[2] if ":" in source and not Path(source).exists() else Path(source).stem


def check(out: Path, force: bool) -> None:
    """Raises ConfigError where the folder cannot be written, or must not be replaced."""
    utf8(out.absolute())
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; give a folder for the artifacts")
    if not out.exists():
        return
    if os.path.ismount(out) or out.samefile(Path.cwd()):
        raise ConfigError(f"{out} is a mount point or the current folder and cannot be replaced; give a folder in it")
    if any(out.iterdir()):
        if not force:
            raise ConfigError(f"{out} exists; choose another folder, or replace it with --force")
        if not (out / MARKER).exists():
            raise ConfigError(f"{out} holds no {MARKER}: it was not made by an export, and --force would delete it")


@contextmanager
def staging(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside the output, moved into its place at the end and deleted on any failure."""
    out = out.resolve()  # where it is a link, what it leads to is replaced
    parent = out.parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{out.name}."))
    except OSError as error:
        _remove_empty(missing)
        raise ConfigError(f"{out} cannot be made: {error.strerror}; give another folder") from error
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp keeps it from others
        if force and out.exists():
            old = Path(tempfile.mkdtemp(dir=parent, prefix=f".{out.name}.old."))
            os.replace(out, old)
            try:
                os.replace(folder, out)
            except BaseException:
                os.replace(old, out)
                raise
            shutil.rmtree(old)
        else:
            os.replace(folder, out)  # onto nothing, or an empty folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(missing)
        raise


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # never made, or another process uses it
            folder.rmdir()
