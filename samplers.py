"""Which images each rank sees, in which order: training with repeats, exact evaluation."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class Draw(int):
    """Index of an image that also says which draw of it this is.

    The augmentation of a sample is seeded by (run seed, epoch, index, copy), so that it
    depends neither on the number of loader workers nor on where a run was interrupted.

    Attributes:
        epoch: Epoch of the draw.
        copy: Number of the repetition within the epoch, from 0.
    """

    epoch: int
    copy: int

    def __new__(cls, index: int, epoch: int = 0, copy: int = 0) -> "Draw":
        draw = super().__new__(cls, index)
        draw.epoch, draw.copy = epoch, copy
        return draw


class RASampler(Sampler[Draw]):
    """Repeated augmentation over the ranks of a distributed run.

    An epoch has about as many samples as the dataset has images, but only
    ``1 / num_repeats`` of the images, each ``num_repeats`` times (arXiv 1901.09335 and
    1902.05509; DeiT uses 3). ``num_repeats`` consecutive epochs, counted from epoch 0, draw
    different parts of one permutation and so visit every image.

    The copies of an image fall, as a rule, into one optimizer step: on different ranks where
    there are at least ``num_repeats`` of them; on fewer ranks into one batch, where they are
    spread out and never follow each other directly (unless the epoch has fewer than two
    distinct images per rank).

    Every rank gets the same number of samples. With ``num_repeats=1`` this is the usual
    shuffled distributed sampler.

    Args:
        num_images: Size of the dataset.
        num_replicas: Ranks.
        rank: This rank.
        batch_size: Samples per rank and step.
        num_repeats: Copies of an image.
        seed: Seed of the permutations, equal on all ranks.

    Raises:
        ValueError: There are no images, or ``rank`` is not within ``num_replicas``.
    """

    def __init__(
        self,
        num_images: int,
        num_replicas: int = 1,
        rank: int = 0,
        batch_size: int = 64,
        num_repeats: int = 3,
        seed: int = 0,
    ):
        if num_images < 1:
            raise ValueError(f"cannot sample from {num_images} images")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not within 0..{num_replicas - 1}")
        self.num_images = num_images
        self.num_replicas = num_replicas
        self.rank = rank
        self.num_repeats = num_repeats
        self.seed = seed
        self.epoch = 0
        self.num_samples = math.ceil(num_images / num_replicas)
        if num_replicas >= num_repeats:
            self.block_size = 1
        else:
            self.block_size = max(2 * num_replicas, batch_size * num_replicas // num_repeats)

    def set_epoch(self, epoch: int) -> None:
        """Choose the images and the order of ``epoch``."""
        self.epoch = epoch

    def _epoch_images(self) -> list[int]:
        """The distinct images of this epoch: its part of the permutation of its cycle."""
        cycle, part = divmod(self.epoch, self.num_repeats)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, cycle))
        order = torch.randperm(self.num_images, generator=generator).tolist()
        count = math.ceil(self.num_samples * self.num_replicas / self.num_repeats)
        return [order[i % self.num_images] for i in range(part * count, (part + 1) * count)]

    def __iter__(self) -> Iterator[Draw]:
        images = self._epoch_images()
        starts = list(range(0, len(images), self.block_size))
        if len(starts) > 1 and len(images) - starts[-1] < self.block_size:
            starts.pop()  # a short last block would put copies side by side
        stops = [*starts[1:], len(images)]
        samples = (
            Draw(image, self.epoch, copy)
            for start, stop in zip(starts, stops, strict=True)
            for copy in range(self.num_repeats)
            for image in images[start:stop]
        )
        total = self.num_samples * self.num_replicas
        for position, sample in enumerate(samples):
            if position >= total:
                return
            if position % self.num_replicas == self.rank:
                yield sample

    def __len__(self) -> int:
        return self.num_samples


class EvalBatchSampler(Sampler[list[int]]):
    """Deals whole batches of an evaluation set to the ranks, every image exactly once.

    Rank ``r`` of ``n`` takes the batches ``r``, ``r + n``, ... of those that one process would
    form, so that not even rounding depends on the number of ranks. There are no duplicates: the
    last batch may be short, and a rank may get no batch at all.

    Args:
        num_images: Size of the dataset.
        batch_size: Images per batch.
        num_replicas: Ranks.
        rank: This rank.
    """

    def __init__(self, num_images: int, batch_size: int, num_replicas: int = 1, rank: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size} is not positive")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not within 0..{num_replicas - 1}")
        self.num_images = num_images
        self.batch_size = batch_size
        self.starts = range(rank * batch_size, num_images, num_replicas * batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, min(start + self.batch_size, self.num_images)))

    def __len__(self) -> int:
        return len(self.starts)


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, equal on every machine and Python."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**64
        seed ^= seed >> 33
    return seed % 2**63
