"""One pass over a test set, in which everything is counted."""

import contextlib
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import engine
from tools.validate.classes import ClassMap
from tools.validate.counts import Bins, Counts
from tools.validate.real import RealCounts
from tools.validate.sets import EvalSet
from utils import UserError


@dataclass(frozen=True)
class Scores:
    """What a network achieves on a test set; accuracies in percent, rates in images/s.

    Attributes:
        top1, top5: Images whose class is predicted, or among the five likeliest.
        nll: Mean negative log-likelihood, the cross-entropy.
        ece: Expected calibration error, in percent.
        confidence: Mean probability of the predictions, in percent.
        images, corrupt: Images that were counted, and files that were left out.
        messages: About the files that were left out.
        nonfinite: Images whose outputs are not finite, which are counted as predicted wrong.
        network_rate: Of the network alone, after the first batch if there are others.
        rate: Of the whole evaluation, with reading and preparing images.
        bins: Images by confidence.
        confusion: Images by true class and prediction, ``K K``, if it was asked for.
        real_images, real_top1, real_top5: The same for ImageNet-ReaL's labels, if there are any.
    """

    top1: float
    top5: float
    nll: float
    ece: float
    confidence: float
    images: int
    corrupt: int
    messages: tuple[str, ...]
    nonfinite: int
    network_rate: float
    rate: float
    bins: Bins
    confusion: np.ndarray | None = None
    real_images: int | None = None
    real_top1: float | None = None
    real_top5: float | None = None


class Clock:
    """Adds up the time of a network on its device, read at the end alone."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._batches: list[tuple[int, object, object]] = []

    @contextlib.contextmanager
    def batch(self, images: int) -> Iterator[None]:
        """Time the block, which is about so many images."""
        start = self._now()
        yield
        self._batches.append((images, start, self._now()))

    def _now(self) -> object:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def rate(self) -> float:
        """Images per second, without the first batch, which warms up, if there are others."""
        counted = self._batches[1:] or self._batches
        if self._cuda:
            seconds = sum(start.elapsed_time(end) for _, start, end in counted) / 1000
        else:
            seconds = sum(end - start for _, start, end in counted)
        return sum(images for images, *_ in counted) / max(seconds, 1e-9)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    test_set: EvalSet,
    matched: ClassMap,
    precision: engine.Precision,
    args: Namespace,
    pairs: bool = False,
    real: torch.Tensor | None = None,
) -> Scores:
    """Evaluate a model; on the network's outputs for classes of the set alone.

    Accuracies and loss are those of :func:`engine.evaluate` where the set has all classes.

    Args:
        model: On the device of ``precision``. For a compiled one, smaller batches are filled up.
        test_set: The images.
        matched: Outputs of their classes.
        precision: Autocast and layout.
        args: The flags of the loader.
        pairs: Whether to count the confusion matrix.
        real: Labels of ImageNet-ReaL by number of the image, ``N 1000`` of bool.

    Raises:
        UserError: There was not a single sound image.
    """
    device = precision.device
    model.eval()
    is_compiled = engine.unwrap(model) is not model
    column_of_class = torch.tensor(matched.column_of_class)
    target_of_image = column_of_class[torch.as_tensor(test_set.targets)].to(device)
    columns = torch.tensor(matched.columns, device=device) if matched.is_subset else None
    counts = Counts(len(matched.columns), device, pairs)
    real_counts = RealCounts(real.to(device)) if real is not None else None
    clock = Clock(device)
    images_seen = full = 0
    messages: list[str] = []
    synchronize(device)
    started = time.perf_counter()
    for images, numbers, corrupt in test_set.feed(args, device, precision.memory_format):
        messages += corrupt
        images_seen += len(images)
        if not len(images):
            continue
        images = precision.move(images)
        numbers = numbers.to(device, non_blocking=True)
        full = max(full, len(images)) if is_compiled else len(images)
        filled = F.pad(images, (0,) * 7 + (full - len(images),)) if full > len(images) else images
        with clock.batch(len(images)), precision.autocast():
            logits = model(filled)
        logits = logits[: len(images)].float()
        if real_counts is not None:
            real_counts.add(logits, numbers)
        if columns is not None:
            logits = logits.index_select(1, columns)
        counts.add(logits, target_of_image[numbers])
    synchronize(device)
    seconds = time.perf_counter() - started
    if not images_seen:
        raise UserError(
            f"nothing to evaluate in {test_set.title}: {len(messages)} corrupt images, no sound "
            f"one; the first: {messages[0]}"
        )
    found = summary(counts, images_seen) | real_summary(real_counts)
    rates = {"network_rate": clock.rate(), "rate": images_seen / seconds}
    left_out = {"corrupt": len(messages), "messages": tuple(messages)}
    return Scores(images=images_seen, **left_out, **rates, **found)


def summary(counts: Counts, images: int) -> dict:
    """The scores that counts of so many images give."""
    first, five = counts.hits()
    bins = counts.bins()
    return {
        "top1": 100 * first / images,
        "top5": 100 * five / images,
        "nll": counts.loss() / images,
        "ece": 100 * bins.ece,
        "confidence": 100 * bins.mean_confidence,
        "nonfinite": counts.nonfinite(),
        "bins": bins,
        "confusion": counts.confusion(),
    }


def real_summary(counts: RealCounts | None) -> dict:
    """The scores of ImageNet-ReaL; none of its accuracies where no image has a label."""
    if counts is None:
        return {}
    images, first, five = counts.result()
    shares = [100 * hits / images if images else None for hits in (first, five)]
    return {"real_images": images, "real_top1": shares[0], "real_top5": shares[1]}
