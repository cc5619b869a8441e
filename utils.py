"""Logging, errors, collectives and random state; imports nothing of this project."""

import contextlib
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


class UserError(Exception):
    """An error that the user can fix: the message names the bad value and what would be right."""


class PeerError(Exception):
    """Another rank failed; that rank reports the error itself."""


def printable(text: str) -> str:
    """Return ``text`` with line ends and control characters escaped as in Python literals.

    Names of files, classes and columns may hold any: they must not command a terminal, or forge
    lines of a log.
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def log(message: str) -> None:
    """Print one line on rank 0 only; without a reader of the output, print no more."""
    if is_main_process():
        try:
            print(printable(message), flush=True)
        except (OSError, ValueError):  # closed, or a full disk: the run is worth more than its log
            silence()


def silence() -> None:
    """Direct the standard output to nowhere."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


def is_main_process() -> bool:
    """Return True on rank 0, or in a single process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def sum_over_processes(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, exchanged on ``device``."""
    if not dist.is_initialized():
        return tensor
    total = tensor.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def control_group(timeout: float) -> dist.ProcessGroup | None:
    """Return a CPU process group of all ranks, separate from the gradients'; None for one rank."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def all_or_none(call: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Return ``call()`` if it fails on no rank.

    Raises:
        PeerError: It failed on another rank, which raises the error itself.
    """
    if group is None:
        return call()
    failed, result = None, None
    try:
        result = call()
    except Exception as error:  # of any kind: the other ranks must not wait for this one
        failed = error
    count = torch.tensor(int(failed is not None))
    dist.all_reduce(count, group=group)
    if failed is not None:
        raise failed
    if count:
        raise PeerError("another rank failed")
    return result


def broadcast_value(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Return the ``value`` of rank 0 on every rank."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return the values of all ranks, in the order of ranks."""
    if group is None:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_lines(lines: Sequence[str], group: dist.ProcessGroup | None) -> list[str]:
    """Return the lines of all ranks."""
    return [line for part in gather(list(lines), group) for line in part]


def broadcast_buffers(module: nn.Module) -> None:
    """Broadcast the buffers of rank 0 (BatchNorm statistics differ by rank)."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) from the combination of ``numbers``."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64).item()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the random state of this process as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the random state that :func:`random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
