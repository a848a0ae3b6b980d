"""What is written appears whole, and what --force replaces was written by an export.

One file, though long: each row of its tables damages the same export in one way.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx
import pytest

import adaattn
from adaattn.calibration.state_file import write as write_statistics
from adaattn.errors import ConfigError
from adaattn.export.artifacts import folder
from adaattn.export.artifacts import manifest as manifest_module
from adaattn.export.artifacts.manifest import versions
from adaattn.export.onnx.inline_weights import inline_weights
from adaattn.system import atomic_file

FILES = {"model.onnx": "a model", "triton/model/1/model.onnx": "a model", "report.json": "{}"}


def fill(place: Path, text: str = "") -> Path:
    """Write what an export writes, as far as a folder is judged by it."""
    for name, content in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content + text)
    manifest_module.write_manifest(place, {"versions": versions(), "command": text, "verdict": "passed"})
    return place


def export(
    out: Path,
    force: bool = False,
    text: str = "new",
    reads: tuple[Path, ...] = (),
    during: Callable[[], object] = lambda: None,
) -> folder.Staging:
    with folder.staging(out, force, reads) as made:
        fill(made.folder, text)
        during()
    return made


def held_by(place: Path) -> dict[str, object]:
    """All that is in a folder."""
    return {
        path.relative_to(place).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else stat.S_IFMT(path.stat().st_mode)
        for path in sorted(place.rglob("*"))
    }


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def no_renameat2(*arguments: object) -> None:
    raise OSError(errno.EINVAL, "no such flag here")


@pytest.fixture(params=["exchanged in one step", "moved in two steps"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to replace a folder; the second is for file systems that cannot exchange."""
    if request.param == "moved in two steps":
        monkeypatch.setattr(atomic_file, "_renameat2", no_renameat2)


def manifest(**changes: object) -> Callable[[Path], object]:
    def change(out: Path) -> None:
        content = json.loads((out / "manifest.json").read_text())
        (out / "manifest.json").write_text(json.dumps(content | changes))

    return change


def replaced_by_text(text: str | bytes) -> Callable[[Path], object]:
    return lambda out: (out / "manifest.json").write_bytes(text.encode() if isinstance(text, str) else text)


def linked(name: str) -> Callable[[Path], object]:
    def change(out: Path) -> None:
        (out / name).rename(out.parent / "elsewhere")
        (out / name).symlink_to(out.parent / "elsewhere")

    return change


def fifo(out: Path) -> None:
    (out / "manifest.json").unlink()
    os.mkfifo(out / "manifest.json")


NOT_ALL_OURS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file beside": (lambda out: (out / "notes.txt").touch(), "notes.txt"),
    "a hidden file": (lambda out: (out / ".env").touch(), ".env"),
    "a file in a folder below": (lambda out: (out / "triton" / "model" / "2").touch(), "triton/model/2"),
    "an empty folder": (lambda out: (out / "cache").mkdir(), "cache"),
    "a copy of the model in ONNX Runtime's form": (lambda out: (out / "model.trt.onnx").touch(), "model.trt.onnx"),
    "a file that was changed": (lambda out: (out / "model.onnx").write_text("mine   "), "model.onnx"),
    "a file that was made longer": (lambda out: (out / "model.onnx").write_text("a much longer model"), "model.onnx"),
    "a link for a file": (linked("model.onnx"), "model.onnx"),
    "a link for a folder": (linked("triton"), "triton"),
    "a folder for a file": (
        lambda out: ((out / "report.json").unlink(), (out / "report.json").mkdir()),
        "report.json",
    ),
    "a link for the manifest": (linked("manifest.json"), "manifest.json"),
    "a pipe for the manifest": (fifo, "manifest.json"),
    "a web app's manifest": (replaced_by_text('{"name": "shop", "icons": []}'), "manifest.json"),
    "an empty manifest": (replaced_by_text("{}"), "manifest.json"),
    "a list for a manifest": (replaced_by_text("[]"), "manifest.json"),
    "a word for a manifest": (replaced_by_text('"files"'), "manifest.json"),
    "a manifest that is cut off": (replaced_by_text('{"format": "adaattn-export", "ver'), "manifest.json"),
    "a manifest in no encoding": (replaced_by_text(b"\xff\xfe\x00{"), "manifest.json"),
    "a manifest without end": (replaced_by_text("[" * 100_000), "manifest.json"),
    "a manifest of another program": (manifest(format="webpack"), "manifest.json"),
    "a manifest of a later version": (manifest(version=2), "manifest.json"),
    "a manifest whose files are a list": (manifest(files=["model.onnx"]), "manifest.json"),
    "a manifest without hashes": (manifest(files={"model.onnx": {"sha256": None}}), "manifest.json"),
    "a manifest that lists nothing": (manifest(files={}), "model.onnx"),
    "a manifest that lists what is outside": (manifest(files={"../mine": {"sha256": "0" * 64}}), "model.onnx"),
}


@pytest.mark.parametrize("name", NOT_ALL_OURS)
def test_force_refuses_a_folder_that_is_not_all_of_an_export(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    out = fill(tmp_path / "out")
    change, said = NOT_ALL_OURS[name]
    change(out)
    before = held_by(tmp_path)
    with pytest.raises(ConfigError, match=rf"{said}.*--force would delete it"):
        export(out, force=True)
    assert held_by(tmp_path) == before


@pytest.mark.usefixtures("swap")
@pytest.mark.parametrize("change", [lambda out: None, lambda out: (out / "report.json").unlink()])
def test_force_replaces_an_export_of_this_and_of_earlier_versions(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    out = fill(tmp_path / "out")
    change(out)
    export(out, force=True, text="second")
    content = json.loads((out / "manifest.json").read_text())
    assert (content["format"], content["version"]) == ("adaattn-export", 1)
    del content["format"], content["version"]  # as it was before they were written
    (out / "manifest.json").write_text(json.dumps(content))
    export(out, force=True, text="third")
    assert (out / "model.onnx").read_text() == "a modelthird"
    assert os.listdir(tmp_path) == ["out"]


def test_force_refuses_a_folder_that_the_export_reads_or_works_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = fill(tmp_path / "out")
    (tmp_path / "link").symlink_to(out / "model.onnx")
    for read in (out / "model.onnx", out, tmp_path / "link", Path("out/triton/../model.onnx")):
        with pytest.raises(ConfigError, match="which this export reads"):
            export(out, force=True, reads=(read,))
    for place in (out, out / "triton" / "model"):
        monkeypatch.chdir(place)
        with pytest.raises(ConfigError, match="holds the current folder"):
            export(out, force=True)
        with pytest.raises(ConfigError, match="holds the current folder"):
            export(tmp_path, force=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").symlink_to(tmp_path)  # a link does not hide it
    with pytest.raises(ConfigError, match="holds the current folder"):
        export(tmp_path / "home", force=True)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConfigError, match="loop of links"):
        export(tmp_path / "a" / "out")


@pytest.mark.usefixtures("swap")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda out: (out.mkdir(), (out / "mine").touch()),
        lambda out: out.write_text("mine"),
        lambda out: (out.with_name("there").mkdir(), out.symlink_to("there")),
    ],
    ids=["a folder", "a file", "a link"],
)
def test_what_appears_during_an_export_is_left_alone(
    force: bool, make: Callable[[Path], object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made: dict[str, object] = {}

    def during() -> None:
        make(out)
        made.update({name: x for name, x in held_by(tmp_path).items() if not name.startswith(".")})

    with pytest.raises(ConfigError):
        export(out, force, during=during)
    assert made
    assert held_by(tmp_path) == made


@pytest.mark.usefixtures("swap")
def test_an_empty_folder_is_used_unless_it_appears_during_the_export(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="appeared during the export"):
        export(out, during=out.mkdir)
    assert os.listdir(out) == []
    out.chmod(0o700)
    export(out)
    assert (out / "model.onnx").exists()
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


@pytest.mark.usefixtures("swap")
def test_an_export_that_changes_during_another_one_is_judged_again(tmp_path: Path) -> None:
    out = fill(tmp_path / "out")
    with pytest.raises(ConfigError, match="holds mine"):
        export(out, force=True, during=(out / "mine").touch)
    (out / "mine").unlink()
    export(out, force=True, text="later", during=lambda: export(out, force=True, text="sooner"))
    assert (out / "model.onnx").read_text() == "a modellater"
    with pytest.raises(ConfigError, match="exists"):
        export(tmp_path / "new", during=lambda: export(tmp_path / "new"))
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]


@pytest.mark.usefixtures("swap")
def test_a_file_that_appears_between_the_check_and_the_move_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, exchange = fill(tmp_path / "out"), atomic_file.exchange
    before = held_by(out)

    def late(new: Path, place: Path) -> None:
        if not (place / "mine").exists() and not (new / "mine").exists():
            (place / "mine").write_text("mine")
        exchange(new, place)

    monkeypatch.setattr(atomic_file, "exchange", late)
    with pytest.raises(ConfigError, match="changed while it was being replaced; nothing was written"):
        export(out, force=True)
    assert held_by(out) == before | {"mine": b"mine"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("swap")
def test_a_folder_that_cannot_be_moved_in_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = fill(tmp_path / "out"), os.rename
    before = held_by(out)

    def refuse_the_new(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        rename(source, target)

    def refused(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "scratch")

    if atomic_file._renameat2 is not no_renameat2:
        monkeypatch.setattr(atomic_file, "_renameat2", refused)
    monkeypatch.setattr(os, "rename", refuse_the_new)
    with pytest.raises(PermissionError) as caught:
        export(out, force=True)
    assert caught.value.filename == str(out)
    assert held_by(out) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("swap")
def test_an_old_folder_that_cannot_be_deleted_is_a_warning_and_is_swept_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = fill(tmp_path / "out")
    with monkeypatch.context() as patched:

        def refuse(path: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        patched.setattr("shutil.rmtree", refuse)
        made = export(out, force=True)
    assert (out / "model.onnx").read_text() == "a modelnew"
    assert made.leftover is not None
    assert made.leftover.parent == tmp_path
    assert (made.leftover / "new" / "model.onnx").read_text() == "a model"
    export(tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from adaattn.system import atomic_file
from adaattn.export.artifacts import folder

def no_renameat2(*arguments):
    raise OSError(22, "no such flag here")

atomic_file._renameat2 = no_renameat2
rename, count = os.rename, iter(range(9))

def killed(source, target):
    if next(count) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.rename = killed
with folder.staging(Path("out"), True) as made:
    (made.folder / "manifest.json").write_text("new")
"""


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_kill_in_the_middle_of_a_move_in_two_steps_is_mended_by_the_next_run(step: int, tmp_path: Path) -> None:
    out = fill(tmp_path / "out")
    before = held_by(out)
    done = subprocess.run([sys.executable, "-c", KILLED, str(step)], check=False)
    assert done.returncode == (-9 if step < 3 else 0)
    assert out.exists() == (step != 1)  # the one moment that the docstring of `exchange` names
    export(tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]
    assert held_by(out) == (before if step < 2 else {"manifest.json": b"new"})


def test_scratch_folders_are_swept_when_their_process_is_gone_and_only_then(tmp_path: Path) -> None:
    code = (
        "import os; from adaattn.system.atomic_file import _make; from pathlib import Path; made, _ = _make(Path())\n"
    )
    code += "(made / 'x').write_text('half'); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    (stale,) = tmp_path.glob(".adaattn-*")
    (tmp_path / ".adaattn-mine").mkdir()
    (tmp_path / ".adaattn-mine" / "mine").touch()  # without a lock it was not made here
    (tmp_path / ".adaattn-link").symlink_to(tmp_path / ".adaattn-mine")
    (tmp_path / ".adaattn-file").touch()
    (tmp_path / ".adaattn-empty").mkdir()  # what a kill right after mkdir leaves
    with atomic_file.scratch_folder(tmp_path) as running:
        assert not stale.exists()
        atomic_file.sweep(tmp_path)
        names = {".adaattn-mine", ".adaattn-link", ".adaattn-file"}
        assert set(os.listdir(tmp_path)) == {running.name, *names}
        assert stat.S_IMODE(running.stat().st_mode) == 0o700
    assert set(os.listdir(tmp_path)) == names


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def save_model(path: Path) -> None:
    adaattn.save(adaattn.DenseAttention(8, 2), path)


def save_embedded(path: Path) -> None:
    """Return the model's weights move from their file into it."""
    data = path.with_name("weights")
    data.write_bytes(bytes(4000))
    weights = onnx.TensorProto(name="w", data_type=1, dims=[1000], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "weights"), ("offset", "0"), ("length", "4000")):
        weights.external_data.add(key=key, value=value)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [weights]))
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "wb") as file:
        file.write(model.SerializeToString())
    inline_weights(path, data)


WRITERS: dict[str, Callable[[Path], object]] = {
    "adaattn.save": save_model,
    "calibration": lambda path: write_statistics(path, 1, "weights", {}, {}),
    "embed": save_embedded,
    "write": lambda path: atomic_file.write(path, b"content"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_keep_their_permissions_and_new_ones_respect_the_umask(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for mask, expected in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        with umask(mask):
            WRITERS[name](path)
            assert stat.S_IMODE(path.stat().st_mode) == expected
        path.unlink()
    for mode in (0o600, 0o640, 0o666, 0o444, 0o755):
        path.write_text("old")
        path.chmod(mode)
        WRITERS[name](path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert path.read_bytes() != b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_folders_respect_the_umask_and_keep_their_permissions(tmp_path: Path) -> None:
    for mask, expected in ((0o022, 0o755), (0o077, 0o700), (0o002, 0o775)):
        with umask(mask):
            export(tmp_path / f"{mask}")
        assert stat.S_IMODE((tmp_path / f"{mask}").stat().st_mode) == expected
        (tmp_path / f"{mask}").chmod(0o750)
        export(tmp_path / f"{mask}", force=True)
        assert stat.S_IMODE((tmp_path / f"{mask}").stat().st_mode) == 0o750


@pytest.mark.parametrize("name", WRITERS)
def test_no_planted_name_or_link_leads_a_file_elsewhere(name: str, tmp_path: Path) -> None:
    """What stands at names that a writer might use for its temporary file stays as it is."""
    (tmp_path / "victim").write_text("mine")
    planted = (".file.new", "file.new", ".file.tmp", "file.whole", ".file", ".adaattn-file")
    for each in planted:
        (tmp_path / each).symlink_to("victim")
    WRITERS[name](tmp_path / "file")
    assert (tmp_path / "victim").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == sorted(["file", "victim", *planted])


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_stays_a_link_and_the_file_behind_it_is_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "file").symlink_to("disk/file")  # to nothing yet
    (tmp_path / "again").symlink_to("file")
    for _ in range(2):
        WRITERS[name](tmp_path / "again")
        assert (tmp_path / "file").is_symlink()
        assert not (tmp_path / "disk" / "file").is_symlink()
        assert (tmp_path / "disk" / "file").stat().st_size
    assert os.listdir(tmp_path / "disk") == ["file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make links of somebody else")
def test_a_link_of_somebody_else_in_a_shared_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    tmp_path.chmod(0o1777)
    (tmp_path / "file").symlink_to("victim")
    os.lchown(tmp_path / "file", 12345, 12345)
    with pytest.raises(ConfigError, match="is a link that somebody else made"):
        atomic_file.write(tmp_path / "file", b"content")
    assert (tmp_path / "victim").read_text() == "mine"


def test_folders_devices_and_loops_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "folder", tmp_path / "pipe", tmp_path / "loop", Path("/dev/null")):
        with pytest.raises(ConfigError, match="cannot be written"):
            atomic_file.write(path, b"content")
    with pytest.raises(FileNotFoundError) as caught:
        atomic_file.write(tmp_path / "none" / "file", b"content")
    assert caught.value.filename == str(tmp_path / "none" / "file")
    assert sorted(os.listdir(tmp_path)) == ["folder", "loop", "pipe"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with suppress(RuntimeError), atomic_file.replacing(tmp_path / "file") as file:
        file.write(b"half")
        raise RuntimeError("no more")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
