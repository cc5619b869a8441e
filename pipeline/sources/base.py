"""Where images come from: files, members of shards, or pixels in memory."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.images import decode_image, read_file


class Source(ABC):
    """Labelled images that can be read in any order, by several processes at once.

    Attributes:
        classes: Names of the classes.
        targets: Class of each image, ``N`` of int64.
        shards: Numbers of images that lie together and are best read together, in their order;
            ``None`` where any order is as good.
    """

    classes: Sequence[str]
    targets: np.ndarray
    shards: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Image ``index``, decoded to RGB.

        Raises:
            CorruptImageError: It cannot be decoded.
        """


class Encoded(Source):
    """Images that have to be decoded."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image ``index``.

        Raises:
            CorruptImageError: It is not there.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages call image ``index``."""

    def decode(self, data: bytes, index: int) -> Image.Image:
        """What :meth:`read` gave for ``index``, decoded to RGB.

        Raises:
            CorruptImageError: It cannot be decoded.
        """
        return decode_image(data, self.name(index))

    def open(self, index: int) -> Image.Image:
        return self.decode(self.read(index), index)


class Files(Encoded):
    """Image files.

    Paths lie in one array: a list of a million strings would be copied into the memory of every
    loader process, little by little, as each counts its own references.

    Args:
        paths: Of the files.
        targets: Class of each.
        classes: Names of the classes.
    """

    def __init__(self, paths: Sequence[str | Path], targets: Sequence[int], classes: Sequence[str]):
        encoded = [str(path).encode("utf-8", "surrogateescape") for path in paths]
        self._text = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([len(path) for path in encoded])
        self.targets, self.classes = np.asarray(targets, np.int64), list(classes)

    def name(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        text = self._text[start : self._ends[index]].tobytes()
        return text.decode("utf-8", "surrogateescape")

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))


class Pixels(Source):
    """Decoded images of one size, in memory.

    Args:
        pixels: ``N H W 3`` of uint8.
        targets: Class of each.
        classes: Names of the classes.
    """

    def __init__(self, pixels: np.ndarray, targets: Sequence[int], classes: Sequence[str]):
        self.pixels = pixels
        self.targets, self.classes = np.asarray(targets, np.int64), list(classes)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])
