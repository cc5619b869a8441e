"""Logging, errors, collectives and random state; imports nothing of this project."""

import random
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


def log(message: str) -> None:
    """Print on the first process only."""
    if is_main_process():
        print(message, flush=True)


def is_main_process() -> bool:
    """Whether this process is the first one, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def sum_over_processes(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum of a tensor over all processes, which communicate through ``device``."""
    if not dist.is_initialized():
        return tensor
    total = tensor.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def control_group(timeout: float) -> dist.ProcessGroup | None:
    """A group of all processes that talk over the CPU, beside the gradients; None for one."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def all_or_none(call: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What ``call`` returns on this process, if it fails on none.

    Raises:
        PeerError: It failed on another process, which raises the error itself.
    """
    if group is None:
        return call()
    failed, result = None, None
    try:
        result = call()
    except Exception as error:  # of any kind: the others must not wait for this process
        failed = error
    count = torch.tensor(int(failed is not None))
    dist.all_reduce(count, group=group)
    if failed is not None:
        raise failed
    if count:
        raise PeerError("another process failed")
    return result


def from_first(value: Any, group: dist.ProcessGroup | None) -> Any:
    """The first process's ``value``, on every process."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def gather_lines(lines: Sequence[str], group: dist.ProcessGroup | None) -> list[str]:
    """The lines of all processes."""
    if group is None:
        return list(lines)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(lines), group=group)
    return [line for part in gathered for line in part]


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers (BatchNorm's statistics differ by process)."""
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
    """The state of this process's random numbers, as plain values and tensors."""
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
    """Go on with the random numbers of :func:`random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
