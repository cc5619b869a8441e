"""The device's share of a batch, and bringing it there ahead of its use."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from pipeline.augment_device import augment, crop_padded, erase, flip
from pipeline.fast import RawBatch, Recipe
from pipeline.images import decode_image
from pipeline.reference import Batch


def _references(arrays: Sequence[np.ndarray], index: int) -> int:
    return sys.getrefcount(arrays[index])


FREE = _references([np.empty(0)], 0)  # of an array that nothing but a list holds


class Memory:
    """Gives out float32 tensors, and takes the memory of those that nobody holds any more.

    Fresh memory of the CPU costs more time than the arithmetic on it. PyTorch's allocator does
    the same for CUDA.
    """

    COUNT = 3  # batches in use at once, at most

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape on the same device, with any content."""
        if tensor.device.type != "cpu":
            return torch.empty(tensor.shape, device=tensor.device)
        self._arrays = [array for array in self._arrays if array.shape == tensor.shape]
        for index in range(len(self._arrays)):
            if _references(self._arrays, index) == FREE:
                return torch.from_numpy(self._arrays[index])
        array = np.empty(tensor.shape, np.float32)
        if len(self._arrays) < self.COUNT:
            self._arrays.append(array)
        return torch.from_numpy(array)


class BatchFinalizer:
    """Makes of what the loader brings the images that a network takes.

    Args:
        recipe: Of the transform.
        device: Where to.
        dtype: Of the images.
        memory_format: Of the images.
        mode: Of random erasing: ``pixel``, ``rand`` or ``const``.
        resident: ``N H W 3`` of uint8, the images that indices mean, or None.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        mode: str = "pixel",
        resident: torch.Tensor | None = None,
    ):
        self.recipe, self.device, self.dtype = recipe, device, dtype
        self.memory_format, self.mode = memory_format, mode
        self.resident = None if resident is None else resident.to(device)
        self.fill = recipe.policy.fill if recipe.policy else (0, 0, 0)
        self.memory = Memory()
        self.mean, self.std = (value.to(device) for value in (recipe.mean, recipe.std))

    def __call__(self, raw: RawBatch) -> Batch:
        """Images ``B 3 H W`` and targets, on the device."""
        targets = self._to_device(raw.targets)
        if not len(raw.targets):
            return Batch(torch.empty(0, device=self.device), targets, raw.corrupt)
        images = self._pixels(raw)  # B 3 H W of uint8, channels last
        if raw.operations.shape[1]:
            images = augment(images, raw.operations, self.fill)
        images = self.normalized(images)
        if raw.boxes.shape[1]:
            generator = torch.Generator(self.device).manual_seed(raw.seed)
            images = erase(images, raw.boxes, self.mode, generator)
        return Batch(images.to(self.dtype), targets, raw.corrupt)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _pixels(self, raw: RawBatch) -> torch.Tensor:
        if raw.indices is None:
            images = self._to_device(raw.images)
            if raw.encoded is not None:
                images = self._decoded(raw, images)
            return images.permute(0, 3, 1, 2)
        images = self.resident[self._to_device(raw.indices)].permute(0, 3, 1, 2)
        if self.recipe.padding:
            images = crop_padded(images, self._to_device(raw.offsets), self.recipe.padding)
        return flip(images, self._to_device(raw.flips)) if self.recipe.hflip else images

    def _decoded(self, raw: RawBatch, images: torch.Tensor) -> torch.Tensor:
        """``images`` with those that came encoded in their places."""
        # here, as torchvision 0.29 says that it will not have it for ever
        from torchvision.io import ImageReadMode, decode_jpeg

        size = images.shape[1]
        mode = self.recipe.crop.interpolation.value
        lengths = raw.crops[:, 0].tolist()
        data = [part for part in raw.encoded.split(lengths) if len(part)]
        try:
            decoded = decode_jpeg(data, ImageReadMode.RGB, device=self.device)
        except RuntimeError:  # one that the device cannot decode
            decoded = [_decoded_here(one).to(self.device) for one in data]
        positions = [position for position, length in enumerate(lengths) if length]
        for position, whole in zip(positions, decoded, strict=True):
            _, top, left, height, width, mirrored = raw.crops[position].tolist()
            crop = whole[None, :, top : top + height, left : left + width].float()
            crop = F.interpolate(crop, (size, size), mode=mode, antialias=True)
            crop = crop.flip(-1) if mirrored else crop
            images[position] = crop[0].round_().clamp_(0, 255).permute(1, 2, 0).to(torch.uint8)
        return images

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """``(x / 255 - mean) / std`` of ``B 3 H W``, rounded as torchvision's transforms do.

        On the CPU image by image, as one fits into its cache.
        """
        count, _, height, width = images.shape
        if self.memory_format == torch.channels_last:
            pixels = images.permute(0, 2, 3, 1).reshape(count, height, width * 3)  # a view
            mean, std = (value.repeat(width) for value in (self.mean, self.std))
        else:
            pixels = images
            mean, std = (value.view(3, 1, 1) for value in (self.mean, self.std))
        found = self.memory.like(pixels)
        parts = zip(found, pixels, strict=True) if found.device.type == "cpu" else [(found, pixels)]
        for result, part in parts:
            result.copy_(part).div_(255).sub_(mean).div_(std)
        if self.memory_format == torch.channels_last:
            return found.view(count, height, width, 3).permute(0, 3, 1, 2)
        return found


class ToDevice:
    """Brings finished batches to the device.

    Args:
        device: Where to.
        dtype, memory_format: Of the images.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
    ):
        self.device, self.dtype, self.memory_format = device, dtype, memory_format

    def __call__(self, batch: Batch) -> Batch:
        """The batch, without waiting for the copy."""
        images = batch.images.to(self.device, non_blocking=True)
        if images.ndim == 4:  # not a batch of corrupt images alone
            images = images.to(self.dtype, memory_format=self.memory_format)
        return Batch(images, batch.targets.to(self.device, non_blocking=True), batch.corrupt)


def _decoded_here(data: torch.Tensor) -> torch.Tensor:
    image = decode_image(data.numpy().tobytes(), "sent to the device")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Prefetcher:
    """Iterates over a loader, and has the next batch finished while one is in use.

    On CUDA, the copy and what follows it run beside the network, on a stream of their own.

    Args:
        loader: Of raw batches.
        finish: Makes of one what the network takes.
        device: Where to.
    """

    def __init__(self, loader: DataLoader, finish: Callable[[Any], Batch], device: torch.device):
        self.loader, self.finish, self.device = loader, finish, device
        self.batch_size, self.sampler = loader.batch_size, loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def batch(self, indices: Sequence[int]) -> Batch:
        """A batch of these images of the dataset, which is read here and now."""
        return self.finish(self.loader.dataset.__getitems__(indices))

    def __iter__(self) -> Iterator[Batch]:
        if self.device.type != "cuda":
            yield from map(self.finish, self.loader)
            return
        stream, ahead = torch.cuda.Stream(self.device), None
        for raw in self.loader:
            with torch.cuda.stream(stream):
                batch = self.finish(raw)
            following = batch, stream.record_event()
            if ahead is not None:
                yield self._handed_over(*ahead)
            ahead = following
        if ahead is not None:
            yield self._handed_over(*ahead)

    def _handed_over(self, batch: Batch, ready: torch.cuda.Event) -> Batch:
        """A batch of the other stream for use on the network's."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        for tensor in (batch.images, batch.targets):
            tensor.record_stream(current)
        return batch
