"""Metrics of a model on a test set: accuracy, likelihood, calibration, confusion and speed."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import engine
from tools.validate.classes import ClassMap
from tools.validate.eval_models import EvalModel
from tools.validate.sets import EvalSet
from training.progress import shown

NUM_BINS = 15


class Bins(NamedTuple):
    """Images by the confidence of their prediction, in ``M`` bins of equal width.

    Bin m holds confidences above (m - 1) / M and up to m / M (Guo et al., On Calibration of Modern
    Neural Networks, ICML 2017, section 2).
    """

    counts: np.ndarray  # images, M
    hits: np.ndarray  # correct predictions, M
    confidence: np.ndarray  # sum of confidences, M

    @property
    def total(self) -> float:
        """Number of images; NaN if there are none, so that their means are NaN."""
        return self.counts.sum() or np.nan

    @property
    def ece(self) -> float:
        """Expected calibration error, equation 3 of Guo et al., within 0..1."""
        return float(np.abs(self.hits - self.confidence).sum() / self.total)

    @property
    def mean_confidence(self) -> float:
        """Mean probability of the predictions, within 0..1."""
        return float(self.confidence.sum() / self.total)

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Return accuracy and mean confidence of each bin, ``M``; NaN for empty bins."""
        counts = np.where(self.counts, self.counts, np.nan)
        return self.hits / counts, self.confidence / counts


def bin_of(confidence: torch.Tensor) -> torch.Tensor:
    """Return the index of each confidence's bin, 0 for a confidence of 0."""
    return (confidence * NUM_BINS).ceil().clamp(1, NUM_BINS).long().sub(1)


class ClassificationMetrics:
    """Counts of predictions, summed on the device without waiting for it.

    Images with non-finite logits count as errors, and are in no bin and no pair.

    Args:
        num_classes: Columns of the logits.
        device: Device of the logits.
        pairs: Count pairs of true and predicted class, too.
    """

    def __init__(self, num_classes: int, device: torch.device, pairs: bool = False):
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._bins = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=device)
        shape = (num_classes, num_classes)
        self._pairs = torch.zeros(shape, dtype=torch.int64, device=device) if pairs else None

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count a batch: logits ``B K`` of float32, targets ``B``."""
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        finite = logits.isfinite().all(1)
        hits = (ranked == targets[:, None]) & finite[:, None]
        self._counts += torch.stack([hits[:, 0].sum(), hits.sum(), (~finite).sum()])
        confidence = logits.softmax(1).amax(1).double().where(finite, 0)
        members = F.one_hot(bin_of(confidence), NUM_BINS).double()  # B M
        self._bins += torch.stack([finite.double(), hits[:, 0].double(), confidence]) @ members
        if self._pairs is not None:
            # bincount would wait for a GPU to tell the largest value
            self._pairs.index_put_((targets, ranked[:, 0]), finite.long(), accumulate=True)

    def compute(self, images: int) -> dict[str, Any]:
        """Return the metrics of so many images; see :func:`evaluate`."""
        counts, hits, confidence = self._bins.cpu().numpy()
        bins = Bins(counts.astype(np.int64), hits.astype(np.int64), confidence)
        top1, top5, nonfinite = self._counts.tolist()
        return {
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "ece": 100 * bins.ece,
            "confidence": 100 * bins.mean_confidence,
            "nonfinite": nonfinite,
            "bins": bins,
            "confusion": None if self._pairs is None else self._pairs.cpu().numpy(),
        }


class RealMetrics:
    """Counts of predictions that are among the ImageNet-ReaL labels of their image.

    Args:
        table: Labels of each image, ``N 1000`` of bool, on the device of the logits.
    """

    def __init__(self, table: torch.Tensor):
        self._table = table
        self._counts = torch.zeros(3, dtype=torch.int64, device=table.device)

    def update(self, logits: torch.Tensor, numbers: torch.Tensor) -> None:
        """Count a batch: logits ``B 1000``, indices of the images ``B``."""
        labels = self._table[numbers]
        hits = labels.gather(1, logits.topk(5, dim=1).indices)
        hits &= logits.isfinite().all(1, keepdim=True)
        self._counts += torch.stack([labels.any(1), hits[:, 0], hits.any(1)]).sum(1)

    def compute(self) -> dict[str, Any]:
        """Return the number of images with labels and their accuracies; None without any."""
        images, *hits = self._counts.tolist()
        top1, top5 = (100 * count / images if images else None for count in hits)
        return {"real_images": images, "real_top1": top1, "real_top5": top5}


class Clock:
    """Sum of the times of a model on its device, read at the end only."""

    def __init__(self, device: torch.device):
        self._device, self._cuda = device, device.type == "cuda"
        self._batches: list[tuple[int, Any, Any]] = []

    @contextlib.contextmanager
    def batch(self, images: int) -> Iterator[None]:
        """Time the block, which processes so many images."""
        start = self._now()
        yield
        self._batches.append((images, start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def rate(self) -> float:
        """Return images/s, without the first batch, which warms up, if there are others."""
        counted = self._batches[1:] or self._batches
        seconds = sum(
            start.elapsed_time(end) / 1000 if self._cuda else end - start
            for _, start, end in counted
        )
        return sum(images for images, *_ in counted) / max(seconds, 1e-9)


def evaluate(
    subject: EvalModel, test_set: EvalSet, matched: ClassMap, pairs: bool = False
) -> dict[str, Any]:
    """Evaluate a model on a test set, among the outputs of the test set's classes.

    ``matched`` has the outputs of those classes; the confusion matrix is counted with ``pairs``.

    Returns:
        ``top1``, ``top5``, ``ece`` (expected calibration error) and ``confidence`` (mean
        probability of the predictions) in percent; ``nll``, the cross-entropy; the numbers of
        ``images``, of ``corrupt`` files left out, with their ``messages``, and of ``nonfinite``
        outputs; ``network_rate`` of the model alone, after the first batch if there are others, and
        ``rate`` of the whole evaluation in images/s; ``bins`` and ``confusion`` (``K K``, by true
        class and prediction, or None); of a test set with ImageNet-ReaL labels, the metrics of
        :class:`RealMetrics`.

    Raises:
        UserError: No image can be decoded.
    """
    precision, device = subject.precision, subject.precision.device
    column_of_class = np.searchsorted(matched.columns, matched.outputs)
    target_of_image = torch.from_numpy(column_of_class[test_set.targets]).to(device)
    columns = torch.tensor(matched.columns, device=device)
    metrics = ClassificationMetrics(len(columns), device, pairs)
    real = None if test_set.real is None else RealMetrics(test_set.real.to(device))
    clock = Clock(device)

    def observe(logits: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if real is not None:
            real.update(logits, numbers)
        if matched.is_subset:
            logits = logits.index_select(1, columns)
        targets = target_of_image[numbers]
        metrics.update(logits, targets)
        return logits, targets

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    loader = test_set.loader(subject.args, device, precision.memory_format)
    found = engine.evaluate(
        shown(loader, "evaluation", len(loader), seconds=math.inf),
        *(subject.model, device, precision, False),
        observe=observe,
        timer=clock.batch,
        size=len(target_of_image),
    )
    images, seconds = found["images"], time.perf_counter() - started
    result = {"nll": found["loss"], "network_rate": clock.rate(), "rate": images / seconds}
    result |= {key: found[key] for key in ("images", "corrupt", "messages")}
    return result | metrics.compute(images) | (real.compute() if real is not None else {})


class ClassScore(NamedTuple):
    """Metrics of a class in a confusion matrix."""

    images: int
    recall: float | None  # share of them that is predicted correctly; None without images
    precision: float | None  # share of its predictions that is correct; None without predictions
    wrong: int | None  # the wrong class predicted most often, None if there are no errors
    wrong_images: int  # how often


def class_scores(confusion: np.ndarray) -> list[ClassScore]:
    """Return recall, precision and most frequent confusion of each class."""
    errors = _errors(confusion)
    parts = (np.diag(confusion), confusion.sum(1), confusion.sum(0), errors.argmax(1))
    return [
        ClassScore(
            images,
            right / images if images else None,
            right / predicted if predicted else None,
            wrong if count else None,
            count,
        )
        for right, images, predicted, wrong, count in np.stack([*parts, errors.max(1)], 1).tolist()
    ]


def most_confused(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """Return at most ``count`` most frequent (true class, prediction, images) of the errors."""
    errors = _errors(confusion)
    best = np.argsort(-errors, axis=None, kind="stable")[:count]
    pairs = np.stack([*np.unravel_index(best, errors.shape), errors.flat[best]], 1).tolist()
    return [tuple(pair) for pair in pairs if pair[2]]


def _errors(confusion: np.ndarray) -> np.ndarray:
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    return errors
