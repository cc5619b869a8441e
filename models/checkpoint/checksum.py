"""Checksums of checkpoints, stored in the files themselves and verified on reading.

A file with a checksum is torch.save's zip archive with the comment ``sha256=<64 hexadecimal
digits>``: the digest of the file as torch wrote it, that is of all bytes before the comment with
the comment's two-byte length read as zero. Zip readers, among them torch.load, accept it.
"""

import hashlib
import re
from os import PathLike
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError

END_MARK = b"PK\5\6"  # of the record that ends an archive, whose last two bytes are a length
END_BYTES = 22
COMMENT = re.compile(rb"sha256=([0-9a-f]{64})")
COMMENT_BYTES = len("sha256=") + 64
CHUNK = 1 << 22


class _Hashing:
    """A file that hashes what is written, and remembers why writing failed.

    It hashes the data in memory: a failing disk may return something else.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data: memoryview) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_with_checksum(content: Any, file: BinaryIO) -> None:
    """Write a checkpoint with its checksum, without holding the file in memory.

    Args:
        content: Argument of torch.save.
        file: Empty file, open for writing and seeking (``"w+b"``).

    Raises:
        OSError: Writing failed.
    """
    hashing = _Hashing(file)
    try:
        torch.save(content, hashing)
    except RuntimeError as error:
        if hashing.error is not None:  # torch's error does not say why writing failed
            raise hashing.error from error
        raise
    file.seek(-2, 2)
    file.write(COMMENT_BYTES.to_bytes(2, "little"))
    file.write(b"sha256=" + hashing.digest.hexdigest().encode())
    file.flush()


def file_digest(file: BinaryIO, size: int) -> "hashlib._Hash":
    """Return the SHA-256 of the first ``size`` bytes, read in chunks."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(size, CHUNK)))
    file.seek(0)
    while size > 0:
        count = file.readinto(piece[:size])
        if not count:
            break
        digest.update(piece[:count])
        size -= count
    return digest


def _read_checksum(file: BinaryIO) -> tuple[bytes, bytes]:
    """Return the bytes at the places of the end record and of the checksum comment."""
    size = file.seek(0, 2)
    file.seek(max(size - END_BYTES - COMMENT_BYTES, 0))
    tail = file.read()
    return tail[:-COMMENT_BYTES], tail[-COMMENT_BYTES:]


def has_checksum(path: str | PathLike[str]) -> bool:
    """Return True if a file has a checksum, intact or not; see :func:`verify_checksum`.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        end, comment = _read_checksum(file)
    # either of the two shows that there was a checksum, should the other be damaged
    return end.startswith(END_MARK) or COMMENT.fullmatch(comment) is not None


def verify_checksum(path: str | PathLike[str]) -> bool:
    """Verify a file's checksum; return False if it does not have one.

    Raises:
        CheckpointError: The file differs from what was written.
        OSError: The file cannot be read.
    """
    if not has_checksum(path):
        return False
    with open(path, "rb", buffering=0) as file:
        end, comment = _read_checksum(file)
        stated = COMMENT.fullmatch(comment)
        if not stated or end[-2:] != bytes([COMMENT_BYTES, 0]):  # the digest is of the rest
            raise CheckpointError(f"{path} is damaged: its checksum, at the end, is incomplete")
        digest = file_digest(file, file.seek(0, 2) - COMMENT_BYTES - 2)
    digest.update(b"\0\0")
    if digest.hexdigest() != stated[1].decode():
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is {digest.hexdigest()} instead of "
            f"{stated[1].decode()}"
        )
    return True
