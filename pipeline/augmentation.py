"""Augmentation settings, and the transforms of torchvision and timm that they stand for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import (
    CenterCropOrPad,
    RandomCropOrPad,
    RandomResizedCropAndInterpolation,
    ResizeKeepRatio,
    str_to_interp_mode,
)
from timm.layers import to_2tuple
from torchvision import transforms

from .images import RRC_RATIO, RRC_SCALE, CropLongSide, DataError, EnlargeTiny

PADDING = 4  # pixels around a small or resized image that is cropped at random
KEEP_RATIO = {"rkrc": CenterCropOrPad, "rkrr": RandomCropOrPad}  # timm's crop modes
# values of --train-crop-mode, and the crops they stand for
CROP_MODES = {"rrc": "random-resized"} | {mode: mode for mode in KEEP_RATIO}
RKR_SCALE, RKR_RATIO, RKR_PROB = (0.8, 1.0), (0.9, 1 / 0.9), 0.5  # timm's, of both


class Stages(NamedTuple):
    """Transforms of an augmentation, stage by stage; a stage can be empty.

    Attributes:
        resize: Resize a PIL image before the crop.
        crop: Crop a PIL image to the input size.
        flip: Flip a PIL image.
        color: Apply a policy or colour jitter to a PIL image.
        normalize: Turn a PIL image into a normalised tensor ``C H W``.
        erase: Erase boxes of the tensor.
    """

    resize: Sequence[Callable]
    crop: Sequence[Callable]
    flip: Sequence[Callable]
    color: Sequence[Callable]
    normalize: Sequence[Callable]
    erase: Sequence[Callable]


@dataclass(frozen=True)
class Augmentation:
    """How a decoded image becomes a model input. Both loaders are built from this.

    Before a resize by the short side, images longer than 8:1 are cropped to that. For an input that
    is not square, the resize by the short side makes the smallest image that covers it, that by the
    long side the largest within it, as timm's do.

    Attributes:
        size: Side of the input, or height and width, in pixels.
        crop: ``random-resized``; ``padded`` (resize to ``size``, pad with black, crop at random);
            ``reflected`` (resize the short side, pad with reflected pixels, crop at random: DeiT
            III's simple random crop); timm's ``rkrc`` and ``rkrr`` (resize the short side, half
            of the images to another scale and half to another aspect ratio, crop or reflect at
            the centre or at random); and
            timm's for evaluation, of an image of ``size / crop_ratio`` pixels: ``center`` (resize
            the short side, crop the centre), ``squash`` (resize both sides, crop the centre) or
            ``border`` (resize the long side, pad with ``mean``, crop the centre).
        crop_ratio: ``size`` over the side of the resized image, for timm's three.
        interpolation: Filter of the random crops, of the policy and of timm's three for
            evaluation: ``bilinear``, ``bicubic``, or for the first two ``random`` for either; the
            last take any of Pillow's.
        hflip: Probability of a horizontal flip.
        policy: timm's name of a RandAugment, AutoAugment or AugMix policy; empty for none.
        color_jitter: Strength of brightness, contrast and saturation jitter; applied without a
            policy and with ``3a``.
        erase_prob: Probability of random erasing.
        erase_mode: ``pixel`` (normal noise), ``rand`` (one random colour) or ``const`` (zeros).
        erase_count: Largest number of erased boxes.
        mean, std: Normalisation, per channel; of one channel, images are grey.
        vflip: Probability of a vertical flip.
        scale, ratio: Ranges of ``random-resized``, ``rkrc`` and ``rkrr``: share of the area, and
            aspect ratio or, for the latter two, its change. None for timm's: 0.08 to 1 and 3/4 to
            4/3, or 0.8 to 1 and 0.9 to 1/0.9.

    Raises:
        DataError: The crop has no ``scale`` or ``ratio``.
    """

    size: int | tuple[int, int]
    crop: str
    crop_ratio: float = 1.0
    interpolation: str = "bicubic"
    hflip: float = 0.0
    policy: str | None = None
    color_jitter: float | None = None
    erase_prob: float = 0.0
    erase_mode: str = "pixel"
    erase_count: int = 1
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    vflip: float = 0.0
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for flag in ("scale", "ratio"):
            value = getattr(self, flag)
            if value is not None and self.crop not in CROP_MODES.values():
                raise DataError(
                    f"--{flag} {value[0]:g} {value[1]:g} has no effect: training images of"
                    f" {self.size} pixels get a {self.crop} crop; --train-crop-mode rrc resizes"
                    f" random crops instead"
                )

    @classmethod
    def for_evaluation(cls, images: Any) -> "Augmentation":
        """Return the resize and crop of a ``models.DataConfig``."""
        crop = (images.crop_mode, images.crop_pct, images.interpolation)
        return cls(images.size, *crop, mean=images.mean, std=images.std)

    @property
    def is_grey(self) -> bool:
        """Inputs have one channel; until they are normalised, images have three equal ones."""
        return len(self.mean) == 1

    @property
    def _rgb_mean(self) -> tuple[float, ...]:
        return self.mean * 3 if self.is_grey else self.mean

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the input."""
        return to_2tuple(self.size)

    def compose(self) -> transforms.Compose:
        """Return the reference transform: PIL image to tensor ``C H W``."""
        return transforms.Compose([*chain.from_iterable(self.stages())])

    def stages(self) -> Stages:
        """Return the reference transforms by stage.

        Raises:
            DataError: timm does not know the policy.
        """
        erase = RandomErasing(
            self.erase_prob, mode=self.erase_mode, max_count=self.erase_count, device="cpu"
        )
        return Stages(
            *self._resize_and_crop(),
            flip=self._flip(),
            color=self._color(),
            normalize=[
                transforms.ToTensor(),
                *([first_channel] if self.is_grey else []),
                transforms.Normalize(self.mean, self.std),
            ],
            erase=[erase] if self.erase_prob > 0 else [],
        )

    def _flip(self) -> list[Callable]:
        kinds = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
        pairs = zip(kinds, (self.hflip, self.vflip), strict=True)
        return [kind(probability) for kind, probability in pairs if probability > 0]

    def _resize_and_crop(self) -> tuple[list[Callable], list[Callable]]:
        size = self.shape
        if self.crop == "random-resized":
            ranges = (self.scale or RRC_SCALE, self.ratio or RRC_RATIO)
            crop = RandomResizedCropAndInterpolation(size, *ranges, self.interpolation)
            return [EnlargeTiny(*ranges)], [crop]
        if self.crop in KEEP_RATIO:
            resize = ResizeKeepRatio(
                size,
                interpolation=self.interpolation,
                random_scale_prob=RKR_PROB,
                random_scale_range=self.scale or RKR_SCALE,
                random_scale_area=True,
                random_aspect_prob=RKR_PROB,
                random_aspect_range=self.ratio or RKR_RATIO,
            )
            crop = KEEP_RATIO[self.crop](size, padding_mode="reflect")
            return [CropLongSide(), resize], [crop]
        if self.crop == "padded":
            return [transforms.Resize(size)], [transforms.RandomCrop(size, padding=PADDING)]
        if self.crop == "reflected":
            crop = transforms.RandomCrop(size, padding=PADDING, padding_mode="reflect")
            return [CropLongSide(), _resize_to_cover(size, "bicubic")], [crop]
        whole = tuple(int(side / self.crop_ratio) for side in size)
        crop = [] if whole == size else [transforms.CenterCrop(size)]
        if self.crop == "squash":
            return [transforms.Resize(whole, str_to_interp_mode(self.interpolation))], crop
        if self.crop == "border":
            fill = tuple(round(255 * value) for value in self._rgb_mean)
            return [ResizeKeepRatio(whole, 1.0, self.interpolation)], [CenterCropOrPad(size, fill)]
        resize = _resize_to_cover(whole, self.interpolation)
        return [CropLongSide(), resize], [transforms.CenterCrop(size)]

    def _color(self) -> list[Callable]:
        if not self.policy and self.color_jitter is None:
            return []
        try:
            _, color, _ = create_transform(
                input_size=self.size,
                is_training=True,
                color_jitter=self.color_jitter,
                auto_augment=self.policy,
                interpolation=self.interpolation,
                mean=self._rgb_mean,
                separate=True,
            )
        except (AssertionError, ValueError) as error:  # of the parts of a policy's name
            raise DataError(
                f"unknown policy --aa {self.policy}; use one of timm's, such as"
                f" rand-m9-mstd0.5-inc1, original, v0 or augmix-m5-w4: {error}"
            ) from error
        _keep_one_bit(color.transforms)
        return color.transforms


def first_channel(images: torch.Tensor) -> torch.Tensor:
    """Return the first channel of images ``... C H W``, ``... 1 H W``."""
    return images[..., :1, :, :]


def _resize_to_cover(size: tuple[int, int], interpolation: str) -> Callable:
    """Return timm's resize to the smallest image of the same aspect ratio that covers a size."""
    if size[0] == size[1]:
        return transforms.Resize(size[0], str_to_interp_mode(interpolation))
    return ResizeKeepRatio(size, interpolation=interpolation)


def _keep_one_bit(steps: Sequence[Callable]) -> None:
    """Let the posterize operations of policies keep at least one bit.

    At the highest magnitudes timm asks for 0 bits, which Pillow refuses.
    """
    for step in steps:
        for operation in chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
                operation.level_fn = _AtLeastOneBit(operation.level_fn)


@dataclass(frozen=True)
class _AtLeastOneBit:
    level_fn: Callable

    def __call__(self, level: float, hparams: dict) -> tuple[int]:
        return (max(self.level_fn(level, hparams)[0], 1),)
