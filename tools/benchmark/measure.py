"""Rates by the clock, alternating between candidates; memory in fresh processes."""

import argparse
import collections
import contextlib
import platform
import re
import resource
import statistics
import time
from argparse import BooleanOptionalAction as OnOff
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from engine import uses_tf32
from utils import UserError

Step = Callable[[], object]


def add_flags(
    parser: argparse.ArgumentParser,
    batch_size: int,
    rounds: int = 7,
    timing: bool = False,
    device: str = "device to measure on",
) -> None:
    """Add the flags of every benchmark; with ``timing``, those of a number of steps by time."""
    add = parser.add_argument
    add("--batch-size", type=int, default=batch_size, metavar="N", help="images per step")
    where = f"{device}; default: cuda if available, else cpu"
    add("--device", choices=["cpu", "cuda"], help=where)
    turns = "measurements of each candidate, in turn; the median counts"
    add("--rounds", type=int, default=rounds, metavar="N", help=turns)
    if timing:
        dtypes = ["float32", "bfloat16", "float16"]
        add("--dtype", choices=dtypes, default="float32", help="data type to compute in")
        add("--tf32", action=OnOff, default=True, help="on CUDA, multiply float32 in TF32")
        shortest = "shortest time of a measurement"
        add("--min-time", type=float, default=0.5, metavar="SECONDS", help=shortest)


def in_turn(
    measures: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 0
) -> dict[str, list]:
    """Return ``rounds`` results of every measurement, taken in turn, each round in another order.

    Results of the first ``warm_up`` rounds are dropped.
    """
    found = {label: [] for label in measures}
    order = collections.deque(measures)
    for _ in range(warm_up + rounds):
        for label in order:
            found[label].append(measures[label]())
        order.rotate(-1)
    return {label: results[warm_up:] for label, results in found.items()}


def seconds(step: Step, times: int, device: str) -> float:
    """Return the mean time of a step."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(times):
        step()
    wait()
    return (time.perf_counter() - started) / times


def alternate(
    steps: Mapping[str, Step], device: str, rounds: int, min_time: float
) -> dict[str, list[float]]:
    """Time every step in turn; return seconds per step, one number per round.

    A measurement takes at least ``min_time`` seconds.
    """
    measures = {}
    for label, step in steps.items():
        step()
        step()
        times = max(1, round(min_time / seconds(step, 1, device)))
        measures[label] = partial(seconds, step, times, device)
    return in_turn(measures, rounds)


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each measurement."""
    return {label: statistics.median(values) for label, values in found.items()}


def ratio(ours: list[float], others: list[float]) -> float:
    """Return the speed-up: the median over rounds of the ratio of times."""
    return statistics.median(other / own for own, other in zip(ours, others, strict=True))


def from_proc(file: str, name: str) -> str | None:
    """Return the value of the first line ``name: value`` of a file in ``/proc``, None if none."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}\s*: *(.*)$", Path("/proc", file).read_text(), re.M)
        return found and found[1]
    return None


def peak_memory(device: str) -> float:
    """Return the peak memory of this process in MiB: PyTorch's allocator or the resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    found = from_proc("self/status", "VmHWM")  # getrusage includes the process before exec
    kib = int(found.split()[0]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 1024


def _put(index: int, queue: Any, function: Callable[..., float], args: Sequence[Any]) -> None:
    queue.put(function(*args))


def in_fresh_process(label: str, function: Callable[..., float], *args: Any) -> float:
    """Return what a function of a module returns in a process of its own.

    Raises:
        UserError: The process fails, as with some configurations of peers; names ``label``.
    """
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        multiprocessing.spawn(_put, (queue, function, args))
    except (ProcessRaisedException, ProcessExitedException) as error:
        # the last line has the exception or the signal
        reason = str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")
        raise UserError(f"{label}: {reason}") from error
    return queue.get()


def machine(device: str) -> str:
    """Return processor or GPU, and versions."""
    if device == "cuda":
        products = "TF32" if uses_tf32(torch.device(device)) else "float32"
        where = f"{torch.cuda.get_device_name()}, float32 multiplied in {products}"
    else:
        processor = from_proc("cpuinfo", "model name") or platform.processor() or "CPU"
        where = f"{processor}, {torch.get_num_threads()} threads"
    python = platform.python_version()
    return f"{where}, Python {python}, torch {torch.__version__}, timm {timm.__version__}"
