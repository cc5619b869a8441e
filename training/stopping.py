"""Requests to stop, and what all ranks do after a step."""

import signal
import time
from collections.abc import Sequence
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TWICE = 1.0  # seconds within which a request may be sent twice, as by timeout and by launchers
STALL = 5.0  # seconds that a loader may take after a request
LOADER = "/torch/utils/data/"  # in the paths of its files


class LoaderStalled(BaseException):
    """Data do not arrive although a request to stop waits for them.

    As KeyboardInterrupt, it is not one of the errors that the ranks exchange.
    """


class StopSignals:
    """Context manager that turns signals into a request to stop; the second one kills.

    Signals within a second are one request: ``timeout`` sends SIGTERM to the process and to its
    group, torchrun and Slurm to every process of a step. A closed terminal sends SIGHUP, which
    ``nohup`` lets programs ignore, and Slurm SIGUSR1 ahead of the end (``--signal``).

    A loader that does not deliver for some seconds after the request is left: the main thread,
    which waits for it, gets :class:`LoaderStalled`.
    """

    def __init__(self):
        self.requested: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._look)
        return self

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = signal.Signals(number), now
            signal.setitimer(signal.ITIMER_REAL, STALL, STALL)
        elif now - self._since >= TWICE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _look(self, number: int, frame: FrameType | None) -> None:
        """Raise LoaderStalled if the main thread waits for a loader."""
        while frame is not None:
            if LOADER in frame.f_code.co_filename:
                raise LoaderStalled
            frame = frame.f_back


class RequestExchange:
    """All-reduces the requests of all ranks to their maximum, one exchange later.

    The exchange overlaps with the training step, so that no rank waits for it.

    Args:
        group: CPU process group; None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, requests: Sequence[int]) -> list[int]:
        """Send this rank's requests; return the maximum of the previous exchange (0 at first).

        A single process gets its own requests back.
        """
        if self.group is None:
            return list(requests)
        reduced = self.finish() or [0] * len(requests)
        numbers = torch.tensor(list(requests))
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self._pending = work, numbers
        return reduced

    def finish(self) -> list[int] | None:
        """Return the maximum of the last exchange, or None if none is pending."""
        if self._pending is None:
            return None
        work, numbers = self._pending
        self._pending = None
        work.wait()
        return numbers.tolist()

    def now(self, requests: Sequence[int]) -> list[int]:
        """Return the maximum of these requests and of the pending ones; waits for all ranks."""
        before = self.finish() or [0] * len(requests)
        self.exchange([max(pair) for pair in zip(before, requests, strict=True)])
        return self.finish() or list(requests)
