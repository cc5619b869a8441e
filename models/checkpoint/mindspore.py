"""Read MindSpore's checkpoint files (``.ckpt``) without MindSpore.

A file is a sequence of protobuf records, one per parameter or slice of one::

    Checkpoint  { repeated Value value = 1; }
    Value       { required string tag = 1; oneof { TensorProto tensor = 2; maptensor = 3; } }
    TensorProto { repeated int64 dims = 1; required string tensor_type = 2;
                  required bytes tensor_content = 3; }

(``checkpoint.proto`` of mindspore-ai/mindspore; wire format:
https://protobuf.dev/programming-guides/encoding). Content is little-endian, in C order. An
optional trailer holds the CRC-32 of all before it. Every length and size that a file states is
checked against the size of the file.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import CheckpointError

__all__ = ["looks_like_mindspore", "read_mindspore"]

DTYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.uint16,
    "int32": torch.int32,
    "uint32": torch.uint32,
    "int64": torch.int64,
    "uint64": torch.uint64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bool": torch.bool,
}
TEXT = "str"  # numpy's str: UTF-32, little-endian
CIPHERS = {0x7F3A5ED8: "AES-GCM", 0x7F3A5ED9: "AES-CBC", 0x7F3A5EDA: "SM4-CBC"}
CRC_MARK = b"crc_num"
CRC_BYTES = len(CRC_MARK) + 10
VARINT_BYTES = 10  # of 7 bits, for 64
MAX_DIMS = 32
MAX_RECORDS = 1 << 16
CHUNK = 1 << 20
NUMBER, BYTES = 0, 2  # wire types
VALUE = 1 << 3 | BYTES  # first byte of a record: field 1 of Checkpoint
TAG = 1 << 3 | BYTES  # first byte within a record: field 1 of Value
TENSOR, MAP_TENSOR = (2 << 3 | BYTES, 3 << 3 | BYTES)  # what follows the tag


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number at ``data[at:]``, in base 128 with low digits first, and its end."""
    value = 0
    for i, byte in enumerate(data[at : at + VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if value >= 1 << 64:
                raise CheckpointError("a number exceeds 64 bits")
            return value, at + i + 1
    if len(data) - at >= VARINT_BYTES:
        raise CheckpointError("a number exceeds 64 bits")
    raise CheckpointError("it is cut short within a number")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield field numbers and values of the message that ``data`` is."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == BYTES:
            if value > len(data) - at:
                raise CheckpointError(f"field {key >> 3} claims {value} bytes of {len(data) - at}")
            value, at = data[at : at + value], at + value
        elif key & 7 != NUMBER:
            raise CheckpointError(f"field {key >> 3} has the unexpected wire type {key & 7}")
        yield key >> 3, value


def _text(value: int | memoryview, what: str, encoding: str = "utf-8") -> str:
    if isinstance(value, int):
        raise CheckpointError(f"the {what} is a number instead of text")
    try:
        return str(value, encoding)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the {what} is not text: {error.reason}") from error


@dataclass
class _Slice:
    """One record: a parameter, or a part of it."""

    tag: str
    dims: tuple[int, ...]
    type: str
    content: memoryview


def _parse_tensor(message: memoryview, tag: str) -> _Slice:
    dims, found = [], {}
    for number, value in _fields(message):
        if number == 1 and isinstance(value, int):
            if len(dims) == MAX_DIMS:
                raise CheckpointError(f"it has more than {MAX_DIMS} dimensions")
            if value >= 1 << 63:
                raise CheckpointError(f"dimension {len(dims)} is negative ({value - (1 << 64)})")
            dims.append(value)
        elif number in (2, 3) and number not in found and isinstance(value, memoryview):
            found[number] = value
        else:
            raise CheckpointError(f"field {number} of the tensor is unknown or there twice")
    for number, name in ((2, "type"), (3, "content")):
        if number not in found:
            raise CheckpointError(f"it has no {name}")
    return _Slice(tag, tuple(dims), _text(found[2], "type").lower(), found[3])


def _parse_value(record: memoryview) -> _Slice:
    """One record of the file, parsed."""
    found = {}
    for number, value in _fields(record):
        if number == 3:
            raise CheckpointError("it holds a map tensor, which is not supported")
        if number not in (1, 2) or number in found or isinstance(value, int):
            raise CheckpointError(f"field {number} of a record is unknown or there twice")
        found[number] = value
    tag = _text(found.get(1, b""), "name of a parameter")
    if not tag:
        raise CheckpointError("a record has no name")
    with _naming(tag):
        if 2 not in found:
            raise CheckpointError("it has no value")
        return _parse_tensor(found[2], tag)


class _naming:
    """Context that prefixes errors with the parameter's name."""

    def __init__(self, tag: str):
        self.tag = tag

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"parameter {self.tag[:200]!r}: {error}") from None


def _bytes_of(part: _Slice, size: int) -> int:
    """Return the bytes of a whole parameter, of which ``part`` is the first slice or all.

    Raises:
        CheckpointError: Its type is unknown, or it does not fit into a file of ``size`` bytes.
    """
    if part.type not in DTYPES:
        known = ", ".join([*DTYPES, TEXT])
        raise CheckpointError(f"type {part.type[:40]!r} is not supported, only {known}")
    itemsize = DTYPES[part.type].itemsize
    if part.dims == (0,) and len(part.content):
        return itemsize  # MindSpore's other way to write a scalar
    if math.prod(dim or 1 for dim in part.dims) * itemsize > size:
        raise CheckpointError(f"shape {part.dims} of {part.type} exceeds the file's {size} bytes")
    return math.prod(part.dims) * itemsize


def _tensor(first: _Slice, content: bytearray) -> torch.Tensor:
    dtype = DTYPES[first.type]
    shape = () if first.dims == (0,) and content else first.dims
    if not content:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        return torch.frombuffer(content, dtype=torch.uint8).ne(0).reshape(shape)
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


def _check_crc(file: BinaryIO, size: int) -> int:
    """Verify the trailer, if there is one, and return the end of the records before it."""
    end = size - CRC_BYTES
    if end < 0:
        return size
    file.seek(end)
    trailer = file.read(CRC_BYTES)
    if not trailer.startswith(CRC_MARK):
        return size
    file.seek(0)
    crc = 0
    for at in range(0, end, CHUNK):
        crc = zlib.crc32(file.read(min(CHUNK, end - at)), crc)
    stated = int.from_bytes(trailer[len(CRC_MARK) :], "big")
    if crc != stated:
        raise CheckpointError(f"it is damaged: its CRC is {crc:#010x} instead of {stated:#010x}")
    return end


def _records(file: BinaryIO, end: int) -> Iterator[memoryview]:
    """Yield the records of the first ``end`` bytes, one in memory at a time."""
    at = count = 0
    while at < end:
        count += 1
        if count > MAX_RECORDS:
            raise CheckpointError(f"it has more than {MAX_RECORDS} records")
        file.seek(at)
        head = memoryview(file.read(min(1 + VARINT_BYTES, end - at)))
        if head[:1] != bytes([VALUE]):
            raise CheckpointError(f"it is not a MindSpore checkpoint, or damaged at byte {at}")
        length, skip = _varint(head, 1)
        if length > end - at - skip:
            raise CheckpointError(
                f"it is cut short or damaged: the record at byte {at} claims {length} bytes, and "
                f"{end - at - skip} are left"
            )
        file.seek(at + skip)
        record = file.read(length)
        if len(record) < length:
            raise CheckpointError("it became shorter while it was read")
        yield memoryview(record)
        at += skip + length


def _read(file: BinaryIO, size: int) -> dict[str, torch.Tensor]:
    cipher = CIPHERS.get(int.from_bytes(file.read(4), "little"))
    if cipher:
        raise CheckpointError(f"it is encrypted ({cipher}); save it again without enc_key")
    if size == 0:
        raise CheckpointError("it is empty")
    tensors, texts = {}, set()
    first, content, needed = None, bytearray(), 0  # the parameter whose slices are being joined
    for record in _records(file, _check_crc(file, size)):
        part = _parse_value(record)
        joining = len(content) < needed
        if joining and part.tag != first.tag:
            break
        with _naming(part.tag):
            if part.tag in tensors or part.tag in texts:
                raise CheckpointError("it is there twice")
            if joining:
                if (part.dims, part.type) != (first.dims, first.type):
                    raise CheckpointError("its slices differ in shape or type")
            elif part.type == TEXT:
                if part.dims not in ((), (0,)):
                    raise CheckpointError(f"a text has the shape {part.dims}")
                _text(part.content, "value", "utf-32-le")
                texts.add(part.tag)
                continue
            else:
                first, content, needed = part, bytearray(), _bytes_of(part, size)
            left = needed - len(content)
            if len(part.content) > left or (left and not part.content):
                raise CheckpointError(
                    f"{len(part.content)} bytes do not fit the {left} that its shape {first.dims} "
                    f"of {first.type} has left"
                )
            content += part.content
            if len(content) == needed:
                tensors[part.tag] = _tensor(first, content)
                content, needed = bytearray(), 0
    if len(content) < needed:
        with _naming(first.tag):
            raise CheckpointError(f"{needed - len(content)} of its {needed} bytes are missing")
    return tensors


def looks_like_mindspore(start: bytes, size: int) -> bool:
    """Return True if the first bytes are of a MindSpore checkpoint, encrypted or not.

    A damaged one is recognised if the first record's name is readable.

    Args:
        start: First bytes of the file, at least 256 unless it is shorter.
        size: Size of the file in bytes.
    """
    if int.from_bytes(start[:4], "little") in CIPHERS:
        return len(start) >= 4
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return False  # safetensors
    data = memoryview(start)
    try:
        if data[:1] != bytes([VALUE]):
            return False
        length, at = _varint(data, 1)
        if data[at : at + 1] != bytes([TAG]):
            return False
        name_length, begin = _varint(data, at + 1)
    except CheckpointError:
        return False
    end = begin + name_length
    if not 0 < name_length < length:
        return False
    name = start[begin:end]
    if not name or not str(name, "utf-8", "ignore").isprintable():
        return False
    # the start may end within a long name
    return end >= len(start) or start[end] in (TENSOR, MAP_TENSOR)


def read_mindspore(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the parameters of a MindSpore checkpoint, without values of type ``str``.

    A file that was cut exactly between two records reads as one of fewer parameters, so load
    the result strictly.

    Args:
        path: File of any MindSpore version, not encrypted.

    Returns:
        Tensors by MindSpore's names, in the file's order and dtypes.

    Raises:
        CheckpointError: The file is not such a checkpoint, is encrypted or damaged, or holds values
            without a counterpart; the message names the file and the parameter.
        OSError: The file cannot be read.
    """
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        try:
            return _read(file, size)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
