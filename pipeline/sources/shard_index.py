"""Contents of packed shards: tar files in WebDataset's format, and their index."""

import hashlib
import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from ..images import MAX_BYTES, DataError
from .base import Strings
from .download import PIPE, REMOTE
from .listing import image_suffixes

FORMAT = "packed shards 1"
LABEL = "cls"
ANY_IMAGE = ("img", "image")  # suffixes of images of any format
DTYPES = (np.int64, np.uint32, np.int32, np.uint32, np.uint8, np.uint16)  # of Members
DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError)
META = re.compile(r"__[^/]*__($|/)")  # names that the webdataset library passes over, too
BLOCK = 512  # bytes, of a tar file
CHUNK = 2**20  # bytes
MAX_INDEX = 2**24  # bytes of JSON, enough for 100,000 shards
MAX_MEMBERS = 2**17  # files in a shard
MAX_HEADER = 2**15  # bytes of a long name or of PAX records, which tarfile parses in Python
MAX_DIGITS = 256  # one after the other in a header; tarfile's patterns take the square of it
MAX_RECORDS = 64  # of PAX for a member; tarfile applies those for all members to each of them
MAX_LABEL = 64  # bytes
MEMBER_BYTES = 300  # in an index, of which a name takes most
TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError)


class Members(NamedTuple):
    """Images of one shard or of consecutive shards, in order.

    Attributes:
        offsets: Start of each image in its shard, bytes, ``N`` of int64.
        sizes: Bytes of each image, ``N`` of uint32.
        targets: Class of each image, ``N`` of int32.
        checksums: CRC-32 of each image, ``N`` of uint32, or none.
        names: All names as UTF-8, one after the other, uint8.
        name_sizes: Bytes of each name, ``N`` of uint16.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    targets: np.ndarray
    checksums: np.ndarray
    names: np.ndarray
    name_sizes: np.ndarray

    def to_bytes(self) -> bytes:
        """Return a file of :func:`numpy.savez_compressed`."""
        file = io.BytesIO()
        np.savez_compressed(file, **self._asdict())
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str, images: int) -> "Members":
        """Read the result of :meth:`to_bytes`, which has so many images.

        Raises:
            DataError: It is damaged; calls it ``name``.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                size = sum(info.file_size for info in archive.infolist())
            if size > index_bytes(images):
                raise ValueError(f"{size} bytes are too many for {images} images")
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
        """Concatenate the images of consecutive shards."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Part:
    """File of an index: name, bytes, and their SHA-256 if it is known."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Shard(Part):
    """Shard with its number of images."""

    images: int


@dataclass(frozen=True)
class Index:
    """Contents of shards: names of the classes, shards, and all images in order."""

    classes: list[str]
    shards: list[Shard]
    members: Members

    def to_json(self, members: Part, **notes: Any) -> str:
        """Return the text of the index.

        Args:
            members: File next to it, of ``members.to_bytes()``.
            notes: Further values to keep.
        """
        content = {"format": FORMAT, "classes": self.classes, "members": asdict(members)}
        return json.dumps(content | {"shards": list(map(asdict, self.shards))} | notes, indent=1)


def index_bytes(images: int) -> int:
    """Return the most bytes that the columns of so many images may take."""
    return MEMBER_BYTES * images + CHUNK


def parse_index(text: bytes, name: str) -> tuple[list[str], list[Shard], Part]:
    """Return classes, shards and the file of the images of a text of :meth:`Index.to_json`.

    Raises:
        DataError: It is something else; calls it ``name``.
    """
    try:
        if len(text) > MAX_INDEX:
            raise ValueError(f"it has {len(text)} bytes, of which at most {MAX_INDEX} are read")
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        shards = [_checked(Shard(**values)) for values in content["shards"]]
        if not shards:
            raise ValueError("it names no shards")
        part = _checked(Part(**content["members"]))
        return [str(name) for name in content["classes"]], shards, part
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{name} is not an index of shards, or is damaged: {error}") from error


def _checked(file: Part) -> Any:
    """Return a shard or part that names a file of its own folder.

    Raises:
        TypeError, ValueError: A value is not of its kind.
    """
    numbers = [file.size, getattr(file, "images", 0)]
    if not all(isinstance(number, int) and 0 <= number < 2**53 for number in numbers):
        raise ValueError(f"{asdict(file)} has a size that is not a number")
    if numbers[1] * BLOCK > file.size:
        raise ValueError(f"{asdict(file)} is too small for its images")
    if file.name in ("", ".", "..") or {"/", "\0"} & {*file.name} or file.name.startswith(REMOTE):
        raise ValueError(f"{file.name!r} is not a file of its folder")
    if file.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", file.sha256):
        raise ValueError(f"{file.sha256!r} is not a SHA-256")
    return file


def is_pattern(path: str) -> bool:
    """Return True for a pattern of shards, False for a folder or base URL."""
    return path.startswith(PIPE) or bool(re.search(r"\.tar$|[{]", split_path(path)[1]))


def split_path(path: str) -> tuple[str, str, str]:
    """Return folder with its slash, file name, and query of a path or URL."""
    head, mark, query = path.partition("?") if path.startswith(REMOTE) else (path, "", "")
    start = head.rfind("/") + 1
    return head[:start], head[start:], mark + query


def sibling(path: str, name: str) -> str:
    """Return path or URL of the file ``name`` in the folder of ``path``."""
    folder, _, query = split_path(path)
    return f"{folder}{name}{query}"


def expand_pattern(pattern: str) -> list[str]:
    """Return the shards of a pattern.

    Raises:
        DataError: It names one twice, or cannot be parsed.
    """
    try:
        paths = list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError as error:
        raise DataError(f"{pattern} has an unbalanced brace") from error
    if len(set(paths)) < len(paths):
        raise DataError(f"{pattern} names a shard twice")
    return paths


def index_name(pattern: str) -> str:
    """Return the name of the index of shards: ``train`` of ``shards/train-{0000..0146}.tar``."""
    name = re.sub(r"\d*\.tar$", "", split_path(pattern)[1].partition("{")[0])
    return name.rstrip("-_.") or "shards"


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 of a file, from its start."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


class _Headers:
    """A tar file without the bytes of its members, for tarfile.

    Args:
        file: The tar file.

    Attributes:
        left: Bytes that the headers of the current member may still have.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell, self.left = file, file.seek, file.tell, 2 * MAX_HEADER

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes, at most {MAX_HEADER} are read")
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError(f"a member has more than {2 * MAX_HEADER} bytes of headers")
        data = self.file.read(size)
        if size > BLOCK:
            digits = max(map(len, re.findall(rb"[0-9]+", data)), default=0)
            if digits > MAX_DIGITS or data.count(b"hdrcharset=") > 1:
                raise tarfile.ReadError(
                    f"a header with {digits} digits in a row, at most {MAX_DIGITS} are read, or"
                    f" with two character sets"
                )
        return data


def _members(archive: tarfile.TarFile, headers: _Headers, name: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file, keeping none.

    Raises:
        DataError: There are too many, or too many records for all of them.
        tarfile.TarError: It is damaged, or its headers would take long.
    """
    count = 0
    while (member := archive.next()) is not None:
        count, records = count + 1, max(len(archive.pax_headers), len(member.pax_headers))
        if count > MAX_MEMBERS:
            raise DataError(f"{name} has more than {MAX_MEMBERS} members")
        if records > MAX_RECORDS:
            raise DataError(
                f"{name}: {member.name[:100]} has {records} records (PAX), of which at most"
                f" {MAX_RECORDS} are read"
            )
        yield member
        archive.members.clear()  # tarfile keeps them: 100,000 take 200 MB
        headers.left = 2 * MAX_HEADER


def scan_shard(file: BinaryIO, name: str, with_checksums: bool = False) -> Members:
    """Read images and labels of a tar file from its headers.

    Args:
        file: The shard.
        name: Its name for messages.
        with_checksums: Read the images, too, for their checksums.

    Raises:
        DataError: It is not a complete tar file, or an image or a label lacks the other, occurs
            twice, or is not a class; names shard and key.
    """
    images: dict[str, tuple[str, int, int, int]] = {}
    labels: dict[str, int] = {}
    headers = _Headers(file)
    try:
        with tarfile.open(fileobj=headers, mode="r:") as archive:
            for member in _members(archive, headers, name):
                if member.size < 0:
                    raise DataError(f"{name}: {member.name[:100]} has {member.size} bytes")
                folder, _, last = member.name.rpartition("/")
                stem, _, suffix = last.partition(".")
                if not member.isreg() or META.match(member.name) or not (stem and suffix):
                    continue
                key, suffix = (f"{folder}/{stem}" if folder else stem), suffix.lower()
                if (kind := _kind_of(suffix.rpartition(".")[2])) is None:
                    continue
                if "." in suffix:
                    raise DataError(_split_name(name, member.name[:100], key, suffix))
                if member.issparse() or not 0 <= member.size <= MAX_BYTES:
                    raise DataError(
                        f"{name}: {member.name[:100]} is sparse, or has {member.size} bytes,"
                        f" of which at most {MAX_BYTES} are read"
                    )
                if key in (labels if suffix == LABEL else images):
                    raise DataError(f"{name}: {key} has two {kind}, or occurs twice")
                if suffix == LABEL:
                    labels[key] = _parse_label(
                        _read(file, member, MAX_LABEL), f"{name}: label of {key}"
                    )
                else:
                    checksum = zlib.crc32(_read(file, member)) if with_checksums else 0
                    images[key] = (member.name, member.offset_data, member.size, checksum)
            end = archive.offset
    except TAR_ERRORS as error:
        raise DataError(
            f"{name} is not a complete tar file (it must not be compressed): {error}"
        ) from error
    file.seek(end)
    if len(block := file.read(BLOCK)) < BLOCK or block.strip(b"\0") or not _is_zero(file):
        raise DataError(f"{name} is cut off or damaged at byte {end:,}")
    if incomplete := sorted(images.keys() ^ labels.keys()):
        lacks = f"label ({LABEL})" if incomplete[0] in images else "image"
        raise DataError(
            f"{name}: {incomplete[0]} has no {lacks}; {len(incomplete)} lack one or the other"
        )
    names = Strings.of([image[0] for image in images.values()])
    rows = np.array([image[1:] for image in images.values()], np.int64).reshape(-1, 3)
    return Members(
        offsets=rows[:, 0],
        sizes=rows[:, 1].astype(np.uint32),
        targets=np.array([labels[key] for key in images], np.int32),
        checksums=rows[: len(rows) if with_checksums else 0, 2].astype(np.uint32),
        names=names.text,
        name_sizes=names.sizes.astype(np.uint16),
    )


def _split_name(shard: str, member: str, key: str, suffix: str) -> str:
    """Return the message for an image or a label with a dot in its name."""
    folder, _, last = member.rpartition("/")
    head, _, end = last.rpartition(".")
    right = f"{folder}/" * bool(folder) + f"{head.replace('.', '_')}.{end}"
    return (
        f"{shard}: {member} is {suffix!r} of sample {key!r}, as the first dot of a name ends the"
        f" key: an image and its label ({LABEL}) must not have others, as in {right}"
    )


def _read(file: BinaryIO, member: tarfile.TarInfo, limit: int = MAX_BYTES) -> bytes:
    file.seek(member.offset_data)
    return file.read(min(member.size, limit))


def _kind_of(suffix: str) -> str | None:
    """Return ``images`` or ``labels`` for the last suffix of a member, else None."""
    if suffix == LABEL:
        return "labels"
    return "images" if suffix in ANY_IMAGE or f".{suffix}" in image_suffixes() else None


def _parse_label(data: bytes, name: str) -> int:
    text = data.decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise DataError(
            f"{name} is {text[:20]!r}, not the number of a class, from 0: images have one class"
            " each"
        )
    return int(text)


def _is_zero(file: BinaryIO) -> bool:
    """Return True if the rest of a file is zeros."""
    return not any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(CHUNK), b""))
