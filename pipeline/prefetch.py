"""Move batches to the device ahead of their use, and finish them there."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from .augment_device import augment, crop_padded, erase, flip, grey
from .augmentation import PADDING, first_channel
from .fast import EncodedImages, FastDataset, RawBatch, ResidentImages
from .images import decode_image
from .reference import Batch


def _references(arrays: Sequence[np.ndarray], index: int) -> int:
    return sys.getrefcount(arrays[index])


FREE = _references([np.empty(0)], 0)  # of an array that only a list refers to


class Memory:
    """Allocates float32 tensors, reusing the CPU memory of those that are no longer referenced.

    Page faults of fresh memory cost more time than the arithmetic on it.
    """

    COUNT = 3  # largest number of tensors whose memory is kept

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised tensor of the same shape on the CPU."""
        self._arrays = [array for array in self._arrays if array.shape == tensor.shape]
        for index in range(len(self._arrays)):
            if _references(self._arrays, index) == FREE:
                return torch.from_numpy(self._arrays[index])
        array = np.empty(tensor.shape, np.float32)
        if len(self._arrays) < self.COUNT:
            self._arrays.append(array)
        return torch.from_numpy(array)


def to_device(
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Batch:
    """Move a batch of images ``B 3 H W`` to a device, without waiting for the copy."""
    images = batch.images.to(device, non_blocking=True)
    if images.ndim == 4:  # there is at least one image
        images = images.to(dtype, memory_format=memory_format)
    return Batch(images, batch.targets.to(device, non_blocking=True), batch.corrupt)


class BatchFinalizer:
    """Moves a raw batch to the device, and does there what is left of the augmentation.

    Args:
        dataset: Makes the raw batches.
        device: Target device.
        dtype: Type of the images.
        memory_format: Layout of the images.
    """

    def __init__(
        self,
        dataset: FastDataset,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.augmentation = augmentation = dataset.augmentation
        self.fill = dataset.policy.fill if dataset.policy else (0, 0, 0)
        self.device, self.dtype, self.memory_format = device, dtype, memory_format
        self.resident = None
        if dataset.resident is not None:
            self.resident = torch.from_numpy(dataset.resident).to(device)
        self.memory = Memory()
        self.mean, self.std = map(torch.tensor, (augmentation.mean, augmentation.std))
        levels = (torch.arange(256.0).div_(255) - self.mean[:, None]) / self.std[:, None]
        self.levels = levels.to(device, dtype).view(-1)  # of each channel
        starts = 256 * torch.arange(len(self.mean), dtype=torch.int32)
        self.starts = starts.to(device)  # waits: the stream that reads it is another one

    def __call__(self, raw: RawBatch) -> Batch:
        """Return images ``B C H W`` and targets on the device."""
        targets = self._move(raw.targets)
        if not len(targets):
            return Batch(torch.empty(0, device=self.device), targets, raw.corrupt)
        images = self._images(raw.pixels)
        if raw.operations.shape[1]:
            images = augment(images, raw.operations, self.fill)
        normalize = self.normalized if self.device.type == "cpu" else self.looked_up
        images = normalize(first_channel(images) if self.augmentation.is_grey else images)
        if raw.boxes.shape[1]:
            generator = torch.Generator(self.device).manual_seed(raw.seed)
            images = erase(images, raw.boxes, self.augmentation.erase_mode, generator)
        images = images.to(self.dtype, memory_format=self.memory_format)
        return Batch(images, targets, raw.corrupt)

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _images(self, pixels: torch.Tensor | EncodedImages | ResidentImages) -> torch.Tensor:
        """Return uint8 ``B 3 H W``, channels last, cropped and flipped."""
        if isinstance(pixels, EncodedImages):
            return self._decoded(pixels).permute(0, 3, 1, 2)
        if not isinstance(pixels, ResidentImages):
            return self._move(pixels).permute(0, 3, 1, 2)
        images = self.resident[self._move(pixels.indices)].permute(0, 3, 1, 2)
        if self.augmentation.crop == "padded":
            images = crop_padded(images, pixels.offsets, PADDING)
        for dim, mask in zip((3, 2), self._move(pixels.flips).unbind(1), strict=True):
            used = self.augmentation.hflip if dim == 3 else self.augmentation.vflip
            images = flip(images, mask, dim) if used else images
        return images

    def _decoded(self, batch: EncodedImages) -> torch.Tensor:
        """Return the images ``B H W 3`` of which some are still encoded."""
        # imported late, as torchvision 0.29 announces its removal
        from torchvision.io import ImageReadMode, decode_jpeg

        images = self._move(batch.images)
        size = images.shape[1:3]
        lengths, *_ = batch.crops.T.tolist()
        data = [part for part in batch.data.split(lengths) if len(part)]
        try:
            decoded = decode_jpeg(data, ImageReadMode.RGB, device=self.device)
        except RuntimeError:  # one of them is not for the device's decoder
            decoded = [self._move(_decoded_by_pillow(one)) for one in data]
        positions = [position for position, length in enumerate(lengths) if length]
        for position, whole in zip(positions, decoded, strict=True):
            if self.augmentation.is_grey:
                whole = grey(whole.permute(1, 2, 0)).permute(2, 0, 1).to(torch.uint8)
            _, top, left, height, width, *flips, is_bicubic = batch.crops[position].tolist()
            crop = whole[None, :, top : top + height, left : left + width].float()
            mode = "bicubic" if is_bicubic else "bilinear"
            crop = F.interpolate(crop, size, mode=mode, antialias=True)
            crop = crop.flip([dim for dim, on in zip((3, 2), flips, strict=True) if on])
            images[position] = crop[0].round_().clamp_(0, 255).permute(1, 2, 0).to(torch.uint8)
        return images

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """Return ``(x / 255 - mean) / std`` of ``B C H W``, rounded as by torchvision's transforms.

        For the CPU: it works image by image, as one image fits into its cache.
        """
        count, channels, height, width = images.shape
        if self.memory_format == torch.channels_last:
            pixels = images.permute(0, 2, 3, 1).reshape(count, height, width * channels)  # a view
            mean, std = (value.repeat(width) for value in (self.mean, self.std))
        else:
            pixels = images
            mean, std = (value.view(-1, 1, 1) for value in (self.mean, self.std))
        found = self.memory.like(pixels)
        for result, part in zip(found, pixels, strict=True):
            result.copy_(part).div_(255).sub_(mean).div_(std)
        if self.memory_format == torch.channels_last:
            return found.view(count, height, width, channels).permute(0, 3, 1, 2)
        return found

    def looked_up(self, images: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`normalized` does, of the type of the batches, channels last.

        For GPUs: a table of 256 values a channel leaves out float32 images.
        """
        index = images.permute(0, 2, 3, 1) + self.starts  # B H W C
        return self.levels.index_select(0, index.view(-1)).view_as(index).permute(0, 3, 1, 2)


def _decoded_by_pillow(data: torch.Tensor) -> torch.Tensor:
    image = decode_image(data.numpy().tobytes(), "sent to the device")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Prefetcher:
    """Iterates over a loader and finishes the next batch while one is in use.

    On CUDA, batches are copied and finished on a side stream.

    Args:
        loader: Yields raw batches.
        finalize: Turns one into a batch on the device.
        device: Target device.
    """

    def __init__(self, loader: DataLoader, finalize: Callable[[Any], Batch], device: torch.device):
        self.loader, self.finalize, self.device = loader, finalize, device
        self.batch_size, self.sampler = loader.batch_size, loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Read and return a batch of these images, in this process."""
        return self.finalize(self.loader.dataset.__getitems__(indices))

    def __iter__(self) -> Iterator[Batch]:
        if self.device.type != "cuda":
            yield from map(self.finalize, self.loader)
            return
        stream, ahead = torch.cuda.Stream(self.device), None
        for raw in self.loader:
            with torch.cuda.stream(stream):
                batch = self.finalize(raw)
            following = batch, stream.record_event()
            if ahead is not None:
                yield self._on_current_stream(*ahead)
            ahead = following
        if ahead is not None:
            yield self._on_current_stream(*ahead)

    def _on_current_stream(self, batch: Batch, ready: torch.cuda.Event) -> Batch:
        """Make a batch of the side stream usable on the current one."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        for tensor in (batch.images, batch.targets):
            tensor.record_stream(current)
        return batch
