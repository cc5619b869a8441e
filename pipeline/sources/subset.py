"""A fixed share of a dataset, the same for every class."""

from collections.abc import Iterator

import numpy as np

from .base import Encoded, Pixels, Source

SEED = 2103_10697  # of the choice, which depends on the dataset and not on the run


def stratified_share(targets: np.ndarray, ratio: float) -> np.ndarray:
    """Return the indices of a share of the images, in ascending order, ``n`` of int64.

    It has ``ratio`` of the images of every class, rounded, and at least one. The choice depends on
    the dataset alone; that of a smaller ratio is a subset of that of a larger one.

    Args:
        targets: Class of each image, ``N``.
        ratio: Above 0 and at most 1.
    """
    generator = np.random.default_rng(SEED)
    order = generator.permutation(len(targets))
    by_class = order[np.argsort(targets[order], kind="stable")]
    ends = np.cumsum(np.unique(targets, return_counts=True)[1])
    classes = np.split(by_class, ends[:-1])
    return np.sort(np.concatenate([c[: max(1, round(ratio * len(c)))] for c in classes]))


def share_of(source: Source, ratio: float) -> Source:
    """Return ``ratio`` of every class of ``source``; see :func:`stratified_share`."""
    if ratio == 1:
        return source
    indices = stratified_share(source.targets, ratio)
    if isinstance(source, Pixels):
        return Pixels(source.pixels[indices], source.targets[indices], source.classes)
    return _Part(source, indices)


class _Part(Encoded):
    """Selected images of a source, in its order."""

    def __init__(self, whole: Encoded, indices: np.ndarray):
        self._whole, self._indices = whole, indices
        self.targets, self.classes = whole.targets[indices], whole.classes
        self.left_out, self.notices = whole.left_out, whole.notices
        self.is_remote = whole.is_remote
        self.is_upright, self.is_grey = whole.is_upright, whole.is_grey
        if whole.shards is not None:
            number = np.searchsorted(np.cumsum(whole.shards), indices, side="right")
            counts = np.bincount(number, minlength=len(whole.shards))
            self.shards = tuple(counts.tolist())

    def name(self, index: int) -> str:
        return self._whole.name(self._indices[index])

    def read(self, index: int) -> bytes:
        return self._whole.read(self._indices[index])

    def listing(self) -> Iterator[str]:
        lines = list(self._whole.listing())
        return (lines[index] for index in self._indices)
