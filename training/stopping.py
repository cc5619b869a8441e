"""Requests to stop, and what all ranks do after a step."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TWICE = 1.0  # seconds within which a launcher and its cluster may send the same request each


class StopSignals:
    """Context manager that turns SIGTERM, SIGINT and SIGUSR1 into a request; the second one kills.

    Slurm sends SIGUSR1 ahead of the end (``--signal``) and SIGTERM at it, to every process of a
    step; torchrun forwards SIGTERM to its own. Under either, signals within a second are one
    request.

    Args:
        env: Environment, from which torchrun and Slurm are recognised.
    """

    def __init__(self, env: Mapping[str, str] = os.environ):
        self.requested: signal.Signals | None = None
        doubled = "TORCHELASTIC_RUN_ID" in env or "SLURM_JOB_ID" in env
        self._patience = TWICE if doubled else 0.0
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = signal.Signals(number), now
        elif now - self._since >= self._patience:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


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
