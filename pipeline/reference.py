"""Images under transforms of torchvision and timm, one at a time: what the rest is measured by."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate, get_worker_info

from pipeline.images import CorruptImageError, DataError
from pipeline.sources.base import Source
from samplers import SampleIndex, mix_seed

Found = TypeVar("Found")


class Sample(NamedTuple):
    """One augmented image; ``image`` is None where the file is corrupt and skipped.

    ``corrupt`` has the message of each corrupt file met: ``cannot decode image PATH: WHY``.
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
    """Images of a source, where a corrupt one is an error, or is stood in for or left out.

    Args:
        source: The images.
        is_train: Whether these are training images.
        seed: Seed of the run; with a :class:`SampleIndex` as index, each draw has its own numbers.
        skip_corrupt: Instead of raising, replace a corrupt training image by the next sound
            one of its class, and leave a corrupt evaluation image out; both are reported.
    """

    def __init__(self, source: Source, is_train: bool, seed: int = 0, skip_corrupt: bool = False):
        self.source = source
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
        """What ``read`` makes of image ``index``, or of what stands for it.

        The global random numbers are seeded; see :func:`kept_random_numbers`.

        Returns:
            It, or None for an evaluation image that is left out; its class; and the messages of
            the corrupt files met.

        Raises:
            CorruptImageError: Corrupt images are not to be skipped.
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
    """Images under a transform whose random numbers depend on the draw alone.

    Args:
        transform: PIL image to tensor ``3 H W``.
        source, is_train, seed, skip_corrupt: See :class:`LabelledImages`.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], torch.Tensor],
        is_train: bool,
        seed: int = 0,
        skip_corrupt: bool = False,
    ):
        super().__init__(source, is_train, seed, skip_corrupt)
        self.transform = transform

    def __getitem__(self, index: int) -> Sample:
        with kept_random_numbers():
            return self._sample(index)

    def _sample(self, index: int) -> Sample:
        return Sample(*self.find(index, lambda i: self.transform(self.source.open(i))))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch of these images."""
        with kept_random_numbers():
            samples = [self._sample(index) for index in indices]
        corrupt = [message for sample in samples for message in sample.corrupt]
        sound = [(sample.image, sample.target) for sample in samples if sample.image is not None]
        if not sound:
            return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), corrupt)
        return Batch(*default_collate(sound), corrupt)


def seed_generators(seed: int) -> None:
    """Seed Python, NumPy and torch's CPU generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def kept_random_numbers() -> Iterator[None]:
    """Leave the random numbers of the main process as they were before the block.

    A loader process has no other use of them, so there they are not restored.
    """
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
