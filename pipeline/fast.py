"""The fast loader's dataset: workers read, crop and resize images, and sample their augmentation.

The random numbers are those that timm's and torchvision's transforms would use. The sampled
operations run on the device (:mod:`pipeline.prefetch`), batch by batch, or here.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info
from torchvision import transforms

from samplers import SampleIndex, mix_seed

from . import augment_host
from .augment_ops import (
    ENCODED,
    Box,
    ErasingRecorder,
    Operation,
    PolicyRecorder,
    UnsupportedPolicy,
    encode,
)
from .augmentation import PADDING, Augmentation
from .crop import (
    Header,
    crop_padded,
    crop_slices,
    decode_crop,
    flip,
    is_readable,
    read_header,
    resize,
)
from .images import orientation_of, to_grey
from .reference import LabelledImages, kept_random_numbers
from .sources.base import Encoded, Pixels, Source


class EncodedImages(NamedTuple):
    """Images of which some are JPEGs that the device decodes.

    Attributes:
        images: uint8 ``B H W 3``; undefined where there is a JPEG.
        data: uint8, the JPEGs one after the other.
        crops: int64 ``B 8``: length of the JPEG (0 for none), top, left, height and width of its
            crop, 1 to flip it horizontally, 1 vertically, 1 to resize it by bicubic instead of
            bilinear filter.
    """

    images: torch.Tensor
    data: torch.Tensor
    crops: torch.Tensor


class ResidentImages(NamedTuple):
    """Images that are on the device.

    Attributes:
        indices: int64 ``B``.
        offsets: int64 ``B 2``, top and left of the crop of the padded image.
        flips: bool ``B 2``, horizontally and vertically.
    """

    indices: torch.Tensor
    offsets: torch.Tensor
    flips: torch.Tensor


class RawBatch(NamedTuple):
    """Batch as a worker returns it.

    Attributes:
        pixels: uint8 ``B H W 3``, or where they come from.
        targets: int64 ``B``.
        corrupt: Messages of the corrupt files met.
        operations: ``B S 8``, see :func:`pipeline.augment_ops.encode`; S is 0 if all are done.
        boxes: int64 ``B K 4``, top, left, height and width of erased boxes; zeros for none.
        seed: Seed of the noise in erased boxes.
    """

    pixels: torch.Tensor | EncodedImages | ResidentImages
    targets: torch.Tensor
    corrupt: list[str]
    operations: torch.Tensor
    boxes: torch.Tensor
    seed: int


class EncodedCrop(NamedTuple):
    """One image of :class:`EncodedImages`."""

    data: bytes
    box: Box
    is_bicubic: bool
    flips: tuple[bool, bool] = (False, False)


class ResidentCrop(NamedTuple):
    """One image of :class:`ResidentImages`."""

    index: int
    offset: tuple[int, int]
    flips: tuple[bool, bool] = (False, False)


class RawSample(NamedTuple):
    """One image of a :class:`RawBatch`."""

    pixels: np.ndarray | EncodedCrop | ResidentCrop
    operations: Sequence[Operation]
    boxes: Sequence[Box]


class FastDataset(LabelledImages):
    """Batches of cropped and resized images, with the operations that are left to do.

    Args:
        source, augmentation, is_train, seed, skip_corrupt: See :class:`LabelledImages`.
        augment: Apply the policy's operations here instead of on the device.
        resident: Keep the images on the device, if they are decoded and small, and if the
            device can apply the whole augmentation.
        decode: Decode JPEGs here instead of on the device, where that is possible.

    Attributes:
        policy: Samples the operations of the policy; None if there is none, or if it has
            operations for PIL images only, which are applied here.
        resident: The images, uint8 ``N H W 3``, if they are to be kept on the device, else None.
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        is_train: bool,
        seed: int = 0,
        skip_corrupt: bool = False,
        augment: bool = True,
        resident: bool = False,
        decode: bool = True,
    ):
        super().__init__(source, augmentation, is_train, seed, skip_corrupt)
        self.size = height, width = augmentation.shape
        self._stages = stages = augmentation.stages()
        self.policy = _record(stages.color, width, height)
        self._pil_steps = stages.color if self.policy is None else []
        self._erasing = None
        if stages.erase:
            self._erasing = ErasingRecorder(*stages.erase, height, width)
        self.resident = None
        keeps_all = augmentation.crop == "padded" or (
            augmentation.crop == "squash" and augmentation.crop_ratio == 1
        )
        if resident and not self._pil_steps and keeps_all:
            self.resident = _resized(source, stages.resize, self.size)
        self._augment = augment and self.resident is None
        is_random_crop = augmentation.crop == "random-resized"
        self._decodes = decode or not is_random_crop or bool(self._pil_steps) or self._augment

    def __getitems__(self, indices: Sequence[int]) -> RawBatch:
        """Return the batch of these images."""
        with kept_random_numbers():
            found = [self.find(index, self._sample) for index in indices]
        corrupt = [message for *_, messages in found for message in messages]
        sound = [(sample, target) for sample, target, _ in found if sample is not None]
        targets = torch.tensor([target for _, target in sound], dtype=torch.long)
        first, seed = indices[0], 0
        if isinstance(first, SampleIndex):
            seed = mix_seed(self.seed, first.epoch, first, first.copy)
        samples = [sample for sample, _ in sound]
        slots = 0 if self.policy is None or self._augment else self.policy.slots
        operations = torch.zeros(len(samples), slots, ENCODED, dtype=torch.float64)
        slots = self._erasing.slots if self._erasing else 0
        boxes = torch.zeros(len(samples), slots, 4, dtype=torch.long)
        for i, sample in enumerate(samples):
            if sample.operations:
                operations[i] = torch.from_numpy(encode(sample.operations, operations.shape[1]))
            if sample.boxes:
                boxes[i, : len(sample.boxes)] = torch.tensor(sample.boxes)
        pixels = self.collate([sample.pixels for sample in samples])
        return RawBatch(pixels, targets, corrupt, operations, boxes, seed)

    def collate(
        self, crops: Sequence[np.ndarray | EncodedCrop | ResidentCrop]
    ) -> torch.Tensor | EncodedImages | ResidentImages:
        """Return the ``pixels`` of a batch."""
        if self.resident is not None:
            indices, offsets, flips = zip(*crops, strict=True) if crops else ((), (), ())
            return ResidentImages(
                torch.tensor(indices, dtype=torch.long),
                torch.tensor(offsets, dtype=torch.long).view(-1, 2),
                torch.tensor(flips, dtype=torch.bool).view(-1, 2),
            )
        images = empty_batch(len(crops), self.size)
        pixels, encoded = images.numpy(), {}
        for i, crop in enumerate(crops):
            if isinstance(crop, EncodedCrop):
                encoded[i] = crop
            else:
                pixels[i] = crop
        if not encoded:
            return images
        data = bytearray().join(crop.data for crop in encoded.values())
        rows = torch.zeros(len(crops), 8, dtype=torch.long)
        for i, crop in encoded.items():
            rows[i] = torch.tensor([len(crop.data), *crop.box, *crop.flips, crop.is_bicubic])
        return EncodedImages(images, torch.frombuffer(data, dtype=torch.uint8), rows)

    def _sample(self, index: int) -> RawSample:
        pixels = self._flip(self._crop(index))
        operations = self.policy.sample() if self.policy else []
        if self._augment and operations:
            pixels, operations = augment_host.apply(pixels, operations, self.policy.fill), []
        if self._pil_steps:
            pixels = np.array(_apply(self._pil_steps, Image.fromarray(pixels)))
        return RawSample(pixels, operations, self._erasing.sample() if self._erasing else [])

    def _flip(
        self, pixels: np.ndarray | EncodedCrop | ResidentCrop
    ) -> np.ndarray | EncodedCrop | ResidentCrop:
        """Flip an image horizontally and vertically by chance, or note that it is to be."""
        probabilities = (self.augmentation.hflip, self.augmentation.vflip)
        flips = tuple(p > 0 and torch.rand(1).item() < p for p in probabilities)
        if not isinstance(pixels, np.ndarray):
            return pixels._replace(flips=flips)
        for axis, is_flipped in zip((1, 0), flips, strict=True):
            pixels = flip(pixels, axis) if is_flipped else pixels
        return pixels

    def _crop(self, index: int) -> np.ndarray | EncodedCrop | ResidentCrop:
        crop = self.augmentation.crop
        if self.resident is not None:
            return ResidentCrop(index, self._offset() if crop == "padded" else (0, 0))
        if crop == "random-resized":
            return self._random_crop(index)
        if crop == "padded":
            return crop_padded(self._whole(index), *self._offset(), PADDING)
        steps = [*self._stages.resize, *self._stages.crop]
        return np.array(_apply(steps, self.source.open(index)))

    def _offset(self) -> tuple[int, int]:
        sides = (side + 2 * PADDING for side in self.size)
        padded = torch.empty(3, *sides, device="meta")
        top, left, *_ = transforms.RandomCrop.get_params(padded, self.size)
        return top, left

    def _whole(self, index: int) -> np.ndarray:
        """Return an image resized to ``H W 3``."""
        pixels = None
        if isinstance(self.source, Pixels):
            pixels = self.source.pixels[index]
        elif isinstance(self.source, Encoded):
            data = self.source.read(index)
            header = self._header(data)
            if is_readable(header, data):
                box = Box(0, 0, header.height, header.width)
                pixels = self._decode(data, header, box, (header.height, header.width))
            image = self.source.decode(data, index) if pixels is None else None
        else:
            image = self.source.open(index)
        if pixels is not None:
            if pixels.shape[:2] == self.size:
                return pixels
            image = Image.fromarray(pixels)
        return np.array(_apply(self._stages.resize, image))

    def _random_crop(self, index: int) -> np.ndarray | EncodedCrop:
        """Return a random crop, resized; or its JPEG and where to crop it."""
        if isinstance(self.source, Encoded):
            data = self.source.read(index)
            header = self._header(data)
            (enlarge,) = self._stages.resize
            if is_readable(header, data) and not enlarge.is_tiny(header.height, header.width):
                return self._crop_jpeg(data, header, index)
            image = self.source.decode(data, index)
        else:
            image = self.source.open(index)
        pixels = np.array(_apply(self._stages.resize, image))
        box, mode = self._box(*pixels.shape[:2])
        return resize(pixels[crop_slices(box)], self.size, mode)

    def _header(self, data: bytes) -> Header | None:
        """Return the header of a JPEG whose crops can be decoded: not of one to be turned."""
        if self.source.is_upright and orientation_of(data) != 1:
            return None
        return read_header(data)

    def _decode(
        self, data: bytes, header: Header, box: Box, size: tuple[int, int]
    ) -> np.ndarray | None:
        """Decode a crop as :func:`decode_crop` does, as grey if the images are."""
        pixels = decode_crop(data, header, box, size)
        if pixels is None or not self.source.is_grey:
            return pixels
        return np.array(to_grey(Image.fromarray(pixels)))

    def _crop_jpeg(self, data: bytes, header: Header, index: int) -> np.ndarray | EncodedCrop:
        box, mode = self._box(header.height, header.width)
        if not self._decodes:
            return EncodedCrop(data, box, mode == "bicubic")
        pixels = self._decode(data, header, box, self.size)
        if pixels is None:
            pixels = np.array(self.source.decode(data, index))[crop_slices(box)]
        return resize(pixels, self.size, mode)

    def _box(self, height: int, width: int) -> tuple[Box, str]:
        """Sample a crop and its interpolation as timm's transform does."""
        (crop,) = self._stages.crop
        image = torch.empty(3, height, width, device="meta")
        box = Box(*crop.get_params(image, crop.scale, crop.ratio))
        mode = crop.interpolation
        if isinstance(mode, tuple | list):
            mode = random.choice(mode)
        return box, mode.value


def _record(steps: Sequence[Callable], width: int, height: int) -> PolicyRecorder | None:
    """Return a recorder of the only step, if it is a policy that can be recorded."""
    if len(steps) != 1:
        return None
    try:
        return PolicyRecorder(steps[0], width, height)
    except UnsupportedPolicy:
        return None


def _resized(source: Source, steps: Sequence[Callable], size: tuple[int, int]) -> np.ndarray | None:
    """Return decoded images at ``size``, uint8 ``N H W 3``; None if they are not decoded."""
    if not isinstance(source, Pixels):
        return None
    if source.pixels.shape[1:3] == size:
        return source.pixels
    images = [np.asarray(_apply(steps, source.open(index))) for index in range(len(source))]
    return np.stack(images)


def _apply(steps: Sequence[Callable], image: Image.Image) -> Image.Image:
    return reduce(lambda image, step: step(image), steps, image)


def empty_batch(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Allocate uint8 ``B H W 3``; in a worker, in memory shared with the main process."""
    shape = (count, *size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
