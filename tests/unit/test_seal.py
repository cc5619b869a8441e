"""The seal of a checkpoint: any reader takes the file, and no damage goes unnoticed."""

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


def content():
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer.{i}": torch.randn(5, generator=generator) for i in range(3)}
    return {"model": weights, "epoch": 3}


def sealed(path):
    with path.open("w+b") as file:
        write_with_checksum(content(), file)
    return path


def test_every_reader_takes_a_sealed_file(tmp_path):
    path = sealed(tmp_path / "a.pth")
    want = content()["model"]
    for options in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **options)
        assert all(torch.equal(found["model"][key], want[key]) for key in want)
    assert torch.equal(read_checkpoint(path)["model"]["layer.2"], want["layer.2"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256=")


def test_seal_is_the_digest_of_the_file_as_torch_wrote_it(tmp_path):
    data = sealed(tmp_path / "a.pth").read_bytes()
    body, comment = data[:-COMMENT_BYTES], data[-COMMENT_BYTES:].decode()
    assert comment == f"sha256={hashlib.sha256(body[:-2] + bytes(2)).hexdigest()}"
    buffer = io.BytesIO(body[:-2] + bytes(2))
    assert torch.load(buffer, weights_only=True)["epoch"] == 3


def test_what_has_no_seal_is_told_apart(tmp_path):
    torch.save(content(), tmp_path / "plain.pth")
    (tmp_path / "empty.pth").touch()
    assert verify_checksum(sealed(tmp_path / "sealed.pth")) and has_checksum(
        tmp_path / "sealed.pth"
    )
    for name in ("plain.pth", "empty.pth"):
        assert not verify_checksum(tmp_path / name) and not has_checksum(tmp_path / name)


def test_one_changed_bit_anywhere_is_noticed(tmp_path):
    data = sealed(tmp_path / "a.pth").read_bytes()
    bits = [(at, at * 5 % 8) for at in range(len(data))]  # local headers, padding, tensors, ...
    # of the directory's last entry, the end records and the seal, every bit
    bits += [(at, bit) for at in range(len(data) - 250, len(data)) for bit in range(8)]
    path = tmp_path / "b.pth"
    for at, bit in bits:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        for read in (verify_checksum, read_checkpoint):
            with pytest.raises(CheckpointError, match="is damaged"):
                read(path)


def test_digests_are_told(tmp_path):
    path = sealed(tmp_path / "a.pth")
    data = bytearray(path.read_bytes())
    stated = data[-64:].decode()
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        verify_checksum(path)
    start, _, should = str(caught.value).partition(", and should be ")
    assert start.startswith(f"{path} is damaged: its SHA-256 is ") and should == stated


def test_every_shorter_and_any_longer_file_is_refused(tmp_path):
    data = sealed(tmp_path / "a.pth").read_bytes()
    path = tmp_path / "b.pth"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="does not end as an archive does"):
        read_checkpoint(path)


def test_seal_vouches_for_what_was_in_memory(tmp_path):
    class Wrong:
        """A disk that stores something else."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(bytes(data).replace(b"layer.1", b"layer.7"))

        def __getattr__(self, name):
            return getattr(self.file, name)

    with (tmp_path / "a.pth").open("w+b") as file:
        write_with_checksum(content(), Wrong(file))
    with pytest.raises(CheckpointError, match="its SHA-256 is"):
        verify_checksum(tmp_path / "a.pth")


def test_reason_of_a_failed_write_is_kept():
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left") as caught:
        write_with_checksum(content(), Full())
    assert caught.value.errno == errno.ENOSPC
