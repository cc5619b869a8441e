"""Shards and their indices: damaged, lying, and of names beyond their folder."""

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.attack.case import FINE, Case
from tests.attack.metadata import BREAK, ESCAPE, LARGE
from tests.attack.programs import FEW
from tests.attack.valid import World, jpeg

Change = Callable[[Path], object]
INDEX, MEMBERS = "val.json", "val.npz"


def of_index(**changes: Any) -> Change:
    """Return a function that changes values of an index."""

    def change(folder: Path) -> None:
        path = index_of(folder)
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def of_shard(**changes: Any) -> Change:
    """Return a function that changes values of the first shard in an index."""

    def change(folder: Path) -> None:
        path = index_of(folder)
        content = json.loads(path.read_text())
        content["shards"][0] |= changes
        path.write_text(json.dumps(content))

    return change


def rename_classes(folder: Path) -> None:
    """Give odd names to the classes of both splits."""
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"classes": [ESCAPE, BREAK]}))


def index_of(folder: Path) -> Path:
    return next(path for path in folder.glob("val*.json"))


def members_of(folder: Path) -> Path:
    return folder / json.loads(index_of(folder).read_text())["members"]["name"]


def index_bytes(data: bytes) -> Change:
    return lambda folder: index_of(folder).write_bytes(data)


def of_members(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    """Return a function that changes arrays of the file of the images."""

    def write(folder: Path) -> None:
        path, index = members_of(folder), index_of(folder)
        with np.load(path) as arrays:
            values = dict(arrays)
        change(values)
        path.unlink()
        with path.open("wb") as file:
            np.savez_compressed(file, **values)
        content = json.loads(index.read_text())
        content["members"] |= {"size": path.stat().st_size, "sha256": None}
        index.write_text(json.dumps(content))

    return write


def shard_bytes(change: Callable[[bytes], bytes], indexed: bool = True) -> Change:
    """Return a function that changes the first shard's bytes; without its index, if wanted."""

    def write(folder: Path) -> None:
        path = min(folder.glob("val*.tar"))
        path.write_bytes(change(path.read_bytes()))
        if not indexed:
            members_of(folder).unlink()
            index_of(folder).unlink()

    return write


def tar(members: dict[str, bytes]) -> Callable[[bytes], bytes]:
    def write(_: bytes) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return file.getvalue()

    return write


def set_to(name: str, value: Any) -> Change:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = np.full_like(arrays[name], value) if np.isscalar(value) else value

    return of_members(change)


ZERO = "0" * 64
CHANGES: dict[str, Change] = {
    "index empty": index_bytes(b""),
    "index not JSON": index_bytes(b"{'a'}"),
    "index deep": index_bytes(b"[" * 10**5),
    "index NUL": index_bytes(bytes(99)),
    "index list": index_bytes(b"[]"),
    "index null": index_bytes(b"null"),
    "index number": index_bytes(b"9" * 5000),
    "index no UTF-8": index_bytes(b'"\xff\xfe"'),
    "format other": of_index(format=ESCAPE),
    "format list": of_index(format=[]),
    "shards none": of_index(shards=[]),
    "shards number": of_index(shards=3),
    "shards of numbers": of_index(shards=[1, 2]),
    "shards dict": of_index(shards={"a": 1}),
    "shard name above": of_shard(name="../images/val/cat/0.jpg"),
    "shard name absolute": of_shard(name="/etc/passwd"),
    "shard name command": of_shard(name="pipe:touch /tmp/attacked"),
    "shard name address": of_shard(name="http://example.com/x.tar"),
    "shard name of two lines": of_shard(name=BREAK),
    "shard name NUL": of_shard(name="a\0b"),
    "shard name number": of_shard(name=3),
    "shard size text": of_shard(size="1"),
    "shard size negative": of_shard(size=-1),
    "shard size huge": of_shard(size=LARGE),
    "shard size nan": of_shard(size=float("nan")),
    "shard images huge": of_shard(images=LARGE),
    "shard images 10^12": of_shard(images=10**12),
    "shard images bool": of_shard(images=True),
    "shard sha256 number": of_shard(sha256=3),
    "shard key unknown": of_shard(nonesuch=1),
    "classes number": of_index(classes=3),
    "classes text": of_index(classes="catdog"),
    "classes of lists": of_index(classes=[["cat"], {"a": 1}]),
    "members list": of_index(members=[1]),
    "members above": of_index(members={"name": "../x.npz", "size": 1, "sha256": None}),
    "members absent": of_index(members={"name": "none.npz", "size": 1, "sha256": None}),
    "members false digest": of_index(members={"name": MEMBERS, "size": 1, "sha256": ZERO}),
    "offsets negative": set_to("offsets", -1),
    "offsets overflow": set_to("offsets", (1 << 63) - 1),
    "sizes huge": set_to("sizes", (1 << 32) - 1),
    "targets negative": set_to("targets", -1),
    "targets beyond": set_to("targets", 99),
    "names of a gigabyte": set_to("name_sizes", 65535),
    "names short": set_to("names", np.zeros(1, np.uint8)),
    "columns of objects": set_to("offsets", np.zeros(4, "U9")),
    "columns of floats": set_to("offsets", np.full(4, np.nan)),
    "columns of a length": set_to("targets", np.zeros(9, np.int32)),
    "columns of a bomb": set_to("names", np.zeros(1 << 28, np.uint8)),
    "shard empty": shard_bytes(lambda data: b""),
    "shard cut": shard_bytes(lambda data: data[:1000]),
    "shard other": shard_bytes(lambda data: bytes(len(data))),
    "no index, shard empty": shard_bytes(lambda data: b"", False),
    "no index, shard cut": shard_bytes(lambda data: data[:1000], False),
    "no index, no tar": shard_bytes(lambda data: b"x" * 5000, False),
    "no index, two labels": shard_bytes(tar({"a.cls": b"0", "a.jpg": jpeg(), "a.png": b""}), False),
    "no index, no label": shard_bytes(tar({"a.jpg": jpeg()}), False),
    "no index, label text": shard_bytes(tar({"a.jpg": jpeg(), "a.cls": b"\x1b[2J"}), False),
    "no index, label huge": shard_bytes(tar({"a.jpg": jpeg(), "a.cls": b"9" * 9}), False),
    "no index, label of 5 MB": shard_bytes(tar({"a.jpg": jpeg(), "a.cls": bytes(5 << 20)}), False),
}
CHANGES["class names with ESC"] = rename_classes
SOUND: dict[str, Change] = {
    "as packed": lambda folder: None,
    "classes unknown": of_index(classes=[]),
}
# of which the error names something else than the shards
NAMED = {"class names with ESC": "mid.pth"}
KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a loop": lambda path: path.symlink_to(path),
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "missing": lambda path: None,
}


def copied(change: Change) -> Callable[[Path, World], None]:
    """Return a function that writes the valid shards, changed."""

    def make(folder: Path, world: World) -> None:
        shutil.copytree(world.folder / "shards", folder / "shards")
        change(folder / "shards")

    return make


def replaced(find: Callable[[Path], Path], write: Callable[[Path], object]) -> Change:
    def change(folder: Path) -> None:
        path = find(folder)
        path.unlink()
        write(path)

    return change


def cases(rng: random.Random) -> list[Case]:
    """Return the cases of this class."""
    changes = dict(CHANGES)
    places = {"index": index_of, "members": members_of, "shard": lambda f: min(f.glob("val*.tar"))}
    for what, find in places.items():
        for kind, write in KINDS.items():
            changes[f"{what} {kind}"] = replaced(find, write)
    del changes["index missing"]  # the shards are read instead
    data = ["--data-set", "WDS", "--data-path", "@shards", *FEW]
    readers = [
        ("main", ["--eval", "--resume", "+mid.pth", *data]),
        ("validate", ["+mid.pth", *data]),
    ]
    found, start = [], rng.randrange(10**6)
    for i, (name, change) in enumerate((changes | SOUND).items()):
        program, words = readers[0 if name in SOUND else (start + i) % 2]
        outcome = {"outcome": FINE} if name in SOUND else {"named": NAMED.get(name, "shards")}
        found.append(Case("shards", name, program, words, copied(change), **outcome))
    return found
