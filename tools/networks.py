"""From a checkpoint, or the name of a model, to a model with its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import models
from models.checkpoint.contents import num_classes_of, state_dict_of

WEIGHTS = ("model", "ema")
CROP_RATIO = 0.875  # default of --eval-crop-ratio


@dataclass(frozen=True)
class ModelSource:
    """A model that can be built: its name, arguments and weights.

    The model must accept the keyword arguments ``required``, where None is its default; those of
    ``optional`` are left out if it does not accept them.
    """

    label: str  # file name, or a description of timm's weights, for messages
    name: str  # registered name of the model
    required: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Mapping[str, Any] = field(default_factory=dict)  # empty without a file
    input_size: int | None = None  # of the training, in pixels; None if unknown
    classes: tuple[str, ...] | None = None  # in the order of the outputs; None if unknown
    pretrained: bool = False  # build with timm's weights

    def weights(self, choice: str = "both") -> tuple[str, ...]:
        """Return the chosen weights, of ``both`` those that exist; CheckpointError if none."""
        if self.checkpoint:
            wanted = WEIGHTS if choice == "both" else (choice,)
            return tuple(_states(self.checkpoint, self.label, wanted))
        if choice == "ema":
            raise models.CheckpointError(f"{self.label}: no moving average; use --weights model")
        return ("model",)

    def build(self, size: int | Sequence[int] | None = None, **required: Any) -> nn.Module:
        """Return the model of :meth:`build_with_kwargs` alone."""
        return self.build_with_kwargs(size, **required)[0]

    def build_with_kwargs(
        self, size: int | Sequence[int] | None = None, **required: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Build the model, with timm's weights if ``pretrained``, else with random ones.

        Args:
            size: Image size in pixels, for models that depend on it.
            **required: Further keyword arguments that the model must accept.

        Returns:
            The model and its keyword arguments.

        Raises:
            ModelError: The model cannot be built, or timm's weights cannot be downloaded.
        """
        required = dict(self.required) | required
        optional = dict(self.optional) | ({} if size is None else {"img_size": size})
        if not self.pretrained:
            return models.build_model(self.name, required, optional)
        try:
            return models.build_model(self.name, required | {"pretrained": True}, optional)
        except models.ModelError:
            raise
        except Exception as error:  # downloads raise errors of any type
            reason = " ".join(str(error).split()) or type(error).__name__
            raise models.ModelError(
                f"cannot get timm's weights of {self.name}: {reason}"
            ) from error

    def load(self, model: nn.Module, weights: str = "model") -> models.LoadReport | None:
        """Load the weights of the file, ``model`` or ``ema``, if there is a file.

        Raises:
            CheckpointError: The weights do not fit the model.
        """
        if not self.checkpoint:
            return None
        return models.load_weights(model, self.checkpoint, self.label, ema=weights == "ema")

    def normalization(self, model: nn.Module) -> models.Normalization:
        """Mean and standard deviation of the images that the weights were trained on."""
        return models.normalization_of(self.checkpoint, model.pretrained_cfg)

    def image_size(self, size: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Return height and width: those given, else of the training, else of timm's weights."""
        if size or (self.checkpoint and self.input_size):
            return size or (self.input_size, self.input_size)
        config = models.pretrained_config(self.name)
        return tuple(config.input_size[-2:]) if config else None

    @property
    def crop_ratio(self) -> float:
        """Fraction of the resized image that the centre crop of evaluation keeps."""
        flags = models.flags_of_run(self.checkpoint) or {}
        return flags.get("eval_crop_ratio") or CROP_RATIO


def from_checkpoint(
    path: str, name: str | None = None, exponent: float | None = None
) -> ModelSource:
    """Read a checkpoint file.

    Args:
        path: File or URL.
        name: Model name; needed if the file does not contain it. Arguments saved for another
            model are ignored.
        exponent: Query/key pre-scale exponent, for files that do not contain it.

    Raises:
        CheckpointError: The file cannot be read, or is inconsistent.
        ModelError: The model name is unknown.
    """
    checkpoint = models.read_checkpoint(path)
    named = checkpoint.get("model_name")
    name = name or named
    if not isinstance(name, str):
        raise models.ModelError(f"{path} does not contain the model name: give --model NAME")
    saved = checkpoint.get("model_kwargs")
    saved = dict(saved) if isinstance(saved, Mapping) and named in (None, name) else {}
    num_classes = saved.get("num_classes")
    if not num_classes:
        num_classes = num_classes_of(next(iter(_states(checkpoint, path).values())), name)
    exponent = saved.get("qk_scale_factor", exponent)
    required = {"num_classes": num_classes, "qk_scale_factor": exponent}
    size = checkpoint.get("input_size")
    if size is not None and not (type(size) is int and size > 0):  # True is an int, too
        raise models.CheckpointError(
            f"{path}: input_size must be a number of pixels, not {str(size)[:20]}"
        )
    classes = models.class_names(checkpoint, path)
    if classes and num_classes is not None and len(classes) != num_classes:
        raise models.CheckpointError(
            f"{path} has {len(classes)} class names for {num_classes} outputs"
        )
    return ModelSource(path, name, required, saved, checkpoint, size, tuple(classes) or None)


def from_name(name: str, pretrained: bool = False) -> ModelSource:
    """Return a model of timm's registry, with timm's weights or with random ones.

    Raises:
        ModelError: The model name is unknown.
    """
    config = models.pretrained_config(name)
    size = config.input_size[-1] if config else None
    label = f"timm's weights of {name}" if pretrained else f"{name} with random weights"
    return ModelSource(label, name, input_size=size, pretrained=pretrained)


def _states(
    checkpoint: Mapping[str, Any], source: str, wanted: Sequence[str] = WEIGHTS
) -> dict[str, dict[str, torch.Tensor]]:
    """Return those of the wanted weights that a file has; raise the first's error without any."""
    found, errors = {}, []
    for name in wanted:
        try:
            found[name] = state_dict_of(checkpoint, source, ema=name == "ema")[0]
        except models.CheckpointError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found
