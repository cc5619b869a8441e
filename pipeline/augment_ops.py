"""What timm's augmentation draws for an image, as numbers that other code can apply."""

import copy
import math
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing

NUM_VALUES = 6
ENCODED = NUM_VALUES + 2  # kind, values, bicubic
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


class UnsupportedPolicy(ValueError):
    """A policy has an operation that cannot be expressed; the message names it."""


class Kind(IntEnum):
    """What an operation does, and the values that it takes."""

    NONE = 0
    AFFINE = 1  # a, b, c, d, e, f: output (x, y) is input (a x + b y + c, d x + e y + f)
    AUTO_CONTRAST = 2
    EQUALIZE = 3
    INVERT = 4
    SOLARIZE = 5  # threshold
    SOLARIZE_ADD = 6  # addend, threshold
    POSTERIZE = 7  # bits to keep, 1..8
    COLOR = 8  # factor: 0 for the degenerate image, 1 for the same image
    CONTRAST = 9  # factor
    BRIGHTNESS = 10  # factor
    SHARPNESS = 11  # factor


class Operation(NamedTuple):
    """One step of an augmentation.

    Attributes:
        kind: What is done.
        values: Up to 6 numbers, see :class:`Kind`. Coordinates are in pixels, where the first
            pixel covers 0..1, as in ``PIL.Image.transform``.
        bicubic: Whether AFFINE interpolates by bicubic, else by bilinear filter.
    """

    kind: Kind
    values: tuple[float, ...] = ()
    bicubic: bool = False


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class _Recording:
    """Stands for an image of ``size`` (width, height); keeps what is done to it.

    It has the methods of ``PIL.Image.Image`` that timm's geometric operations call.
    """

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.operations: list[Operation] = []

    def add(self, kind: Kind, *values: float) -> "_Recording":
        self.operations.append(Operation(kind, values))
        return self

    def transform(self, size, method, data, resample, fillcolor) -> "_Recording":
        if tuple(data) != (1, 0, 0, 0, 1, 0):
            bicubic = resample == Image.Resampling.BICUBIC
            self.operations.append(Operation(Kind.AFFINE, tuple(data), bicubic))
        return self

    def rotate(self, angle: float, resample, fillcolor) -> "_Recording":
        matrix = rotation(angle, *self.size)
        return self.transform(self.size, Image.Transform.AFFINE, matrix, resample, fillcolor)


def rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """The six values of a rotation, counter-clockwise around the centre of an image.

    Cosine and sine are rounded to 15 digits as in ``PIL.Image.rotate``, so that the pixels are
    the same.
    """
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def _posterize(image: _Recording, bits: int, **_: Any) -> _Recording:
    if bits < 1:
        raise ValueError(f"posterize can keep 1 to 8 bits, not {bits}")
    return image if bits >= 8 else image.add(Kind.POSTERIZE, bits)


def _solarize_add(image: _Recording, addend: int, thresh: int = 128, **_: Any) -> _Recording:
    return image.add(Kind.SOLARIZE_ADD, addend, thresh)


def _desaturate(image: _Recording, factor: float, **_: Any) -> _Recording:
    return image.add(Kind.COLOR, min(1.0, max(0.0, 1.0 - factor)))


def _add(kind: Kind, image: _Recording, *values: float, **_: Any) -> _Recording:
    return image.add(kind, *values)


GEOMETRIC = {
    auto_augment.rotate,
    auto_augment.shear_x,
    auto_augment.shear_y,
    auto_augment.translate_x_abs,
    auto_augment.translate_x_rel,
    auto_augment.translate_y_abs,
    auto_augment.translate_y_rel,
}
RECORDERS = {
    auto_augment.auto_contrast: partial(_add, Kind.AUTO_CONTRAST),
    auto_augment.equalize: partial(_add, Kind.EQUALIZE),
    auto_augment.invert: partial(_add, Kind.INVERT),
    auto_augment.solarize: partial(_add, Kind.SOLARIZE),
    auto_augment.solarize_add: _solarize_add,
    auto_augment.posterize: _posterize,
    auto_augment.color: partial(_add, Kind.COLOR),
    auto_augment.contrast: partial(_add, Kind.CONTRAST),
    auto_augment.brightness: partial(_add, Kind.BRIGHTNESS),
    auto_augment.sharpness: partial(_add, Kind.SHARPNESS),
    auto_augment.desaturate: _desaturate,
} | {function: function for function in GEOMETRIC}


class PolicyRecorder:
    """Draws operations from a RandAugment or AutoAugment policy of timm.

    timm itself draws: its objects are called on a stand-in for the image, in copies whose
    operations note what they would do. So ``random`` and ``numpy.random`` are used exactly as
    by the policy itself. Operations that change nothing are left out.

    Args:
        policy: The transform; it is not changed.
        width: Of the images that the policy would get, in pixels.
        height: Of the same images.

    Attributes:
        fill: Red, green and blue of what comes from outside the image.
        slots: The most operations that a draw can have.

    Raises:
        UnsupportedPolicy: The transform is of another type, or one of its operations (named in
            the message) has no :class:`Kind`, another filter than bilinear and bicubic, or
            another fill colour than the rest.
    """

    def __init__(self, policy: RandAugment | AutoAugment, width: int, height: int):
        if type(policy) not in (RandAugment, AutoAugment):
            raise UnsupportedPolicy(
                f"{type(policy).__name__} is neither a RandAugment nor an AutoAugment"
            )
        self._size = width, height
        self._policy = copy.copy(policy)
        if isinstance(policy, RandAugment):
            self._policy.ops = _recording(policy.ops)
            self.slots = policy.num_layers
            operations = policy.ops
        else:
            self._policy.policy = [_recording(part) for part in policy.policy]
            self.slots = max(map(len, policy.policy))
            operations = [operation for part in policy.policy for operation in part]
        self.fill: tuple[int, int, int] = _fill(operations)

    def draw(self) -> list[Operation]:
        """The operations for the next image, in their order.

        Raises:
            ValueError: The policy wants to posterize to 0 bits, which Pillow refuses, too.
        """
        return self._policy(_Recording(self._size)).operations


def _recording(operations: Sequence[AugmentOp]) -> list[AugmentOp]:
    """Copies of a policy's operations that record what they do."""
    copies = [copy.copy(operation) for operation in operations]
    for operation in copies:
        if operation.aug_fn not in RECORDERS:
            raise UnsupportedPolicy(f"operation {operation.name} cannot be expressed")
        resample = operation.kwargs["resample"]
        filters = resample if isinstance(resample, Sequence) else [resample]
        if operation.aug_fn in GEOMETRIC and not set(filters) <= set(FILTERS):
            raise UnsupportedPolicy(
                f"operation {operation.name} has filter {resample}, not bilinear or bicubic"
            )
        operation.aug_fn = RECORDERS[operation.aug_fn]
    return copies


def _fill(operations: Sequence[AugmentOp]) -> tuple[int, int, int]:
    fill = operations[0].kwargs["fillcolor"]
    for operation in operations:
        colour = operation.kwargs["fillcolor"]
        if colour != fill or not isinstance(colour, tuple) or len(colour) != 3:
            raise UnsupportedPolicy(
                f"operation {operation.name} fills with {colour}; it must be one tuple of red,"
                " green and blue for all"
            )
    return fill


class _ErasedImage:
    """Stands for an image tensor ``3 H W``; keeps where it is assigned to."""

    dtype = torch.float32

    def __init__(self, shape: tuple[int, int, int]):
        self._shape = shape
        self.boxes: list[Box] = []

    def size(self) -> tuple[int, int, int]:
        return self._shape

    def __setitem__(self, where: tuple[slice, slice, slice], value: torch.Tensor) -> None:
        _, rows, columns = where
        top, left = rows.start, columns.start
        self.boxes.append(Box(top, left, rows.stop - top, columns.stop - left))


class ErasingRecorder:
    """Draws the boxes of timm's RandomErasing, of which only ``random`` is used.

    Args:
        erasing: The transform; it is not changed.
        height: Of the images that it would get, in pixels.
        width: Of the same images.

    Attributes:
        slots: The most boxes that a draw can have.
        mode: ``pixel``, ``rand`` or ``const``: what the boxes are filled with.
    """

    def __init__(self, erasing: RandomErasing, height: int, width: int):
        self._shape = 3, height, width
        self._erasing = copy.copy(erasing)
        self._erasing.device = "meta"
        self._erasing.per_pixel = self._erasing.rand_color = False
        self.slots: int = erasing.max_count
        self.mode: str = erasing.mode or "const"

    def draw(self) -> list[Box]:
        """The boxes for the next image; later ones lie over earlier ones."""
        return self._erasing(_ErasedImage(self._shape)).boxes


def encode(operations: Sequence[Operation], slots: int) -> np.ndarray:
    """Operations as float64 ``slots 8``: kind, six values, bicubic; NONE in what is left.

    In float32, positions would be off by 1e-5 pixels. Where the exact result is a whole number,
    as often is with magnitudes like 0.45, that decides whether it is rounded down to the next.

    Raises:
        ValueError: There are more operations than slots.
    """
    if len(operations) > slots:
        raise ValueError(f"{len(operations)} operations do not fit in {slots} slots")
    rows = np.zeros((slots, ENCODED))
    for row, (kind, values, bicubic) in zip(rows, operations, strict=False):
        row[0], row[1 : 1 + len(values)], row[-1] = kind, values, bicubic
    return rows
