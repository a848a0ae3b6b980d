"""What the .json files of an export hold. They may come from elsewhere, or be changed: readers check them first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from adaattn.errors import ConfigError
from adaattn.export.folder import MARKER, read_json

NUMBER = (int, float, None)  # None for NaN and Inf, which JSON lacks
MANIFEST = {"files": {str: {"bytes": int, "sha256": str}}}
REPORT = {
    "model": {"source": str, "class": str, "dtype": str, "parameters": NUMBER},
    "inputs": {str: str},
    "dims": {str: str},
    "opset": int,
    "layers": [
        {
            "name": str,
            "tolerance": NUMBER,
            "head_dim": int,
            "precision": [str],
            "rank": [NUMBER],
            "predicted": [NUMBER],
            "measured": [NUMBER],
        }
    ],
    "tokens": {str: (int, None)},
    "calibration": (
        None,
        {
            "batches": int,
            "residue": NUMBER,
            "layers": [{"name": str, "tokens": NUMBER, "ranks": [NUMBER], "beyond": [[NUMBER]]}],
            "refused": {str: str},
        },
    ),
}
"""The part of report.json that stays true wherever the artifacts run."""


def mismatch(value: Any, schema: Any, at: str = "it") -> str | None:
    """Return where a value departs from a schema, or None.

    A schema is a type, None, a tuple of schemas of which one must fit, [schema] for a list, {str: schema} for a mapping
    with any names, or a dictionary of the names that must be there.

    Example:
        >>> mismatch({"files": {"a": 1}}, {"files": {str: str}})
        'files.a is a int'
    """
    if isinstance(schema, tuple):
        found = [mismatch(value, each, at) for each in schema]
        return None if None in found else found[-1]
    if isinstance(schema, list) and isinstance(value, list):
        items = (mismatch(item, schema[0], f"{at}[{place}]") for place, item in enumerate(value))
        return next(filter(None, items), None)
    if isinstance(schema, dict) and isinstance(value, Mapping):
        keys = value if str in schema else schema
        prefix = "" if at == "it" else f"{at}."
        missing = (f"{prefix}{key} is missing" for key in keys if key not in value)
        parts = (mismatch(value[key], schema.get(str, schema.get(key)), f"{prefix}{key}") for key in keys)
        return next(missing, None) or next(filter(None, parts), None)
    # A boolean is an int in Python, not in a file.
    fits = value is None if schema is None else isinstance(schema, type) and type(value) is schema
    return None if fits else f"{at} is a {type(value).__name__}"


def read(path: Path, schema: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what a .json file of an export holds.

    Raises:
        ConfigError: there is no such file, or it does not hold what the schema says.
    """
    found = read_json(path)
    wrong = mismatch(found, schema)
    if wrong is not None:
        raise ConfigError(f"{path} is not what adaattn-export wrote: {wrong}")
    return found


def manifest_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the files of an export as its manifest lists them, by their paths in the folder.

    Raises:
        ConfigError: there is no manifest, or it is not one, or it lists files outside the folder.
    """
    if not (folder / MARKER).is_file():
        raise ConfigError(f"{folder} holds no {MARKER}; give a folder that adaattn-export made")
    files: dict[str, dict[str, Any]] = read(folder / MARKER, MANIFEST)["files"]
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ConfigError(f"{folder / MARKER} is not what adaattn-export wrote: {name} is outside the folder")
    return files
