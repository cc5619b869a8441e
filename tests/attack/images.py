"""Images in folders: damaged, huge, of odd modes and names."""

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.attack.case import FINE, Case
from tests.attack.programs import FEW
from tests.attack.valid import World, jpeg, write_images

Write = Callable[[Path, World], object]
ODD = "a\nerror: b\x1b[2J\u202e.jpg"
BYTES = b"a\xff\xfe.jpg"


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *chunks: bytes, depth: int = 8, colour: int = 2):
    """Return a PNG file of any header."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    """Return a PNG file of zeros, of ``side`` squared pixels, in few bytes."""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def of_mode(mode: str, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (24, 16)).save(file, form, **options)
    return file.getvalue()


def frames(form: str) -> bytes:
    file = io.BytesIO()
    pages = [Image.fromarray(np.full((16, 16, 3), i, np.uint8)) for i in range(9)]
    pages[0].save(file, form, save_all=True, append_images=pages[1:])
    return file.getvalue()


def sized(data: bytes, height: int, width: int) -> bytes:
    """Return a JPEG file whose header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


TEXT = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27)))
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\xff",
    "text": b"\x1b[2Jno image",
    "zeros": bytes(1000),
    "JPEG start": jpeg()[:20],
    "JPEG cut": jpeg()[:700],
    "PNG cut": jpeg(form="PNG")[:500],
    "WebP cut": jpeg(form="WEBP")[:100],
    "GIF cut": jpeg(form="GIF")[:30],
    "BMP cut": jpeg(form="BMP")[:200],
    "TIFF cut": jpeg(form="TIFF")[:200],
    "JPEG 2000 cut": jpeg(form="JPEG2000")[:200],
    "JPEG of 65500x65500": sized(jpeg(), 65500, 65500),
    "JPEG of 0x0": sized(jpeg(), 0, 0),
    "PNG of 10^9 pixels": bomb(31680),
    "PNG of 2^31 pixels, without": png(2**31 - 1, 2**31 - 1, b""),
    "PNG of 0x0": png(0, 0, b""),
    "PNG without pixels": png(16, 16, b""),
    "PNG of depth 7": png(16, 16, bytes(16 * 49), depth=7),
    "PNG of colour 5": png(16, 16, bytes(16 * 49), colour=5),
    "float TIFF": of_mode("F", "TIFF"),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) run\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "pickle": b"\x80\x04cos\nsystem\n",
}
SOUND: dict[str, bytes] = {
    "1 bit": of_mode("1", "PNG"),
    "palette": of_mode("P", "PNG"),
    "palette transparent": of_mode("P", "PNG", transparency=bytes(9)),
    "grey": of_mode("L", "JPEG"),
    "grey alpha": of_mode("LA", "PNG"),
    "alpha": of_mode("RGBA", "PNG"),
    "16 bits": of_mode("I;16", "PNG"),
    "CMYK": of_mode("CMYK", "JPEG"),
    "YCbCr": of_mode("YCbCr", "JPEG"),
    "LAB": of_mode("LAB", "TIFF"),
    "1x1": png(1, 1, bytes(4)),
    "1x3000": png(1, 3000, bytes(4 * 3000)),
    "3000x1": png(3000, 1, bytes(9001)),
    "GIF of 9 frames": frames("GIF"),
    "TIFF of 9 pages": frames("TIFF"),
    "animated PNG": frames("PNG"),
    "icon": of_mode("RGB", "ICO"),
    "PNG with bytes behind": jpeg(form="PNG") + bytes(10**6),
    "JPEG with odd EXIF": jpeg()[:2] + b"\xff\xe1\0\x10Exif\0\0II*\0\xff\xff\xff\xff" + jpeg()[2:],
}


def loop(path: Path, world: World) -> None:
    path.symlink_to(path)


KINDS: dict[str, Write] = {
    "a pipe": lambda path, world: os.mkfifo(path),
    "a loop of links": loop,
    "a broken link": lambda path, world: path.symlink_to("nowhere"),
    "a device": lambda path, world: path.symlink_to("/dev/zero"),
}


def folder_of(write: Write, name: str | bytes = "bad.png") -> Callable[[Path, World], None]:
    """Return a function that writes an image folder with one more image in each split."""

    def make(folder: Path, world: World) -> None:
        write_images(folder / "images")
        for split in ("train", "val"):
            place = os.path.join(os.fsencode(folder / "images" / split / "cat"), os.fsencode(name))
            write(Path(os.fsdecode(place)), world)

    return make


def bytes_of(data: bytes) -> Write:
    return lambda path, world: path.write_bytes(data)


EVAL = ["--eval", "--resume", "+mid.pth", *FEW]
TRAIN = [*("--finetune", "+mid.pth", *FEW, "--epochs", 1, "--warmup-epochs", 0, "--unscale-lr")]
TRAIN += ["--cooldown-epochs", 0, "--no-repeated-aug", "--output_dir", "=run"]


def programs(data: str) -> list[tuple[str, list[object]]]:
    """Return the programs that read an image folder."""
    return [
        ("main", [*EVAL, "--data-path", data]),
        ("main", [*TRAIN, "--data-path", data]),
        ("main", [*TRAIN, "--data-path", data, "--loader", "timm"]),
        ("validate", ["+mid.pth", "--data-path", data, *FEW]),
        ("pack", ["--data-path", data, "--output", "=shards", "--num_workers", 0]),
    ]


# a folder's structure, and what the error names
FOLDERS: dict[str, tuple[Callable[[Path, World], object], str]] = {
    "missing": (lambda folder, world: None, "images"),
    "empty": (lambda folder, world: (folder / "images").mkdir(), "images"),
    "a file": (lambda folder, world: (folder / "images").write_bytes(b"x"), "images"),
    "a loop": (lambda folder, world: (folder / "images").symlink_to(folder / "images"), "images"),
    "splits without classes": (
        lambda folder, world: [
            (folder / "images" / s).mkdir(parents=True) for s in ("train", "val")
        ],
        "images",
    ),
    "classes without images": (
        lambda folder, world: [
            (folder / "images" / s / c).mkdir(parents=True)
            for s in ("train", "val")
            for c in ("cat", "dog")
        ],
        "images",
    ),
}


def cases(rng: random.Random) -> list[Case]:
    """Return the cases of this class."""
    found, start = [], rng.randrange(10**6)

    def add(name: str, number: int, make: Callable, *flags: str, **options: object) -> None:
        readers = programs("@images")
        program, words = readers[(start + number) % len(readers)]
        leaves = ("args.yaml", "data.json", "events.*", "lock", "plan.json")  # of a start
        words = [*words, *flags]
        found.append(Case("images", name, program, words, make, leaves=leaves, **options))

    damaged = {name: bytes_of(data) for name, data in DAMAGED.items()} | KINDS
    for i, (name, write) in enumerate(damaged.items()):
        make = folder_of(write)
        if name not in ("a loop of links", "a broken link"):
            add(f"{name}, error", i, make, "--on-corrupt", "error", named="bad.png")
        add(f"{name}, skip", i + 1, make, "--on-corrupt", "skip", outcome=FINE)
    for i, (name, data) in enumerate(SOUND.items()):
        add(name, i, folder_of(bytes_of(data)), outcome=FINE)
    for i, name in enumerate((ODD, BYTES, "n" * 240 + ".jpg")):
        for number in range(3):
            add(f"odd name {i}", i + number, folder_of(bytes_of(jpeg()), name), outcome=FINE)
            bad = folder_of(bytes_of(b"x"), name)
            add(f"odd name {i}, damaged", i + number, bad, named=(".jpg", "a\\n"))
    for i, (name, (make, named)) in enumerate(FOLDERS.items()):
        add(name, i, make, named=named)
    predict = ["@images/val/cat/bad.png", "--checkpoint", "+mid.pth", "--csv", "=table.csv"]
    for name, write in damaged.items():
        words = [*predict, "--device", "cpu"]
        found.append(Case("images", name, "predict", words, folder_of(write), "bad.png"))
    return found
