"""What lies where in packed shards: tar files in WebDataset's format, and their index."""

import hashlib
import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from pipeline.images import DataError
from pipeline.sources.download import PIPE, REMOTE

FORMAT = "packed shards 1"
LABEL = "cls"
IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "pgm", "pbm"} | {
    *("tif", "tiff", "jp2", "avif", "ico", "img", "image")
}
DTYPES = (np.int64, np.uint32, np.int32, np.uint32, np.uint8, np.uint16)  # of Members
DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError)
META = re.compile(r"__[^/]*__($|/)")  # names that the webdataset library passes over, too
BLOCK = 512  # bytes, of a tar file


class Members(NamedTuple):
    """The images of a shard, or of several in a row, in their order.

    Attributes:
        offsets: Where each begins in its shard, bytes, ``N`` of int64.
        sizes: Bytes of each, ``N`` of uint32.
        targets: Class of each, ``N`` of int32.
        checksums: CRC-32 of each, ``N`` of uint32, or none.
        names: Their names as UTF-8, one after the other, uint8.
        name_sizes: Bytes of each name, ``N`` of uint16.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    targets: np.ndarray
    checksums: np.ndarray
    names: np.ndarray
    name_sizes: np.ndarray

    def to_bytes(self) -> bytes:
        """As a file of :func:`numpy.savez_compressed`."""
        file = io.BytesIO()
        np.savez_compressed(file, **self._asdict())
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "Members":
        """What :meth:`to_bytes` made.

        Raises:
            DataError: It is damaged; names it.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                columns = [
                    arrays[field].reshape(-1).astype(dtype, casting="safe", copy=False)
                    for field, dtype in zip(cls._fields, DTYPES, strict=True)
                ]
            members, lengths = cls(*columns), {len(column) for column in columns[:3]}
            lengths |= {len(members.name_sizes), len(members.checksums) or len(members.sizes)}
            if len(lengths) > 1:
                raise ValueError("its columns differ in length")
        except (LookupError, TypeError, ValueError, OSError, EOFError, *DAMAGED) as error:
            raise DataError(f"{name} is damaged: {error}") from error
        return members

    @classmethod
    def joined(cls, parts: Sequence["Members"]) -> "Members":
        """The images of consecutive shards."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Shard:
    """A shard: file name, bytes, SHA-256 of them if it is known, and number of images."""

    name: str
    size: int
    sha256: str | None
    images: int


@dataclass(frozen=True)
class Part:
    """The file of an index that lists the images: name, bytes, and SHA-256 of them."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What shards hold: names of the classes, shards, and all images in their order."""

    classes: list[str]
    shards: list[Shard]
    members: Members

    def to_json(self, members: Part, **notes: Any) -> str:
        """The index as text.

        Args:
            members: The file beside it that has ``members.to_bytes()``.
            notes: Further values to keep.
        """
        content = {"format": FORMAT, "classes": self.classes, "members": asdict(members)}
        return json.dumps(content | {"shards": list(map(asdict, self.shards))} | notes, indent=1)


def parse_index(text: bytes, name: str) -> tuple[list[str], list[Shard], Part]:
    """Classes, shards, and the file of the images, of what :meth:`Index.to_json` made.

    Raises:
        DataError: It is something else; calls it ``name``.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        shards = [_typed(Shard, values) for values in content["shards"]]
        if not shards:
            raise ValueError("it names no shards")
        return [str(name) for name in content["classes"]], shards, _typed(Part, content["members"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{name} is no index of shards, or damaged: {error}") from error


def _typed(kind: type, values: dict[str, Any]) -> Any:
    """A ``kind`` of these fields, which name a file of the same folder.

    Raises:
        TypeError, ValueError: They are others.
    """
    made = kind(**values)
    numbers = [made.size, getattr(made, "images", 0)]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"{values} has a size that is no number")
    if made.name in ("", ".", "..") or "/" in made.name or made.name.startswith(REMOTE):
        raise ValueError(f"{made.name!r} is no file of its folder")
    if made.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", made.sha256):
        raise ValueError(f"{made.sha256!r} is no SHA-256")
    return made


def is_pattern(place: str) -> bool:
    """Whether a place is a pattern of shards, and no folder or base URL."""
    return place.startswith(PIPE) or bool(re.search(r"\.tar$|[{]", file_of(place)))


def file_of(place: str) -> str:
    """File name of a path or URL."""
    return split_place(place)[1]


def split_place(place: str) -> tuple[str, str, str]:
    """Folder with its slash, file name, and query of a path or URL."""
    head, mark, query = place.partition("?") if place.startswith(REMOTE) else (place, "", "")
    start = head.rfind("/") + 1
    return head[:start], head[start:], mark + query


def beside(place: str, name: str) -> str:
    """Path or URL of the file ``name`` in the folder of ``place``."""
    folder, _, query = split_place(place)
    return f"{folder}{name}{query}"


def expand_pattern(pattern: str) -> list[str]:
    """The shards that a pattern stands for.

    Raises:
        DataError: It names one twice, or cannot be read.
    """
    try:
        places = list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError as error:
        raise DataError(f"{pattern} has a brace without its other") from error
    if len(set(places)) < len(places):
        raise DataError(f"{pattern} names a shard twice")
    return places


def index_name(pattern: str) -> str:
    """Name of the index of shards: ``train`` of ``shards/train-{0000..0146}.tar``."""
    name = re.sub(r"\d*\.tar$", "", file_of(pattern).partition("{")[0])
    return name.rstrip("-_.") or "shards"


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 of a whole file."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def scan_shard(file: BinaryIO, name: str, with_checksums: bool = False) -> Members:
    """The images and labels of a tar file, from its headers.

    Args:
        file: The shard.
        name: What messages call it.
        with_checksums: Read the images, too, for their checksums.

    Raises:
        DataError: It is no whole tar file, or an image or a label lacks the other, comes twice,
            or is no class; names shard and key.
    """
    images: dict[str, tuple[str, int, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                folder, _, last = member.name.rpartition("/")
                stem, _, suffix = last.partition(".")
                if not member.isreg() or META.match(member.name) or not (stem and suffix):
                    continue
                key = f"{folder}/{stem}" if folder else stem
                suffix = suffix.lower()
                if suffix == LABEL:
                    _refuse_second(labels, key, name, "labels")
                    labels[key] = _read_label(_content(file, member), f"{name}: label of {key}")
                elif suffix in IMAGES:
                    _refuse_second(images, key, name, "images")
                    checksum = zlib.crc32(_content(file, member)) if with_checksums else 0
                    images[key] = (member.name, member.offset_data, member.size, checksum)
            end = archive.offset
    except tarfile.TarError as error:
        raise DataError(f"{name} is no whole tar file (it must not be packed): {error}") from error
    file.seek(end)
    if (block := file.read(BLOCK)).strip(b"\0") or len(block) < BLOCK or _rest(file):
        raise DataError(f"{name} is cut off or damaged at byte {end:,}")
    if lone := sorted(images.keys() ^ labels.keys()):
        lacks = f"label ({LABEL})" if lone[0] in images else "image"
        raise DataError(f"{name}: {lone[0]} has no {lacks}, nor has the other part of {len(lone)}")
    return _members(images, labels, with_checksums)


def _refuse_second(found: dict, key: str, name: str, what: str) -> None:
    if key in found:
        raise DataError(f"{name}: {key} has two {what}, or comes twice")


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _read_label(data: bytes, name: str) -> int:
    text = data.decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise DataError(f"{name} is {text[:20]!r}, not the number of a class, from 0")
    return int(text)


def _rest(file: BinaryIO) -> bytes:
    """What is not 0 of the rest of a file, at least one byte if there is any."""
    while chunk := file.read(2**20):
        if chunk := chunk.strip(b"\0"):
            return chunk
    return b""


def _members(
    images: dict[str, tuple[str, int, int, int]], labels: dict[str, int], with_checksums: bool
) -> Members:
    names = [image[0].encode("utf-8", "surrogateescape") for image in images.values()]
    rows = np.array([image[1:] for image in images.values()], np.int64).reshape(-1, 3)
    return Members(
        offsets=rows[:, 0],
        sizes=rows[:, 1].astype(np.uint32),
        targets=np.array([labels[key] for key in images], np.int32),
        checksums=rows[: len(rows) if with_checksums else 0, 2].astype(np.uint32),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_sizes=np.array([len(name) for name in names], np.uint16),
    )
