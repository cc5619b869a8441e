"""Input pipelines and their speed: by stage in this process, and with workers."""

import contextlib
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.data import DataLoader
from torchvision import transforms

import datasets
from engine import build_mixup
from pipeline import augment_host, fast, prefetch, reference
from pipeline.augment_ops import ErasingRecorder, PolicyRecorder
from pipeline.sources.base import Encoded
from samplers import SampleIndex

CLASSES = 1000  # of mixup's targets
REPEATS = 4  # epochs of a measurement with workers, without a pause between them
STAGES = {  # product functions by stage, of both pipelines
    "decode": [(fast, "decode_crop"), (Encoded, "decode")],
    "crop, resize": [(fast, "resize")],
    "flip": [(fast, "flip")],
    "RandAugment": [(PolicyRecorder, "sample"), (augment_host, "apply")],
    "normalise": [(prefetch.BatchFinalizer, "normalized")],
    "erase": [(ErasingRecorder, "sample"), (prefetch, "erase")],
    "collate": [(fast.FastDataset, "collate"), (reference, "default_collate")],
}
REFERENCE_STAGES = {  # stages of the reference's transform
    "resize": "crop, resize",
    "crop": "crop, resize",
    "flip": "flip",
    "color": "RandAugment",
    "normalize": "normalise",
    "erase": "erase",
}


class Stopwatch:
    """Sums up the time spent in functions.

    Attributes:
        seconds: Seconds by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, stage: str, function: Callable) -> Callable:
        """Return ``function``, timed as part of a stage."""
        self.seconds.setdefault(stage, 0.0)

        def run(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            self.seconds[stage] += time.perf_counter() - started
            return result

        return run

    @contextlib.contextmanager
    def patched(self, source: Encoded) -> Iterator[None]:
        """Time the functions of ``STAGES``, and the reading of a source, in the block."""
        stages = {"read": [(type(source), "read")]} | STAGES
        with contextlib.ExitStack() as stack:
            for stage, places in stages.items():
                for owner, name in places:
                    function = self.timed(stage, getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, function))
            yield


@dataclass(frozen=True)
class Pipeline:
    """An input pipeline.

    Attributes:
        label: Its name, and that of its images.
        dataset: Returns batches.
        finalize: What the CPU does to a batch of the dataset.
        flags: main.py's flags.
    """

    label: str
    dataset: reference.LabelledImages
    finalize: Callable[[Any], Any]
    flags: Namespace

    def measure(self) -> dict[str, float]:
        """Return seconds per image by stage; ``other`` is Python and random numbers.

        Mixup is measured as well, but not part of ``total``.
        """
        count = len(self.dataset)
        clock, mixup = Stopwatch(), build_mixup(self.flags, CLASSES)
        indices = [SampleIndex(index) for index in range(count)]
        targets = torch.zeros(self.flags.batch_size, dtype=torch.long)
        total = 0.0
        with clock.patched(self.dataset.source), self._timed_transform(clock):
            for start in range(0, count, self.flags.batch_size):
                started = time.perf_counter()
                batch = self.dataset.__getitems__(indices[start : start + self.flags.batch_size])
                batch = self.finalize(batch)
                total += time.perf_counter() - started
                if isinstance(batch, reference.Batch):
                    images = batch.images[: len(batch.images) // 2 * 2].clone()
                    clock.timed("mixup", mixup)(images, targets[: len(images)])
        seconds = clock.seconds
        parts = sum(seconds.values()) - seconds.get("mixup", 0)
        found = seconds | {"other": total - parts, "total": total}
        return {stage: value / count for stage, value in found.items()}

    @contextlib.contextmanager
    def _timed_transform(self, clock: Stopwatch) -> Iterator[None]:
        if not isinstance(self.dataset, reference.AugmentedDataset):
            yield
            return
        stages = datasets.build_augmentation(True, self.flags).stages()._asdict()
        steps = [
            clock.timed(REFERENCE_STAGES[name], step) for name in stages for step in stages[name]
        ]
        with mock.patch.object(self.dataset, "transform", transforms.Compose(steps)):
            yield


def pipelines(sources: dict[str, Encoded], flags: Namespace) -> list[Pipeline]:
    """Return the reference, ours, and ours with the device's share left out.

    Args:
        sources: Images by name.
        flags: main.py's flags.
    """
    found = []
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
            found.append(Pipeline(f"{side} {name}", dataset, finalize, args))
    return found


class Workers:
    """A pipeline's loader, whose workers live on between measurements."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline, flags = pipeline, pipeline.flags
        images = range(len(pipeline.dataset))
        self.indices = [SampleIndex(i, copy=copy) for copy in range(REPEATS) for i in images]
        options = datasets.loader_options(flags)
        self.loader = DataLoader(
            pipeline.dataset, flags.batch_size, sampler=self.indices, **options
        )

    def seconds(self) -> float:
        """Return seconds per image."""
        started = time.perf_counter()
        for batch in self.loader:
            self.pipeline.finalize(batch)
        return (time.perf_counter() - started) / len(self.indices)

    def memory(self) -> float:
        """Return the largest memory of a worker seen during an epoch, in MiB."""
        iterator = iter(self.loader)
        return max(max(memory_of(w.pid) for w in iterator._workers) for _ in iterator)


def memory_of(pid: int) -> float:
    """Return the proportional set size (PSS) of a process in MiB, NaN if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    except (OSError, StopIteration):
        return float("nan")


def alternate(measures: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Return the results of measurements, taken in turn, rotating the order; warm up once."""
    found: dict[str, list[Any]] = {label: [] for label in measures}
    labels: Sequence[str] = list(measures)
    for index in range(rounds + 1):
        first = index % len(labels)
        for label in [*labels[first:], *labels[:first]]:
            result = measures[label]()
            if index:
                found[label].append(result)
    return found
