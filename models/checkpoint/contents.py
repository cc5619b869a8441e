"""What the content of a checkpoint says: weights, classes, and how they were trained."""

import argparse
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from models.checkpoint.mindcv_names import to_original_names
from models.errors import CheckpointError

Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation by channel

WEIGHT_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")
SHOWN = 4  # keys in a message
HEADS = ("head.weight", "classifier.weight", "head.fc.weight")


def state_dict_of(
    checkpoint: Mapping[str, Any], source: str, ema: bool = False
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The weights within a checkpoint, whatever they are filed under.

    Args:
        checkpoint: What :func:`read_checkpoint` returns.
        source: Its name in error messages.
        ema: Take the moving average instead of the raw weights.

    Returns:
        The weights, and the names of what a training checkpoint of MindCV holds besides.

    Raises:
        CheckpointError: There are none.
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
    """What is filed under ``key``, if it holds values by name."""
    value = checkpoint.get(key)
    return value if isinstance(value, Mapping) else {}


def _named(state: Mapping[Any, Any], source: str) -> dict[str, torch.Tensor]:
    """The tensors of a mapping, whose keys must be names."""
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
    strange = next((key for key in tensors if not isinstance(key, str)), None)
    if strange is not None:
        raise CheckpointError(
            f"{source} holds a tensor under {str(strange)[:80]}, which is no name"
        )
    return tensors


def num_classes_of(state: Mapping[str, torch.Tensor], name: str = "") -> int | None:
    """Rows of the classifier, or None where it is not recognised.

    Args:
        state: Weights in any layout.
        name: Of the model, if it is known: timm says what its classifier is called.
    """
    name = name.partition(".")[0]  # without the tag
    named = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    keys = (*HEADS, f"{named.classifier}.weight") if named else HEADS
    return next((state[key].shape[0] for key in keys if key in state), None)


def class_names(checkpoint: Mapping[str, Any], source: str) -> list[str]:
    """Names of the classes in the order of the logits; empty where a checkpoint has none.

    Raises:
        CheckpointError: What stands for them are no names.
    """
    names = checkpoint.get("classes") or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: classes must be a list of names")
    return list(names)


def flags_of_run(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Flags of the run that made a checkpoint, if it was of this repository, of DeiT or its kin.

    Of MindCV's runs, whose files hold none, an empty dict; None of timm's runs, whose files name
    their ``arch``, and of weights that say nothing of a run.
    """
    flags = {} if "mindspore" in checkpoint else checkpoint.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    return dict(flags) if isinstance(flags, Mapping) and "arch" not in checkpoint else None


def normalization_of(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> Normalization:
    """Mean and deviation of the images that weights were trained on, for values from 0 to 1.

    Runs with :func:`flags_of_run` have ImageNet's, whatever the model; other weights have what
    timm says of the model.

    Args:
        checkpoint: The file's content; empty for timm's own weights.
        config: The model's ``pretrained_cfg``.
    """
    if flags_of_run(checkpoint) is not None or not config.get("mean"):
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return tuple(config["mean"]), tuple(config["std"])


def settings_of(checkpoint: Mapping[str, Any], source: str) -> tuple[float | None, str]:
    """Exponent of the query/key pre-scale, and GELU, that the weights were trained for."""
    kwargs = _mapping(checkpoint, "model_kwargs") or checkpoint
    exponent, gelu = kwargs.get("qk_scale_factor"), checkpoint.get("gelu", "none")
    if exponent is not None and not (isinstance(exponent, float | int) and -8 <= exponent <= 8):
        raise CheckpointError(f"{source}: qk_scale_factor must be an exponent from -8 to 8")
    if not isinstance(gelu, str) or gelu not in ("none", "tanh"):
        raise CheckpointError(f"{source}: gelu must be none or tanh, not {str(gelu)[:80]}")
    return exponent, gelu
