"""Define what the .json files of an export hold, and check it: they may come from elsewhere or be changed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from adaattn.errors import ConfigError
from adaattn.export.artifacts.files import read_checked, sha256

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


def manifest_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the files of an export as its manifest lists them, by their paths in the folder.

    Raises:
        ConfigError: there is no manifest, or it is not one, or it lists files outside the folder.
    """
    if not (folder / MARKER).is_file():
        raise ConfigError(f"{folder} holds no {MARKER}; give a folder that adaattn-export made")
    files: dict[str, dict[str, Any]] = read_checked(folder / MARKER, MANIFEST)["files"]
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ConfigError(f"{folder / MARKER} is not what adaattn-export wrote: {name} is outside the folder")
    return files


def refuse_to_overwrite(folder: Path, output: Path | None) -> None:
    """Refuse an output file that is a file of the export itself.

    Raises:
        ConfigError: it is one.
    """
    if output is None or not (folder / MARKER).is_file():
        return
    for name in (MARKER, *manifest_files(folder)):
        if os.path.realpath(output) == os.path.realpath(folder / name):
            raise ConfigError(f"{output} is a file of the export in {folder}; give another file")


MARKER = "manifest.json"  # names every other file of an export, with its hash
FORMAT, VERSION = "adaattn-export", 1
BEFORE_FORMAT = {"files", "versions", "command", "verdict"}  # all that manifests held before they named their format

PACKAGES = (
    *("adaattn", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt", "tensorrt-rtx-cu13", "transformers"),
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of each installed package."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_exported(folder: Path, name: str) -> Path:
    """Return the path of a file that says what is right. One that was changed since the export proves nothing.

    Raises:
        ConfigError: it is not the file that was exported.
    """
    files, path = manifest_files(folder), folder / name
    if path.is_file() and sha256(path) != files.get(name, {}).get("sha256"):
        raise ConfigError(f"{path} is not the file that was exported; export the model again, or restore the file")
    return path


def changed_files(folder: Path) -> list[str]:
    """Return a line for each file that is not the one which was exported."""
    lines = []
    for name, about in manifest_files(folder).items():
        if not (folder / name).is_file():
            lines.append(f"{name} is missing")
        elif sha256(folder / name) != about["sha256"]:
            lines.append(f"{name} is not the file that was exported")
    return lines


def write_manifest(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the manifest: hashes of all files, versions and command."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "files": files,
        "versions": report["versions"],
        "command": report["command"],
        "verdict": report["verdict"],
    }
    (folder / MARKER).write_text(json.dumps(content, indent=1) + "\n")
