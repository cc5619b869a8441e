"""Input pipelines and their speed: by stage in this process, with workers, and in training."""

import contextlib
import functools
import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader

import datasets
import engine
import models
from pipeline import augment_host, fast, prefetch, reference
from pipeline.sources.base import Encoded, Pixels, Source
from samplers import SampleIndex
from tools.benchmark.measure import from_proc
from training import losses, optimizers
from training.network import choose_precision

CLASSES = 1000  # of mixup's targets
REPEATS = 4  # epochs of a measurement with workers, without a pause between them
STAGES = {  # functions of our pipeline, by stage of the augmentation and before and after it
    "decode": [(fast, "decode_crop"), (Encoded, "decode")],
    "crop": [(fast, "resize")],
    "flip": [(fast, "flip")],
    "color": [(augment_host, "apply")],
    "normalize": [(prefetch.BatchFinalizer, "normalized")],
    "erase": [(prefetch, "erase")],
    "collate": [(fast.FastDataset, "collate"), (reference, "default_collate")],
}


@contextlib.contextmanager
def timed(dataset: reference.LabelledImages) -> Iterator[dict[str, float]]:
    """Time a dataset's stages, transforms included, in the block; yield seconds by stage so far."""
    functions = {"read": [(type(dataset.source), "read")]} | STAGES
    for name, steps in dataset.augmentation.stages()._asdict().items():
        stage = "crop" if name == "resize" else name
        functions[stage] = functions[stage] + [(type(step), "__call__") for step in steps]
    seconds = dict.fromkeys(functions, 0.0)

    def wrapped(stage: str, function: Callable) -> Callable:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            seconds[stage] += time.perf_counter() - started
            return result

        return run

    with contextlib.ExitStack() as stack:
        for stage, places in functions.items():
            for owner, name in places:
                function = wrapped(stage, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, function))
        yield seconds


@dataclass
class Pipeline:
    """An input pipeline, in this process and with workers, which live on between measurements."""

    dataset: reference.LabelledImages
    finalize: Callable[[Any], Any]  # what the CPU does to a batch of the dataset
    flags: Namespace

    def measure(self) -> dict[str, float]:
        """Return seconds per image by stage; ``other`` is Python and random numbers.

        Mixup is measured as well, but not part of ``total``.
        """
        count, step = len(self.dataset), self.flags.batch_size
        indices = [SampleIndex(index) for index in range(count)]
        mixup, targets = losses.build_mixup(self.flags, CLASSES), torch.zeros(step).long()
        total = mixing = 0.0
        with timed(self.dataset) as seconds:
            for start in range(0, count, step):
                started = time.perf_counter()
                batch = self.finalize(self.dataset.__getitems__(indices[start : start + step]))
                total += time.perf_counter() - started
                if isinstance(batch, reference.Batch):
                    images = batch.images[: len(batch.images) // 2 * 2].clone()
                    started = time.perf_counter()
                    mixup(images, targets[: len(images)])
                    mixing += time.perf_counter() - started
        found = {"other": total - sum(seconds.values()), "total": total, "mixup": mixing}
        return {stage: value / count for stage, value in (seconds | found).items()}

    @functools.cached_property
    def loader(self) -> DataLoader:
        """Loader of several repeats of all images."""
        images = range(len(self.dataset))
        indices = [SampleIndex(i, copy=copy) for copy in range(REPEATS) for i in images]
        options = datasets.loader_options(self.flags)
        return DataLoader(self.dataset, self.flags.batch_size, sampler=indices, **options)

    def seconds(self) -> float:
        """Return seconds per image with workers."""
        started = time.perf_counter()
        for batch in self.loader:
            self.finalize(batch)
        return (time.perf_counter() - started) / len(self.loader.sampler)

    def memory(self) -> float:
        """Return the largest memory of a worker seen during an epoch, in MiB."""
        iterator = iter(self.loader)
        return max(max(memory_of(w.pid) for w in iterator._workers) for _ in iterator)


def pipelines(sources: dict[str, Encoded], flags: Namespace) -> dict[str, Pipeline]:
    """Return the reference, ours, and ours without the device's share, for sources by name."""
    found = {}
    for name, source in sources.items():
        for side, words in (
            ("reference", {"loader": "timm"}),
            ("fast", {"augment_on": "workers"}),
            ("host", {"augment_on": "device"}),
        ):
            args = Namespace(**vars(flags) | words)
            dataset = datasets.augmented(source, True, args)
            finalize = datasets.identity
            if side == "fast":
                finalize = prefetch.BatchFinalizer(dataset, torch.device("cpu"))
            found[f"{side} {name}"] = Pipeline(dataset, finalize, args)
    return found


def memory_of(pid: int) -> float:
    """Return the proportional set size (PSS) of a process in MiB, NaN if it has ended."""
    found = from_proc(f"{pid}/smaps_rollup", "Pss")
    return int(found.split()[0]) / 1024 if found else float("nan")


def in_memory(source: Source, size: int | tuple[int, int]) -> Pixels:
    """Return a source's images, decoded and resized to ``size``, a side, or height and width."""
    height, width = models.height_and_width(size)
    images = [np.asarray(source.open(i).resize((width, height))) for i in range(len(source))]
    return Pixels(np.stack(images), source.targets, source.classes)


class Steps:
    """An iterable over the next ``count`` batches of an iterator."""

    def __init__(self, batches: Iterator[reference.Batch], count: int):
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[reference.Batch]:
        return itertools.islice(self.batches, self.count)


def endless(feed: prefetch.Prefetcher) -> Iterator[reference.Batch]:
    """Yield the batches of one epoch after the other."""
    for epoch in itertools.count():
        feed.sampler.set_epoch(epoch)
        yield from feed


class Training:
    """Trains a model on the batches of a source, and on the same batch again and again."""

    def __init__(self, args: Namespace, source: Source, device: torch.device):
        classes = len(source.classes)
        required, optional = {"num_classes": classes}, {"img_size": args.input_size}
        self.args, self.device = args, device
        self.model, _ = models.build_model(args.model, required, optional)
        self.precision = choose_precision(args, self.model, device)
        self.precision.place(self.model)
        self.optimizer = optimizers.build(args, self.model, 1e-5)
        self.mixup = losses.build_mixup(args, classes)
        self.criterion = losses.build_criterion(args, self.mixup, classes)
        dataset = datasets.augmented(source, True, args, device)
        loader = datasets.build_train_loader(dataset, args, 1, 0)
        placement = (device, self.precision.dtype or torch.float32, self.precision.memory_format)
        self.batches = endless(datasets.build_prefetcher(loader, *placement))
        self.batch = next(self.batches)

    def rate(self, batches: Iterator[reference.Batch]) -> float:
        """Return images per second of training on ``--steps`` batches."""
        stats = engine.train_one_epoch(
            self.model,
            self.criterion,
            Steps(batches, self.args.steps),
            self.optimizer,
            self.device,
            0,
            self.precision,
            mixup_fn=self.mixup,
        )
        return stats["images_per_second"]

    def fed(self) -> float:
        """Return the rate on the loader's batches."""
        return self.rate(self.batches)

    def at_hand(self) -> float:
        """Return the rate on one batch in memory; mixup changes a copy."""
        batch = self.batch
        return self.rate(batch._replace(images=batch.images.clone()) for _ in itertools.count())
