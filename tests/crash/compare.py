"""Bits in which two runs differ, and the checkpoints that a killed run can resume from."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models import CheckpointError, read_checkpoint
from training.checkpoints import BEST, CHECKPOINT, PREVIOUS
from training.output import LOG

# keys that may differ, as rates in the log may: sampler says where the last start began
FREE = ("args", "seconds", "sampler")
RATE = "images_per_second"


def raw(value: Any) -> bytes:
    """Return the bits of a tensor or of a float; other values as they are printed."""
    if isinstance(value, torch.Tensor):
        return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return struct.pack("<d", value) if isinstance(value, float) else repr(value).encode()


def differing_bits(one: Any, other: Any) -> int:
    """Count the bits in which two nested plain values with tensors differ.

    Missing values, and those of another type, shape or length, count with all their bits. Values
    under the keys of :data:`FREE` and rates of images are ignored.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = one.keys() | other.keys()
        keys = [key for key in keys if key not in FREE and not str(key).endswith(RATE)]
        return sum(differing_bits(one.get(key, ...), other.get(key, ...)) for key in keys)
    sequences = isinstance(one, list | tuple) and isinstance(other, list | tuple)
    if sequences and len(one) == len(other):
        return sum(map(differing_bits, one, other))
    bits = [raw(one), raw(other)]
    kinds = [(type(x), getattr(x, "dtype", 0), getattr(x, "shape", 0)) for x in (one, other)]
    if kinds[0] != kinds[1] or len(bits[0]) != len(bits[1]):
        return 8 * max(map(len, bits))
    first, second = (int.from_bytes(value, "little") for value in bits)
    return (first ^ second).bit_count()


def compare(folder: Path, reference: Path) -> int:
    """Count the bits in which the checkpoints and logs of two finished runs differ.

    Raises:
        CheckpointError, OSError: A checkpoint or a log cannot be read.
    """

    def content(path: Path) -> list[Any]:
        log = [json.loads(line) for line in (path / LOG).read_text().splitlines()]
        return [read_checkpoint(path / CHECKPOINT), read_checkpoint(path / BEST), log]

    return differing_bits(content(folder), content(reference))


def survey(folder: Path, per_epoch: int) -> tuple[int, set[int]]:
    """Return the step to resume from, counted over epochs, and the inodes of damaged files.

    The step is that of the newest readable checkpoint of a run in ``folder``, with ``per_epoch``
    steps per epoch; 0 without one.
    """
    steps, damaged = [], {path.stat().st_ino for path in folder.glob("*.damaged")}
    for path in (folder / name for name in (CHECKPOINT, PREVIOUS, BEST)):
        try:
            content = read_checkpoint(path)
            if path.name != BEST:
                steps.append((content["epoch"] + 1) * per_epoch + content["step"])
        except CheckpointError:
            if path.exists():
                damaged.add(path.stat().st_ino)
    return (steps or [0])[0], damaged
