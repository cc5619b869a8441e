"""Input pipelines and their speed: by stage in this process, and with workers."""

import contextlib
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.data import DataLoader

import datasets
from engine import build_mixup
from pipeline import augment_host, fast, prefetch, reference
from pipeline.sources.base import Encoded
from samplers import SampleIndex
from tools.benchmark.measure import in_turn

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


def functions_of(dataset: reference.LabelledImages) -> dict[str, list[tuple[Any, str]]]:
    """Return the functions of each stage as (module or class, name), transforms included."""
    functions = {"read": [(type(dataset.source), "read")]} | STAGES
    for name, steps in dataset.augmentation.stages()._asdict().items():
        stage = "crop" if name == "resize" else name
        functions[stage] = functions[stage] + [(type(step), "__call__") for step in steps]
    return functions


@contextlib.contextmanager
def timed(functions: dict[str, list[tuple[Any, str]]]) -> Iterator[dict[str, float]]:
    """Time functions in the block.

    Returns:
        Seconds by stage so far.
    """
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
        count, step = len(self.dataset), self.flags.batch_size
        indices = [SampleIndex(index) for index in range(count)]
        mixup, targets = build_mixup(self.flags, CLASSES), torch.zeros(step, dtype=torch.long)
        total = mixing = 0.0
        with timed(functions_of(self.dataset)) as seconds:
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


def pipelines(sources: dict[str, Encoded], flags: Namespace) -> list[Pipeline]:
    """Return the reference, ours, and ours without the device's share, for sources by name."""
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
    for label in in_turn(measures, rounds + 1):
        found[label].append(measures[label]())
    return {label: results[1:] for label, results in found.items()}
