"""From a name, a Hub id, a folder, a file or an address to a model and its preprocessing.

The one rule of which model a source is, and what it expects of its images.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .checkpoint.apply import LoadReport
from .checkpoint.contents import (
    class_names,
    num_classes_of,
    plain_arguments,
    settings_of,
    states_of,
)
from .checkpoint.read import read_checkpoint
from .data_config import DataConfig, data_config_of
from .errors import CheckpointError, ModelError, brief
from .factory import check_name, pretrained_config
from .hub import FOLDER, HUB, read_hub
from .source import ModelSource


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, and what its images are.

    Attributes:
        model: In evaluation mode, on the CPU.
        name: Registered name.
        kwargs: Keyword arguments that built it.
        classes: Class names in the order of the outputs, None if unknown.
        data_config: Preprocessing of its images; ``model.pretrained_cfg`` has the same.
        report: Report of keys; None if the weights are timm's or random.
    """

    model: nn.Module
    name: str
    kwargs: Mapping[str, Any]
    classes: tuple[str, ...] | None
    data_config: DataConfig
    report: LoadReport | None


def load_model(
    source: str | Path | ModelSource,
    name: str | None = None,
    *,
    pretrained: bool = False,
    weights: str = "model",
    input_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    **kwargs: Any,
) -> LoadedModel:
    """Load a model from any source.

    Args:
        source: Registered name, with or without timm's tag; ``hf-hub:ORG/NAME``;
            ``local-dir:FOLDER``; or a file or http(s) address in any format that
            :func:`models.read_checkpoint` reads; or a result of :func:`find_model`.
        name: Name of the model, for files that do not contain it.
        pretrained: Load timm's weights of a registered name, instead of random ones.
        weights: ``model``, or ``ema`` for the moving average.
        input_size: Side, height and width, or timm's ``(3, height, width)``, in pixels; default:
            that of the source.
        num_classes: Number of outputs; a new classifier if the source has another number.
        **kwargs: Further arguments of the model; ``img_size`` is the same as ``input_size``.

    Raises:
        ModelError: The source does not exist, or the model cannot be built.
        CheckpointError: Weights cannot be read, or do not fit the model.
    """
    input_size = kwargs.pop("img_size", input_size)
    found = source
    if not isinstance(source, ModelSource):
        found = find_model(str(source), name, pretrained=pretrained)
    if kwargs.get("in_chans") in (1, 3):
        found = found.with_channels(kwargs["in_chans"])
    found.weights(weights)
    config = found.data_config if input_size is None else found.data_config.at_size(input_size)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    model, used = found.build_with_kwargs(config.size, kwargs)
    is_new = num_classes not in (None, found.num_classes)
    report = found.load(model, weights, new_head=is_new, other_classes=is_new)
    found.describe(model, config)
    classes = None if is_new else found.classes
    return LoadedModel(model.eval(), found.name, used, classes, config, report)


def find_model(
    source: str,
    name: str | None = None,
    *,
    pretrained: bool = False,
    default: str | None = None,
    exponent: float | None = None,
) -> ModelSource:
    """Find what model a source is, without building it.

    Args:
        source, name, pretrained: See :func:`load_model`.
        default: Name of the model if neither the file nor ``name`` tells.
        exponent: Query/key pre-scale exponent, for files that do not contain it.

    Raises:
        ModelError: The source does not exist, or does not fit the other arguments.
        CheckpointError: The file cannot be read, or is inconsistent.
    """
    checkpoint = _read(source)
    if checkpoint is None:
        return from_name(source, pretrained, name)
    return from_checkpoint(checkpoint, source, name, default, exponent)


def read_weights(source: str) -> Mapping[str, Any]:
    """Return the content of a checkpoint from any source; of a model name, timm's weights.

    Raises:
        ModelError, CheckpointError: See :func:`find_model`.
    """
    checkpoint = _read(source)
    if checkpoint is None:
        found = from_name(source, pretrained=True)
        return {"model_name": found.name, "model": found.build().state_dict()}
    return checkpoint


def _read(source: str) -> dict[str, Any] | None:
    """Read a file, an address, a folder or a model of the Hub; None for other names."""
    if source.startswith((HUB, FOLDER)):
        return read_hub(source)
    if source.startswith(("http://", "https://")) or os.path.isfile(source):
        return read_checkpoint(source)
    if timm.is_model(source) or not os.path.exists(source):
        return None
    return read_hub(source) if os.path.isdir(source) else read_checkpoint(source)


def from_name(name: str, pretrained: bool = False, other: str | None = None) -> ModelSource:
    """Return a model of timm's registry, with timm's weights or with random ones.

    Raises:
        ModelError: The name is neither a model nor a file, or ``other`` is given and differs.
    """
    try:
        config = pretrained_config(name)
    except ModelError as error:
        if "/" in name or Path(name).suffix in (".pth", ".pt", ".bin", ".safetensors", ".ckpt"):
            raise CheckpointError(
                f"cannot read checkpoint {name}: No such file or directory; a model of the Hub "
                f"has the prefix {HUB}, a folder {FOLDER}"
            ) from error
        raise
    if other is not None and timm.models.get_arch_name(other) != timm.models.get_arch_name(name):
        raise ModelError(f"{name} is a model, and so is {other}: leave one of them out")
    label = f"timm's weights of {name}" if pretrained else f"{name} with random weights"
    images = data_config_of({}, config.to_dict() if config else None, name)
    return ModelSource(label, name, images, pretrained=pretrained)


def from_checkpoint(
    checkpoint: Mapping[str, Any],
    label: str,
    name: str | None = None,
    default: str | None = None,
    exponent: float | None = None,
) -> ModelSource:
    """Return the model of a checkpoint that has been read; see :func:`find_model`.

    Raises:
        CheckpointError: The content is inconsistent, or names no registered model.
        ModelError: No model is named, or ``name`` is unknown.
    """
    names = (checkpoint.get(key) for key in ("model_name", "arch"))
    saved_name = next((found for found in names if found is not None), None)
    if saved_name is not None and not isinstance(saved_name, str):
        raise CheckpointError(f"{label}: model_name must be text, not {brief(saved_name)}")
    if name is None and saved_name is not None and not timm.is_model(saved_name):
        raise CheckpointError(
            f"{label} is of model {brief(saved_name)}, which is not registered: give --model NAME"
        )
    name = name or saved_name or default
    if name is None:
        raise ModelError(f"{label} does not contain the model name: give --model NAME")
    check_name(name)
    is_own = saved_name is not None and _architecture(saved_name) == _architecture(name)
    saved = checkpoint.get("model_kwargs")
    saved = {} if saved is None else saved
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{label}: model_kwargs must be a dict")
    saved = plain_arguments(saved, label) if is_own or saved_name is None else {}
    rows = num_classes_of(next(iter(states_of(checkpoint, label).values())), name)
    number = rows if saved.get("num_classes") is None else saved["num_classes"]
    if number is not None and (type(number) is not int or rows not in (None, number)):
        raise CheckpointError(
            f"{label} has {rows} outputs, not {brief(number)} as its num_classes says"
        )
    classes = class_names(checkpoint, label)
    if classes and number is not None and len(classes) != number:
        raise CheckpointError(f"{label} has {len(classes)} class names for {number} outputs")
    own_exponent, _ = settings_of(checkpoint, label)
    required = {"num_classes": number}
    required["qk_scale_factor"] = exponent if own_exponent is None else own_exponent
    config = pretrained_config(name)
    images = data_config_of(checkpoint, config.to_dict() if config else None, label)
    if saved.get("in_chans") == 1:
        images = images.with_channels(1)
    return ModelSource(label, name, images, required, saved, checkpoint, tuple(classes) or None)


def _architecture(name: str) -> str:
    return name.partition(".")[0]
