"""The host's share of a batch: images are read, cropped and resized, and the rest is drawn.

What is drawn, from the very numbers that the transforms of timm would draw, is done on the device
(:mod:`pipeline.prefetch`), in most cases for the whole batch at once.
"""

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch.utils.data import get_worker_info
from torchvision import transforms

from pipeline import augment_host
from pipeline.augment_ops import (
    ENCODED,
    Box,
    ErasingRecorder,
    Operation,
    PolicyRecorder,
    UnsupportedPolicy,
    encode,
)
from pipeline.crop import Header, decode_crop, is_readable, read_header
from pipeline.images import EnlargeTiny
from pipeline.reference import LabelledImages, kept_random_numbers
from pipeline.sources.base import Encoded, Pixels, Source
from samplers import SampleIndex, mix_seed

TO_TENSOR = (MaybeToTensor, transforms.ToTensor)
SIZING = (  # the last of these gives an image the size of the input
    transforms.RandomCrop,
    transforms.CenterCrop,
    transforms.Resize,
    RandomResizedCropAndInterpolation,
)


@dataclass(frozen=True)
class Recipe:
    """What a transform consists of, in this order.

    Attributes:
        crop: Random crop and resize, or None.
        before: Transforms of PIL images in place of the crop.
        hflip: Probability of mirroring.
        policy: RandAugment or AutoAugment, or None.
        others: Transforms of PIL images in place of the policy.
        mean, std: Of the normalisation.
        erasing: Random erasing, or None.
    """

    crop: RandomResizedCropAndInterpolation | None
    before: Sequence[Callable]
    hflip: float
    policy: PolicyRecorder | None
    others: Sequence[Callable]
    mean: torch.Tensor
    std: torch.Tensor
    erasing: ErasingRecorder | None

    @property
    def slots(self) -> int:
        """Operations of an image, at most."""
        return self.policy.slots if self.policy else 0

    @property
    def boxes(self) -> int:
        """Erased boxes of an image, at most."""
        return self.erasing.slots if self.erasing else 0

    @property
    def padding(self) -> int:
        """Black pixels around a resized image, of which a part is then cropped."""
        last = self.before[-1] if self.before else None
        is_plain = isinstance(last, transforms.RandomCrop) and last.padding_mode == "constant"
        return last.padding if is_plain else 0


def take_apart(transform: transforms.Compose, size: int) -> Recipe:
    """The parts of what :func:`datasets.build_transform` builds for images of ``size``."""
    steps = list(transform.transforms)
    end = next(i for i, step in enumerate(steps) if isinstance(step, TO_TENSOR))
    start = max(i + 1 for i, step in enumerate(steps[:end]) if isinstance(step, SIZING))
    before, others = steps[:start], steps[start:end]
    hflip = 0.0
    if others and isinstance(others[0], transforms.RandomHorizontalFlip):
        hflip = others.pop(0).p
    crop = policy = None
    if isinstance(before[-1], RandomResizedCropAndInterpolation):
        crop, before = before[-1], []
    if len(others) == 1 and isinstance(others[0], RandAugment | AutoAugment):
        with contextlib.suppress(UnsupportedPolicy):
            policy, others = PolicyRecorder(others[0], size, size), []
    normalize, *rest = steps[end + 1 :]
    erasing = next((step for step in rest if isinstance(step, RandomErasing)), None)
    erasing = erasing and ErasingRecorder(erasing, size, size)
    mean, std = (torch.as_tensor(value) for value in (normalize.mean, normalize.std))
    return Recipe(crop, before, hflip, policy, others, mean, std, erasing)


class RawBatch(NamedTuple):
    """A batch as it leaves the loader.

    Attributes:
        images: ``B H W 3`` of uint8; None where ``indices`` name images that are on the device.
        indices: ``B``, or None.
        targets: ``B``.
        corrupt: Messages of the corrupt files met.
        flips: ``B``, whether still to be mirrored; or None.
        offsets: ``B 2``, top and left of the crop of a padded image; or None.
        operations: ``B S 8``, see :func:`pipeline.augment_ops.encode`; S is 0 where all are done.
        boxes: ``B K 4``, top, left, height and width of what is erased; zeros for nothing.
        encoded: JPEGs that are to be decoded on the device, one after the other; or None.
        crops: ``B 6``: length of the JPEG (0 for an image of ``images``), top, left, height and
            width of its crop, and whether to mirror it; or None.
        seed: Of random numbers that are drawn on the device.
    """

    images: torch.Tensor | None
    indices: torch.Tensor | None
    targets: torch.Tensor
    corrupt: list[str]
    flips: torch.Tensor | None
    offsets: torch.Tensor | None
    operations: torch.Tensor
    boxes: torch.Tensor
    encoded: torch.Tensor | None
    crops: torch.Tensor | None
    seed: int


NOWHERE = Box(0, 0, 0, 0)


class Drawn(NamedTuple):
    """What was read and drawn for one image; see :class:`RawBatch`."""

    index: int
    pixels: np.ndarray | None = None
    encoded: bytes = b""
    crop: Box = NOWHERE
    flip: bool = False
    offset: tuple[int, int] = (0, 0)
    operations: Sequence[Operation] = ()
    boxes: Sequence[Box] = ()


class FastDataset(LabelledImages):
    """Batches of images, cropped and resized, with what is left to do to them.

    Args:
        source: The images.
        transform: Of :func:`datasets.build_transform`.
        is_train, seed, skip_corrupt: See :class:`LabelledImages`.
        size: Of the network's input.
        augment: Whether the operations of the policy are done here rather than on the device.
        resident: The images are on the device: only draw what is to be done to them.
        decode: Whether JPEGs are decoded here rather than on the device.
    """

    def __init__(
        self,
        source: Source,
        transform: transforms.Compose,
        is_train: bool,
        size: int,
        seed: int = 0,
        skip_corrupt: bool = False,
        augment: bool = True,
        resident: bool = False,
        decode: bool = True,
    ):
        super().__init__(source, is_train, seed, skip_corrupt)
        self.recipe, self.size = take_apart(transform, size), size
        self.resident = resident
        self.augment = augment and not resident
        self.decode = decode or self.recipe.crop is None or bool(self.recipe.others) or self.augment

    def __getitems__(self, indices: Sequence[int]) -> RawBatch:
        """A batch of these images."""
        with kept_random_numbers():
            found = [self.find(index, self._draw) for index in indices]
        corrupt = [message for *_, messages in found for message in messages]
        sound = [(drawn, target) for drawn, target, _ in found if drawn is not None]
        targets = torch.tensor([target for _, target in sound], dtype=torch.long)
        first = indices[0]
        is_drawn = isinstance(first, SampleIndex)
        seed = mix_seed(self.seed, first.epoch, first, first.copy) if is_drawn else 0
        return self._stack([drawn for drawn, _ in sound], targets, corrupt, seed)

    def _stack(
        self, drawn: Sequence[Drawn], targets: torch.Tensor, corrupt: list[str], seed: int
    ) -> RawBatch:
        count, recipe = len(drawn), self.recipe
        images = indices = flips = offsets = encoded = crops = None
        slots = 0 if self.augment else recipe.slots
        operations = torch.zeros(count, slots, ENCODED, dtype=torch.float64)
        boxes = torch.zeros(count, recipe.boxes, 4, dtype=torch.long)
        for i, one in enumerate(drawn):
            if one.operations:
                operations[i] = torch.from_numpy(encode(one.operations, slots))
            if one.boxes:
                boxes[i, : len(one.boxes)] = torch.tensor(one.boxes)
        if self.resident:
            indices = torch.tensor([one.index for one in drawn], dtype=torch.long)
            flips = torch.tensor([one.flip for one in drawn], dtype=torch.bool)
            offsets = torch.tensor([one.offset for one in drawn], dtype=torch.long).view(-1, 2)
        else:
            images = empty_batch(count, self.size)
            pixels = images.numpy()
            for i, one in enumerate(drawn):
                if one.pixels is not None:
                    pixels[i] = one.pixels
        if data := b"".join(one.encoded for one in drawn):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            crops = torch.tensor([(len(one.encoded), *one.crop, one.flip) for one in drawn])
        return RawBatch(
            *(images, indices, targets, corrupt, flips, offsets, operations, boxes),
            *(encoded, crops, seed),
        )

    def _draw(self, index: int) -> Drawn:
        recipe = self.recipe
        pixels, encoded, crop, offset = None, b"", NOWHERE, (0, 0)
        if self.resident:
            offset = self._draw_offset()
        elif recipe.crop is not None:
            pixels, encoded, crop = self._crop(index)
        elif recipe.padding:
            whole = self._whole(index)
            pixels = crop_padded(whole, *self._draw_offset(), recipe.padding)
        else:
            pixels = np.array(_apply(recipe.before, self.source.open(index)))
        flip = recipe.hflip > 0 and torch.rand(1).item() < recipe.hflip
        if flip and pixels is not None:
            pixels = torch.from_numpy(pixels).flip(1).numpy()  # several times as fast as NumPy
        operations = recipe.policy.draw() if recipe.policy else []
        if self.augment and operations:
            pixels, operations = augment_host.apply(pixels, operations, recipe.policy.fill), []
        if recipe.others:
            pixels = np.array(_apply(recipe.others, Image.fromarray(pixels)))
        boxes = recipe.erasing.draw() if recipe.erasing else []
        return Drawn(index, pixels, encoded, crop, flip, offset, operations, boxes)

    def _whole(self, index: int) -> np.ndarray:
        """An image of the input's size, ``H W 3``, as the transforms before the crop make it."""
        *resizing, _ = self.recipe.before
        pixels = None
        if isinstance(self.source, Pixels):
            pixels = self.source.pixels[index]
        elif isinstance(self.source, Encoded):
            data = self.source.read(index)
            header = read_header(data)
            if is_readable(header):
                box = Box(0, 0, header.height, header.width)
                pixels = decode_crop(data, header, box, max(header.height, header.width))
            if pixels is None:
                return np.array(_apply(resizing, self.source.decode(data, index)))
        if pixels is None:
            return np.array(_apply(resizing, self.source.open(index)))
        if pixels.shape[:2] == (self.size, self.size):
            return pixels
        return np.array(_apply(resizing, Image.fromarray(pixels)))

    def _draw_offset(self) -> tuple[int, int]:
        if not self.recipe.padding:
            return 0, 0
        side = self.size + 2 * self.recipe.padding
        padded = torch.empty(3, side, side, device="meta")
        top, left, *_ = transforms.RandomCrop.get_params(padded, (self.size, self.size))
        return top, left

    def _crop(self, index: int) -> tuple[np.ndarray | None, bytes, Box]:
        """A random crop, resized; or its JPEG and where to crop it."""
        if isinstance(self.source, Encoded):
            data = self.source.read(index)
            header = read_header(data)
            if is_readable(header) and header.height * header.width >= 5:
                return self._crop_jpeg(data, header, index)
            image = self.source.decode(data, index)
        else:
            image = self.source.open(index)
        pixels = np.array(EnlargeTiny()(image))
        box, mode = self.draw_crop(*pixels.shape[:2])
        return resize(pixels[crop_slices(box)], self.size, mode), b"", box

    def _crop_jpeg(
        self, data: bytes, header: Header, index: int
    ) -> tuple[np.ndarray | None, bytes, Box]:
        box, mode = self.draw_crop(header.height, header.width)
        if not self.decode:
            return None, data, box
        pixels = decode_crop(data, header, box, self.size)
        if pixels is None:
            pixels = np.array(self.source.decode(data, index))[crop_slices(box)]
        return resize(pixels, self.size, mode), b"", box

    def draw_crop(self, height: int, width: int) -> tuple[Box, str]:
        """Where to crop, and how to interpolate, as timm's transform draws it."""
        crop = self.recipe.crop
        image = torch.empty(3, height, width, device="meta")
        box = Box(*crop.get_params(image, crop.scale, crop.ratio))
        mode = crop.interpolation
        if isinstance(mode, tuple | list):
            mode = random.choice(mode)
        return box, mode.value


def crop_slices(box: Box) -> tuple[slice, slice]:
    """Rows and columns of a box."""
    top, left, height, width = box
    return slice(top, top + height), slice(left, left + width)


def crop_padded(pixels: np.ndarray, top: int, left: int, padding: int) -> np.ndarray:
    """The part ``H W 3`` from ``top`` and ``left`` of an image ``H W 3`` with a black margin."""
    height, width, _ = pixels.shape
    part = np.zeros_like(pixels)
    rows, columns = top - padding, left - padding
    part[max(0, -rows) : height - rows, max(0, -columns) : width - columns] = pixels[
        max(0, rows) : height + rows, max(0, columns) : width + columns
    ]
    return part


def _apply(steps: Sequence[Callable], image: Image.Image) -> Image.Image:
    for step in steps:
        image = step(image)
    return image


def resize(pixels: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Resize ``h w 3`` of uint8 to ``size size 3``, with antialiasing as Pillow has it.

    Args:
        pixels: The image, writable.
        size: Of both sides.
        mode: ``bilinear`` or ``bicubic``.
    """
    # 1 3 h w, in this order of calls recognised as channels last, whose kernel is the faster one
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(image, (size, size), mode=mode, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def empty_batch(count: int, size: int) -> torch.Tensor:
    """Memory of ``B H W 3`` of uint8; in a loader process, memory that the main process shares."""
    shape = (count, size, size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
