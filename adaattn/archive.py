"""Check files of torch.save before torch reads them: torch itself verifies no checksum."""

from __future__ import annotations

import os
import pickle
import pickletools
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from adaattn.errors import CheckpointError

DAMAGED = "is damaged or of another kind"
CODE = "holds objects that only code can make"
# How torch.save began before it wrote zip files: the first of five pickles, before the numbers.
LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
LARGEST_PICKLE = 2**24  # bytes, of names and shapes alone: the numbers of each weight are a record of its own
LARGEST_EXPANDED = 2**26  # bytes that tensors may take beyond the storages that they repeat
# What torch allows in a pickle of weights, by the bytes that name it there.
REFUSED = {
    b"_codecs\nencode\n": DAMAGED,  # weights need neither; a call makes much of few bytes, or takes very long
    b"\nbytearray\n": DAMAGED,
    b"_rebuild_meta_tensor_no_storage\n": "holds tensors without numbers, of the meta device; save it when it has some",
    b"_rebuild_sparse_tensor\n": "holds sparse tensors; save them after .to_dense()",
    b"_rebuild_nested_tensor\n": "holds nested tensors; save them padded, by torch.nested.to_padded_tensor",
    b"_rebuild_qtensor\n": "holds quantized tensors; save them after .dequantize()",
}
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
        self._refused: str | None = None
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":
                with _opened(file) as archive:
                    self._records = _check_kind(archive)
                    check_zip(archive, file)
                    name = next(name for name in self._records if name.endswith("data.pkl"))
                    pickled = archive.read(name)
                    if len(pickled) > LARGEST_PICKLE:
                        self._refused = f"{DAMAGED}: its pickle has {len(pickled)} bytes"
                    for call, predicate in REFUSED.items():
                        self._refused = predicate if call in pickled else self._refused

    @property
    def is_torch(self) -> bool:
        """Whether torch.save wrote it, and not pickle.dump."""
        with open(self.path, "rb") as file:
            return self._records is not None or file.read(len(LEGACY_START)) == LEGACY_START

    @cached_property
    def outline(self) -> Any:
        """What it holds, of tensors only the shapes and types: they are on the meta device."""
        return self._load("meta")

    def load(self) -> Any:
        """Return what it holds, read into memory.

        Raises:
            CarriesCodeError: it holds more than tensors, numbers and texts in lists and dicts.
            CheckpointError: it is damaged or of another kind; a predicate whose subject is the path.
        """
        return self._load("cpu")

    def _load(self, device: str) -> Any:
        try:
            if self._refused is not None:
                if torch.serialization.get_unsafe_globals_in_checkpoint(self.path):
                    raise CarriesCodeError(CODE)
                raise CheckpointError(self._refused)
            content = torch.load(self.path, map_location=device, weights_only=True, mmap=False)
            self._check_sizes(content, device == "meta")
        except pickle.UnpicklingError as error:
            if "GLOBAL" in str(error) or self._calls():
                raise CarriesCodeError(CODE) from error
            raise CheckpointError(DAMAGED) from error
        except CheckpointError:
            raise
        except Exception as error:  # torch.load has no error class: a damaged file may raise any
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
        """Refuse tensors that are larger than the file: they would take memory that the file does not justify."""
        storages: dict[int, int] = {}
        expanded = 0
        for place, x in enumerate(_tensors(content)):
            if x.layout is not torch.strided or x.is_nested or (x.is_meta and not meta):
                continue  # of older files; they have no storage
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

    def _calls(self) -> bool:
        """Return whether it is a whole pickle that calls something by the opcodes of newer protocols."""
        if self._records is not None:
            return False
        found = False
        try:
            with open(self.path, "rb") as file:
                for code, _, _ in pickletools.genops(file):
                    found = found or code.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "INST", "GLOBAL")
        except Exception:  # pickletools has no error class either
            return False
        return found


def _tensors(content: Any) -> Iterator[Tensor]:
    """Return the tensors of a state dict, or of one within a dict."""
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
    """Return the sizes of its records by their names, if they are those of torch.save."""
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
