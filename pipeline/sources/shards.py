"""Images packed in shards, read in any order by an index."""

import glob
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from ..images import CorruptImageError, DataError, open_regular
from .base import Encoded, Strings
from .download import (
    PIPE,
    REMOTE,
    Cache,
    MissingFileError,
    check_size,
    default_folder,
    without_query,
)
from .listing import some_of
from .shard_index import (
    MAX_INDEX,
    Index,
    Members,
    Shard,
    expand_pattern,
    index_bytes,
    index_name,
    is_pattern,
    parse_index,
    scan_shard,
    sha256_of,
    sibling,
    split_path,
)

OPEN_FILES = 256


class _Descriptor:
    """An open file, closed when its last reader is done with it."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close):
        close(self.number)  # at the end of the interpreter the name os may be gone


class _OpenFiles:
    """Descriptors of shards by their number; those used last stay open. Thread-safe.

    Forked processes share them, as :func:`os.pread` does not move the position in a file.

    Args:
        paths: Path or URL of each shard.
        shards: Entry of each shard in the index.
        cache: Cache of remote shards.
    """

    def __init__(self, paths: Sequence[str], shards: Sequence[Shard], cache: Cache | None):
        def open_number(number: int) -> _Descriptor:
            shard = shards[number]
            return _Descriptor(open_shard(paths[number], cache, shard.size, shard.sha256))

        self._args, self.get = (paths, shards, cache), lru_cache(OPEN_FILES)(open_number)

    def __reduce__(self) -> tuple:
        return _OpenFiles, self._args


class Shards(Encoded):
    """Images in shards.

    Args:
        index: Contents of the shards.
        paths: Path or URL of each shard.
        cache: Cache of remote shards.

    Raises:
        DataError: There are no images; an index does not match itself or a local shard.
    """

    def __init__(self, index: Index, paths: Sequence[str], cache: Cache | None = None):
        members = index.members
        self.classes, self.targets = index.classes, members.targets.astype(np.int64)
        self.shards = tuple(shard.images for shard in index.shards)
        self._stops = np.cumsum(self.shards)
        self._offsets, self._sizes = members.offsets, members.sizes
        self._checksums, self._names = members.checksums, Strings(*members[-2:])
        self.paths, self._files = list(paths), _OpenFiles(paths, index.shards, cache)
        self.is_remote = any(path.startswith(REMOTE) for path in self.paths)
        self._check(index.shards)

    def _check(self, shards: Sequence[Shard]) -> None:
        """Check everything that can be known without reading images."""
        first = without_query(self.paths[0])
        if not len(self):
            raise DataError(f"{first} and the other shards have no images")
        if self._stops[-1] != len(self) or self._names.sizes.sum() != len(self._names.text):
            raise DataError(f"the index of {first} is damaged: its parts do not match")
        room = np.repeat([shard.size for shard in shards], self.shards)
        if (self._offsets < 0).any() or (self._offsets + self._sizes > room).any():
            raise DataError(f"the index of {first} is damaged: images beyond the shards")
        wrong = np.flatnonzero((self.targets < 0) | (self.targets >= len(self.classes)))
        if len(wrong):
            raise DataError(
                f"{self.name(wrong[0])}: its label is {self.targets[wrong[0]]}, but there are"
                f" {len(self.classes)} classes, from 0"
            )
        for path, shard in zip(self.paths, shards, strict=True):
            if not path.startswith(REMOTE):
                os.close(open_shard(path, None, shard.size))

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._stops, index, "right"))

    def name(self, index: int) -> str:
        return f"{without_query(self.paths[self._shard_of(index)])}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        """Return the encoded image ``index``.

        Raises:
            CorruptImageError: It cannot be read completely, or does not match the index.
            DataError: Its shard cannot be read, or is not the one of the index.
        """
        file = self._files.get(self._shard_of(index))
        size = int(self._sizes[index])
        try:
            data = _read_at(file.number, size, int(self._offsets[index]))
        except OSError as error:
            raise self._corrupt(index, error.strerror) from error
        if len(data) < size:
            raise self._corrupt(index, "its shard has become shorter")
        if len(self._checksums) and zlib.crc32(data) != self._checksums[index]:
            raise self._corrupt(index, "its checksum (CRC-32) does not match the index")
        return data

    def listing(self) -> Iterator[str]:
        shards = [split_path(without_query(path))[1] for path in self.paths]
        shard_of = np.repeat(np.arange(len(shards)), self.shards).tolist()
        checksums = self._checksums.tolist() or [None] * len(self)
        columns = (shard_of, self._names, self._sizes.tolist(), checksums)
        for shard, name, size, checksum in zip(*columns, strict=True):
            yield f"{shards[shard]}/{name}, {size} bytes of CRC-32 {checksum}"

    def _corrupt(self, index: int, reason: str) -> CorruptImageError:
        return CorruptImageError(f"cannot decode image {self.name(index)}: {reason}")


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Return ``size`` bytes of a file, or fewer at its end."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def open_shard(
    path: str, cache: Cache | None, size: int | None = None, sha256: str | None = None
) -> int:
    """Return a descriptor of a shard, fetching it if it is remote.

    Raises:
        DataError: It is missing, or not as expected.
    """
    if path.startswith(REMOTE):
        scan = partial(scan_shard, name=without_query(path))
        return cache.open(path, size, sha256, scan if sha256 is None else None)
    try:
        check_size(path, os.stat(path).st_size, size)
        return open_regular(path)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from error


def open_shards(
    path: str | Path, is_train: bool, val_path: str | None = None, cache: Cache | None = None
) -> Shards:
    """Open the training or validation set of packed shards.

    A path of shards is a folder or base URL with ``train.json`` and ``val.json``, the indices
    that ``tools.pack_dataset`` writes; or a pattern of shards, as ``train-{000000..000146}.tar``,
    with path, URL, or ``pipe:`` and a command. The index of a pattern is expected next to the
    shards, unless a command prints them; without one, the shards are scanned.

    Args:
        path: Training shards. A folder has the validation shards, too. For a pattern, these are
            ``val.json``, or locally ``val*.tar``, of the same folder; a pattern of shards whose
            names begin with ``val`` is itself the validation set.
        is_train: Open the training set (else validation).
        val_path: Validation shards, if they are elsewhere.
        cache: Cache of remote shards, by default in this user's temporary folder.

    Raises:
        DataError: Something is missing, does not match, or cannot be fetched; names it.
    """
    train = str(path).removeprefix("file://")
    path = train if is_train else str(val_path or path).removeprefix("file://")
    remote = [one for one in (path, train) if one.startswith(REMOTE)]
    if cache is None and remote:
        cache = Cache(default_folder(remote[0]))
    classes = None if is_train else _classes_at(train, cache)
    if not is_pattern(path):
        location = f"{path.rstrip('/')}/{'train' if is_train else 'val'}.json"
        if (shards := _open_index(location, cache, classes)) is None:
            raise DataError(_advice(path, location))
        return shards
    if is_train or val_path or split_path(path)[1].startswith("val"):
        return _open_pattern(path, cache, classes)
    return _open_val_next_to(path, cache, classes)


def _advice(folder: str, location: str) -> str:
    """Return the message for a folder without an index, with the right command."""
    split = Path(location).stem
    if os.path.isdir(os.path.join(folder, split)):
        return (
            f"{folder} is a folder of images, not of shards: pack it by python -m"
            f" tools.pack_dataset --data-path {folder} --output OUT, or omit --data-set"
        )
    shards = glob.glob(f"{glob.escape(folder)}/*.tar")
    if not shards:
        return f"{folder} has neither {split}.json, the index of shards, nor shards (*.tar)"
    return (
        f"{folder} has no {split}.json, the index of shards: name its {len(shards)} shards by a"
        f" pattern, as {folder}/{split}-{{000000..000099}}.tar, or write an index by python -m"
        f" tools.pack_dataset --index PATTERN"
    )


def _open_val_next_to(pattern: str, cache: Cache | None, classes: list[str] | None) -> Shards:
    """Open the validation shards in the folder of training shards."""
    if not pattern.startswith(PIPE):
        first = expand_pattern(pattern)[0]
        if shards := _open_index(sibling(first, "val.json"), cache, classes):
            return shards
        if not first.startswith(REMOTE):
            found = sorted(glob.glob(f"{glob.escape(split_path(first)[0])}val*.tar"))
            if found:
                return Shards(scan_shards(found, cache, classes), found)
    raise DataError(f"no validation shards next to {pattern}: name them by --val-path")


def _open_pattern(pattern: str, cache: Cache | None, classes: list[str] | None) -> Shards:
    paths = expand_pattern(pattern)
    if not pattern.startswith(PIPE) and len({split_path(path)[0] for path in paths}) == 1:
        location = _index_of(pattern)
        if shards := _open_index(location, cache, classes):
            if different := sorted(set(shards.paths) ^ set(paths)):
                raise DataError(
                    f"{location} and {pattern} differ: only one of them has {some_of(different, 3)}"
                )
            return shards
    return Shards(scan_shards(paths, cache, classes), paths, cache)


def scan_shards(
    paths: Sequence[str],
    cache: Cache | None = None,
    classes: list[str] | None = None,
    with_checksums: bool = False,
) -> Index:
    """Make the index of shards from their contents.

    Args:
        paths: Path or URL of each shard.
        cache: Cache of remote shards.
        classes: Names of the classes; by default their numbers, to the highest label.
        with_checksums: Compute those of shards and images, for which all of them are read.

    Raises:
        DataError: A shard or its content cannot be used; names it.
    """
    shards, parts = [], []
    for path in paths:
        with os.fdopen(open_shard(path, cache), "rb") as file:
            members = scan_shard(file, without_query(path), with_checksums)
            digest = sha256_of(file) if with_checksums else None
            size = os.fstat(file.fileno()).st_size
        shards.append(Shard(split_path(path)[1], size, digest, len(members.sizes)))
        parts.append(members)
    members = Members.joined(parts)
    numbers = range(int(members.targets.max(initial=-1)) + 1)
    return Index(classes or [str(number) for number in numbers], shards, members)


def _index_of(pattern: str) -> str:
    """Return the path or URL of the index of a pattern of shards."""
    return sibling(expand_pattern(pattern)[0], f"{index_name(pattern)}.json")


def _classes_at(path: str, cache: Cache | None) -> list[str] | None:
    """Return the names of the classes in the index of training shards, if there is one."""
    if path.startswith(PIPE):
        return None
    location = _index_of(path) if is_pattern(path) else f"{path.rstrip('/')}/train.json"
    content = _read_json(location, cache)
    return None if content is None else parse_index(content, location)[0]


def _read_json(location: str, cache: Cache | None) -> bytes | None:
    """Return the text of an index, if there is one."""
    try:
        if location.startswith(REMOTE):
            return cache.fetch(location, MAX_INDEX)
        with os.fdopen(open_regular(location), "rb") as file:
            return file.read(MAX_INDEX + 1)  # one more is an error of parse_index
    except (FileNotFoundError, NotADirectoryError, MissingFileError):
        return None
    except OSError as error:
        raise DataError(f"cannot read {location}: {error.strerror}") from error


def _open_index(location: str, cache: Cache | None, classes: list[str] | None) -> Shards | None:
    """Open the shards of an index, if there is one; ``classes`` are those of the training set."""
    content = _read_json(location, cache)
    if content is None:
        return None
    own, shards, part = parse_index(content, location)
    path = sibling(location, part.name)
    images = sum(shard.images for shard in shards)
    if part.size > index_bytes(images):
        raise DataError(f"{location}: {part.size} bytes are too many for {images} images")
    with os.fdopen(open_shard(path, cache, part.size, part.sha256), "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise DataError(f"{path} is not the one that {location} was written with")
    index = Index(own or classes or [], shards, Members.from_bytes(data, path, images))
    found = Shards(index, [sibling(location, shard.name) for shard in shards], cache)
    return found if classes is None else found.in_classes(classes, location)
