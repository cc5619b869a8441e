"""Mutated checkpoints: bytes flipped, cut, inserted and repeated, read many in one process."""

import os
import random
import traceback
from pathlib import Path

from models import ModelError, find_model, read_checkpoint
from tests.attack.case import limit, wait
from tests.attack.valid import World

FILES = ("mid.pth", "run/checkpoint.pth", "plain.pth", "own.safetensors", "plain.safetensors")
FILES += ("mindspore.ckpt",)
NAME = "vit_b_32_224"
BATCH = 50  # files read in one process
BATCH_SECONDS = 120
EDGES = 2048  # bytes at both ends, where the structure of most formats is


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return ``data`` with a few random changes, most of them near its ends."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        near = min(EDGES, len(found) - 1)
        places = (rng.randrange(near), len(found) - 1 - rng.randrange(near))
        at = rng.choice((*places, rng.randrange(len(found))))
        size = rng.choice((1, 1, 4, 8, 100))
        kind = rng.randrange(6)
        if kind == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
        elif kind == 2:
            found[at : at + size] = b""
        elif kind == 3:
            found[at:at] = rng.randbytes(size)
        elif kind == 4:
            found[at:at] = found[at : at + size]
        elif rng.random() < 0.2:
            del found[at:]
        if len(found) < 2:
            break
    return bytes(found)


def _read_all(folder: Path, files: dict[str, bytes], first: int, count: int, seed: int) -> None:
    """Read some mutations; leave the number of the present one in a file."""
    path, state = folder / "x.pth", folder / "state"
    for number in range(first, first + count):
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(list(files))
        path.write_bytes(mutated(files[name], rng))
        state.write_text(f"{number} of {name}")
        try:
            read_checkpoint(path)
            find_model(str(path), NAME)
        except ModelError:
            pass
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}, {last.filename}:{last.lineno}"
            state.write_text(f"{number} of {name}: {text}")
            os._exit(1)
    os._exit(0)


def attack(world: World, folder: Path, count: int, seed: int) -> list[str]:
    """Read ``count`` mutations of the valid files; return what was not survived."""
    files = {name: (world.folder / name).read_bytes() for name in FILES}
    wrong, number = [], 0
    place = folder / "mutations"
    place.mkdir()
    while number < count:
        size = min(BATCH, count - number)
        child = os.fork()
        if not child:
            try:
                os.setsid()
                limit(seconds=BATCH_SECONDS)
                _read_all(place, files, number, size, seed)
            finally:
                os._exit(1)
        status = wait(child, BATCH_SECONDS)
        if status == 0:
            number += size
            continue
        text = (place / "state").read_text()
        how = "no end" if status is None else f"status {status}"
        wrong.append(f"mutations: seed {seed}, number {text} ({how})")
        number = int(text.partition(" ")[0]) + 1
    return wrong
