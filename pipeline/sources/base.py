"""Image sources: files, members of shards, or pixels in memory."""

import copy
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from ..images import DataError, decode_image, read_file, to_grey
from .listing import LeftOut, some_of


class Source(ABC):
    """Labelled images that can be read in any order, by several processes at once.

    Attributes:
        classes: Names of the classes.
        targets: Class of each image, ``N`` of int64.
        shards: Number of images of each shard, whose images are best read together and in
            order; ``None`` if any order is equally good.
        left_out: What its folder has and is not among the images.
        notices: What the user should know about the choice of images.
        is_remote: Reading an image may fetch a file.
        is_upright: The EXIF orientation is applied.
        is_grey: Images are grey, in three equal channels.
    """

    classes: Sequence[str]
    targets: np.ndarray
    shards: Sequence[int] | None = None
    left_out = LeftOut()  # replaced by sources of folders, never changed
    notices: tuple[str, ...] = ()
    is_remote = False
    is_upright = False
    is_grey = False

    def __len__(self) -> int:
        return len(self.targets)

    def in_classes(self, classes: Sequence[str], title: str, source: str = "training") -> Self:
        """Return these images with ``classes``, by which they are numbered by name.

        Classes without images are allowed; a notice names them.

        Args:
            classes: Names of the classes, which include those of the images.
            title: Name of the images for messages.
            source: What the classes are those of.

        Raises:
            DataError: A class of the images is not one of them.
        """
        if list(self.classes) == list(classes):
            return self
        numbers = {name: number for number, name in enumerate(classes)}
        if unknown := [name for name in self.classes if name not in numbers]:
            raise DataError(
                f"{title} has classes that {source} does not have: {some_of(unknown)}; its classes"
                f" are {some_of(list(classes))}"
            )
        renumbered = np.array([numbers[name] for name in self.classes], np.int64)
        found = copy.copy(self)
        found.targets, found.classes = renumbered[self.targets], list(classes)
        if missing := sorted({*classes} - {*self.classes}, key=numbers.get):
            share = f"{len(self.classes):,} of {len(classes):,}"
            found.notices += (f"{title} has {share} classes of {source}: no {some_of(missing)}",)
        return found

    def decoded_as(self, is_upright: bool, is_grey: bool = False) -> Self:
        """Return these images, decoded with the EXIF orientation or without, and as grey or RGB."""
        if (self.is_upright, self.is_grey) == (is_upright, is_grey):
            return self
        found = copy.copy(self)
        found.is_upright, found.is_grey = is_upright, is_grey
        return found

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return image ``index``, decoded to RGB.

        Raises:
            CorruptImageError: It cannot be decoded.
        """

    @abstractmethod
    def listing(self) -> Iterator[str]:
        """Yield a line for each image, which tells it from others without reading it.

        Copies of a dataset have the same listing, wherever they are.
        """


class Encoded(Source):
    """Images that have to be decoded."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the encoded image ``index``.

        Raises:
            CorruptImageError: It cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of image ``index`` for messages."""

    def decode(self, data: bytes, index: int) -> Image.Image:
        """Decode the bytes that :meth:`read` returned for ``index`` to RGB.

        Raises:
            CorruptImageError: They cannot be decoded.
        """
        return decode_image(data, self.name(index), self.is_upright, self.is_grey)

    def open(self, index: int) -> Image.Image:
        return self.decode(self.read(index), index)


class Strings(Sequence[str]):
    """Strings in two arrays.

    A list of a million strings would be copied into the memory of every loader process, little
    by little, as each process counts its own references.

    Args:
        text: All strings as UTF-8, one after the other, uint8.
        sizes: Bytes of each string, ``N``.
    """

    def __init__(self, text: np.ndarray, sizes: np.ndarray):
        self.text, self.sizes = text, sizes
        self._ends = np.cumsum(sizes, dtype=np.int64)

    @classmethod
    def of(cls, strings: Sequence[str]) -> "Strings":
        """Encode strings, such as paths that need not be valid UTF-8."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        sizes = np.array([len(string) for string in encoded], np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> str:
        end = self._ends[index]
        return (
            self.text[end - int(self.sizes[index]) : end]
            .tobytes()
            .decode("utf-8", "surrogateescape")
        )

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.tobytes(), 0
        for end in self._ends.tolist():
            yield text[start:end].decode("utf-8", "surrogateescape")
            start = end


class Files(Encoded):
    """Image files.

    Args:
        paths: Path of each file.
        targets: Class of each file.
        classes: Names of the classes.
        folder: Folder of the dataset, within which the images have names.

    Attributes:
        held_out: Flags that chose these images for validation; empty if a folder did.
    """

    held_out = ""

    def __init__(
        self,
        paths: Sequence[str | Path],
        targets: Sequence[int],
        classes: Sequence[str],
        folder: str | Path = "",
    ):
        self._paths, self.folder = Strings.of(list(map(str, paths))), str(folder)
        self.targets, self.classes = np.asarray(targets, np.int64), list(classes)

    def names(self) -> list[str]:
        """Return the path of each image within the folder of the dataset, with slashes."""
        start = os.path.join(self.folder, "")  # ends in a separator
        return [path.removeprefix(start).replace(os.sep, "/") for path in self._paths]

    def select(self, indices: np.ndarray) -> Self:
        """Return the images ``indices``, with the same classes and notices."""
        paths, part = list(self._paths), copy.copy(self)
        part._paths = Strings.of([paths[index] for index in indices])
        part.targets = self.targets[indices]
        return part

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))

    def listing(self) -> Iterator[str]:
        paths = list(self._paths)
        root = os.path.commonpath([os.path.dirname(min(paths)), os.path.dirname(max(paths))])
        for path in paths:
            yield f"{path.removeprefix(root).lstrip(os.sep)}, {file_size(path)} bytes"


def file_size(path: str) -> int | None:
    """Return the bytes of a file; None if there is none, which is an error once it is read."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


class Pixels(Source):
    """Decoded images of one size, in memory.

    Args:
        pixels: ``N H W 3`` of uint8.
        targets: Class of each image.
        classes: Names of the classes.
    """

    def __init__(self, pixels: np.ndarray, targets: Sequence[int], classes: Sequence[str]):
        self.pixels = pixels
        self.targets, self.classes = np.asarray(targets, np.int64), list(classes)

    def decoded_as(self, is_upright: bool, is_grey: bool = False) -> Self:
        found = super().decoded_as(is_upright, is_grey)
        if is_grey and not self.is_grey:
            images = (to_grey(self.open(index)) for index in range(len(self)))
            found.pixels = np.stack([np.asarray(image) for image in images])
        return found

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def listing(self) -> Iterator[str]:
        for index, image in enumerate(self.pixels):
            yield f"image {index} of CRC-32 {zlib.crc32(np.ascontiguousarray(image)):08x}"
