"""An engine's description chooses nothing that runs: no package, no library, no file outside its folder."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from adaattn.errors import ConfigError, TargetError
from adaattn.export.cli.run import main
from adaattn.export.engines import description
from adaattn.export.engines.description import profile_of, read_engine_info
from adaattn.export.engines.load import open_engine
from adaattn.export.parity.golden_case import GoldenCase
from adaattn.export.runtime import open_runtime
from adaattn.export.verification import backends, verify
from adaattn.system import cuda_driver
from tests.support.engine_files import described

LOADED = "the library is loaded"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an engine, where a stand-in for TensorRT says what it is asked to load."""

    class Registry:
        def load_library(self, library: str) -> None:
            raise RuntimeError(f"{LOADED}: {library}")

    stand_in = ModuleType("tensorrt")
    stand_in.__spec__ = ModuleSpec("tensorrt", None)
    stand_in.get_plugin_registry = Registry
    stand_in.Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    stand_in.Runtime = lambda logger: type("Runtime", (), {"deserialize_cuda_engine": lambda self, content: object()})()
    stand_in.Refitter = stand_in.OnnxParserRefitter = None
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    monkeypatch.setattr(cuda_driver, "capability", lambda: 90)
    (tmp_path / "tensorrt.engine").write_bytes(b"engine")
    return tmp_path / "tensorrt.engine"


def describe(file: Path, content: Any) -> None:
    description.sidecar(file).write_text(content if isinstance(content, str) else json.dumps(content))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the way to each part of a description."""
    if path:
        yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*path, key))


def changed(path: tuple[Any, ...], value: Any) -> Any:
    about = copy.deepcopy(described(versions={"tensorrt": "10"}, options={**described()["options"], "workspace": 5}))
    part = about
    for key in path[:-1]:
        part = part[key]
    if value is KeyError:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return about


@pytest.mark.parametrize("path", list(places(described())), ids=str)
def test_a_description_with_a_part_of_another_type_is_refused(path: tuple[Any, ...], file: Path) -> None:
    """Each part in turn becomes each type that JSON has; what still reads is of the right type."""
    describe(file, described())
    read_engine_info(file)
    refused = 0
    for value in (KeyError, None, True, -1, 1e9, float("nan"), "text", [], {}, [[]], [None], {"a": None}, 10**400):
        describe(file, changed(path, value))
        try:
            found = read_engine_info(file)
        except ConfigError:
            refused += 1
            continue
        assert found.package == "tensorrt"
        if found.profiles:
            profile_of(found.profiles, {})
    assert refused >= 8 - 2 * (path[0] in ("ops", "profiles", "compute_capabilities"))


def test_what_is_no_description_is_refused(file: Path) -> None:
    for text in ("", "{", "[]", "null", '"text"', "1", "{}", "\x00", "[" * 100_000):
        describe(file, text)
        with pytest.raises(ConfigError, match="is not what adaattn-export wrote"):
            read_engine_info(file)
    description.sidecar(file).write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="is not what adaattn-export wrote"):
        read_engine_info(file)
    description.sidecar(file).unlink()
    description.sidecar(file).mkdir()
    with pytest.raises(ConfigError, match=r"has no .* beside it"):
        read_engine_info(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"package": "planted"},
        {"target": "planted", "package": "planted"},
        {"package": "planted", "versions": {"planted": "1", "tensorrt": "1"}},
        {"target": "tensorrt-rtx"},
        {"package": "os"},
        {"package": "tensorrt.planted"},
    ],
    ids=str,
)
def test_a_description_does_not_choose_what_is_imported(
    changes: dict[str, object], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    describe(file, {**described(), **changes})
    (case,) = [GoldenCase("case", {"x": np.zeros((1, 8), np.float32)}, {}, {})]
    for read in (
        lambda: open_engine(file),
        lambda: open_runtime(file),
        lambda: backends.engine_backend(file, tmp_path / "log"),
        lambda: verify._served(file, [case]),
    ):
        with pytest.raises(ConfigError, match="is not what adaattn-export wrote: target is"):
            read()
    assert "planted" not in sys.modules


NATIVE = {"plugins": "native", "plugin_library": "libadaattn_plugins.so"}


def test_a_description_does_not_choose_which_library_is_loaded(file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.so"
    mine.touch()
    for named in ("libadaattn_plugins.so", "/tmp/evil.so", "../evil.so", str(mine)):
        describe(file, described(options={**described()["options"], **NATIVE, "plugin_library": named}))
        with pytest.raises(ConfigError, match=rf"plugins of {named}.*its code: name the one that you trust"):
            open_runtime(file)
        with pytest.raises(ConfigError, match="name the one that you trust"):
            backends.engine_backend(file, tmp_path / "log")
        with pytest.raises(RuntimeError, match=f"{LOADED}: {mine}"):
            open_runtime(file, plugin_library=mine)
    result = CliRunner().invoke(main, [str(file)])
    assert result.exit_code == 2
    assert "with --plugin-library" in result.output
    result = CliRunner().invoke(main, [str(file), "--plugin-library", str(mine)])
    assert LOADED in f"{result.output}{result.exception}"
    with pytest.raises(ConfigError, match=r"none\.so does not exist; adaattn-plugins build makes it"):
        open_runtime(file, plugin_library=tmp_path / "none.so")
    # Without the option that asks for it, a name loads nothing, and no export writes it.
    describe(file, described(options={**described()["options"], "plugin_library": str(mine)}))
    with pytest.raises(ConfigError, match="plugin_library go together"):
        open_engine(file, mine)
    describe(file, described())
    open_engine(file)
    with pytest.raises(ConfigError, match="was built without a plugin library"):
        open_engine(file, mine)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ConfigError, match="plugin_library is for engines"):
        open_runtime(tmp_path / "model.onnx", plugin_library=mine)


def test_weights_come_from_the_engine_s_own_folder(file: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}.onnx"
    outside.touch()
    (tmp_path / "link.onnx").symlink_to(outside)
    for model in (str(outside), f"../{outside.name}", "a/../../x.onnx", "link.onnx", "/etc/passwd"):
        describe(file, described(model=model, options={**described()["options"], "strip_weights": True}))
        with pytest.raises(ConfigError, match="which is outside its folder"):
            open_engine(file)
    describe(file, described(options={**described()["options"], "strip_weights": True}))
    with pytest.raises(TargetError, match=r"takes them from .*model\.onnx, which is not there"):
        open_engine(file)
