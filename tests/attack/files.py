"""Checkpoint files: empty, cut, not regular, huge, or with code and lies in them."""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.attack.case import EXHAUSTED, FINE, Case
from tests.attack.programs import readers
from tests.attack.valid import World, field_of, mindspore_record, varint

Write = Callable[[Path, World], object]


class Call:
    """Pickled, it asks for a call."""

    def __init__(self, function: Callable, *arguments: object):
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


CALLS: dict[str, Callable[[], object]] = {
    "os.system": lambda: Call(os.system, "touch /tmp/attacked"),
    "eval": lambda: Call(eval, "open('/tmp/attacked', 'w')"),
    "Popen": lambda: Call(subprocess.Popen, ["touch", "/tmp/attacked"]),
    "bytearray of 4 GB": lambda: Call(bytearray, 1 << 32),
    "getattr": lambda: Call(getattr, int, "from_bytes"),
    "torch.load": lambda: Call(torch.load, "/etc/passwd"),
    "torch.zeros of 4 TB": lambda: Call(torch.zeros, 1 << 40),
    "torch.Size": lambda: Call(torch.Size, [1 << 40]),
}


def of_bytes(data: bytes) -> Write:
    return lambda path, world: path.write_bytes(data)


def of_valid(name: str, change: Callable[[bytes], bytes]) -> Write:
    """Return a function that writes a valid file's bytes, changed."""
    return lambda path, world: path.write_bytes(change((world.folder / name).read_bytes()))


def cut(name: str, share: float) -> Write:
    return of_valid(name, lambda data: data[: int(len(data) * share)])


def pickled(make: Callable[[], object], form: str) -> Write:
    """Return a function that writes an object as ``torch.save`` or ``pickle`` does."""

    def write(path: Path, world: World) -> None:
        content = {"model": {"head.weight": torch.zeros(2, 2)}, "x": make()}
        if form == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")

    return write


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, begin: int, end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "length beyond the file": safetensors(b"{}", length=1 << 62),
    "length 0": safetensors(b"{}", length=0),
    "deep header": safetensors(b"{" + b'"a":{' * 10**5),
    "not JSON": safetensors(b"{'a': 1}"),
    "no UTF-8": safetensors(b'{"\xff": 1}'),
    "offsets beyond": safetensors({"a": entry([2], 0, 8)}),
    "offsets reversed": safetensors({"a": entry([2], 8, 0)}, bytes(8)),
    "offsets overlap": safetensors({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
    "shape overflows": safetensors({"a": entry([1 << 40, 1 << 40], 0, 8)}, bytes(8)),
    "shape negative": safetensors({"a": entry([-2], 0, 8)}, bytes(8)),
    "unknown type": safetensors({"a": entry([2], 0, 8, "F99")}, bytes(8)),
    "bytes left": safetensors({"a": entry([2], 0, 8)}, bytes(99)),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}}),
    "no tensors": safetensors({}),
    "model_kwargs not JSON": safetensors(
        {"__metadata__": {"model_name": "vit_b_32_224", "model_kwargs": "{'a': 1}"}}
    ),
    "model_kwargs deep": safetensors(
        {"__metadata__": {"model_name": "vit_b_32_224", "model_kwargs": "[" * 10**5}}
    ),
}
HUGE = 1 << 62
MINDSPORE = {
    "record beyond the file": b"\n" + varint(HUGE) + b"x",
    "name beyond the record": field_of(1, b"\n" + varint(HUGE) + b"ab"),
    "shape beyond the file": mindspore_record("head.weight", (1 << 40,), b"1234"),
    "negative dimension": mindspore_record("head.weight", ((1 << 64) - 5,), b"1234"),
    "100 dimensions": mindspore_record("head.weight", (1,) * 100, b"1234"),
    "unknown type": mindspore_record("head.weight", (1,), b"1234", "Float99"),
    "twice": mindspore_record("head.weight", (1,), b"1234") * 2,
    "odd name": mindspore_record("\x1b[2J\nx", (1,), b"1234"),
    "number without end": b"\n" + b"\xff" * 40,
    "map tensor": field_of(1, field_of(1, b"head") + field_of(3, b"x")),
    "encrypted": struct.pack("<I", 0x7F3A5ED8) + bytes(100),
    "false CRC": mindspore_record("head.weight", (1,), b"1234") + b"crc_num" + b"0123456789",
}


def bomb(path: Path, world: World) -> None:
    """1 GB of zeros, compressed, in an archive like torch's."""
    file = io.BytesIO()
    torch.save({"model": {"head.weight": torch.zeros(4)}}, file)
    with (
        zipfile.ZipFile(file) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            with new.open(info.filename, "w") as record:
                record.write(old.read(info))
                for _ in range(1024 * info.filename.endswith("/data/0")):
                    record.write(bytes(1 << 20))


def many_records(path: Path, world: World) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(20000):
            archive.writestr(f"archive/data/{i}", b"")


def overlapping(path: Path, world: World) -> None:
    """An archive whose directory names one record twice."""
    file = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(4), "b": torch.ones(4)}}, file)
    data = bytearray(file.getvalue())
    start = data.rindex(b"archive/data/1") - 46
    first = data.rindex(b"archive/data/0") - 46
    data[start + 42 : start + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)


def sparse(size: int, start: bytes = b"") -> Write:
    def write(path: Path, world: World) -> None:
        with path.open("wb") as file:
            file.write(start)
            file.truncate(size)

    return write


def no_permission(path: Path, world: World) -> None:
    path.write_bytes(b"x")
    path.chmod(0)


def loop(path: Path, world: World) -> None:
    path.symlink_to(path)


FILES: dict[str, Write] = {
    "missing": lambda path, world: None,
    "empty": of_bytes(b""),
    "one byte": of_bytes(b"P"),
    "zeros": of_bytes(bytes(1000)),
    "text": of_bytes(b"\x1b[2Jnot a checkpoint\n" * 50),
    "web page": of_bytes(b"<!DOCTYPE html><html>404</html>"),
    "LFS pointer": of_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "zip start alone": of_bytes(b"PK\3\4"),
    "a folder": lambda path, world: path.mkdir(),
    "a pipe": lambda path, world: os.mkfifo(path),
    "a loop of links": loop,
    "a broken link": lambda path, world: path.symlink_to("nowhere"),
    "a link to zeros": lambda path, world: path.symlink_to("/dev/zero"),
    "sparse, 1 TB": sparse(1 << 40),
    "sparse zip, 1 TB": sparse(1 << 40, b"PK\3\4"),
    "1 TB in truth, safetensors": sparse(1 << 40, safetensors({"a": entry([1 << 38], 0, 1 << 40)})),
    "1 TB in truth, MindSpore": sparse(1 << 40, b"\n" + varint((1 << 40) - 99) + b"\n\4head\x12"),
    "zip bomb": bomb,
    "20000 records": many_records,
    "records overlap": overlapping,
}


def all_files(rng: random.Random) -> Iterator[tuple[str, Write]]:
    """Yield the files of this class."""
    yield from FILES.items()
    if os.getuid():  # root may read everything
        yield "no permission", no_permission
    for name, make in CALLS.items():
        for form in ("zip", "legacy", "pickle"):
            yield f"{form} calls {name}", pickled(make, form)
    yield from ((f"safetensors, {name}", of_bytes(data)) for name, data in SAFETENSORS.items())
    yield from ((f"MindSpore, {name}", of_bytes(data)) for name, data in MINDSPORE.items())
    for name in ("mid.pth", "own.safetensors", "mindspore.ckpt", "plain.pth"):
        share = rng.random()
        yield f"{name} cut at {share:.3f}", cut(name, share)
        yield f"{name} without its last byte", of_valid(name, lambda data: data[:-1])


def cases(rng: random.Random) -> list[Case]:
    """Return the cases of this class."""
    found, start = [], rng.randrange(10**6)
    for i, (name, write) in enumerate(all_files(rng)):
        programs = [*readers("@x.pth"), ("load_model", ["@x.pth", "vit_b_32_224"])]
        program, words = programs[(start + i) % len(programs)]
        make = lambda folder, world, write=write: write(folder / "x.pth", world)  # noqa: E731
        named = EXHAUSTED if name.startswith("1 TB in truth") else "x.pth"
        found.append(Case("files", name, program, words, make, named))
    odd = "a\nb\x1b[2J\u202e\udcff.pth"
    for program, words in readers(f"@{odd}"):
        make = of_valid("mid.pth", bytes)
        fine = lambda folder, world, write=make: write(folder / odd, world)  # noqa: E731
        found.append(Case("files", "valid with an odd name", program, words, fine, outcome=FINE))
        found.append(Case("files", "missing with an odd name", program, words, named="udcff.pth"))
    return found
