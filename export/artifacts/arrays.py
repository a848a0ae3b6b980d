"""Read and write arrays of NumPy as .npz files."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from adaattn.errors import ConfigError

Array: TypeAlias = np.ndarray[Any, Any]
UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, MemoryError, OverflowError, RuntimeError),
    *(NotImplementedError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, struct.error),
)
"""What numpy and zipfile raise for a damaged .npy or .npz."""


def save_arrays(file: Path | IO[bytes], arrays: Mapping[str, Array]) -> None:
    """Write an .npz of arrays; numpy.savez takes names such as `file` for its own arguments."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, x in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asanyarray(x), allow_pickle=False)


def load_arrays(path: Path, what: str) -> dict[str, Array]:
    """Read what `save_arrays` wrote.

    Raises:
        ConfigError: there is no such file, or it holds no arrays; it says that it should hold `what`.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError("it is not a file")  # a pipe or a device could be read without an end
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except UNREADABLE as error:
        raise ConfigError(
            f"{path} holds no {what} ({error}); it is cut off, or the export was made with --no-verify"
        ) from error
    if not arrays:
        raise ConfigError(f"{path} holds no {what}: it is empty")
    return arrays
