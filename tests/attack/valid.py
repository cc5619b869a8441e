"""Valid files, which hostile ones are made from."""

import copy
import io
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from models import read_checkpoint
from tests.attack.programs import PROGRAMS, TRAIN, VIT

CLASSES = ("cat", "dog")


@dataclass
class World:
    """A folder of valid files.

    Attributes:
        folder: Has ``images``, ``photo.jpg``, ``run``, ``mid.pth`` saved within an epoch,
            ``plain.pth``, ``own.safetensors``, ``hub``, ``mindspore.ckpt`` and ``shards``.
        base: Address of the web server, if any.
        content: Of ``mid.pth``.
    """

    folder: Path
    base: str = ""
    content: dict[str, Any] = field(default_factory=dict)

    def changed(self, *removed: str, **changes: Any) -> dict[str, Any]:
        """Return the content of the valid checkpoint with other values."""
        kept = {key: value for key, value in self.content.items() if key not in removed}
        return copy.deepcopy(kept) | changes  # which may be too deep for a copy

    def config(self, **changes: Any) -> dict[str, Any]:
        """Return the valid ``config.json`` with other values."""
        return json.loads((self.folder / "hub" / "config.json").read_text()) | changes


def jpeg(size: tuple[int, int] = (40, 32), seed: int = 0, form: str = "JPEG") -> bytes:
    """Return an encoded image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write_images(root: Path, train: int = 8, val: int = 2) -> None:
    """Write an image folder of two classes."""
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.jpg").write_bytes(jpeg(seed=i))


def _call(program: str, *words: object) -> None:
    if status := PROGRAMS[program]([str(word) for word in words]):
        raise SystemExit(f"{program} ended with status {status}: there is nothing to attack")


def varint(number: int) -> bytes:
    """Return a number in protobuf's base 128."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def field_of(number: int, value: int | bytes) -> bytes:
    """Return a field of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def mindspore_record(name: str, dims: tuple[int, ...], content: bytes, kind: str = "Float32"):
    """Return a parameter of a MindSpore checkpoint."""
    tensor = b"".join(field_of(1, dim) for dim in dims)
    tensor += field_of(2, kind.encode()) + field_of(3, content)
    return field_of(1, field_of(1, name.encode()) + field_of(2, tensor))


def write_world(folder: Path) -> World:
    """Write the valid files; the programs print to the standard error meanwhile."""
    world = World(folder)
    write_images(folder / "images")
    (folder / "photo.jpg").write_bytes(jpeg())
    words = [str(word).replace("=", f"{folder}/", 1) if word == "=run" else word for word in TRAIN]
    words = [str(word).replace("+", f"{folder}/") for word in words]
    more = ["--model-ema", "--save-every-steps", 3]
    stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        _call("main", *words, *more, *VIT)
        run = folder / "run"
        _call("convert", run / "checkpoint.pth", folder / "own.safetensors")
        _call("convert", run / "checkpoint.pth", folder / "hub", "--to", "hub")
        shards = ["--data-path", folder / "images", "--output", folder / "shards"]
        _call("pack", *shards, "--num_workers", 0, "--shard-images", 4)
    finally:
        sys.stdout = stdout
    world.content = read_checkpoint(run / "previous.pth")
    shutil.copy(run / "previous.pth", folder / "mid.pth")
    state = world.content["model"]
    torch.save(state, folder / "plain.pth")
    safetensors.torch.save_file(state, folder / "plain.safetensors")
    records = [
        mindspore_record(name, tuple(value.shape), value.numpy().tobytes())
        for name, value in state.items()
    ]
    (folder / "mindspore.ckpt").write_bytes(b"".join(records))
    return world
