"""Write files and folders that appear whole or not at all; everything that is written for a user is written here.

A new file or folder is made in a scratch folder beside its place, `.adaattn-…`, and moved when it is complete. The
scratch folder is readable by its owner only and holds a file that its process keeps locked. The lock is gone when the
process is gone, however it ended; the next run then deletes what it finds.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adaattn.errors import ConfigError
from adaattn.system.interrupts import held, surely

if sys.platform != "win32":
    import fcntl

PREFIX = ".adaattn-"
LOCK = "lock"
OLD = "old"  # in a scratch folder: what was moved away from the place that the lock file names
_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2
_AT_FDCWD = -100


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file, which appears whole or not at all; see `replacing`."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its place when the block has ended, and is deleted if the block fails.

    A file that is replaced hands on its permissions; a new one gets those that the umask leaves. Where the path is a
    link, the file that it leads to is replaced. In a folder that everybody may write to, a link that somebody else made
    is refused, as Linux does for sticky folders.

    Raises:
        ConfigError: the path is a folder or a device, or a link that is not followed.
        OSError: the file cannot be written; its `filename` is the path.
    """
    try:
        place = _followed(path)
        mode = stat.S_IMODE(place.stat().st_mode) & 0o777 if place.exists() else None
        with scratch_folder(place.parent) as folder:
            new = folder / "new"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
            with open(os.open(new, flags, 0o666 if mode is None else mode), "wb") as file:
                yield file
                file.flush()
                if mode is not None:
                    new.chmod(mode)  # the umask does not apply to permissions that the user has chosen
                # Without it a power cut after the move could leave an empty file where there was a good one.
                os.fsync(file.fileno())
            with held():
                os.replace(new, place)
    except OSError as error:
        if error.filename is None or PREFIX in str(error.filename):
            error.filename, error.filename2 = str(path), None  # the user knows no scratch folder
        raise


def _followed(path: Path) -> Path:
    """Return the file that a path leads to, following links."""
    for _ in range(40):  # as many links as Linux follows
        try:
            found = path.lstat()
        except FileNotFoundError:
            return path
        if not stat.S_ISLNK(found.st_mode):
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{path} cannot be written: it is a folder or a device; give a file")
            return path
        parent = path.parent.stat()
        if parent.st_mode & stat.S_IWOTH and found.st_uid not in (_user(), parent.st_uid):
            raise ConfigError(f"{path} is a link that somebody else made in a folder that everybody may write to")
        path = path.parent / os.readlink(path)
    raise ConfigError(f"{path} cannot be written: it is a loop of links")


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a private folder, which is deleted at the end; delete those of runs that were killed.

    Args:
        parent: the folder to make it in. [default: that of temporary files]
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    sweep(parent)
    made: list[tuple[Path, int]] = []

    def clean_up() -> None:
        for folder, lock in made:
            with suppress(OSError):
                _remove(folder)
            os.close(lock)
        made.clear()

    try:
        with held():
            made.append(_make(parent))
        yield made[0][0]
    finally:
        surely(clean_up)


def sweep(parent: Path) -> None:
    """Delete scratch folders in `parent` whose process has ended, and put back a folder that it had moved away.

    Folders of other users, folders whose process runs, and folders on file systems without locks are left alone.
    """
    if sys.platform == "win32":  # it has no such locks
        return
    found = []
    with suppress(OSError), os.scandir(parent) as entries:
        found = [Path(entry) for entry in entries if entry.name.startswith(PREFIX)]
    for folder in found:
        with suppress(OSError):  # another process deletes it, or this file system has no locks
            about = folder.lstat()
            if stat.S_ISDIR(about.st_mode) and about.st_uid == _user():
                _sweep(folder)


def _sweep(folder: Path) -> None:
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        folder.rmdir()  # killed before it had a lock, or after; only an empty folder goes
        return
    try:
        _take(lock)
        with held():
            place = folder.parent / os.fsdecode(os.read(lock, 4096))
            if (folder / OLD).exists() and place != folder.parent and not place.exists():
                os.rename(folder / OLD, place)
            _remove(folder)
    finally:
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    """Make a scratch folder and lock it."""
    for _ in range(100):
        folder = parent / (PREFIX + secrets.token_hex(8))
        folder.mkdir(0o700)
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
        except FileNotFoundError:  # another process found it without a lock and deleted it
            continue
        except OSError:
            folder.rmdir()
            raise
        try:
            _take(lock)
        except BlockingIOError:  # another process found it unlocked and is deleting it
            os.close(lock)
            continue
        except OSError:  # a file system without locks: nobody else can take it for a stale one
            return folder, lock
        if sys.platform == "win32" or os.fstat(lock).st_nlink:
            return folder, lock
        os.close(lock)
    raise ConfigError(f"{parent}: scratch folders vanish as soon as they are made; give another folder")


def _take(lock: int) -> None:
    if sys.platform != "win32":
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove(folder: Path) -> None:
    """Delete a scratch folder, the lock last: when this is cut short, the rest is still known to be one."""
    for entry in list(folder.iterdir()):
        if entry.name != LOCK:
            remove(entry)
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


def remove(path: Path) -> None:
    """Delete a file or a whole folder; links in it are deleted, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rename_new(source: Path, target: Path) -> None:
    """Move a folder to a place where there is nothing.

    Raises:
        FileExistsError: there is something.
    """
    try:
        _renameat2(source, target, _NOREPLACE)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise
        if target.is_symlink() or target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(source, target)  # a folder that appeared right now is replaced only if it is empty


def exchange(new: Path, place: Path) -> None:
    """Exchange a folder in a scratch folder with another one, in one step where the kernel and the file system can.

    Elsewhere it takes two: the old folder moves away, then the new one moves in. Signals wait. Only a process that is
    killed between the two, or a power cut, leaves nothing at `place`; the old folder is then in the scratch folder,
    and `sweep`, which every next run begins with, puts it back.
    """
    try:
        _renameat2(new, place, _EXCHANGE)
        return
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise
    folder = new.parent
    lock = os.open(folder / LOCK, os.O_RDWR)
    try:
        os.write(lock, os.fsencode(place.name))
        os.rename(place, folder / OLD)
        try:
            os.rename(new, place)
        except OSError:
            os.rename(folder / OLD, place)
            raise
        os.ftruncate(lock, 0)
        os.rename(folder / OLD, new)
    finally:
        os.close(lock)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(target))


def sync(folder: Path) -> None:
    """Bring all files of a folder onto the disk: an earlier folder is deleted in exchange for them."""
    for path in (folder, *folder.rglob("*")):
        if sys.platform != "win32" and (path.is_dir() or path.is_file()) and not path.is_symlink():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def _user() -> int:
    return os.geteuid() if sys.platform != "win32" else 0
