"""Checkpoint contents: weights, class names and training settings."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch

from ..errors import CheckpointError, UnsafeFileError, brief
from .mindcv_names import to_original_names

WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "net", "network", "module", "weights")
EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema")
# components that torch.compile, FSDP and activation checkpointing put into the names of parts
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
EMA_COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel
SHOWN = 4  # keys in a message
LONGEST_TEXT, LONGEST_LIST, LARGEST_NUMBER = 100, 1000, 10**5  # of an argument of the model
LOADERS = ("pretrained", "checkpoint", "cache")  # in front of arguments that load or name files
FREE_BYTES, SHARED = 1 << 24, 4  # all weights may have so much, and so often what is stored
HEADS = ("head.weight", "classifier.weight", "head.fc.weight")


class Weights(NamedTuple):
    """Weights of a checkpoint.

    Attributes:
        state: Tensors by name, without wrappers.
        ignored: Names that are not the model's: of a trainer, or counters of an average.
        prefix: Removed from all names: of DDP, Lightning and others that wrap a model.
    """

    state: dict[str, torch.Tensor]
    ignored: tuple[str, ...] = ()
    prefix: str = ""


def state_dict_of(
    checkpoint: Mapping[str, Any],
    source: str,
    ema: bool = False,
    own: Container[str] = (),
    prefix: str = "",
) -> Weights:
    """Return the weights of a checkpoint, under whichever key they are.

    Args:
        checkpoint: Content of the file.
        source: Name of the file, for messages.
        ema: Return the moving average instead of the raw weights.
        own: Names of the model's tensors; a prefix that they have, too, stays.
        prefix: Return only the weights below it (``backbone`` for ``backbone.stem.weight``).

    Raises:
        CheckpointError: It does not have any.
    """
    foreign = _mapping(checkpoint, "mindspore")
    keys = EMA_KEYS if ema else WEIGHT_KEYS
    states = (_mapping(checkpoint, key) for key in keys)
    state = foreign or next(filter(_has_tensors, states), {})
    if not state and not ema:
        state = checkpoint
    if not _has_tensors(state):
        found = ", ".join(map(brief, list(checkpoint)[:SHOWN])) or "nothing"
        raise CheckpointError(
            f"{source} has no weights under {', '.join(map(repr, keys))}, but {found}"
        )
    state, others = _named(state, source), []
    if prefix:
        prefix = prefix.removesuffix(".") + "."
        state, others = _below(prefix, state, source)
    if foreign:
        try:
            found = Weights(*to_original_names(state, ema))
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error
    else:
        found = _unwrapped(state, own, source)
    return Weights(found.state, (*found.ignored, *others), prefix + found.prefix)


def _below(
    prefix: str, state: Mapping[str, torch.Tensor], source: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the weights whose names begin with ``prefix``, without it, and the other names.

    Raises:
        CheckpointError: No name begins with it; the message has the prefixes that there are.
    """
    below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not below:
        parts = dict.fromkeys(key.partition(".")[0] for key in state if "." in key)
        found = ", ".join(map(brief, list(parts)[:SHOWN])) or "none"
        raise CheckpointError(f"{source} has no weights of the prefix {prefix}, but of {found}")
    return below, [key for key in state if not key.startswith(prefix)]


def _has_tensors(state: Mapping[Any, Any]) -> bool:
    return any(torch.is_tensor(value) for value in state.values())


def _unwrapped(state: Mapping[str, torch.Tensor], own: Container[str], source: str) -> Weights:
    """Remove counters and what wrappers of a model put into and in front of all names.

    Raises:
        CheckpointError: Two names become one.
    """
    ignored = tuple(key for key in state if key in EMA_COUNTERS and key not in own)
    names = {key: _without_wrappers(key) for key in state if key not in ignored}
    prefix = ""
    while names and not any(name in own for name in names.values()):
        first = {name.partition(".")[0] for name in names.values()}
        if len(first) > 1 or any("." not in name for name in names.values()):
            break
        prefix += (part := f"{first.pop()}.")
        names = {key: name.removeprefix(part) for key, name in names.items()}
    found = {name: state[key] for key, name in names.items()}
    if len(found) < len(names):
        raise CheckpointError(f"{source}: two tensors have one name without their wrappers")
    return Weights(found, ignored, prefix)


def _without_wrappers(key: str) -> str:
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def _mapping(checkpoint: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the mapping under ``key``, or an empty one."""
    value = checkpoint.get(key)
    return value if isinstance(value, Mapping) else {}


def _named(state: Mapping[Any, Any], source: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a mapping, whose keys must be names.

    Raises:
        CheckpointError: A key is not text.
        UnsafeFileError: Strides of zero make the tensors much larger than what the file holds.
    """
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
    storages = (value.untyped_storage() for value in tensors.values())
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if sum(value.nbytes for value in tensors.values()) > FREE_BYTES + SHARED * held:
        raise UnsafeFileError(f"{source} has {held} bytes, which is far too few for its tensors")
    strange = next((key for key in tensors if not isinstance(key, str)), None)
    if strange is not None:
        raise CheckpointError(
            f"{source} holds a tensor under {brief(strange)}, which is not a name"
        )
    return tensors


def num_classes_of(state: Mapping[str, torch.Tensor], name: str = "") -> int | None:
    """Return the number of rows of the classifier, or None if it is not recognised.

    Args:
        state: Weights in any layout.
        name: Name of the model, if known, for timm's name of its classifier.
    """
    name = name.partition(".")[0]  # without the tag
    named = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    keys = (*HEADS, f"{named.classifier}.weight") if named else HEADS
    return next((len(state[key]) for key in keys if key in state and state[key].ndim), None)


def class_names(checkpoint: Mapping[str, Any], source: str) -> list[str]:
    """Return the class names in the order of the logits, empty if the checkpoint has none.

    Raises:
        CheckpointError: They are not names.
    """
    names = checkpoint.get("classes")
    names = [] if names is None else names  # of any type: a tensor is neither true nor false
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: classes must be a list of names")
    return list(names)


def states_of(
    checkpoint: Mapping[str, Any], source: str, wanted: Sequence[str] = ("model", "ema")
) -> dict[str, dict[str, torch.Tensor]]:
    """Return those of the wanted weights that a file has.

    Raises:
        CheckpointError: The file has none of them; the reason for the first.
    """
    found, errors = {}, []
    for name in wanted:
        try:
            found[name] = state_dict_of(checkpoint, source, ema=name == "ema").state
        except CheckpointError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def plain_arguments(saved: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return arguments of a file: numbers, flags, short texts and lists of them."""

    for key, value in saved.items():
        if isinstance(key, str) and key.startswith(LOADERS):
            raise UnsafeFileError(f"{label}: model_kwargs has {key}, which would load another file")
        if not isinstance(key, str) or not _is_plain(value):
            raise CheckpointError(
                f"{label}: model_kwargs has {brief(key)}: {brief(value)}, which is not a number, "
                f"a flag or a short text"
            )
    return dict(saved)


def _is_plain(value: Any) -> bool:
    left, pending = LONGEST_LIST, [value]
    while pending:
        left, one = left - 1, pending.pop()
        if isinstance(one, list | tuple) and len(one) + len(pending) <= left:
            pending.extend(one)
        elif isinstance(one, str):
            left -= LONGEST_LIST * (len(one) > LONGEST_TEXT)
        elif isinstance(one, int):
            left -= LONGEST_LIST * (abs(one) > LARGEST_NUMBER)
        elif one is not None and not isinstance(one, float):
            return False
        if left < 0:
            return False
    return True


def settings_of(checkpoint: Mapping[str, Any], source: str) -> tuple[float | None, str]:
    """Return the exponent of the query/key pre-scale and the GELU of the training."""
    kwargs = _mapping(checkpoint, "model_kwargs") or checkpoint
    exponent, gelu = kwargs.get("qk_scale_factor"), checkpoint.get("gelu", "none")
    if exponent is not None and not (isinstance(exponent, float | int) and -8 <= exponent <= 8):
        raise CheckpointError(f"{source}: qk_scale_factor must be an exponent from -8 to 8")
    if not isinstance(gelu, str) or gelu not in ("none", "tanh"):
        raise CheckpointError(f"{source}: gelu must be none or tanh, not {brief(gelu)}")
    return exponent, gelu
