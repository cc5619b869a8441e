"""Whether torch.load may be given a file: its frame, a zip archive or torch's older format.

The reader of archives in torch takes what a directory says: it would unpack a compressed record of
any size, and records that lie over each other. It also does not look where Python's reader looks,
so the archive must be of a form that leaves no choice.
"""

import os
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from models.checkpoint.checksum import COMMENT_BYTES, END_BYTES, END_MARK
from models.checkpoint.pickled import DAMAGED, UnsafeFileError, follow, is_part

FREE_BYTES, SHARED = 1 << 24, 4  # all tensors may have so much, and so often the file's size
MAX_DIRECTORY = 1 << 24  # bytes, some 100 per tensor
ZIP_START = b"PK\3\4"
END = struct.Struct("<4s8xLLH")  # mark, bytes and offset of the directory, bytes of the comment
END64, LOCATOR = struct.Struct("<4sQ28xQQ"), struct.Struct("<4s4xQ4x")
ENTRY = struct.Struct("<4s22xHH")  # what stands before a record: mark, bytes of name and extra
# pickles of torch's magic number and of the version of its older format
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
LENGTH = 8  # bytes before each storage of the older format


def verify_archive(path: Path) -> None:
    """Check that a PyTorch file is what torch.save writes for tensors and plain values.

    Takes memory in proportion to the pickle, and reads no tensor.

    Raises:
        UnsafeFileError: It is not, or is damaged.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(len(LEGACY_START))
        if start.startswith(ZIP_START):
            _vet_zip(file, size)
        elif start == LEGACY_START:
            _vet_legacy(file, size)
        else:
            raise UnsafeFileError(DAMAGED)


def _vet_legacy(file: BinaryIO, size: int) -> None:
    """After the start: the machine's sizes, the content, the keys of storages, and these."""
    storages: dict[str, int] = {}

    def storage(key: str, count: int) -> None:
        if storages.setdefault(key, count) != count or count > size:
            raise UnsafeFileError("is damaged or cut short (a storage has a wrong size)")

    limit = FREE_BYTES + SHARED * size
    follow(file, size, limit, storage)
    follow(file, size, limit, storage)
    keys = follow(file, size, limit, storage)
    if not is_part(keys, "list") or sorted(map(str, keys.items)) != sorted(storages):
        raise UnsafeFileError(DAMAGED)
    if file.tell() + sum(storages.values()) + LENGTH * len(storages) != size:
        raise UnsafeFileError(
            "is damaged or cut short (its storages are not as long as they should be)"
        )


def _vet_zip(file: BinaryIO, size: int) -> None:
    start, end = _directory(file, size)
    if end - start > MAX_DIRECTORY:
        raise UnsafeFileError(f"is refused: its directory has {end - start} bytes")
    try:
        with zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            first = archive.infolist()[0].filename if infos else ""
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        raise UnsafeFileError(f"is damaged or cut short ({error})") from error
    prefix = first[: first.find("/") + 1]
    records: dict[str, tuple[int, int]] = {}  # begin and bytes
    bounds = [info.header_offset for info in infos[1:]] + [start]
    for info, bound in zip(infos, bounds, strict=True):
        name = info.orig_filename
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UnsafeFileError(f"is refused: its record {name[:100]} is compressed")
        if not prefix or not name.startswith(prefix) or not name.isascii() or "\0" in name:
            raise UnsafeFileError(DAMAGED)
        begin = _begin(file, info)
        key = name.removeprefix(prefix).lower()  # torch finds names whatever their case
        if begin + info.file_size > bound or key in records:
            raise UnsafeFileError(
                "is damaged or cut short (its records overlap, or are there twice)"
            )
        records[key] = begin, info.file_size
    if "constants.pkl" in records:
        raise UnsafeFileError("is refused: it is a TorchScript program, not a checkpoint")
    if "data.pkl" not in records:
        raise UnsafeFileError(DAMAGED)

    def storage(key: str, count: int) -> None:
        if records.get(f"data/{key}".lower(), (0, -1))[1] != count:
            raise UnsafeFileError("is damaged or cut short (a storage has a wrong size)")

    begin, length = records["data.pkl"]
    file.seek(begin)
    follow(BytesIO(file.read(length)), length, FREE_BYTES + SHARED * size, storage)


def _directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the directory of an archive begins and ends, if there is one way to see it.

    Raises:
        UnsafeFileError: The file does not end with the directory and its end records, or a seal.
    """
    for comment in (0, COMMENT_BYTES):
        end = size - comment - END_BYTES
        if end < 0:
            break
        file.seek(max(end - LOCATOR.size - END64.size, 0))
        tail = file.read(min(end, LOCATOR.size + END64.size) + END_BYTES)
        mark, length, start, stated = END.unpack(tail[-END_BYTES:])
        if mark != END_MARK or stated != comment:
            continue
        if len(tail) == LOCATOR.size + END64.size + END_BYTES:
            locator, place = LOCATOR.unpack_from(tail, END64.size)
            if locator == b"PK\6\7":  # the numbers are in another record, of 64 bits
                end -= LOCATOR.size + END64.size
                mark, extent, length, start = END64.unpack_from(tail)
                if mark != b"PK\6\6" or place != end or extent != END64.size - 12:
                    break
        if start + length == end:
            return start, end
        break
    raise UnsafeFileError("is damaged or cut short (it does not end as an archive does)")


def _begin(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: after a header, which must bear its name."""
    file.seek(info.header_offset)
    mark, name, extra = ENTRY.unpack(file.read(ENTRY.size).ljust(ENTRY.size))
    if mark != ZIP_START or file.read(name) != info.orig_filename.encode():
        raise UnsafeFileError("is damaged or cut short (its directory and its records differ)")
    return info.header_offset + ENTRY.size + name + extra
