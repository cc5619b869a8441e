"""Progress of epochs and other loops: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.prefetch import Prefetcher
from utils import is_main_process, log

T = TypeVar("T")
REPORTS = 10  # of an epoch, at least, on a terminal
MINUTE = 60.0


def _on_terminal() -> bool:
    return is_main_process() and sys.stderr is not None and sys.stderr.isatty()


def _bar(items: Iterable[T], what: str, **options: Any) -> tqdm:
    """Return a bar around ``items``, disabled where there is no terminal or another rank has it."""
    return tqdm(items, what, leave=False, disable=not _on_terminal(), dynamic_ncols=True, **options)


def shown(
    items: Iterable[T], what: str, total: int, done: int = 0, seconds: float = MINUTE
) -> Iterator[T]:
    """Yield ``items``, and show on rank 0 how many are done.

    On a terminal by a bar, elsewhere by a line per ``seconds``.

    Args:
        items: What to iterate over.
        what: Name of the loop.
        total: Number of items, including those done before.
        done: Items done before.
        seconds: Time between lines; infinity for none.
    """
    bar = _bar(items, what, total=total, initial=done)
    told = time.monotonic()
    for number, item in enumerate(bar, start=done + 1):
        yield item
        if bar.disable and time.monotonic() - told >= seconds and number < total:
            log(f"{what}: {number:,} of {total:,}")
            told = time.monotonic()


class Progress:
    """Iterates over a training loader and shows progress on rank 0.

    On a terminal it is a bar, elsewhere a line per report.

    Args:
        loader: Training loader.
        epoch: Current epoch, from 0.
        epochs: Epoch before which training stops.
        world_size: Number of ranks, assumed to be equally fast.
        done: Steps of the epoch that were done before; the loader yields the others.
        waiting: Called with True before every batch and with False after it.
    """

    def __init__(
        self,
        loader: Prefetcher,
        epoch: int,
        epochs: int,
        world_size: int,
        done: int = 0,
        waiting: Callable[[bool], None] = lambda begins: None,
    ):
        self.loader, self.epoch, self.epochs, self.world_size = loader, epoch, epochs, world_size
        self.steps, self.done, self.waiting = done + len(loader), done, waiting
        self.bar = None

    def __len__(self) -> int:
        return len(self.loader)

    def interval(self, log_interval: int) -> int:
        """Return the steps between reports: ``--log-interval``, or fewer on a terminal."""
        return min(log_interval, max(1, self.steps // REPORTS)) if _on_terminal() else log_interval

    def __iter__(self) -> Iterator:
        self.bar = _bar(self.loader, f"epoch {self.epoch}", initial=self.done, total=self.steps)
        self.waiting(True)
        for batch in self.bar:
            self.waiting(False)
            yield batch
            self.waiting(True)
        self.waiting(False)

    def report(self, step: int, loss: float, lr: float, rate: float) -> None:
        """Show the steps done, mean loss, learning rate and images per second of this rank."""
        steps_left = self.steps - step + self.steps * (self.epochs - self.epoch - 1)
        eta = timedelta(seconds=int(steps_left * self.loader.batch_size / rate))
        rate *= self.world_size
        text = f"loss {loss:.4f} lr {lr:.3g} {rate:.0f} images/s eta {eta}"
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(text)
        if step == self.steps or self.bar is None or self.bar.disable:
            log(f"epoch {self.epoch} step {step}/{self.steps} {text}")
