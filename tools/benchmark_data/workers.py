"""Rates and memory of loader processes."""

import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader, Sampler

from datasets import as_it_is
from pipeline.workers import worker_init_fn
from samplers import SampleIndex
from tools.benchmark_data.sides import Side


class Rounds(Sampler[SampleIndex]):
    """Every image ``repeats`` times, drawn anew in every epoch.

    Args:
        num_images: Of the dataset.
        repeats: Draws of an image.
    """

    def __init__(self, num_images: int, repeats: int):
        self.num_images, self.repeats, self.epoch = num_images, repeats, 0

    def __len__(self) -> int:
        return self.num_images * self.repeats

    def __iter__(self) -> Iterator[SampleIndex]:
        self.epoch += 1
        for copy in range(self.repeats):
            yield from (SampleIndex(i, self.epoch, copy) for i in range(self.num_images))


class Workers:
    """The loader of a side, with processes that stay between its rounds.

    Args:
        side: The pipeline.
        count: Loader processes.
        batch_size: Images per batch.
        repeats: Draws of an image in a round.
    """

    def __init__(self, side: Side, count: int, batch_size: int, repeats: int):
        self.side = side
        self.sampler = Rounds(len(side.dataset), repeats)
        self.loader = DataLoader(
            side.dataset,
            batch_size,
            sampler=self.sampler,
            num_workers=count,
            worker_init_fn=worker_init_fn,
            persistent_workers=True,
            collate_fn=as_it_is,
        )

    def seconds(self) -> float:
        """Time of a round, per image."""
        started = time.perf_counter()
        for batch in self.loader:
            self.side.finish(batch)
        return (time.perf_counter() - started) / len(self.sampler)

    def memory(self) -> float:
        """The most memory that a process was seen to have in a round, in MiB."""
        iterator = iter(self.loader)
        peaks = [max(memory_of(w.pid) for w in iterator._workers) for _ in iterator]
        return max(peaks)


def memory_of(pid: int) -> float:
    """Memory of a process in MiB; what it shares with others in equal parts (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    except (OSError, StopIteration):
        return float("nan")
