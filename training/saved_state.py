"""Checks of the state of a run in a checkpoint, whose values may be of any type."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from models.errors import CheckpointError, brief
from training.launch import USER_ERRORS

LARGEST = 1 << 53  # of a count; float64 holds all up to it


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= LARGEST


def _is_number(value: Any) -> bool:
    """Return True for a number, also as a tensor as PyTorch's examples save it."""
    return type(value) in (int, float) or (torch.is_tensor(value) and value.numel() == 1)


def _are_ranks(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(rank, Mapping)
            and isinstance(rank.get("random"), Mapping)
            and isinstance(meter := rank.get("meter"), Mapping)
            and all(type(meter[key]) in (int, float) for key in meter if key != "corrupt")
            for rank in value
        )
    )


def _is_sampler(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    numbers = {k: number for k, number in value.items() if k not in ("shards", "is_balanced")}
    divisors = ("num_images", "num_replicas", "batch_size", "num_repeats", "window")
    if not all(_is_count(number, key in divisors) for key, number in numbers.items()):
        return False
    if type(value.get("is_balanced", False)) is not bool:
        return False
    images, ranks = numbers.get("num_images", 0), numbers.get("num_replicas", 0)
    return numbers.get("dealt", 0) <= images + ranks


def _are_best(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(number) in (int, float) for number in pair)
        for pair in value
    )


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(states := value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return (
        isinstance(groups, list | tuple)
        and all(isinstance(group, Mapping) for group in groups)
        and all(
            isinstance(state, Mapping) and not any(isinstance(x, str) for x in state.values())
            for state in states.values()
        )
    )


def _is_dict(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": (lambda value: _is_count(value, -1), "the number of an epoch"),
    "step": (_is_count, "a number of steps"),
    "best_acc1": (_is_number, "a number"),
    "best": (_are_best, "pairs of accuracy and epoch"),
    "optimizer": (_is_optimizer, "an optimizer's state and param_groups"),
    "model_ema": (_is_dict, "a dict"),
    "scaler": (_is_dict, "a dict"),
    "lr_scheduler": (_is_dict, "a dict"),
    "sampler": (_is_sampler, "the state of a sampler"),
    "ranks": (_are_ranks, "the random state and the meter of every rank"),
}


def check_state(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError unless the values that a run resumes from have their types.

    Args:
        checkpoint: Content of the file; what it lacks is not checked.
        source: Name of the file, for messages.
    """
    for key, (is_right, what) in RULES.items():
        if key in checkpoint and not is_right(checkpoint[key]):
            raise CheckpointError(f"{source}: {key} must be {what}, not {brief(checkpoint[key])}")


@contextlib.contextmanager
def restoring(part: str, source: str) -> Iterator[None]:
    """Raise CheckpointError for any error that the values of a part of a file cause."""
    try:
        yield
    except (*USER_ERRORS, MemoryError):
        raise
    except Exception as error:  # values of any kind make restoring raise errors of any kind
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{source}: {part} cannot be restored: {type(error).__name__}: {reason}"
        ) from error
