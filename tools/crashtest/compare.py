"""Bits in which two runs differ, and what a killed run has left to resume from."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models import CheckpointError, read_checkpoint
from training.checkpoints import BEST, CHECKPOINT, PREVIOUS
from training.output import LOG

# keys of a checkpoint that may differ, as the rate in a log may; at the end of an epoch nobody asks
# any more where in its samples a start of the run began
FREE = ("args", "seconds", "sampler")


def raw(value: Any) -> bytes:
    """The bits of a tensor or of a float; other values as they are printed."""
    if isinstance(value, torch.Tensor):
        return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return struct.pack("<d", value) if isinstance(value, float) else repr(value).encode()


def differing_bits(one: Any, other: Any) -> int:
    """Bits in which two nested plain values with tensors differ.

    What is missing, or of another type, shape or length, counts with all its bits. Left out are
    values under the keys of :data:`FREE` and rates of images.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [key for key in one.keys() | other.keys() if key not in FREE]
        keys = [key for key in keys if not str(key).endswith("images_per_second")]
        return sum(differing_bits(one.get(key, ...), other.get(key, ...)) for key in keys)
    sequences = isinstance(one, list | tuple) and isinstance(other, list | tuple)
    if sequences and len(one) == len(other):
        return sum(map(differing_bits, one, other))
    first, second = raw(one), raw(other)
    kinds = [(type(value), getattr(value, "dtype", 0), len(raw(value))) for value in (one, other)]
    if kinds[0] != kinds[1] or getattr(one, "shape", 0) != getattr(other, "shape", 0):
        return 8 * max(len(first), len(second))
    if first == second:
        return 0
    return (int.from_bytes(first, "little") ^ int.from_bytes(second, "little")).bit_count()


def compare(folder: Path, reference: Path) -> int:
    """Bits in which the checkpoints and logs of two finished runs differ.

    Raises:
        CheckpointError: A checkpoint cannot be read.
        OSError: A log cannot be read.
    """
    bits = 0
    for name in (CHECKPOINT, BEST):
        bits += differing_bits(*(read_checkpoint(path / name) for path in (folder, reference)))
    logs = [(path / LOG).read_text().splitlines() for path in (folder, reference)]
    return bits + differing_bits(*([json.loads(line) for line in log] for log in logs))


def survey(folder: Path, per_epoch: int) -> tuple[int, set[int]]:
    """What there is to resume from.

    Args:
        folder: Of a run.
        per_epoch: Steps of an epoch.

    Returns:
        Steps, counted over epochs, of the newest readable checkpoint (0: none), and the numbers
        (inodes) of the files that are damaged.
    """
    steps, damaged = None, set()
    for name in (CHECKPOINT, PREVIOUS, BEST):
        path = folder / name
        try:
            content = read_checkpoint(path)
            if steps is None and name != BEST:
                steps = (content["epoch"] + 1) * per_epoch + content["step"]
        except CheckpointError:
            if path.exists():
                damaged.add(path.stat().st_ino)
    damaged |= {path.stat().st_ino for path in folder.glob("*.damaged")}
    return steps or 0, damaged
