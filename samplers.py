"""Samplers: repeated augmentation for training, exact distributed evaluation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from typing import Any

import torch
from torch.utils.data import Sampler

# 16 shards of 256 MB are 4 GB of page cache and 37,000 images of ImageNet, of which a batch of
# 1024 is a random 36th
WINDOW = 16


class SampleIndex(int):
    """Image index with the epoch and the repeat that it is sampled for.

    The augmentation of a sample is seeded by (run seed, epoch, index, copy), so it depends
    neither on the number of workers nor on where a run was interrupted.

    Attributes:
        epoch: Epoch, from 0.
        copy: Repeat of the image within the epoch, from 0.
    """

    epoch: int
    copy: int

    def __new__(cls, index: int, epoch: int = 0, copy: int = 0) -> "SampleIndex":
        sample = super().__new__(cls, index)
        sample.epoch, sample.copy = epoch, copy
        return sample


@dataclass(frozen=True)
class Deck:
    """Order of an epoch's samples over all ranks, which take them in turn.

    Sharded images are shuffled window by window: shards in random order, then the images of
    ``window`` consecutive ones together. So each shard is read in one part of the order only.
    With repeats, an epoch covers a part of the shards.

    Args:
        num_images: Size of the dataset.
        num_replicas: Number of ranks.
        batch_size: Samples per rank and step.
        num_repeats: Repeats of an image per epoch.
        seed: Seed of the permutations.
        shards: Images in each shard, in order; ``None`` shuffles all images together.
        window: Number of shards shuffled together.
    """

    num_images: int
    num_replicas: int
    batch_size: int
    num_repeats: int
    seed: int
    shards: tuple[int, ...] | None = None
    window: int = WINDOW

    def __len__(self) -> int:
        """Samples of an epoch, a multiple of ``num_replicas``."""
        return math.ceil(self.num_images / self.num_replicas) * self.num_replicas

    def _images(self, epoch: int) -> list[int]:
        """Return the distinct images of an epoch: its part of the permutation of its cycle."""
        cycle, part = divmod(epoch, self.num_repeats)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, cycle))
        order = self._permutation(generator).tolist()
        count = math.ceil(len(self) / self.num_repeats)
        return [order[i % self.num_images] for i in range(part * count, (part + 1) * count)]

    def _permutation(self, generator: torch.Generator) -> torch.Tensor:
        """Return all images in random order, ``num_images`` of int64."""
        if self.shards is None:
            return torch.randperm(self.num_images, generator=generator)
        ends = list(accumulate(self.shards))
        parts = []
        for chosen in torch.randperm(len(ends), generator=generator).split(self.window):
            ranges = [torch.arange(ends[i] - self.shards[i], ends[i]) for i in chosen.tolist()]
            images = torch.cat(ranges)
            parts.append(images[torch.randperm(len(images), generator=generator)])
        return torch.cat(parts)

    def _block_size(self) -> int:
        """Return the number of distinct images whose repeats come before the next images."""
        if self.num_replicas >= self.num_repeats:
            return 1
        replicas = self.num_replicas
        return max(2 * replicas, self.batch_size * replicas // self.num_repeats)

    def samples(self, epoch: int) -> Iterator[SampleIndex]:
        """Yield the samples of an epoch in order."""
        images, block_size = self._images(epoch), self._block_size()
        starts = list(range(0, len(images), block_size))
        if len(starts) > 1 and len(images) - starts[-1] < block_size:
            starts.pop()  # a short last block would put repeats next to each other
        stops = [*starts[1:], len(images)]
        samples = (
            SampleIndex(image, epoch, copy)
            for start, stop in zip(starts, stops, strict=True)
            for copy in range(self.num_repeats)
            for image in images[start:stop]
        )
        return islice(samples, len(self))


class RASampler(Sampler[SampleIndex]):
    """Distributed sampler with repeated augmentation.

    An epoch has about as many samples as the dataset has images, but only
    ``1 / num_repeats`` of the images, each ``num_repeats`` times (arXiv 1901.09335 and
    1902.05509; DeiT uses 3). ``num_repeats`` consecutive epochs, counted from epoch 0, use
    different parts of one permutation and so visit every image.

    The repeats of an image usually fall into one optimizer step: on different ranks if there
    are at least ``num_repeats`` ranks, else into one batch, where they are spread out and never
    adjacent (unless the epoch has fewer than two distinct images per rank).

    Every rank gets the same number of samples. With ``num_repeats=1`` this is the usual
    shuffled distributed sampler.

    An interrupted epoch can resume, also on another number of ranks: the samples that no rank
    has taken are distributed over the new ranks.

    Args:
        num_images: Size of the dataset.
        num_replicas: Number of ranks.
        rank: This rank.
        batch_size: Samples per rank and step.
        num_repeats: Repeats of an image per epoch.
        seed: Seed of the permutations, equal on all ranks.
        shards: Images in each shard, in order; see :class:`Deck`.
        window: Number of shards shuffled together.

    Raises:
        ValueError: There are no images, ``rank`` is not within ``num_replicas``, ``shards`` do
            not add up to ``num_images``, or ``window`` is not positive.
    """

    def __init__(
        self,
        num_images: int,
        num_replicas: int = 1,
        rank: int = 0,
        batch_size: int = 64,
        num_repeats: int = 3,
        seed: int = 0,
        shards: Sequence[int] | None = None,
        window: int = WINDOW,
    ):
        if num_images < 1:
            raise ValueError(f"num_images must be positive, not {num_images}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be within 0..{num_replicas - 1}, not {rank}")
        if shards is not None and sum(shards) != num_images:
            raise ValueError(f"shards have {sum(shards)} images; the dataset has {num_images}")
        if window < 1:
            raise ValueError(f"window must be positive, not {window}")
        self.num_replicas, self.rank, self.batch_size = num_replicas, rank, batch_size
        shards = None if shards is None else tuple(int(count) for count in shards)
        self._own = Deck(num_images, num_replicas, batch_size, num_repeats, seed, shards, window)
        self.epoch, self._deck, self.dealt = 0, self._own, 0

    def set_epoch(self, epoch: int) -> None:
        """Start ``epoch``, which decides the images and their order."""
        self.epoch, self._deck, self.dealt = epoch, self._own, 0

    def state_dict(self, steps: int) -> dict[str, Any]:
        """Return the position in the epoch, ``steps`` batches per rank after it was last set.

        Returns:
            Plain values: ``epoch``, ``dealt`` (samples taken by all ranks together) and the
            fields of :class:`Deck`, which decide the order.
        """
        dealt = self.dealt + steps * self.batch_size * self.num_replicas
        return {"epoch": self.epoch, "dealt": dealt, **asdict(self._deck)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the epoch of a ``state_dict`` with the samples that no rank has taken.

        Raises:
            ValueError: The state belongs to a dataset of another size or in other shards.
        """
        values = dict(state)
        epoch, dealt = values.pop("epoch"), values.pop("dealt")
        if values.get("shards") is not None:
            values["shards"] = tuple(values["shards"])
        deck = Deck(**values)
        if deck.num_images != self._own.num_images:
            raise ValueError(
                f"the dataset has {self._own.num_images} images; the state to resume was saved"
                f" with {deck.num_images}"
            )
        if deck.shards != self._own.shards:  # then indices mean other images
            raise ValueError(
                f"the dataset is stored in {_shards(self._own.shards)}; the state to resume was"
                f" saved with {_shards(deck.shards)}"
            )
        self.epoch, self._deck, self.dealt = epoch, deck, dealt

    @property
    def is_continued_elsewhere(self) -> bool:
        """True if the epoch was started with another number of ranks or batch size."""
        return self._deck != self._own

    @property
    def steps_done(self) -> int:
        """Number of whole steps that the samples taken so far amount to."""
        return self.dealt // (self.batch_size * self.num_replicas)

    def __iter__(self) -> Iterator[SampleIndex]:
        stop = self.dealt + len(self) * self.num_replicas
        samples = self._deck.samples(self.epoch)
        return islice(samples, self.dealt + self.rank, stop, self.num_replicas)

    def __len__(self) -> int:
        return (len(self._deck) - self.dealt) // self.num_replicas


def _shards(sizes: Sequence[int] | None) -> str:
    if sizes is None:
        return "single files"
    return f"{len(sizes)} shards ({min(sizes)} to {max(sizes)} images)"


class EvalBatchSampler(Sampler[list[int]]):
    """Batch sampler that gives every image of an evaluation set to exactly one rank.

    Rank ``r`` of ``n`` takes the batches ``r``, ``r + n``, ... of those that one process would
    form, so that not even rounding depends on the number of ranks. There are no duplicates: the
    last batch may be short, and a rank may get no batch at all.

    Args:
        num_images: Size of the dataset.
        batch_size: Images per batch.
        num_replicas: Number of ranks.
        rank: This rank.

    Raises:
        ValueError: ``batch_size`` is not positive, or ``rank`` is not within ``num_replicas``.
    """

    def __init__(self, num_images: int, batch_size: int, num_replicas: int = 1, rank: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be within 0..{num_replicas - 1}, not {rank}")
        self.num_images = num_images
        self.batch_size = batch_size
        self.starts = range(rank * batch_size, num_images, num_replicas * batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, min(start + self.batch_size, self.num_images)))

    def __len__(self) -> int:
        return len(self.starts)


def mix_seed(*numbers: int) -> int:
    """Hash several numbers to a 63-bit seed, the same on every machine and Python version."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**64
        seed ^= seed >> 33
    return seed % 2**63
