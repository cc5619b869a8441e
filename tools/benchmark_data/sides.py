"""What is measured: whole pipelines, and the same cut into stages."""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from datasets import build_transform
from engine import build_mixup
from pipeline import augment_host
from pipeline.augment_device import erase
from pipeline.crop import decode_crop, read_header
from pipeline.fast import FastDataset, crop_slices, empty_batch, resize
from pipeline.images import decode_image
from pipeline.prefetch import BatchFinalizer
from pipeline.reference import AugmentedDataset, LabelledImages, seed_generators
from pipeline.sources.base import Encoded

CLASSES = 1000  # of mixup's targets


@dataclass(frozen=True)
class Side:
    """A pipeline.

    Attributes:
        label: Whose, and on which images.
        dataset: Makes batches of indices.
        finish: What else the CPU does to a batch.
    """

    label: str
    dataset: LabelledImages
    finish: Callable[[Any], Any]


def nothing(batch: Any) -> Any:
    """The rest is left to the device."""
    return batch


def sides(sources: dict[str, Encoded], args: Namespace) -> list[Side]:
    """The reference, ours, and ours with all behind the crop left to the device.

    Args:
        sources: ``raw`` and ``packed`` images.
        args: Flags of main.py.
    """
    found = []
    for name, source in sources.items():
        transform = build_transform(True, args)
        reference = AugmentedDataset(source, transform, True)
        found.append(Side(f"reference {name}", reference, nothing))
        fast = FastDataset(source, transform, True, args.input_size)
        finish = BatchFinalizer(fast.recipe, torch.device("cpu"), mode=args.remode)
        found.append(Side(f"fast {name}", fast, finish))
        host_only = FastDataset(source, transform, True, args.input_size, augment=False)
        found.append(Side(f"host {name}", host_only, nothing))
    return found


Stage = Callable[[Sequence[Any]], list[Any]]  # of what the stage before made, what is made of it


def each(function: Callable[[Any], Any]) -> Stage:
    """A stage that takes images, or batches, one by one."""
    return lambda items: [function(item) for item in items]


def batches(function: Callable[[Sequence[Any]], Any], size: int) -> Stage:
    """A stage that makes batches of images."""
    return lambda items: [function(items[i : i + size]) for i in range(0, len(items), size)]


def mixing(args: Namespace) -> Stage:
    """Mixup and cutmix, which change a batch in place: here a copy, for both sides."""
    mixup = build_mixup(args, CLASSES)

    def mix(images: torch.Tensor) -> torch.Tensor:
        pairs = images[: len(images) // 2 * 2].clone()
        return mixup(pairs, torch.zeros(len(pairs), dtype=torch.long))[0]

    return each(mix)


def reference_stages(source: Encoded, args: Namespace) -> dict[str, Stage]:
    """The reference, cut where it is composed."""
    _, crop, flip, policy, to_tensor, normalize, erasing = build_transform(True, args).transforms
    return {
        "read": each(source.read),
        "decode": each(lambda data: decode_image(data, "")),
        "crop, resize": each(crop),
        "flip": each(flip),
        "RandAugment": each(policy),
        "normalise": each(lambda image: normalize(to_tensor(image))),
        "erase": each(erasing),
        "collate": batches(default_collate, args.batch_size),
        "mixup": mixing(args),
    }


def fast_stages(source: Encoded, args: Namespace) -> dict[str, Stage]:
    """Ours, cut where the dataset and what finishes its batches go from step to step."""
    dataset = FastDataset(source, build_transform(True, args), True, args.input_size)
    recipe, size = dataset.recipe, args.input_size
    finish = BatchFinalizer(recipe, torch.device("cpu"), mode=args.remode)
    generator = torch.Generator()

    def decode(data: bytes) -> tuple[np.ndarray, str]:
        header = read_header(data)
        if header is None:
            pixels = np.array(decode_image(data, ""))
            box, mode = dataset.draw_crop(*pixels.shape[:2])
            return pixels[crop_slices(box)], mode
        box, mode = dataset.draw_crop(header.height, header.width)
        return decode_crop(data, header, box, size), mode

    def flip(pixels: np.ndarray) -> np.ndarray:
        if torch.rand(1).item() >= recipe.hflip:
            return pixels
        return torch.from_numpy(pixels).flip(1).numpy()

    def collate(images: Sequence[np.ndarray]) -> torch.Tensor:
        batch = empty_batch(len(images), size)
        for place, image in zip(batch.numpy(), images, strict=True):
            place[:] = image
        return batch.permute(0, 3, 1, 2)

    def erased(images: torch.Tensor) -> torch.Tensor:
        boxes = torch.zeros(len(images), recipe.boxes, 4, dtype=torch.long)
        for place in boxes:
            for i, box in enumerate(recipe.erasing.draw()):
                place[i] = torch.tensor(box)
        return erase(images, boxes, args.remode, generator)

    return {
        "read": each(source.read),
        "decode": each(decode),
        "crop, resize": each(lambda pair: resize(pair[0], size, pair[1])),
        "flip": each(flip),
        "RandAugment": each(
            lambda x: augment_host.apply(x, recipe.policy.draw(), recipe.policy.fill)
        ),
        "collate": batches(collate, args.batch_size),
        "normalise": each(finish.normalized),
        "erase": each(erased),
        "mixup": mixing(args),
    }


def seconds_of(stages: dict[str, Stage], indices: Sequence[int]) -> dict[str, float]:
    """Seconds of every stage, one after the other over all images, per image."""
    seed_generators(0)
    items, seconds = list(indices), {}
    for name, stage in stages.items():
        started = time.perf_counter()
        items = stage(items)
        seconds[name] = (time.perf_counter() - started) / len(indices)
    return seconds
