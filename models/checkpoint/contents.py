"""Checkpoint contents: weights, class names and training settings."""

import argparse
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from models.checkpoint.mindcv_names import to_original_names
from models.errors import CheckpointError, UnsafeFileError

Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std by channel

WEIGHT_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")
SHOWN = 4  # keys in a message
FREE_BYTES, SHARED = 1 << 24, 4  # all weights may have so much, and so often what is stored
HEADS = ("head.weight", "classifier.weight", "head.fc.weight")


def state_dict_of(
    checkpoint: Mapping[str, Any], source: str, ema: bool = False
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return the weights of a checkpoint, under whichever key they are.

    Args:
        checkpoint: Content of the file.
        source: Name of the file, for messages.
        ema: Return the moving average instead of the raw weights.

    Returns:
        The weights, and the ignored names of a training checkpoint of MindCV.

    Raises:
        CheckpointError: It does not have any.
    """
    if foreign := _mapping(checkpoint, "mindspore"):
        try:
            return to_original_names(_named(foreign, source), ema)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error
    keys = EMA_KEYS if ema else WEIGHT_KEYS
    state = next(filter(None, (_mapping(checkpoint, key) for key in keys)), {})
    if not state and not ema:
        state = checkpoint
    if not any(torch.is_tensor(value) for value in state.values()):
        found = ", ".join(map(str, list(checkpoint)[:SHOWN])) or "nothing"
        raise CheckpointError(
            f"{source} has no weights under {' or '.join(map(repr, keys))}, but {found}"
        )
    weights = _named(state, source).items()
    return {key.removeprefix("module."): value for key, value in weights}, ()


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
            f"{source} holds a tensor under {str(strange)[:80]}, which is not a name"
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
    return next((state[key].shape[0] for key in keys if key in state), None)


def class_names(checkpoint: Mapping[str, Any], source: str) -> list[str]:
    """Return the class names in the order of the logits, empty if the checkpoint has none.

    Raises:
        CheckpointError: They are not names.
    """
    names = checkpoint.get("classes") or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: classes must be a list of names")
    return list(names)


def flags_of_run(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the flags of the run that made a checkpoint: of this repository, DeiT or its kin.

    The dict is empty for MindCV's runs, whose files hold none. The result is None for timm's runs,
    whose files name their ``arch``, and for weights without a run.
    """
    flags = {} if "mindspore" in checkpoint else checkpoint.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    return dict(flags) if isinstance(flags, Mapping) and "arch" not in checkpoint else None


def normalization_of(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> Normalization:
    """Return mean and std of the training images, for values from 0 to 1.

    They are ImageNet's for runs with :func:`flags_of_run`, whatever the model, and those of the
    model's ``pretrained_cfg`` for other weights.

    Args:
        checkpoint: Content of the file; empty for timm's own weights.
        config: The model's ``pretrained_cfg``.
    """
    if flags_of_run(checkpoint) is not None or not config.get("mean"):
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return tuple(config["mean"]), tuple(config["std"])


def settings_of(checkpoint: Mapping[str, Any], source: str) -> tuple[float | None, str]:
    """Return the exponent of the query/key pre-scale and the GELU of the training."""
    kwargs = _mapping(checkpoint, "model_kwargs") or checkpoint
    exponent, gelu = kwargs.get("qk_scale_factor"), checkpoint.get("gelu", "none")
    if exponent is not None and not (isinstance(exponent, float | int) and -8 <= exponent <= 8):
        raise CheckpointError(f"{source}: qk_scale_factor must be an exponent from -8 to 8")
    if not isinstance(gelu, str) or gelu not in ("none", "tanh"):
        raise CheckpointError(f"{source}: gelu must be none or tanh, not {str(gelu)[:80]}")
    return exponent, gelu
