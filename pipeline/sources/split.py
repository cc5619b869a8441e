"""Held-out images: validation without a folder of its own, by a hash of the images' paths."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import numpy as np

from ..images import DataError
from .base import Files
from .listing import some_of

FLAGS = ("val_split", "k_folds", "fold")
LISTED = 10_000  # files of a validation set that are recorded by name; of more, the digest


@dataclass(frozen=True)
class HoldOut:
    """Which images of each class are the validation set.

    The images of a class are ranked by a hash of their paths within the dataset. The choice
    depends on nothing else, and images that are added do not change the order of the others.

    Args:
        val_split: Part of each class, the first ranks: rounded, and never the whole class.
        k_folds, fold: Number of folds, and the one to validate on: ranks of ``fold`` modulo
            ``k_folds``.

    Raises:
        DataError: A value is out of range, one is missing, or they exclude each other.
    """

    val_split: float | None = None
    k_folds: int | None = None
    fold: int | None = None

    def __post_init__(self):
        share, folds, fold = self.val_split, self.k_folds, self.fold
        if share is not None and folds is not None:
            raise DataError(f"--val-split {share} and --k-folds {folds} exclude each other")
        if share is not None and not (isinstance(share, Real) and 0 < share < 1):
            raise DataError(f"--val-split {share} must be above 0 and below 1, such as 0.2")
        if folds is None:
            if fold is not None:
                raise DataError(f"--fold {fold} needs --k-folds K")
            return
        if not isinstance(folds, int) or folds < 2:
            raise DataError(f"--k-folds {folds} must be at least 2")
        if not isinstance(fold, int) or not 0 <= fold < folds:
            given = "needs --fold I" if fold is None else f"--fold {fold}: the fold"
            raise DataError(f"--k-folds {folds} {given}, from 0 to {folds - 1}")

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> Self | None:
        """Return that of the values of flags; None if none of them is given."""
        found = cls(*(flags.get(name) for name in FLAGS))
        return None if found == cls() else found

    def __str__(self) -> str:
        if self.k_folds is None:
            return f"--val-split {self.val_split}"
        return f"--k-folds {self.k_folds} --fold {self.fold}"

    def mask(self, names: Sequence[str], targets: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """Return True for each image of the validation set, ``N`` of bool.

        Args:
            names: Path of each image within the dataset, ``N``.
            targets: Class of each image, ``N``.
            classes: Names of the classes.

        Raises:
            DataError: A class has fewer images than there are folds, or no class has enough
                images for validation.
        """
        counts = np.bincount(targets, minlength=len(classes))
        place = ranks(names, targets, counts)
        if self.k_folds is not None:
            small = int(counts.argmin())
            if counts[small] < self.k_folds:
                raise DataError(
                    f"--k-folds {self.k_folds} is more than class {classes[small]} has images:"
                    f" {counts[small]}"
                )
            return place % self.k_folds == self.fold
        sizes = np.minimum(np.rint(self.val_split * counts), counts - 1)
        if not sizes.any():
            raise DataError(
                f"{self} leaves no image for validation: the largest of {len(classes)} classes has"
                f" {counts.max()}"
            )
        return place < sizes[targets]

    def part(self, source: Files, is_train: bool) -> Files:
        """Return the images to train on, else those to validate on, with notices.

        Raises:
            DataError: As of :meth:`mask`.
        """
        names = source.names()
        held = self.mask(names, source.targets, source.classes)
        part = source.select(np.flatnonzero(held != is_train))
        if is_train:
            return part
        part.held_out = str(self)
        part.notices += (f"{self}: {len(part):,} of {len(source):,} images are for validation",)
        kept = np.bincount(part.targets, minlength=len(part.classes))
        if missing := [name for name, n in zip(part.classes, kept, strict=True) if not n]:
            part.notices += (f"{self} leaves no validation image of class {some_of(missing)}",)
        return part


def ranks(names: Sequence[str], targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the place of each image within its class in the order of hashes, ``N`` of int64.

    Args:
        names: Path of each image. Forms of Unicode that look the same count as the same, as file
            systems have one or another.
        targets: Class of each image, ``N``.
        counts: Number of images of each class, ``C``.
    """
    encoded = (
        unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape") for name in names
    )
    digests = [int.from_bytes(hashlib.sha256(name).digest()[:8]) for name in encoded]
    order = np.lexsort((np.array(digests, np.uint64), targets))
    place = np.empty(len(targets), np.int64)
    place[order] = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place


def record_of_files(source: Files) -> dict[str, Any]:
    """Return what tells the images of a source: a digest of their paths, and, of few, the paths."""
    names = sorted(source.names())
    lines = "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
    found = {"files_sha256": hashlib.sha256(lines).hexdigest()}
    return found | ({"files": names} if len(names) <= LISTED else {})
