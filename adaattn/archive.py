"""Files of torch.save, checked before torch reads them: torch itself verifies no checksum."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from adaattn.errors import CheckpointError

DAMAGED = "is damaged or of another kind"
# How torch.save began before it wrote zip files: the first of five pickles, before the numbers.
LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
LARGEST_PICKLE = 2**25  # bytes; without numbers, which are records of their own, that is far over 100,000 weights
LARGEST_EXPANDED = 2**26  # bytes that tensors may take beyond the storages that they repeat
# torch allows them among weights, none of which need them; a call makes much of few bytes, or takes very long.
BARRED = {"_codecs encode", "builtins bytearray"}
BY_STACK = {"STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}  # how newer pickles name what they call
CHUNK = 2**20


class CarriesCodeError(CheckpointError):
    """The file is a pickle of more than tensors: reading it would run code."""


def regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the status of a file that can be read.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is a folder or a device, or cannot be read; a predicate whose subject is the path.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError("is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("is a device or a pipe, not a file")
        with open(path, "rb"):
            return status
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


class SavedFile:
    """A file of torch.save, with whole records.

    Args:
        path: of `torch.save`, its zip files and those of releases before 1.6.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged or of another kind; a predicate whose subject is the path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._status = regular(path)
        self._records: dict[str, int] | None = None
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":
                with _opened(file) as archive:
                    self._records = _check_kind(archive)
                    check_zip(archive, file)
                    name = next(name for name in self._records if name.endswith("data.pkl"))
                    if self._records[name] > LARGEST_PICKLE:
                        raise CheckpointError(f"{DAMAGED}: its pickle has {self._records[name]} bytes")
                    self.calls = _calls(io.BytesIO(archive.read(name)))
            else:
                file.seek(0)
                self.calls = _calls(file)

    @property
    def is_torch(self) -> bool:
        """Whether torch.save wrote it, and not pickle.dump."""
        with open(self.path, "rb") as file:
            return self._records is not None or file.read(len(LEGACY_START)) == LEGACY_START

    def load(self, meta: bool = False) -> Any:
        """Return what it holds, its numbers read into memory, or with meta only their shapes and types.

        Raises:
            CarriesCodeError: it holds more than tensors, numbers and texts in lists and dicts.
            CheckpointError: it is damaged or of another kind; a predicate whose subject is the path.
        """
        try:
            if self.calls & BARRED:
                raise CheckpointError(DAMAGED)
            content = torch.load(self.path, map_location="meta" if meta else "cpu", weights_only=True, mmap=False)
            self._check_sizes(content, meta)
        except pickle.UnpicklingError as error:
            if "GLOBAL" in str(error) or self.calls & BY_STACK:
                raise CarriesCodeError("holds objects that only code can make") from error
            raise CheckpointError(DAMAGED) from error
        except CheckpointError:
            raise
        except Exception as error:  # torch.load has no error of its own: whatever a damaged file raises, it means this
            raise CheckpointError(DAMAGED) from error
        self.check_unchanged()
        return content

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file is not the one that was checked."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise CheckpointError("was changed while it was read; try again") from error
        if any(getattr(now, part) != getattr(self._status, part) for part in ("st_ino", "st_size", "st_mtime_ns")):
            raise CheckpointError("was changed while it was read; try again")

    def _check_sizes(self, content: Any, meta: bool) -> None:
        """Refuse tensors that are larger than the file: they would need memory that nobody wrote."""
        storages: dict[int, int] = {}
        expanded = 0
        for place, x in enumerate(_tensors(content)):
            if x.layout is not torch.strided or x.is_nested or (x.device.type == "meta" and not meta):
                continue  # have no storage; no module takes them
            storage = x.untyped_storage()
            storages[place if meta else storage.data_ptr()] = storage.nbytes()
            expanded += max(0, x.numel() * x.element_size() - storage.nbytes())
        sizes = set(self._records.values()) if self._records is not None else None
        foreign = sizes is not None and not sizes.issuperset(size for size in storages.values() if size)
        # Of meta tensors torch does not say which share a storage.
        total = max(storages.values(), default=0) if meta else sum(storages.values())
        if foreign or total > self._status.st_size:
            raise CheckpointError(f"{DAMAGED}: it has tensors of other sizes than its records")
        if expanded > LARGEST_EXPANDED:
            raise CheckpointError(
                f"holds tensors that repeat few numbers over {expanded} bytes; save them after .contiguous()"
            )


def _tensors(content: Any) -> Iterator[Tensor]:
    """The tensors of a state dict, or of one within a dict."""
    if isinstance(content, dict):
        for value in content.values():
            for x in value.values() if isinstance(value, dict) else (value,):
                if isinstance(x, Tensor):
                    yield x


def _opened(file: IO[bytes]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(DAMAGED) from error


def _check_kind(archive: zipfile.ZipFile) -> dict[str, int]:
    """The sizes of its records by their names, if they are those of torch.save."""
    names = [name.rpartition("/")[2] for name in archive.namelist()]
    if "archive_format" in names or "serialized_exported_program.json" in names:
        raise CheckpointError("is a program saved by torch.export.save; give its name the ending .pt2")
    if "constants.pkl" in names:
        raise CheckpointError("is a TorchScript program, which torch.export cannot capture")
    if "data.pkl" not in names:
        raise CheckpointError(DAMAGED)
    return {info.filename: info.file_size for info in archive.infolist()}


def check_zip(archive: zipfile.ZipFile, file: IO[bytes]) -> None:
    """Read all of a zip file of torch, and compare each record with its checksum.

    Zip files say most things twice, and readers differ in whom they believe; in those that torch writes both agree, and
    no record is compressed.

    Raises:
        CheckpointError: one does not; a predicate whose subject is the path.
    """
    try:
        _check_records(archive, file)
    except (zipfile.BadZipFile, OSError, ValueError, struct.error) as error:
        raise CheckpointError(DAMAGED) from error


def _check_records(archive: zipfile.ZipFile, file: IO[bytes]) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(size - 22)
    end = file.read()
    if end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise CheckpointError("is damaged: bytes follow its end")
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if len({info.filename.lower() for info in infos}) != len(infos):
        raise CheckpointError("is damaged: it has records of one name")
    if not infos or infos[0].header_offset != 0:
        raise CheckpointError("is damaged: bytes precede its beginning")
    buffer = memoryview(bytearray(CHUNK))
    free = 0  # where a next record may begin
    for info in infos:
        name = repr(info.filename.rpartition("/")[2])
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"has a compressed record {name}, which torch never writes; save it again by torch itself"
            )
        file.seek(info.header_offset)
        sign, _, flags, method, _, checksum, *sizes, name_size, extra_size = struct.unpack("<4s3HI3I2H", file.read(30))
        # A zip64 record has its sizes elsewhere; one written as a stream has them, and the checksum, behind it.
        behind = flags & 8 and not checksum and set(sizes) <= {0, 0xFFFFFFFF}
        same = checksum == info.CRC and all(n in (info.file_size, 0xFFFFFFFF) for n in sizes)
        agrees = sign == b"PK\3\4" and flags == info.flag_bits and method == info.compress_type and (behind or same)
        if not agrees or info.file_size != info.compress_size or info.header_offset < free:
            raise CheckpointError(f"is damaged: its directory does not agree with its record {name}")
        if file.read(name_size) != info.orig_filename.encode("utf-8" if flags & 0x800 else "cp437"):
            raise CheckpointError(f"is damaged: its directory does not agree with its record {name}")
        file.seek(extra_size, os.SEEK_CUR)
        left, found = info.file_size, 0
        while left and (count := file.readinto(buffer[:left])):  # type: ignore[attr-defined]  # binary files have it
            left, found = left - count, zlib.crc32(buffer[:count], found)
        free = file.tell()
        if left or free > size or found != info.CRC:
            why = "it was saved without checksums, see torch.serialization.set_crc32_options" if not info.CRC else ""
            raise CheckpointError(f"is damaged: the checksum of its record {name} is wrong{why and '; or ' + why}")


def _calls(file: IO[bytes]) -> set[str]:
    """What the pickle at the beginning of a file names, such as "collections OrderedDict".

    Raises:
        CheckpointError: there is no whole pickle.
    """
    legacy = file.read(len(LEGACY_START)) == LEGACY_START
    file.seek(0)
    calls: set[str] = set()
    try:
        for _ in range(5 if legacy else 1):
            for code, argument, _ in pickletools.genops(file):
                if code.name in ("GLOBAL", "INST"):
                    calls.add(str(argument))
                elif code.name in BY_STACK:
                    calls.add(code.name)
    except Exception as error:  # pickletools has no error of its own either
        raise CheckpointError(DAMAGED) from error
    return calls
