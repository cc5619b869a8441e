"""Files that ask for more time or memory than they have bytes: ``(name, content, value named)``."""

import io
import json
import random
import struct
import tarfile
from collections.abc import Iterator

from PIL import Image

Hostile = tuple[str, bytes, str]


def images(seed: int = 0) -> Iterator[Hostile]:
    """Small images that take Pillow or libjpeg long."""
    scans = random.Random(seed).randrange(1500, 2000)
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(buffer, "JPEG", progressive=True)
    jpeg = buffer.getvalue()
    start = jpeg.rindex(b"\xff\xda")
    more = scans - jpeg.count(b"\xff\xda")
    yield "scans.jpg", jpeg[:-2] + jpeg[start:-2] * more + b"\xff\xd9", f"{scans} scans"
    parts = str(1 << 17)
    yield "markers.jpg", jpeg[:2] + b"\xff\xef\0\2" * 10**6 + jpeg[2:], parts
    yield "comments.ppm", b"P6\n" + b"#\n" * 10**6 + b"1 1 255\n000", parts
    buffer = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(buffer, "JPEG2000")
    yield "large.jp2", buffer.getvalue(), "25000000 pixels"
    for name, tag, order in (
        ("strips", 273, "<"),
        ("motorola", 273, ">"),
        ("resolution", 282, "<"),
    ):
        yield f"{name}.tif", tiff({tag: [8] * 10**6}, order), str(1 << 21)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 2, 282, 5, 300_000, 50)
    exif = (exif + struct.pack("<HHII", 296, 3, 1, 2)).ljust(65_000, b"\1")
    more = b"Exif\0\0".ljust(65_000, b"\1")
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", 65_002) + x for x in [exif] + [more] * 50)
    start = 4 + int.from_bytes(jpeg[4:6], "big")  # behind JFIF's, which has a resolution
    yield "exif.jpg", jpeg[:2] + segments + jpeg[start:], "51"


def tiff(tags: dict[int, list[int]], order: str = "<") -> bytes:
    """Return a TIFF of 1 x 10^6 pixels in strips of one row, whose tags have 32 bits."""
    usual = {256: [1], 257: [10**6], 258: [8], 259: [1], 262: [1], 273: [8], 278: [1], 279: [1]}
    fields, values, start = b"", b"", 12 + 2 + 12 * len(usual | tags) + 4
    for tag, numbers in sorted((usual | tags).items()):
        packed, count = struct.pack(f"{order}{len(numbers)}I", *numbers), len(numbers)
        if count > 1:
            packed, values = struct.pack(f"{order}I", start + len(values)), values + packed
        fields += struct.pack(f"{order}HHI", tag, 4, count) + packed
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI4xH", 42, 12, len(fields) // 12)
    return head + fields + bytes(4) + values


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return the header of a member of a tar file."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes, kind: bytes) -> bytes:
    """Return a member of a tar file."""
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def tars() -> Iterator[Hostile]:
    """Shards whose headers lie, or are long."""
    million = 1 << 20
    for name, kind in (("pax", b"x"), ("globals", b"g"), ("long", b"L"), ("link", b"K")):
        yield f"{name}-0.tar", header("p", million, kind) + b"1" * million, str(million)
    yield "claim-0.tar", header("p", 1 << 40, b"x"), str(1 << 40)
    yield "huge-0.tar", header("a.jpg", 1 << 62), str(1 << 62)
    yield "negative-0.tar", header("a.jpg", -512), "-512"
    yield "sparse-0.tar", header("a.jpg", 1, b"S") + bytes(1024), "a.jpg"
    yield "chain-0.tar", (header("p", 9, b"x") + b"9 a=bcde\n".ljust(512, b"\0")) * 5000, ""
    for kind in (b"L", b"K"):
        yield f"chain{kind.decode()}-0.tar", member("p", b"a" * 100, kind) * 5000, ""
    yield "digits-0.tar", member("p", b"1" * (1 << 15), b"x"), str(1 << 15)
    size = b"9 GNU.sparse.size=1\n1 GNU.sparse.offset="
    yield "offset-0.tar", member("p", size.ljust(1 << 15, b"1"), b"x"), "256"
    yield "charsets-0.tar", member("p", b"1 hdrcharset=" * 2500, b"x"), "two"
    version = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    sparse = member("p", version, b"x") + member("a.bin", b"2000000\n" + b"1\n" * 4 * 10**6, b"0")
    yield "map-0.tar", sparse, str(1 << 16)
    old = bytearray(header("a.bin", 1, b"S")[:482] + b"\1" + bytes(29))
    old[148:156] = b"%06o\0 " % (sum(old[:148]) + 8 * 32 + sum(old[156:]))
    yield "extended-0.tar", bytes(old) + (b"1".ljust(504) + b"\1" * 8) * 20_000, str(1 << 16)
    records = b"".join(b"8 %04x=\n" % number for number in range(4000))
    yield "all-0.tar", member("p", records, b"g") + header("x", 0) * 130_000, "4000"
    yield "each-0.tar", (member("p", records, b"x") + header("x", 0)) * 2000, "4000"
    yield "members-0.tar", header("x", 0) * 140_000, str(1 << 17)


def checkpoints() -> Iterator[Hostile]:
    """Checkpoints of a million of anything."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"t{i}": entry for i in range(200_000)}).encode()
    yield "tensors.safetensors", struct.pack("<Q", len(text)) + text, str(len(text))
    record = b"\n\x0d" + b"\n\1a" + b"\x12\x08" + b"\x12\x06" + b"int8  "[:6]
    yield "records.ckpt", record * 10**5, ""


def recipes() -> Iterator[Hostile]:
    """Recipes whose values multiply, or that are long or deep."""
    laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    yield "laughs.yaml", ("a0: &a0 [x]\n" + laughs).encode(), "line 2"
    yield "long.yaml", b"- x\n" * 10**6, str(1 << 15)
    yield "deep.yaml", b"[" * 30_000, ""
    yield "digits.yaml", b"epochs: " + b"9" * 20_000, ""
