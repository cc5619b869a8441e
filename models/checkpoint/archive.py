"""Check that torch.load can be given a file: its frame, zip or legacy, and the pickle within.

``torch.load(weights_only=True)`` calls no foreign code, but it believes what it reads: it unpacks a
compressed record of any size, reads records that overlap, and calls functions that fill memory.
Python's zip reader and torch's must find the same records, so the archive's form is fixed.
"""

import os
import pickletools
import struct
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import UnsafeFileError
from .checksum import COMMENT_BYTES, END_BYTES, END_MARK
from .numpy_scalars import DTYPE, SCALARS, NumberType

MAX_OPCODES = 1 << 20  # some 30 make a tensor and its place in a dict; one takes up to 216 bytes
MAX_DIRECTORY = 1 << 24  # bytes, some 100 per tensor
ZIP_START = b"PK\3\4"
# 64-bit end record (mark, extent, bytes and offset of the directory), its locator (mark, offset),
# end record (mark, bytes and offset of the directory, bytes of the comment)
END = struct.Struct("<4sQ28xQQ4s4xQ4x4s8xLLH")
END64_BYTES = END.size - END_BYTES
ENTRY = struct.Struct("<4s22xHH")  # in front of a record: mark, bytes of the name and of extras
# pickles of torch's magic number and of the version of its legacy format
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
LENGTH = 8  # bytes before each storage of the legacy format

STORAGES = {"torch.storage.UntypedStorage": 1} | {
    f"torch.{name}Storage": size
    for size, names in (
        (1, ("Byte", "Char", "Bool")),
        (2, ("Half", "BFloat16", "Short")),
        (4, ("Float", "Int")),
        (8, ("Double", "Long", "ComplexFloat")),
        (16, ("ComplexDouble",)),
    )
    for name in names
}
# what torch.save's pickles of dense tensors and plain values ask for, dtypes apart
GLOBALS = STORAGES.keys() | {
    "_codecs.encode",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}

Token = tuple[str, Any]  # name of an opcode, and the constant that it pushes or None
NONE: Token = ("NONE", None)
INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")
ENCODE: Token = ("GLOBAL", "_codecs.encode")
# bytes as text; other codecs import modules, or make more bytes than there were
ENCODE_CALL = ("BINUNICODE", ("BINUNICODE", "latin1"), "TUPLE2", "REDUCE")
NUMBER: Token = ("GLOBAL", DTYPE)
NUMBER_MADE: Token = ("REDUCE", DTYPE)
NUMBER_CALL = ("BINUNICODE", "", "", "TUPLE3", NUMBER_MADE)  # with two booleans or integers


def verify_archive(path: Path) -> None:
    """Check that a PyTorch file is what torch.save writes for tensors and plain values.

    It may ask for what ``torch.serialization.safe_globals`` allows, too.
    Takes memory in proportion to the pickle, and reads no tensor.

    Raises:
        UnsafeFileError: It asks for more; the message continues the file's name.
        ValueError, LookupError, zipfile.BadZipFile: It is damaged, or of another kind.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(len(LEGACY_START))
        if start.startswith(ZIP_START):
            _verify_zip(file, size)
        elif start == LEGACY_START:
            _verify_legacy(file, size)
        else:
            raise ValueError("unknown format")


def _verify_legacy(file: BinaryIO, size: int) -> None:
    """After the start: sizes of integers, content, keys of the storages, storages."""
    storages: dict[str, int] = {}

    def verify(key: str, length: int) -> None:
        if storages.setdefault(key, length) != length:
            raise ValueError(f"storage {key} has two sizes")

    for _ in range(2):
        _verify_pickle(file, verify)
    keys = {value for name, value in _tokens(file) if name == "BINUNICODE"}
    if keys != storages.keys():
        raise ValueError("its list of storages is wrong")
    if file.tell() + sum(storages.values()) + LENGTH * len(storages) != size:
        raise ValueError("its storages have another size")


def _verify_zip(file: BinaryIO, size: int) -> None:
    start = _directory_start(file, size)
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    prefix = infos[0].orig_filename.partition("/")[0]
    records: dict[str, tuple[int, int]] = {}  # offset and bytes; torch ignores the names' case
    bound = start
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        name = info.orig_filename
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UnsafeFileError(f"is refused: its record {name[:100]} is compressed")
        offset = _record_start(file, info)
        if offset + info.file_size > bound:
            raise UnsafeFileError(f"is refused: its record {name[:100]} overlaps another")
        if not name.isascii() or "\0" in name or name.lower() in records:
            raise UnsafeFileError(f"is refused: its record {name[:100]} has no name of its own")
        records[name.lower()] = offset, info.file_size
        bound = info.header_offset

    def verify(key: str, length: int) -> None:
        if records[f"{prefix}/data/{key}".lower()][1] != length:
            raise ValueError(f"storage {key} has another size")

    offset, length = records[f"{prefix}/data.pkl".lower()]
    file.seek(offset)
    _verify_pickle(BytesIO(file.read(length)), verify)


def _directory_start(file: BinaryIO, size: int) -> int:
    """Return the offset of the directory, which must end the file but for end records.

    Raises:
        ValueError: The file ends otherwise, or has a comment that is not a checksum.
    """
    for comment in (0, COMMENT_BYTES):
        file.seek(max(size - comment - END.size, 0))
        tail = file.read(END.size).rjust(END.size)
        mark64, extent, length64, start64, locator, place, *record = END.unpack(tail)
        mark, length, start, stated = record
        if mark != END_MARK or stated != comment:
            continue
        end = size - comment - END_BYTES
        if locator == b"PK\6\7":  # the numbers are in the record of 64 bits
            end -= END64_BYTES
            length, start = length64, start64
            if (mark64, extent, place) != (b"PK\6\6", 44, end):
                break
        if length > MAX_DIRECTORY:
            raise UnsafeFileError(f"is refused: its directory has {length} bytes")
        if start + length == end:
            return start
        break
    raise ValueError("its end is not that of an archive")


def _record_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return the offset of a record's bytes, which follow a header with its name."""
    file.seek(info.header_offset)
    mark, name, extra = ENTRY.unpack(file.read(ENTRY.size))
    if mark != ZIP_START or file.read(name) != info.orig_filename.encode():
        raise ValueError(f"record {info.orig_filename[:100]} has another name in its header")
    return info.header_offset + ENTRY.size + name + extra


def _verify_pickle(file: BinaryIO, verify: Callable[[str, int], None]) -> None:
    """Check the pickle at the file's position without running it.

    Args:
        file: Left behind the pickle.
        verify: Called with the key and the bytes of every storage, which is outside the pickle.
    """
    recent: deque[Token] = deque([NONE] * 8, maxlen=8)
    for token in _tokens(file):
        if token[0] == "BINPERSID":
            verify(*_storage(list(recent)))
        recent.append(token)


def _storage(tokens: list[Token]) -> tuple[str, int]:
    """Key and bytes of the storage that a tuple refers to; the tokens are those that make it."""
    # the legacy format adds a view, which torch.save leaves None
    del tokens[-2 if tokens[-2] == NONE else 0]
    names, (_, kind, storage, key, _, count, _) = zip(*tokens, strict=True)
    texts = ("BINUNICODE",) * 2
    if (
        names[:-2] + names[-1:] != ("MARK", "BINUNICODE", "GLOBAL", *texts, "TUPLE")
        or names[-2] not in INTEGERS
        or kind != "storage"
    ):
        raise UnsafeFileError("is refused: it refers to a storage as torch.save never does")
    return key, count * STORAGES[storage]


def _tokens(file: BinaryIO) -> Iterator[Token]:
    """Opcodes of one pickle, with constants looked up in its memo.

    Raises:
        UnsafeFileError: The pickle asks for a global that is not allowed, or is too long.
        ValueError: It is damaged.
    """
    allowed = GLOBALS | safe_names()
    calls = {ENCODE: ENCODE_CALL}
    if (NumberType, DTYPE) in torch.serialization.get_safe_globals():  # not NumPy's own
        calls[NUMBER] = NUMBER_CALL
    memo: dict[int, Token] = {}
    token, due = NONE, ()
    for number, (opcode, value, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if number == MAX_OPCODES:
            raise UnsafeFileError(f"is refused: its pickle has more than {MAX_OPCODES} opcodes")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = token
            continue
        if name == "PROTO":
            if value != 2:
                raise ValueError(f"pickle protocol {value}, not 2")
            continue
        if name == "GLOBAL":
            value = value.replace(" ", ".").replace("__builtin__.", "builtins.")
            if value not in allowed and not _is_dtype(value):
                raise UnsafeFileError(
                    f"is refused: it asks for {value}; a checkpoint may hold only tensors and "
                    f"plain values"
                )
        last = token
        if name in ("BINGET", "LONG_BINGET"):
            token = memo[value]
            if token[1] is None:  # not a constant
                token = (name, None)
        else:
            token = (name, value)
        if token in (NUMBER, NUMBER_MADE) and NUMBER in calls and last[1] not in SCALARS:
            raise UnsafeFileError(f"is refused: it asks for {DTYPE} outside of a scalar")
        if due[:1] == (NUMBER_MADE,) and name == "REDUCE":
            token = NUMBER_MADE
        if due and due[0] not in ("", token[0], token):
            called = DTYPE if due[-1] == NUMBER_MADE else ENCODE[1]
            raise UnsafeFileError(f"is refused: it calls {called} as torch.save never does")
        due = calls.get(token, due[1:])
        yield token


def safe_names() -> set[str]:
    """Return the names that ``torch.serialization.safe_globals`` allows at present."""
    return {
        f[1] if isinstance(f, tuple) else f"{f.__module__}.{f.__qualname__}"
        for f in torch.serialization.get_safe_globals()
    }


def _is_dtype(name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return owner == "torch" and isinstance(getattr(torch, last, None), torch.dtype)
