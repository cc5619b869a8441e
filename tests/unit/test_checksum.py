"""The checksum within a checkpoint: every reader takes the file, and no damage goes unnoticed."""

import errno
import hashlib
import io
import zipfile

import pytest
import torch

from models import CheckpointError, read_checkpoint
from models.checkpoint.checksum import (
    COMMENT_BYTES,
    has_checksum,
    verify_checksum,
    write_with_checksum,
)

CONTENT = {"model": {"layer.0": torch.arange(3.0), "layer.1": torch.ones(2)}, "epoch": 3}


@pytest.fixture(scope="module")
def data():
    """The bytes of a file with a checksum."""
    buffer = io.BytesIO()
    write_with_checksum(CONTENT, buffer)
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path, data):
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    return path


def test_every_reader_takes_the_file(path):
    for options in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **options)
        assert torch.equal(found["model"]["layer.0"], CONTENT["model"]["layer.0"])
    assert torch.equal(read_checkpoint(path)["model"]["layer.1"], torch.ones(2))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256=")


def test_checksum_is_the_digest_of_the_file_as_torch_wrote_it(data):
    body, comment = data[:-COMMENT_BYTES], data[-COMMENT_BYTES:].decode()
    plain = body[:-2] + bytes(2)
    assert comment == f"sha256={hashlib.sha256(plain).hexdigest()}"
    assert torch.load(io.BytesIO(plain), weights_only=True)["epoch"] == 3


def test_files_without_a_checksum_are_told_apart(path, tmp_path):
    torch.save(CONTENT, tmp_path / "plain.pth")
    (tmp_path / "empty.pth").touch()
    assert verify_checksum(path) and has_checksum(path)
    for name in ("plain.pth", "empty.pth"):
        assert not verify_checksum(tmp_path / name) and not has_checksum(tmp_path / name)


def test_one_changed_bit_anywhere_is_noticed(path, data):
    bits = [(at, at * 5 % 8) for at in range(len(data))]  # local headers, padding, tensors, ...
    # of the directory's last entry, the end records and the checksum, every bit
    bits += [(at, bit) for at in range(len(data) - 250, len(data)) for bit in range(8)]
    for number, (at, bit) in enumerate(bits):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        for read in (verify_checksum, read_checkpoint)[: 1 + (number % 8 == 0)]:
            with pytest.raises(CheckpointError, match=f"^{path} "):
                read(path)


def test_both_digests_are_in_the_message(path, data):
    damaged = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
    path.write_bytes(damaged)
    found = hashlib.sha256(damaged[: -COMMENT_BYTES - 2] + bytes(2)).hexdigest()
    with pytest.raises(CheckpointError, match=f"^{path} .*{found}.*{data[-64:].decode()}"):
        verify_checksum(path)


def test_shorter_and_longer_files_are_refused(path, data):
    lengths = [*range(0, len(data), 7), *range(len(data) - 200, len(data))]
    for changed in (*(data[:length] for length in lengths), data + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"^{path} "):
            read_checkpoint(path)


def test_checksum_is_of_what_was_in_memory(path):
    class Wrong:
        """A disk that stores something else."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(bytes(data).replace(b"layer.1", b"layer.7"))

        def __getattr__(self, name):
            return getattr(self.file, name)

    with path.open("w+b") as file:
        write_with_checksum(CONTENT, Wrong(file))
    with pytest.raises(CheckpointError, match=f"^{path} "):
        verify_checksum(path)


def test_reason_of_a_failed_write_is_kept():
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError) as caught:
        write_with_checksum(CONTENT, Full())
    assert caught.value.errno == errno.ENOSPC
