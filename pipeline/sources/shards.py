"""Images packed in shards, read in any order by an index."""

import glob
import hashlib
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pipeline.images import CorruptImageError, DataError
from pipeline.sources.base import Encoded
from pipeline.sources.download import PIPE, REMOTE, Cache, NotThereError, default_folder, shown
from pipeline.sources.shard_index import (
    Index,
    Members,
    Shard,
    beside,
    expand_pattern,
    file_of,
    index_name,
    is_pattern,
    parse_index,
    scan_shard,
    sha256_of,
    split_place,
)

OPEN_FILES = 256
OPEN_IN_BOUNDED_CACHE = 16  # what is open cannot make room
EXAMPLES = 3  # names shown in a message


class _Descriptor:
    """An open file, closed when the last that reads from it is done with it."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close):
        close(self.number)  # at the end of the interpreter the name os may be gone


class _OpenFiles:
    """Shards that this process keeps open, those used last; safe to use from several threads.

    Args:
        places: Path or URL of each.
        shards: What the index says of each.
        cache: Where remote ones are kept.
    """

    def __init__(self, places: Sequence[str], shards: Sequence[Shard], cache: Cache | None):
        self.places, self.shards, self.cache = places, shards, cache
        bounded = cache is not None and cache.max_bytes is not None
        self._limit = OPEN_IN_BOUNDED_CACHE if bounded else OPEN_FILES
        self._start()

    def _start(self) -> None:
        self._files: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock, self._process = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple:
        return _OpenFiles, (self.places, self.shards, self.cache)

    def _open(self, number: int) -> _Descriptor:
        shard = self.shards[number]
        return _Descriptor(open_shard(self.places[number], self.cache, shard.size, shard.sha256))

    def __getitem__(self, number: int) -> _Descriptor:
        if self._process != os.getpid():  # a fork: another thread may have held the lock
            self._start()
        with self._lock:
            if (file := self._files.get(number)) is not None:
                self._files.move_to_end(number)
                return file
            while len(self._files) >= self._limit:
                self._files.popitem(last=False)
        file = self._open(number)  # may take long, so that another thread may do it, too
        with self._lock:
            self._files[number] = file
        return file


class Shards(Encoded):
    """Images in shards.

    Args:
        index: What they hold.
        places: Path or URL of each shard.
        cache: Where remote shards are kept.

    Raises:
        DataError: There are no images; an index does not fit itself or a local shard.
    """

    def __init__(self, index: Index, places: Sequence[str], cache: Cache | None = None):
        members = index.members
        self.classes, self.targets = index.classes, members.targets.astype(np.int64)
        self.shards = tuple(shard.images for shard in index.shards)
        self._stops = np.cumsum(self.shards)
        self._offsets, self._sizes = members.offsets, members.sizes
        self._checksums = members.checksums
        self._names, self._ends = members.names, np.cumsum(members.name_sizes, dtype=np.int64)
        self.places, self._files = list(places), _OpenFiles(places, index.shards, cache)
        self._shown = [shown(place) for place in places]
        self._check(index.shards)

    def _check(self, shards: Sequence[Shard]) -> None:
        """Everything that can be known without reading images."""
        if not len(self):
            raise DataError(f"{self._shown[0]} and the other shards hold no images")
        if self._stops[-1] != len(self) or self._ends[-1] != len(self._names):
            raise DataError(f"the index of {self._shown[0]} is damaged: its parts do not fit")
        room = np.repeat([shard.size for shard in shards], self.shards)
        if (self._offsets < 0).any() or (self._offsets + self._sizes > room).any():
            raise DataError(f"the index of {self._shown[0]} is damaged: images beyond the shards")
        wrong = np.flatnonzero((self.targets < 0) | (self.targets >= len(self.classes)))
        if len(wrong):
            raise DataError(
                f"{self.name(wrong[0])}: its label is {self.targets[wrong[0]]}, but there are"
                f" {len(self.classes)} classes, from 0"
            )
        for place, shard in zip(self.places, shards, strict=True):
            if not place.startswith(REMOTE):
                _check_size(place, place, shard.size)

    def name(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        member = self._names[start : self._ends[index]].tobytes()
        number = np.searchsorted(self._stops, index, "right")
        return f"{self._shown[number]}/{member.decode('utf-8', 'surrogateescape')}"

    def read(self, index: int) -> bytes:
        """The encoded image ``index``.

        Raises:
            CorruptImageError: It cannot be read whole, or is not what the index says.
            DataError: Its shard cannot be had, or is another than that of the index.
        """
        file = self._files[int(np.searchsorted(self._stops, index, "right"))]
        size = int(self._sizes[index])
        try:
            data = _read_at(file.number, size, int(self._offsets[index]))
        except OSError as error:
            raise self._corrupt(index, error.strerror) from error
        if len(data) < size:
            raise self._corrupt(index, "its shard has become shorter")
        if len(self._checksums) and zlib.crc32(data) != self._checksums[index]:
            raise self._corrupt(index, "its checksum (CRC-32) is not that of the index")
        return data

    def _corrupt(self, index: int, reason: str) -> CorruptImageError:
        return CorruptImageError(f"cannot decode image {self.name(index)}: {reason}")


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """``size`` bytes of a file, or fewer if it ends before."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def open_shard(
    place: str, cache: Cache | None, size: int | None = None, sha256: str | None = None
) -> int:
    """A descriptor of a shard, which is fetched if it is remote.

    Raises:
        DataError: It is not there, or not what it must be.
    """
    if place.startswith(REMOTE):
        prove = _anything if sha256 else lambda file: scan_shard(file, shown(place))
        return cache.open(place, size, sha256, prove)
    try:
        descriptor = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"cannot read shard {place}: {error.strerror}") from error
    if size is not None:
        _check_size(place, descriptor, size)
    return descriptor


def _anything(file: object) -> None:
    """No further proof."""


def _check_size(place: str, file: str | int, size: int) -> None:
    """Refuse a local shard that has not ``size`` bytes."""
    try:
        found = os.stat(file).st_size
    except OSError as error:
        raise DataError(f"cannot read shard {place}: {error.strerror}") from error
    if found != size:
        raise DataError(f"{place} does not match its index: it has {found:,} bytes, not {size:,}")


def open_shards(
    path: str | Path, is_train: bool, val_path: str | None = None, cache: Cache | None = None
) -> Shards:
    """The training or validation set of packed shards.

    A place of shards is a folder or base URL with ``train.json`` and ``val.json``, the indices
    that ``tools.pack_dataset`` writes; or a pattern of shards, as ``train-{000000..000146}.tar``,
    with path, URL, or ``pipe:`` and a command. A pattern's index is looked for beside the shards,
    unless they come by a command; without one, the shards are scanned.

    Args:
        path: DistInfo of the training shards. A folder has the validation shards, too. Beside a
            pattern they have to lie as ``val.json``, or locally ``val*.tar``; a pattern of shards
            whose names begin with ``val`` stands for them itself.
        is_train: Which of the two to open.
        val_path: DistInfo of the validation shards, if they are elsewhere.
        cache: Where remote shards are kept, if not in this user's temporary folder.

    Raises:
        DataError: Something is missing, does not fit, or cannot be fetched; says what.
    """
    train_place = str(path).removeprefix("file://")
    place = str(val_path or path).removeprefix("file://")
    remote = [one for one in (place, train_place) if one.startswith(REMOTE)]
    if cache is None and remote:
        cache = Cache(default_folder(remote[0]))
    if is_train:
        return _open_place(train_place, "train", cache, None)
    classes = _classes_at(train_place, cache)
    if val_path or not is_pattern(place) or file_of(place).startswith("val"):
        return _open_place(place, "val", cache, classes)
    return _open_beside(place, cache, classes)


def _open_place(place: str, split: str, cache: Cache | None, classes: list[str] | None) -> Shards:
    """The shards of a folder, base URL or pattern."""
    if is_pattern(place):
        return _open_pattern(place, cache, classes)
    location = f"{place.rstrip('/')}/{split}.json"
    content = _read_json(location, cache)
    if content is None:
        raise DataError(_advice(place, split))
    return _open_index(content, location, cache, classes)


def _advice(place: str, split: str) -> str:
    """What would be right instead of a folder without an index."""
    if os.path.isdir(os.path.join(place, split)):
        return (
            f"{place} is a folder of images, not of shards: pack it by python -m"
            f" tools.pack_dataset --data-path {place} --output OUT, or leave --data-set out"
        )
    shards = sorted(glob.glob(f"{glob.escape(place)}/*.tar"))
    if not shards:
        return f"{place} has no {split}.json, the index of shards, nor shards (*.tar)"
    return (
        f"{place} has no {split}.json, the index of shards: give the names of its {len(shards)}"
        f" shards as a pattern, as {place}/{split}-{{000000..000099}}.tar, or with python -m"
        f" tools.pack_dataset --index PATTERN an index"
    )


def _open_beside(pattern: str, cache: Cache | None, classes: list[str] | None) -> Shards:
    """The validation shards in the folder of training shards."""
    if not pattern.startswith(PIPE):
        first = expand_pattern(pattern)[0]
        content = _read_json(beside(first, "val.json"), cache)
        if content is not None:
            return _open_index(content, beside(first, "val.json"), cache, classes)
        if not first.startswith(REMOTE):
            found = sorted(glob.glob(f"{glob.escape(split_place(first)[0])}val*.tar"))
            if found:
                return Shards(scan_shards(found, cache, classes), found)
    raise DataError(f"no validation shards beside {pattern}: --val-path says where they are")


def _open_pattern(pattern: str, cache: Cache | None, classes: list[str] | None) -> Shards:
    places = expand_pattern(pattern)
    if not pattern.startswith(PIPE) and len({split_place(place)[0] for place in places}) == 1:
        location = beside(places[0], f"{index_name(pattern)}.json")
        content = _read_json(location, cache)
        if content is not None:
            shards = _open_index(content, location, cache, classes)
            if set(shards.places) != set(places):
                lone = sorted(set(shards.places) ^ set(places))
                raise DataError(
                    f"{location} and {pattern} differ: only one of them has {_some(lone)}"
                )
            return shards
    return Shards(scan_shards(places, cache, classes), places, cache)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (", ..." if len(names) > EXAMPLES else "")


def scan_shards(
    places: Sequence[str],
    cache: Cache | None = None,
    classes: list[str] | None = None,
    with_checksums: bool = False,
) -> Index:
    """The index of shards, from what they hold.

    Args:
        places: Path or URL of each.
        cache: Where remote shards are kept.
        classes: Names of the classes; without them their numbers, to the highest label.
        with_checksums: Of shards and images, for which all of them are read.

    Raises:
        DataError: A shard cannot be had, or its content used; names it.
    """
    shards, parts = [], []
    for place in places:
        with os.fdopen(open_shard(place, cache), "rb") as file:
            members = scan_shard(file, shown(place), with_checksums)
            digest = sha256_of(file) if with_checksums else None
            size = os.fstat(file.fileno()).st_size
        shards.append(Shard(file_of(place), size, digest, len(members.sizes)))
        parts.append(members)
    members = Members.joined(parts)
    numbers = range(int(members.targets.max(initial=-1)) + 1)
    return Index(classes or [str(number) for number in numbers], shards, members)


def _classes_at(path: str, cache: Cache | None) -> list[str] | None:
    """Names of the classes in the index of training shards, if there is one."""
    if path.startswith(PIPE):
        return None
    if is_pattern(path):
        location = beside(expand_pattern(path)[0], f"{index_name(path)}.json")
    else:
        location = f"{path.rstrip('/')}/train.json"
    content = _read_json(location, cache)
    return None if content is None else parse_index(content, location)[0]


def _read_json(location: str, cache: Cache | None) -> bytes | None:
    """An index, if there is one."""
    try:
        if location.startswith(REMOTE):
            return cache.fetch(location)
        return Path(location).read_bytes()
    except (FileNotFoundError, NotADirectoryError, NotThereError):
        return None
    except OSError as error:
        raise DataError(f"cannot read {location}: {error.strerror}") from error


def _open_index(
    content: bytes, location: str, cache: Cache | None, classes: list[str] | None
) -> Shards:
    """The shards beside an index; with ``classes``, those of the training set."""
    own, shards, part = parse_index(content, location)
    if classes is not None and classes[: len(own)] != own:
        lone = sorted(set(own) ^ set(classes)) or ["their order"]
        raise DataError(f"{location} has other classes than the training set: {_some(lone)}")
    members_at = beside(location, part.name)
    with os.fdopen(open_shard(members_at, cache, part.size, part.sha256), "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise DataError(f"{members_at} is not the one that {location} was written with")
    index = Index(classes or own, shards, Members.from_bytes(data, members_at))
    return Shards(index, [beside(location, shard.name) for shard in shards], cache)
