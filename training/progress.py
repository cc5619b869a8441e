"""Progress of an epoch: a bar on a terminal, lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

from tqdm import tqdm

from pipeline.prefetch import Prefetcher
from utils import is_main_process, log


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

    def __iter__(self) -> Iterator:
        shown = is_main_process() and sys.stderr is not None and sys.stderr.isatty()
        options = {"leave": False, "disable": not shown, "dynamic_ncols": True}
        sizes = {"initial": self.done, "total": self.steps}
        self.bar = tqdm(self.loader, f"epoch {self.epoch}", **sizes, **options)
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
