"""Samplers: repeated augmentation for training, exact distributed evaluation."""

import math
from collections import Counter
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
        is_balanced: Draw every class equally often, from all images whatever their shards.
    """

    num_images: int
    num_replicas: int
    batch_size: int
    num_repeats: int
    seed: int
    shards: tuple[int, ...] | None = None
    window: int = WINDOW
    is_balanced: bool = False

    def __len__(self) -> int:
        """Samples of an epoch, a multiple of ``num_replicas``."""
        return math.ceil(self.num_images / self.num_replicas) * self.num_replicas

    def _images(self, epoch: int, targets: torch.Tensor | None) -> list[int]:
        """Return the images of an epoch before repeats: its part of the permutation of its cycle.

        Of balanced classes, those that the epoch draws from them.
        """
        count = math.ceil(len(self) / self.num_repeats)
        if self.is_balanced:
            return self._draws(epoch, count, targets).tolist()
        cycle, part = divmod(epoch, self.num_repeats)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, cycle))
        order = self._permutation(generator).tolist()
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

    def _draws(self, epoch: int, count: int, targets: torch.Tensor) -> torch.Tensor:
        """Return the images that an epoch draws from the classes, ``count`` of int64.

        The classes take turns, which go on from epoch to epoch. Each deals its images in random
        order, all of them before the first comes again.
        """
        classes = targets.unique().tolist()
        turns = torch.arange(epoch * count, (epoch + 1) * count)
        parts = []
        for number, name in enumerate(classes):
            images = (targets == name).nonzero().flatten()
            places = turns[turns % len(classes) == number] // len(classes)
            for deal in (places // len(images)).unique().tolist():
                generator = torch.Generator().manual_seed(mix_seed(self.seed, name, deal))
                order = torch.randperm(len(images), generator=generator)
                parts.append(images[order[places[places // len(images) == deal] % len(images)]])
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        return torch.cat(parts)[torch.randperm(count, generator=generator)]

    def _block_size(self) -> int:
        """Return the number of distinct images whose repeats come before the next images."""
        if self.num_replicas >= self.num_repeats:
            return 1
        replicas = self.num_replicas
        return max(2 * replicas, self.batch_size * replicas // self.num_repeats)

    def samples(self, epoch: int, targets: torch.Tensor | None = None) -> Iterator[SampleIndex]:
        """Yield the samples of an epoch in order.

        Args:
            epoch: Epoch, from 0.
            targets: Class of each image, ``N``; needed if ``is_balanced``.
        """
        images, block_size = self._images(epoch, targets), self._block_size()
        before = _occurrences(images) if self.is_balanced else [0] * len(images)
        starts = list(range(0, len(images), block_size))
        if len(starts) > 1 and len(images) - starts[-1] < block_size:
            starts.pop()  # a short last block would put repeats next to each other
        stops = [*starts[1:], len(images)]
        samples = (
            SampleIndex(images[place], epoch, copy + self.num_repeats * before[place])
            for start, stop in zip(starts, stops, strict=True)
            for copy in range(self.num_repeats)
            for place in range(start, stop)
        )
        return islice(samples, len(self))


def _occurrences(images: Sequence[int]) -> list[int]:
    """Return how often each image has come before in a sequence, ``len(images)`` numbers."""
    seen: Counter[int] = Counter()
    counts = []
    for image in images:
        counts.append(seen[image])
        seen[image] += 1
    return counts


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

    With ``targets``, the classes are drawn in turn, so that each has the same number of samples
    in an epoch, within one (times the repeats): images of small classes come several times, with
    other augmentations, and those of large classes over several epochs.

    Args:
        num_images: Size of the dataset.
        num_replicas: Number of ranks.
        rank: This rank.
        batch_size: Samples per rank and step.
        num_repeats: Repeats of an image per epoch.
        seed: Seed of the permutations, equal on all ranks.
        shards: Images in each shard, in order; see :class:`Deck`.
        window: Number of shards shuffled together.
        targets: Class of each image, ``N``, to draw every class equally often.

    Raises:
        ValueError: There are no images, ``rank`` is not within ``num_replicas``, ``shards`` do
            not add up to ``num_images``, ``window`` is not positive, or there are not as many
            ``targets`` as images.
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
        targets: Sequence[int] | None = None,
    ):
        if num_images < 1:
            raise ValueError(f"num_images must be positive, not {num_images}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be within 0..{num_replicas - 1}, not {rank}")
        if shards is not None and sum(shards) != num_images:
            raise ValueError(f"shards have {sum(shards)} images; the dataset has {num_images}")
        if window < 1:
            raise ValueError(f"window must be positive, not {window}")
        if targets is not None and len(targets) != num_images:
            raise ValueError(f"{len(targets)} targets for {num_images} images")
        self.num_replicas, self.rank, self.batch_size = num_replicas, rank, batch_size
        self._targets = None if targets is None else torch.as_tensor(targets)
        shards = None if shards is None else tuple(int(count) for count in shards)
        order = (num_repeats, seed, shards, window, targets is not None)
        self._own = Deck(num_images, num_replicas, batch_size, *order)
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
            ValueError: The state belongs to a dataset of another size or in other shards, or to
                an epoch whose classes are drawn otherwise.
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
        if deck.is_balanced != self._own.is_balanced:
            how = ("without", "with")
            raise ValueError(
                f"the epoch to resume was started {how[deck.is_balanced]} balanced sampling, and"
                f" would go on {how[self._own.is_balanced]} it"
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
        samples = self._deck.samples(self.epoch, self._targets)
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
