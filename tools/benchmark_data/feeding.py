"""A network that trains on what the loader brings, beside one that trains on a batch at hand."""

from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

import engine
import models
from datasets import build_prefetcher, build_train_loader, build_transform
from pipeline.fast import FastDataset
from pipeline.prefetch import Prefetcher
from pipeline.reference import Batch
from pipeline.sources.base import Pixels, Source


class Steps:
    """So many batches of those that are still to come.

    Args:
        batches: Where they come from.
        count: Their number.
    """

    def __init__(self, batches: Iterator[Batch], count: int):
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return islice(self.batches, self.count)


def in_memory(source: Source, size: int) -> Pixels:
    """Images, decoded and resized to ``size``."""
    images = (source.open(index).resize((size, size)) for index in range(len(source)))
    pixels = np.stack([np.asarray(image) for image in images])
    return Pixels(pixels, source.targets, source.classes)


def endless(feed: Prefetcher) -> Iterator[Batch]:
    """Batches of one epoch after the other."""
    epoch = 0
    while True:
        feed.sampler.set_epoch(epoch)
        yield from feed
        epoch += 1


class Training:
    """Trains a model on batches of a set, and on one and the same batch.

    Args:
        args: Flags of main.py.
        source: The training set.
        resident: Whether it is on the device, else loader processes read it.
        device: Of the model.
    """

    def __init__(self, args: Namespace, source: Source, resident: bool, device: torch.device):
        classes = len(source.classes)
        required, optional = {"num_classes": classes}, {"img_size": args.input_size}
        self.args, self.device = args, device
        self.model, _ = models.build_model(args.model, required, optional)
        dtype = getattr(torch, args.amp_dtype) if args.amp else None
        last = getattr(self.model, "channels_last", False)
        layout = torch.channels_last if last else torch.contiguous_format
        self.precision = engine.Precision(device, dtype, layout)
        self.precision.place(self.model)
        self.optimizer = engine.build_optimizer(args, self.model, 1e-5)
        self.mixup = engine.build_mixup(args, classes)
        self.criterion = engine.build_criterion(args, self.mixup, classes)
        transform = build_transform(True, args)
        options: dict[str, Any] = {"resident": resident, "augment": device.type != "cuda"}
        dataset = FastDataset(source, transform, True, args.input_size, **options)
        loader = build_train_loader(dataset, args, 1, 0)
        feed = build_prefetcher(loader, args, device, dtype or torch.float32, layout)
        self.batches = endless(feed)
        self.batch = next(self.batches)

    def at_hand(self) -> Iterator[Batch]:
        """The same batch again and again; mixup changes a copy."""
        while True:
            yield self.batch._replace(images=self.batch.images.clone())

    def rate(self, fed: bool, steps: int) -> float:
        """Seconds per image of a training on the loader's batches, or on the one at hand."""
        batches = self.batches if fed else self.at_hand()
        stats = engine.train_one_epoch(
            self.model,
            self.criterion,
            Steps(batches, steps),
            self.optimizer,
            self.device,
            0,
            self.precision,
            mixup_fn=self.mixup,
        )
        return 1 / stats["images_per_second"]
