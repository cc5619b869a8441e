"""Watchdog: names the rank or worker that died or hangs, and ends the others in bounded time."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from training import launch
from utils import PeerError, UserError

T = TypeVar("T")
TICK = 1.0  # seconds between signs of life
JUMP = 2.0  # seconds by which a tick may be late
ANSWER = 5.0  # seconds that the store has to answer
FAILED = "failed"  # key of the store: the rank that reports an error of its own
SHOWN = 4  # processes named in a message


def _within(seconds: float, call: Callable[[], T]) -> T | None:
    """Return ``call()``, or None if it fails or takes longer than ``seconds``."""
    answers: list[T] = []

    def run() -> None:
        try:
            answers.append(call())
        except Exception:  # whatever the connection to the store raises: no answer
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


class Watchdog:
    """Publishes the position of this rank, and ends it after too long without progress.

    A rank that waits for a dead or stuck one cannot end by itself, and does not know whom it
    waits for. So each rank publishes its position and a heartbeat in the rendezvous store.

    Args:
        rank: Global rank.
        world_size: Number of ranks.
        timeout: Seconds without a step after which the process exits with status 1.
    """

    def __init__(self, rank: int, world_size: int, timeout: float):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.where = ""
        self._since: float | None = None  # time of the last progress; None: not watched
        self._loading = False
        self._moved = False  # the first step may take any time: it may compile
        self._store = None
        if world_size > 1:
            self._store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        threads = [self._watch] + ([self._publish] if self._store else [])
        for work in threads:
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Stop watching; report where a loader worker or another rank was lost."""
        if error is not None:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise once more
        self._ended.set()
        own = isinstance(error, (*launch.USER_ERRORS, MemoryError, torch.OutOfMemoryError))
        if self._store and (own or (isinstance(error, RuntimeError) and launch.loader_died(error))):
            _within(ANSWER, lambda: self._store.set(FAILED, str(self.rank)))
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise UserError(
                f"out of memory at {self.where} ({launch.last_message(error)[:200]}): a smaller "
                f"--batch-size, --grad-checkpointing or fewer --num_workers may help"
            ) from error
        if isinstance(error, ConnectionError | EOFError | RuntimeError):
            if launch.loader_died(error):
                raise UserError(f"{launch.loader_message(error)} (at {self.where})") from error
            if launch.peer_lost(error):
                if self._store and _within(ANSWER, lambda: self._store.check([FAILED])):
                    raise PeerError("another rank failed, and reports it") from error
                reason = str(error).strip().splitlines()[0][:200]
                message = f"another process is lost or stuck at {self.where}{self.others()}"
                raise UserError(f"{message} ({reason})") from error

    def at(self, where: str) -> None:
        """Record progress: the current position."""
        self.where, self._moved, self._since = where, True, time.monotonic()

    def loading(self, begins: bool) -> None:
        """Record that waiting for data starts (True) or ends (False)."""
        self._loading = begins
        self._since = time.monotonic() if begins or self._moved else None

    def pause(self) -> None:
        """Stop watching until the next progress, during work that may take any time."""
        self._since = None

    def _publish(self) -> None:
        count = 0
        while not self._ended.wait(TICK):
            count += 1
            doing = " waiting for its loader" if self._loading else ""
            try:
                self._store.set(str(self.rank), f"{count}|{self.where}{doing}")
            except Exception:  # the store is gone, and so is the run: _watch ends it
                return

    def _watch(self) -> None:
        tick, now = min(TICK, self.timeout / 4), time.monotonic()
        while not self._ended.wait(tick):
            before, now = now, time.monotonic()
            if now - before > tick + JUMP and self._since is not None:
                self._since += now - before  # the process was suspended, as by SIGSTOP
            since = self._since
            if since is None or time.monotonic() - since < self.timeout:
                continue
            if self.world_size == 1 and not self._loading:
                continue  # a single process in a step may take any time
            doing = "waiting for its loader" if self._loading else "in a step"
            message = (
                f"no progress for {self.timeout:g} s (--dist-timeout) at {self.where}, {doing}"
                f"{self.others()}"
            )
            print(f"error on rank {self.rank}: {message}", file=sys.stderr, flush=True)
            launch.end_children()
            os._exit(1)

    def others(self) -> str:
        """Return the ranks that do not answer or are elsewhere, as the end of a message."""
        if self._store is None:
            return ""
        first = _within(ANSWER, self._ask)
        if first is None:
            return "; where all met, at rank 0 or its launcher, nothing answers"
        time.sleep(2.5 * TICK)
        second = _within(ANSWER, self._ask) or first
        parts = []
        for rank, sign in second.items():
            where = sign.partition("|")[2] or "the start"
            if sign == first[rank]:
                parts.append(f"rank {rank} gives no sign of life, last at {where}")
            elif where != self.where:
                parts.append(f"rank {rank} is at {where}")
        return "".join(f"; {part}" for part in parts[:SHOWN])

    def _ask(self) -> dict[int, str]:
        """Return the last heartbeats of the other ranks."""
        ranks = [rank for rank in range(self.world_size) if rank != self.rank]
        signs = (
            self._store.get(str(rank)).decode() if self._store.check([str(rank)]) else ""
            for rank in ranks
        )
        return dict(zip(ranks, signs, strict=True))
