"""Rates by the clock, alternating between candidates; memory in fresh processes."""

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import timm
import torch

from utils import UserError

ROOT = Path(__file__).resolve().parents[2]
Step = Callable[[], object]


def add_flags(parser: argparse.ArgumentParser, batch_size: int, rounds: int = 7) -> None:
    """Add the flags of every benchmark."""
    add = parser.add_argument
    add("--batch-size", type=int, default=batch_size)
    add("--device", choices=["cpu", "cuda"], help="cuda if available, if not given")
    add("--rounds", type=int, default=rounds, help="measurements of each; the median counts")


def add_timing_flags(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Add the flags of benchmarks that choose the number of steps by time."""
    add_flags(parser, batch_size, rounds=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--min-time", type=float, default=0.5, help="seconds of a measurement")


def in_turn(labels: Iterable[str], rounds: int) -> Iterator[str]:
    """Yield every label once in each round, in another order in every round."""
    labels = list(labels)
    for index in range(rounds):
        first = index % len(labels)
        yield from labels[first:] + labels[:first]


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
    """Time every step in turn, in another order in every round.

    Args:
        steps: Candidates by label.
        device: ``cpu`` or ``cuda``.
        rounds: Measurements of each.
        min_time: Minimum seconds of a measurement.

    Returns:
        Seconds per step, one number per round.
    """
    times = {}
    for label, step in steps.items():
        step()
        step()
        times[label] = max(1, round(min_time / seconds(step, 1, device)))
    measured = {label: [] for label in steps}
    for label in in_turn(steps, rounds):
        measured[label].append(seconds(steps[label], times[label], device))
    return measured


def ratio(ours: list[float], others: list[float]) -> float:
    """Return the speed-up: the median over rounds of the ratio of times."""
    return statistics.median(other / own for own, other in zip(ours, others, strict=True))


def peak_memory(device: str) -> float:
    """Return the peak memory of this process in MiB: PyTorch's allocator or the resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:  # getrusage includes what the process was before exec
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_fresh_process(label: str, module: str, *words: object) -> float:
    """Run a module in a process of its own; return the number on the last line of its output.

    Raises:
        UserError: The process fails, as with some configurations of peers; names ``label``.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if done.returncode < 0:
            reason = f"killed by signal {-done.returncode}"
        raise UserError(f"{label}: {reason.removeprefix('error: ')}")
    return float(done.stdout.splitlines()[-1])


def machine(device: str) -> str:
    """Return processor or GPU, and versions."""
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"{processor()}, {torch.get_num_threads()} threads"
    python = platform.python_version()
    return f"{where}, Python {python}, torch {torch.__version__}, timm {timm.__version__}"


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"
