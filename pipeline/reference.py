"""Datasets of labelled images, and the reference: torchvision's and timm's transforms."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from samplers import SampleIndex, mix_seed

from .augmentation import Augmentation
from .images import CorruptImageError, DataError
from .sources.base import Source

Found = TypeVar("Found")


class Sample(NamedTuple):
    """One augmented image, or None if its file is corrupt and skipped.

    ``corrupt`` has one message per corrupt file met: ``cannot decode image PATH: WHY``.
    """

    image: torch.Tensor | None
    target: int
    corrupt: tuple[str, ...]


class Batch(NamedTuple):
    """Images ``B 3 H W``, targets ``B`` and the messages of the corrupt files met for them."""

    images: torch.Tensor
    targets: torch.Tensor
    corrupt: list[str]


class LabelledImages(Dataset):
    """Images of a source, and a rule for corrupt ones.

    Args:
        source: The images.
        augmentation: Their augmentation.
        is_train: The images are for training.
        seed: Seed of the run. With it, a :class:`SampleIndex` seeds the random numbers of its
            sample.
        skip_corrupt: Instead of raising, replace a corrupt training image by the next sound
            one of its class, and skip a corrupt evaluation image; both are reported.
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        is_train: bool,
        seed: int = 0,
        skip_corrupt: bool = False,
    ):
        self.source, self.augmentation = source, augmentation
        self.is_train = is_train
        self.seed = seed
        self.skip_corrupt = skip_corrupt
        self.classes: Sequence[str] = source.classes
        self.targets = source.targets

    def __len__(self) -> int:
        return len(self.source)

    def find(
        self, index: int, read: Callable[[int], Found]
    ) -> tuple[Found | None, int, tuple[str, ...]]:
        """Call ``read`` on image ``index``, or on the one that replaces it.

        This seeds the global random generators; see :func:`kept_random_numbers`.

        Returns:
            The result, or None for a skipped evaluation image; its class; and the messages of
            the corrupt files met.

        Raises:
            CorruptImageError: An image is corrupt, and ``skip_corrupt`` is off.
            DataError: A class has no sound training image.
        """
        corrupt: tuple[str, ...] = ()
        for candidate in self._candidates(int(index)):
            try:
                if isinstance(index, SampleIndex):
                    seed_generators(mix_seed(self.seed, index.epoch, index, index.copy))
                return read(candidate), int(self.targets[candidate]), corrupt
            except CorruptImageError as error:
                if not self.skip_corrupt:
                    raise
                corrupt += (str(error),)
        if self.is_train:
            name = self.classes[self.targets[index]]
            raise DataError(f"class {name} has no image that can be decoded")
        return None, int(self.targets[index]), corrupt

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        if self.is_train and self.skip_corrupt:
            same = np.flatnonzero(self.targets == self.targets[index])
            start = int(np.searchsorted(same, index))
            yield from (int(same[(start + i) % len(same)]) for i in range(1, len(same)))


class AugmentedDataset(LabelledImages):
    """Images under the reference transform, one by one; see :class:`LabelledImages`."""

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        is_train: bool,
        seed: int = 0,
        skip_corrupt: bool = False,
    ):
        super().__init__(source, augmentation, is_train, seed, skip_corrupt)
        self.transform = augmentation.compose()

    def __getitem__(self, index: int) -> Sample:
        with kept_random_numbers():
            return self._sample(index)

    def _sample(self, index: int) -> Sample:
        return Sample(*self.find(index, lambda i: self.transform(self.source.open(i))))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch of these images."""
        with kept_random_numbers():
            samples = [self._sample(index) for index in indices]
        corrupt = [message for sample in samples for message in sample.corrupt]
        sound = [(sample.image, sample.target) for sample in samples if sample.image is not None]
        if not sound:
            return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), corrupt)
        return Batch(*default_collate(sound), corrupt)


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def kept_random_numbers() -> Iterator[None]:
    """Restore the random generators after the block, except in a worker, which needs no others."""
    restore = get_worker_info() is None
    if restore:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        if restore:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
