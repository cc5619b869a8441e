"""Training on a loader's batches, next to training on one batch in memory."""

from argparse import Namespace
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

import datasets
import engine
import models
from pipeline.prefetch import Prefetcher
from pipeline.reference import Batch
from pipeline.sources.base import Pixels, Source
from training.network import choose_precision


def in_memory(source: Source, size: int) -> Pixels:
    """Return a source's images, decoded and resized to ``size``."""
    images = [np.asarray(source.open(i).resize((size, size))) for i in range(len(source))]
    return Pixels(np.stack(images), source.targets, source.classes)


class Steps:
    """An iterable over the next ``count`` batches of an iterator."""

    def __init__(self, batches: Iterator[Batch], count: int):
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return islice(self.batches, self.count)


def endless(feed: Prefetcher) -> Iterator[Batch]:
    """Yield the batches of one epoch after the other."""
    epoch = 0
    while True:
        feed.sampler.set_epoch(epoch)
        yield from feed
        epoch += 1


class Training:
    """Trains a model on the batches of a source, and on the same batch again and again.

    Args:
        args: main.py's flags.
        source: The training images.
        device: Device of the model.
    """

    def __init__(self, args: Namespace, source: Source, device: torch.device):
        classes = len(source.classes)
        required, optional = {"num_classes": classes}, {"img_size": args.input_size}
        self.args, self.device = args, device
        self.model, _ = models.build_model(args.model, required, optional)
        self.precision = choose_precision(args, self.model, device)
        self.precision.place(self.model)
        self.optimizer = engine.build_optimizer(args, self.model, 1e-5)
        self.mixup = engine.build_mixup(args, classes)
        self.criterion = engine.build_criterion(args, self.mixup, classes)
        dataset = datasets.augmented(source, True, args, device)
        loader = datasets.build_train_loader(dataset, args, 1, 0)
        placement = (device, self.precision.dtype or torch.float32, self.precision.memory_format)
        self.batches = endless(datasets.build_prefetcher(loader, *placement))
        self.batch = next(self.batches)

    def same_batch(self) -> Iterator[Batch]:
        """Yield a batch in memory again and again; mixup changes a copy."""
        while True:
            yield self.batch._replace(images=self.batch.images.clone())

    def seconds(self, fed: bool, steps: int) -> float:
        """Return seconds per image of training on the loader's batches, or on the same batch."""
        stats = engine.train_one_epoch(
            self.model,
            self.criterion,
            Steps(self.batches if fed else self.same_batch(), steps),
            self.optimizer,
            self.device,
            0,
            self.precision,
            mixup_fn=self.mixup,
        )
        return 1 / stats["images_per_second"]
