"""Networks as files and timm's collection have them, and how they become models."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import datasets
import models
from models.checkpoint.contents import num_classes_of, state_dict_of

WEIGHTS = ("model", "ema")


@dataclass(frozen=True)
class Network:
    """What is known of a network before it is built.

    Attributes:
        source: Its file, or what messages call timm's weights.
        name: timm's name of the model.
        required: Keyword arguments that the model must take; None for its own default.
        optional: Keyword arguments that it may not know.
        checkpoint: Content of the file; empty for timm's weights.
        input_size: Pixels that it was trained at, None if that is not known.
        classes: Names of its classes in the order of its outputs, None if they are not known.
    """

    source: str
    name: str
    required: Mapping[str, Any]
    optional: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    input_size: int | None = None
    classes: tuple[str, ...] | None = None

    def weights(self, asked: str) -> tuple[str, ...]:
        """``model``, ``ema``, or where ``both`` are asked for, those there are.

        Raises:
            CheckpointError: There are no such weights.
        """
        if self.checkpoint:
            wanted = WEIGHTS if asked == "both" else (asked,)
            return tuple(_states(self.checkpoint, self.source, wanted))
        if asked == "ema":
            raise models.CheckpointError(f"{self.source} have no moving average: --weights model")
        return ("model",)

    def build(self, size: int) -> nn.Module:
        """The model for images of ``size`` pixels; with timm's weights, else with random ones.

        Raises:
            ModelError: It cannot be built, or timm's weights cannot be had.
        """
        optional = dict(self.optional) | {"img_size": size}
        if self.checkpoint:
            return models.build_model(self.name, self.required, optional)[0]
        try:
            required = dict(self.required) | {"pretrained": True}
            return models.build_model(self.name, required, optional)[0]
        except models.ModelError:
            raise
        except Exception as error:  # downloads fail in many ways
            reason = " ".join(str(error).split()) or type(error).__name__
            raise models.ModelError(f"no weights for {self.name} from timm: {reason}") from error

    def load(self, model: nn.Module, weights: str) -> None:
        """Give ``model`` the weights of the file.

        Raises:
            CheckpointError: They do not fit.
        """
        if self.checkpoint:
            models.load_weights(model, self.checkpoint, self.source, ema=weights == "ema")


def read_network(path: str, model: str | None = None, exponent: float | None = None) -> Network:
    """The network of a checkpoint file.

    Args:
        path: File or address.
        model: Model to take the weights for; needed where the file does not name one.
        exponent: Of the query/key pre-scale, for files that do not say it.

    Raises:
        CheckpointError: The file cannot be read, or contradicts itself.
        ModelError: The model is not known.
    """
    checkpoint = models.read_checkpoint(path)
    named = checkpoint.get("model_name")
    name = model or named
    if not isinstance(name, str):
        raise models.ModelError(f"{path} does not say which model it is: give --model NAME")
    saved = checkpoint.get("model_kwargs")
    saved = dict(saved) if isinstance(saved, Mapping) and name == named else {}
    num_classes = saved.get("num_classes")
    if not num_classes:
        num_classes = num_classes_of(next(iter(_states(checkpoint, path).values())), name)
    required = {"num_classes": num_classes}
    required["qk_scale_factor"] = saved.get("qk_scale_factor", exponent)
    size = checkpoint.get("input_size")
    if size is not None and not (type(size) is int and size > 0):  # True is an int, too
        raise models.CheckpointError(
            f"{path}: input_size must be a number of pixels, not {str(size)[:20]}"
        )
    classes = _classes_of(checkpoint, path, num_classes)
    return Network(path, name, required, saved, checkpoint, size, classes)


def pretrained_network(name: str) -> Network:
    """The network that timm has weights for."""
    config = models.pretrained_config(name)
    size = config.input_size[-1] if config else None
    return Network(f"timm's weights of {name}", name, {}, input_size=size)


def _states(
    checkpoint: Mapping[str, Any], source: str, wanted: Sequence[str] = WEIGHTS
) -> dict[str, dict[str, torch.Tensor]]:
    """Those of the wanted weights that a file has.

    Raises:
        CheckpointError: It has none; says why not the first.
    """
    found, errors = {}, []
    for name in wanted:
        try:
            found[name] = state_dict_of(checkpoint, source, ema=name == "ema")[0]
        except models.CheckpointError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _classes_of(
    checkpoint: Mapping[str, Any], path: str, num_classes: int | None
) -> tuple[str, ...] | None:
    names = models.class_names(checkpoint, path)
    if not names:
        return None
    if num_classes is not None and len(names) != num_classes:
        raise models.CheckpointError(
            f"{path} has {len(names)} names of classes for {num_classes} outputs"
        )
    return tuple(names)


def size_of(network: Network, asked: int | None, args: Namespace) -> int:
    """``asked``, else what the network was trained at, else the dataset's usual size."""
    return asked or network.input_size or datasets.input_size_of(args)
