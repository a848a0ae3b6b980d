"""Read single files of an export, and check what they hold."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaattn.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a .json file that an export wrote.

    Raises:
        ConfigError: there is no such file, or it is cut off, or no export wrote it.
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


def sha256(file: Path) -> str:
    """Return the hash of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def read_checked(path: Path, schema: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what a .json file of an export holds.

    Raises:
        ConfigError: there is no such file, or it does not hold what the schema says.
    """
    found = read_json(path)
    wrong = mismatch(found, schema)
    if wrong is not None:
        raise ConfigError(f"{path} is not what adaattn-export wrote: {wrong}")
    return found


def plain(value: Any) -> Any:
    """Return the value with None for NaN and Inf, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
