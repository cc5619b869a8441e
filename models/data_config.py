"""Preprocessing that a model expects of its images: timm's data config, checked."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from timm.data import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .errors import CheckpointError, ModelError, brief

SMALL_SIZE = 32  # pixels; images of at most this size are resized whole
MAX_SIZE = 4096  # pixels that a file may ask for
MINDCV_SIZE = 224  # of MindCV's evaluation, for models of any size
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
TIMM_FLAGS = ("img_size", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class DataConfig:
    """How a decoded image becomes the input of a model in evaluation; timm's names.

    Attributes:
        input_size: Height and width in pixels.
        interpolation: Filter of the resize.
        mean, std: Normalization of values in 0..1, of each channel: three, or one for grey images.
        crop_pct: Input size over the size of the resized image.
        crop_mode: ``center`` resizes the short side and crops the centre, ``squash`` resizes both
            sides, ``border`` resizes the long side and pads.
        exif: Apply the EXIF orientation, which timm and torchvision ignore.
    """

    input_size: tuple[int, int] = (224, 224)
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875
    crop_mode: str = "center"
    exif: bool = False

    def __str__(self) -> str:
        height, width = self.input_size
        how = f"{self.crop_mode} {self.crop_pct:g}, {self.interpolation}"
        turned = "applied" if self.exif else "not applied"
        return (
            f"{height}x{width} pixels, {how}, mean {self.mean}, std {self.std}, EXIF orientation"
            f" {turned}"
        )

    @property
    def size(self) -> int | tuple[int, int]:
        """Side of square images, else height and width: as flags and models accept it."""
        height, width = self.input_size
        return height if height == width else (height, width)

    @property
    def in_chans(self) -> int:
        """Channels of an input: 3, or 1 for grey."""
        return len(self.mean)

    @property
    def is_grey(self) -> bool:
        """Inputs have one channel."""
        return self.in_chans == 1

    def with_channels(self, in_chans: int | None) -> "DataConfig":
        """Return the config for another number of channels; grey has the average mean and std.

        Raises:
            ModelError: It is grey, and three channels are asked for.
        """
        if in_chans in (None, self.in_chans):
            return self
        if in_chans != 1:
            raise ModelError(
                f"in_chans must be 1, as the weights are of grey images, not {in_chans}"
            )
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,), std=(std,))

    def at_size(self, size: int | Sequence[int]) -> "DataConfig":
        """Return the config for another input size; small images are resized whole.

        Raises:
            ModelError: See :func:`height_and_width`.
        """
        size = height_and_width(size)
        if max(size) <= SMALL_SIZE:
            return replace(self, input_size=size, crop_pct=1.0, crop_mode="squash")
        return replace(self, input_size=size)

    def with_crop(self, ratio: float) -> "DataConfig":
        """Return the config with a centre crop of this ratio; small images stay whole."""
        cropped = replace(self, crop_pct=ratio, crop_mode="center")
        return cropped.at_size(self.input_size)

    def to_timm(self) -> dict[str, Any]:
        """Return timm's data config: the input size is ``(channels, height, width)``."""
        found = asdict(self) | {"input_size": (len(self.mean), *self.input_size)}
        del found["exif"]
        return found

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint stores: timm's data config, and ``exif`` if it is on."""
        return self.to_timm() | ({"exif": True} if self.exif else {})


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of a side, of both, or of timm's ``(3, height, width)``.

    Raises:
        ModelError: The size is not one of these, or has a side below 1.
    """
    numbers = tuple(size) if isinstance(size, list | tuple) else (size, size)
    channels, sides = numbers[:-2] or (3,), numbers[-2:]
    if (
        channels != (3,)
        or len(sides) != 2
        or not all(type(side) is int and side > 0 for side in sides)
    ):
        given = " ".join(map(brief, numbers[:5] if isinstance(size, list | tuple) else [size]))
        raise ModelError(
            f"input size {given} must be a side in pixels, height and width, or 3 (channels), "
            f"height and width, such as 224, 224 160 or 3 224 160"
        )
    return sides


def size_text(size: int | tuple[int, int]) -> str:
    """Return an input size as text: the side in pixels, or height x width."""
    height, width = height_and_width(size)
    return str(height) if height == width else f"{height}x{width}"


def trained_size(checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width that a checkpoint's model was built for, if it records them."""
    flags = _flags(checkpoint)
    places = (
        (checkpoint.get("model_kwargs"), "img_size"),
        (checkpoint, "input_size"),
        (checkpoint.get("data_config"), "input_size"),
        (flags, "img_size"),
        (flags, "input_size"),
    )
    for place, key in places:
        if isinstance(place, Mapping) and isinstance(place.get(key), int | list | tuple):
            try:
                size = place[key]
                return height_and_width(size if isinstance(size, int) else size[-2:])
            except ModelError:
                return None
    return None


def flags_of_run(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the flags of the run that made a checkpoint: of this repository, DeiT or its kin.

    The dict is empty for MindCV's runs, whose files hold none. The result is None for timm's runs,
    whose files name their ``arch``, and for weights without a run.
    """
    if "mindspore" in checkpoint:
        return {}
    return None if "arch" in checkpoint else _flags(checkpoint)


def _flags(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    flags = checkpoint.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    return dict(flags) if isinstance(flags, Mapping) else None


def data_config_of(
    checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None, source: str
) -> DataConfig:
    """Return the preprocessing of a checkpoint, or of a model for an empty checkpoint.

    Runs of this repository record theirs. Older ones, and DeiT's, normalize by ImageNet's mean
    and std and crop the centre by ``--eval-crop-ratio``, by default 0.875. MindCV evaluates with
    the same. Runs of torchvision's references record their resize. timm's runs record flags that
    differ from the model's ``pretrained_cfg``, which applies to all other weights.

    Args:
        checkpoint: Content of the file; empty for a model without one.
        config: The model's ``pretrained_cfg``.
        source: Name of the file, for messages.

    Raises:
        CheckpointError: A value is out of range.
    """
    config = config or {}
    own = dict(resolve_data_config({}, pretrained_cfg=config) if config else {})
    runs = flags_of_run(checkpoint)
    size = checkpoint.get("input_size")
    if runs is not None:
        fallback = own.get("input_size", DataConfig.input_size)
        if "mindspore" in checkpoint and not config.get("fixed_input_size"):
            fallback = MINDCV_SIZE
        own = {"input_size": fallback if runs.get("input_size") is None else runs["input_size"]}
        own["crop_pct"] = runs.get("eval_crop_ratio") or DataConfig.crop_pct
        own |= _of_torchvision(runs)
    elif "arch" in checkpoint:
        timms = _flags(checkpoint) or {}
        timms = {key: timms[key] for key in TIMM_FLAGS if timms.get(key) is not None}
        try:
            own = resolve_data_config(timms, pretrained_cfg=config)
        except Exception as error:  # of values of any type
            flags = ", ".join(f"{key} {brief(value)}" for key, value in timms.items())
            raise CheckpointError(f"{source}: args do not describe images: {flags}") from error
    if size is not None:
        own["input_size"] = size
    recorded = checkpoint.get("data_config", {})
    if not isinstance(recorded, Mapping):
        raise CheckpointError(f"{source}: data_config must be a dict")
    return _checked(own | dict(recorded), source)


def _of_torchvision(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the images of a run of torchvision's references; empty for other runs."""
    crop, whole = flags.get("val_crop_size"), flags.get("val_resize_size")
    if type(crop) is not int or type(whole) is not int or not 0 < crop <= whole:
        return {}
    ratio = math.nextafter(crop / whole, 0)  # rounding must not lose a pixel of ``crop / ratio``
    interpolation = flags.get("interpolation", "bilinear")
    return {"input_size": crop, "crop_pct": ratio, "interpolation": interpolation}


def _checked(values: Mapping[str, Any], source: str) -> DataConfig:
    """Return the config of these values, each of which may be of any type."""

    def refuse(key: str, right: str) -> CheckpointError:
        return CheckpointError(f"{source}: {key} must be {right}, not {brief(values[key])}")

    found = {}
    size = values.get("input_size", DataConfig.input_size)
    sides = (size, size) if not isinstance(size, list | tuple) else tuple(size[-2:])
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MAX_SIZE for side in sides):
        raise refuse("input_size", f"a number of pixels, at most {MAX_SIZE}")
    for key, choices in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if key in values:
            if not isinstance(values[key], str) or values[key] not in choices:
                raise refuse(key, f"one of {', '.join(choices)}")
            found[key] = values[key]
    for key in ("mean", "std"):
        if key in values:
            numbers = values[key]
            if (
                not isinstance(numbers, list | tuple)
                or len(numbers) not in (1, 3)
                or not all(_is_number(n) and (key == "mean" or n > 0) for n in numbers)
            ):
                raise refuse(key, "three numbers, or one for grey images")
            found[key] = tuple(map(float, numbers))
    if "crop_pct" in values:
        if not _is_number(values["crop_pct"]) or not 0 < values["crop_pct"] <= 8:
            raise refuse("crop_pct", "above 0, such as 0.875")
        found["crop_pct"] = float(values["crop_pct"])
    if "exif" in values:
        if not isinstance(values["exif"], bool):
            raise refuse("exif", "true or false")
        found["exif"] = values["exif"]
    config = DataConfig(**found).at_size(sides)
    if len(config.mean) != len(config.std):
        raise refuse("std" if "std" in values else "mean", "as many numbers as mean and std have")
    is_grey = isinstance(size, list | tuple) and tuple(size[:-2]) == (1,)
    return config.with_channels(1) if is_grey else config


def _is_number(value: Any) -> bool:
    if type(value) is int:  # which may exceed all floats
        return abs(value) < MAX_SIZE
    return isinstance(value, float) and math.isfinite(value)
