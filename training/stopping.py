"""Requests to stop, and the exchange of all processes on what to do after a step."""

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
    """Turns SIGTERM, SIGINT and SIGUSR1 into a request, for the block; the second one kills.

    Slurm sends SIGUSR1 ahead of the end (``--signal``) and SIGTERM at it, to every process of a
    step; torchrun sends SIGTERM on to its own. Under either, what comes within a second is one
    request.

    Args:
        env: The environment, which tells of torchrun and Slurm.
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
    """Numbers of which every process learns the largest, one exchange later.

    The exchange runs beside the training step, so that nobody waits for it.

    Args:
        group: Processes that take part, over the CPU; None for a single one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, requests: Sequence[int]) -> list[int]:
        """Give this process's requests, and get the largest of the exchange before (at first 0).

        Alone, the requests are granted at once.
        """
        if self.group is None:
            return list(requests)
        granted = self.finish() or [0] * len(requests)
        numbers = torch.tensor(list(requests))
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self._pending = work, numbers
        return granted

    def finish(self) -> list[int] | None:
        """The largest of the last exchange, or None if there is none to wait for."""
        if self._pending is None:
            return None
        work, numbers = self._pending
        self._pending = None
        work.wait()
        return numbers.tolist()

    def now(self, requests: Sequence[int]) -> list[int]:
        """The largest of these requests and of those still under way, waiting for all."""
        before = self.finish() or [0] * len(requests)
        self.exchange([max(pair) for pair in zip(before, requests, strict=True)])
        return self.finish() or list(requests)
