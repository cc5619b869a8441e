"""Operations and boxes that timm's augmentation samples for an image, as numbers to apply later."""

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
    """A policy has an operation without a :class:`Kind`; the message names it."""


class Kind(IntEnum):
    """Kinds of operations, with the values that they take."""

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
        kind: Kind of the operation.
        values: Up to 6 numbers, see :class:`Kind`. Coordinates are in pixels, where the first
            pixel covers 0..1, as in ``PIL.Image.transform``.
        bicubic: AFFINE interpolates by bicubic (else bilinear) filter.
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
    """Stand-in for an image of ``size`` (width, height) that records its operations.

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
    """Return the six values of a rotation, counter-clockwise around the centre of an image.

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
    """Samples operations from a RandAugment or AutoAugment policy of timm.

    Copies of timm's objects, whose operations record instead of computing, are called on a
    stand-in for the image. So ``random`` and ``numpy.random`` are used exactly as by the policy
    itself. Operations without effect are omitted.

    Args:
        policy: The transform; it is not changed.
        width: Width of the images in pixels.
        height: Height of the images in pixels.

    Attributes:
        fill: Red, green and blue of pixels from outside the image.
        slots: Largest number of operations of a sample.

    Raises:
        UnsupportedPolicy: The transform is of another type, or one of its operations (named in
            the message) has no :class:`Kind`, a filter other than bilinear and bicubic, or a
            fill colour of its own.
    """

    def __init__(self, policy: RandAugment | AutoAugment, width: int, height: int):
        if type(policy) not in (RandAugment, AutoAugment):
            raise UnsupportedPolicy(
                f"policy must be a RandAugment or AutoAugment, not {type(policy).__name__}"
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

    def sample(self) -> list[Operation]:
        """Return the operations for the next image, in order.

        Raises:
            ValueError: The policy posterizes to 0 bits, which Pillow does not support either.
        """
        return self._policy(_Recording(self._size)).operations


def _recording(operations: Sequence[AugmentOp]) -> list[AugmentOp]:
    """Return copies of a policy's operations that record."""
    copies = [copy.copy(operation) for operation in operations]
    for operation in copies:
        if operation.aug_fn not in RECORDERS:
            raise UnsupportedPolicy(f"operation {operation.name} is not supported")
        resample = operation.kwargs["resample"]
        filters = resample if isinstance(resample, Sequence) else [resample]
        if operation.aug_fn in GEOMETRIC and not set(filters) <= set(FILTERS):
            raise UnsupportedPolicy(
                f"filter of {operation.name} must be bilinear or bicubic, not {resample}"
            )
        operation.aug_fn = RECORDERS[operation.aug_fn]
    return copies


def _fill(operations: Sequence[AugmentOp]) -> tuple[int, int, int]:
    fill = operations[0].kwargs["fillcolor"]
    for operation in operations:
        colour = operation.kwargs["fillcolor"]
        if colour != fill or not isinstance(colour, tuple) or len(colour) != 3:
            raise UnsupportedPolicy(
                f"fill colour of {operation.name} must be red, green and blue, the same for all"
                f" operations, not {colour}"
            )
    return fill


class _ErasedImage:
    """Stand-in for an image tensor ``3 H W`` that records where it is assigned to."""

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
    """Samples the boxes of timm's RandomErasing, which only uses ``random`` for them.

    Args:
        erasing: The transform; it is not changed.
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Attributes:
        slots: Largest number of boxes of a sample.
    """

    def __init__(self, erasing: RandomErasing, height: int, width: int):
        self._shape = 3, height, width
        self._erasing = copy.copy(erasing)
        self._erasing.device = "meta"
        self._erasing.per_pixel = self._erasing.rand_color = False
        self.slots: int = erasing.max_count

    def sample(self) -> list[Box]:
        """Return the boxes for the next image; later ones lie over earlier ones."""
        return self._erasing(_ErasedImage(self._shape)).boxes


def encode(operations: Sequence[Operation], slots: int) -> np.ndarray:
    """Encode operations as float64 ``slots 8``: kind, six values, bicubic; NONE fills the rest.

    In float32, positions would be off by 1e-5 pixels. Exact results are often whole numbers, for
    example with a magnitude of 0.45, and would be rounded down to the next lower one.

    Raises:
        ValueError: There are more operations than slots.
    """
    if len(operations) > slots:
        raise ValueError(f"{len(operations)} operations do not fit in {slots} slots")
    rows = np.zeros((slots, ENCODED))
    for row, (kind, values, bicubic) in zip(rows, operations, strict=False):
        row[0], row[1 : 1 + len(values)], row[-1] = kind, values, bicubic
    return rows
