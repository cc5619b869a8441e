"""Metrics of a model on a test set: accuracy, likelihood, calibration, confusion and speed."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import engine
from tools.validate.classes import ClassMap
from tools.validate.eval_models import EvalModel
from tools.validate.sets import EvalSet

NUM_BINS = 15


@dataclass(frozen=True)
class Bins:
    """Images by the confidence of their prediction, in ``M`` bins of equal width.

    Bin m holds confidences above (m - 1) / M and up to m / M (Guo et al., On Calibration of Modern
    Neural Networks, ICML 2017, section 2).

    Attributes:
        counts: Images, ``M``.
        hits: Correct predictions, ``M``.
        confidence: Sum of confidences, ``M``.
    """

    counts: np.ndarray
    hits: np.ndarray
    confidence: np.ndarray

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
        self._hits = torch.zeros(2, dtype=torch.int64, device=device)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self._bins = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=device)
        self._numbers = torch.arange(NUM_BINS, device=device)
        self._num_classes = num_classes
        size = num_classes**2 if pairs else 0
        self._pairs = torch.zeros(size, dtype=torch.int64, device=device)

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count a batch: logits ``B K`` of float32, targets ``B``."""
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        finite = logits.isfinite().all(1)
        self._nonfinite += (~finite).sum()
        hits = (ranked == targets[:, None]) & finite[:, None]
        self._hits += torch.stack([hits[:, 0].sum(), hits.sum()])
        confidence = logits.softmax(1).gather(1, ranked[:, :1])[:, 0].double()
        confidence = confidence.where(finite, 0)
        members = ((bin_of(confidence) == self._numbers[:, None]) & finite).double()  # M B
        values = torch.stack([torch.ones_like(confidence), hits[:, 0].double(), confidence])
        self._bins += values @ members.T
        if len(self._pairs):
            # bincount would wait for a GPU to tell the largest value
            pairs = targets * self._num_classes + ranked[:, 0]
            self._pairs.index_add_(0, pairs, finite.to(pairs.dtype))

    def compute(self, images: int) -> dict[str, Any]:
        """Return the metrics of so many images; see :func:`evaluate`."""
        counts, hits, confidence = self._bins.cpu().numpy()
        bins = Bins(counts.astype(np.int64), hits.astype(np.int64), confidence)
        top1, top5 = (100 * hits / images for hits in self._hits.tolist())
        shape = (self._num_classes, self._num_classes)
        return {
            "top1": top1,
            "top5": top5,
            "ece": 100 * bins.ece,
            "confidence": 100 * bins.mean_confidence,
            "nonfinite": int(self._nonfinite),
            "bins": bins,
            "confusion": self._pairs.view(shape).cpu().numpy() if len(self._pairs) else None,
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
        parts = (labels.any(1), hits[:, 0], hits.any(1))
        self._counts += torch.stack([part.sum() for part in parts])

    def compute(self) -> dict[str, Any]:
        """Return the number of images with labels and their accuracies; None without any."""
        images, *hits = self._counts.tolist()
        top1, top5 = (100 * count / images if images else None for count in hits)
        return {"real_images": images, "real_top1": top1, "real_top5": top5}


class Clock:
    """Sum of the times of a model on its device, read at the end only."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
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
        event.record()
        return event

    def rate(self) -> float:
        """Return images/s, without the first batch, which warms up, if there are others."""
        counted = self._batches[1:] or self._batches
        if self._cuda:
            seconds = sum(start.elapsed_time(end) for _, start, end in counted) / 1000
        else:
            seconds = sum(end - start for _, start, end in counted)
        return sum(images for images, *_ in counted) / max(seconds, 1e-9)


def evaluate(
    subject: EvalModel,
    test_set: EvalSet,
    matched: ClassMap,
    pairs: bool = False,
    real: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a test set, among the outputs of the test set's classes.

    Args:
        subject: The model.
        test_set: The images.
        matched: Outputs of their classes.
        pairs: Count the confusion matrix.
        real: ImageNet-ReaL labels of each image, ``N 1000`` of bool.

    Returns:
        ``top1``, ``top5``, ``ece`` (expected calibration error) and ``confidence`` (mean
        probability of the predictions) in percent; ``nll``, the cross-entropy; the numbers of
        ``images``, of ``corrupt`` files left out, with their ``messages``, and of ``nonfinite``
        outputs; ``network_rate`` of the model alone, after the first batch if there are others, and
        ``rate`` of the whole evaluation in images/s; ``bins`` and ``confusion`` (``K K``, by true
        class and prediction, or None); with ``real``, the metrics of :class:`RealMetrics`.

    Raises:
        UserError: No image can be decoded.
    """
    precision = subject.precision
    device = precision.device
    column_of_class = torch.tensor(matched.column_of_class)
    target_of_image = column_of_class[torch.as_tensor(test_set.targets)].to(device)
    columns = torch.tensor(matched.columns, device=device) if matched.is_subset else None
    metrics = ClassificationMetrics(len(matched.columns), device, pairs)
    real_metrics = RealMetrics(real.to(device)) if real is not None else None
    clock = Clock(device)

    def observe(logits: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if real_metrics is not None:
            real_metrics.update(logits, numbers)
        if columns is not None:
            logits = logits.index_select(1, columns)
        targets = target_of_image[numbers]
        metrics.update(logits, targets)
        return logits, targets

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    loader = test_set.loader(subject.args, device, precision.memory_format)
    found = engine.evaluate(
        loader, subject.model, device, precision, False, observe=observe, timer=clock.batch
    )
    seconds = time.perf_counter() - started
    result = {"nll": found["loss"]} | {k: found[k] for k in ("images", "corrupt", "messages")}
    result |= {"network_rate": clock.rate(), "rate": found["images"] / seconds}
    result |= metrics.compute(found["images"])
    return result | (real_metrics.compute() if real_metrics is not None else {})


@dataclass(frozen=True)
class ClassScore:
    """Metrics of a class in a confusion matrix.

    Attributes:
        images: Images of the class.
        recall: Share of them that is predicted correctly; None without images.
        precision: Share of its predictions that is correct; None without predictions.
        wrong: The wrong class predicted most often, None if there are no errors.
        wrong_images: How often.
    """

    images: int
    recall: float | None
    precision: float | None
    wrong: int | None
    wrong_images: int


def class_scores(confusion: np.ndarray) -> list[ClassScore]:
    """Return recall, precision and most frequent confusion of each class."""
    scores = []
    for index, row in enumerate(confusion):
        images, right, predicted = int(row.sum()), int(row[index]), int(confusion[:, index].sum())
        others = row.copy()
        others[index] = 0
        wrong = int(others.argmax())
        scores.append(
            ClassScore(
                images,
                right / images if images else None,
                right / predicted if predicted else None,
                wrong if others[wrong] else None,
                int(others[wrong]),
            )
        )
    return scores


def most_confused(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """Return at most ``count`` most frequent (true class, prediction, images) of the errors."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    best = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [
        (*map(int, np.unravel_index(place, wrong.shape)), int(wrong.flat[place])) for place in best
    ]
    return [pair for pair in pairs if pair[2]]
