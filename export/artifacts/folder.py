"""Write the output folder whole, or leave it as it was. --force replaces only what an export wrote."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adaattn.errors import ConfigError
from adaattn.export.artifacts.files import sha256, utf8
from adaattn.export.artifacts.manifest import BEFORE_FORMAT, FORMAT, MARKER, VERSION
from adaattn.system import atomic_file
from adaattn.system.interrupts import held, surely

ADVICE = "move it elsewhere, delete the folder yourself, or give another folder"

Snapshot = Mapping[str, tuple[int, ...]]
"""For each path in a folder what changes when the file changes."""


@dataclass
class Staging:
    """An output folder in the making.

    Args:
        folder: where to write the artifacts.
        leftover: what is left of the folder that was replaced, where it could not be deleted.
    """

    folder: Path
    leftover: Path | None = None


def model_name(source: str) -> str:
    """Return a name for the artifacts of a model, which is a file, `module:factory` or a class.

    Example:
        >>> model_name("a/model.pt"), model_name("shop.models:ranker"), model_name("hf:a/minilm")
        ('model', 'ranker', 'minilm')
    """
    if source.startswith("hf:") and not Path(source).exists():
        return Path(source.removeprefix("hf:")).resolve().name  # a folder's dots are no suffix
    return source.rpartition(":")[2] if ":" in source and not Path(source).exists() else Path(source).stem


def check_output(out: Path, force: bool, reads: Sequence[Path] = ()) -> Snapshot | None:
    """Return what the folder holds, None where there is no such folder.

    Args:
        force: whether the folder may be replaced if an export made it.
        reads: files and folders that the export reads.

    Raises:
        ConfigError: the folder cannot be written, or must not be replaced.
    """
    utf8(out.absolute())
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; give a folder for the artifacts")
    try:
        place = out.resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{out} is a loop of links; give a folder for the artifacts") from error
    if not place.exists():
        return None
    if os.path.ismount(place) or _current_folder().is_relative_to(place):
        raise ConfigError(
            f"{out} is a mount point, or holds the current folder, and cannot be replaced; give a folder in it"
        )
    for read in reads:
        if read.resolve().is_relative_to(place):
            raise ConfigError(f"{out} holds {read}, which this export reads; give another folder")
    found = snapshot(place)
    if found:
        if not force:
            raise ConfigError(f"{out} exists; choose another folder, or replace it with --force")
        _refuse_what_no_export_wrote(out, place, found)
    return found


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it was deleted
        return Path(os.sep)


def snapshot(folder: Path) -> Snapshot:
    """Return for each path in a folder, links not followed, what changes when the file changes."""
    found = {}
    for parent, names, files in os.walk(folder, onerror=_raise):
        for name in (*names, *files):
            path = Path(parent, name)
            x = path.lstat()
            found[path.relative_to(folder).as_posix()] = (
                *(x.st_mode, x.st_dev, x.st_ino, x.st_size, x.st_mtime_ns, x.st_ctime_ns),
            )
    return found


def _raise(error: OSError) -> None:
    raise error


def _refuse_what_no_export_wrote(out: Path, place: Path, found: Snapshot) -> None:
    """Raise ConfigError unless every file in the folder is as its export wrote it.

    Args:
        out: the folder's name for messages.
    """
    written = _files_of(out, place, found)
    folders = {parent.as_posix() for name in written for parent in Path(name).parents}
    device = place.stat().st_dev
    foreign = [
        name
        for name, (mode, on, *_) in found.items()
        if on != device or not (name in folders if stat.S_ISDIR(mode) else name in written and stat.S_ISREG(mode))
    ]
    if foreign:
        files = [name for name in foreign if not stat.S_ISDIR(found[name][0])] or foreign
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise ConfigError(
            f"{out} holds {', '.join(files[:3])}{more}, which no export wrote there, "
            f"and --force would delete it; {ADVICE}"
        )
    for name, digest in written.items():
        if name in found and name != MARKER and sha256(place / name) != digest:
            raise ConfigError(
                f"{out} holds {name}, which was changed after its export, and --force would delete it; {ADVICE}"
            )


def _files_of(out: Path, place: Path, found: Snapshot) -> dict[str, str]:
    """Return the hashes of the files that an export wrote into a folder, by their names."""
    refusal = f"{out} was not made by an export, and --force would delete it; give another folder"
    if MARKER not in found or not stat.S_ISREG(found[MARKER][0]):
        raise ConfigError(f"{out} holds no {MARKER}: {refusal}")
    try:
        content = json.loads((place / MARKER).read_text())
        named = content.get("format") == FORMAT and content.get("version") == VERSION
        if not named and not (content.keys() == BEFORE_FORMAT and "adaattn" in content["versions"]):
            raise TypeError
        files = {str(name): about["sha256"] for name, about in content["files"].items()}
        if not all(isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) for x in files.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{out}/{MARKER} is not that of an export: {refusal}") from error
    return {MARKER: "", **files}


@contextmanager
def staging(
    out: Path,
    force: bool,
    reads: Sequence[Path] = (),
    on_written: Callable[[], None] = lambda: None,
) -> Iterator[Staging]:
    """Yield a temporary folder beside the output, moved into its place at the end and deleted on any failure.

    An error or a signal leaves the folder as it was until it is in its place, and nothing undoes it afterwards.

    Args:
        out, force, reads: as of `check`, which is called at the start and again right before the move.
        on_written: called once the folder is in its place, before any signal is heard again.

    Raises:
        ConfigError: the folder cannot be written or must not be replaced, at the start or when all is done.
    """
    with _alone(out.absolute().parent):
        seen = check_output(out, force, reads)
    name, out = out, out.resolve()  # where it is a link, what it leads to is replaced
    missing = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    with ExitStack() as stack:
        undo = stack.enter_context(ExitStack())
        undo.callback(surely, lambda: _remove_empty(missing))
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            shell = stack.enter_context(atomic_file.scratch_folder(out.parent))
        except OSError as error:
            raise ConfigError(f"{name} cannot be made: {error.strerror}; give another folder") from error
        made = Staging(shell / "new")
        made.folder.mkdir()  # with the permissions that the umask leaves
        yield made
        atomic_file.sweep(made.folder)  # of a builder that crashed
        atomic_file.sync(made.folder)
        with _alone(out.parent), held():
            replaced = _move(made.folder, name, out, seen, force, reads)
            undo.pop_all()
            on_written()
            if replaced:
                try:
                    atomic_file.remove(made.folder)
                except OSError:
                    made.leftover = shell


def _move(new: Path, name: Path, out: Path, seen: Snapshot | None, force: bool, reads: Sequence[Path]) -> bool:
    """Move the new folder to its place; return whether the old one is now in the place of the new one."""
    now = snapshot(out) if out.is_dir() else None
    if now != seen:  # another export may have made it meanwhile, or anybody else
        now = check_output(out, force, reads)
    try:
        if now is None or (seen is None and not now):
            atomic_file.rename_new(new, out)
            return False
        mode = stat.S_IMODE(out.stat().st_mode)  # it keeps what the user has chosen
        new.chmod(mode | stat.S_IRWXU)
        if now:
            atomic_file.exchange(new, out)
            if snapshot(new) != now:
                atomic_file.exchange(new, out)
                raise ConfigError(f"{name} was changed while it was being replaced; nothing was written")
        else:
            os.rename(new, out)  # it fails where the folder is no longer empty
        if mode != mode | stat.S_IRWXU:
            out.chmod(mode)
        return bool(now)
    except FileExistsError as error:
        raise ConfigError(f"{name} appeared during the export; give another folder") from error
    except OSError as error:
        error.filename, error.filename2 = str(name), None  # the user knows no scratch folder
        raise


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Keep other exports from moving folders in `parent`, where there is one and its file system has locks."""
    with ExitStack() as stack:
        if sys.platform != "win32":
            import fcntl

            with suppress(OSError):
                lock = os.open(parent, os.O_RDONLY)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # never made, or another process uses it
            folder.rmdir()
