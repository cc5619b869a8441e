"""What is counted of a network's outputs, on its device, and what follows from the counts."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

NUM_BINS = 15


@dataclass(frozen=True)
class Bins:
    """Images by the confidence of their prediction, in ``M`` bins of equal width.

    Bin m holds confidences above (m - 1) / M and up to m / M (Guo et al., On Calibration of Modern
    Neural Networks, ICML 2017, section 2).

    Attributes:
        counts: Images, ``M``.
        hits: Those that were predicted right, ``M``.
        confidence: Sum of confidences, ``M``.
    """

    counts: np.ndarray
    hits: np.ndarray
    confidence: np.ndarray

    @property
    def total(self) -> float:
        """Images of all bins; NaN if there are none, whose means are not known."""
        return self.counts.sum() or np.nan

    @property
    def ece(self) -> float:
        """Expected calibration error, equation 3 of Guo et al., within 0..1."""
        return float(np.abs(self.hits - self.confidence).sum() / self.total)

    @property
    def mean_confidence(self) -> float:
        """Mean of the predictions' probabilities, within 0..1."""
        return float(self.confidence.sum() / self.total)

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy and mean confidence of each bin, ``M``; NaN where it is empty."""
        counts = np.where(self.counts, self.counts, np.nan)
        return self.hits / counts, self.confidence / counts


def bin_of(confidence: torch.Tensor) -> torch.Tensor:
    """Number of each confidence's bin, from 0; of the first for 0."""
    return (confidence * NUM_BINS).ceil().clamp(1, NUM_BINS).long().sub(1)


class Counts:
    """Counts of predictions, added up on the device without waiting for it.

    Outputs that are not finite predict nothing: such an image is no hit, and in no bin or pair.

    Args:
        num_classes: Columns of the logits.
        device: Of the logits.
        pairs: Whether to count pairs of true and predicted class, too.
    """

    def __init__(self, num_classes: int, device: torch.device, pairs: bool = False):
        self._hits = torch.zeros(2, dtype=torch.int64, device=device)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self._bins = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=device)
        self._numbers = torch.arange(NUM_BINS, device=device)
        self._losses: list[torch.Tensor] = []
        self._num_classes = num_classes
        size = num_classes**2 if pairs else 0
        self._pairs = torch.zeros(size, dtype=torch.int64, device=device)

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count a batch: logits ``B K`` of float32, classes ``B``."""
        self._losses.append(F.cross_entropy(logits, targets, reduction="sum"))
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

    def hits(self) -> tuple[int, int]:
        """Images whose class is the prediction, and among the five likeliest."""
        first, five = self._hits.tolist()
        return first, five

    def nonfinite(self) -> int:
        """Images whose outputs are not finite."""
        return int(self._nonfinite)

    def loss(self) -> float:
        """Sum of the negative log-likelihoods."""
        # float64, as in engine.evaluate
        return torch.stack(self._losses).cpu().double().sum().item() if self._losses else 0.0

    def bins(self) -> Bins:
        """The bins of confidence."""
        counts, hits, confidence = self._bins.cpu().numpy()
        return Bins(counts.astype(np.int64), hits.astype(np.int64), confidence)

    def confusion(self) -> np.ndarray | None:
        """Images by true class and prediction, ``K K``; None if pairs were not counted."""
        if not len(self._pairs):
            return None
        return self._pairs.view(self._num_classes, self._num_classes).cpu().numpy()


@dataclass(frozen=True)
class ClassScore:
    """What a confusion matrix says of a class.

    Attributes:
        images: Of the class.
        recall: Share of them that is predicted right; None without images.
        precision: Share of its predictions that is right; None without predictions.
        wrong: The wrong class predicted most often for it, None if it is always right.
        wrong_images: How often.
    """

    images: int
    recall: float | None
    precision: float | None
    wrong: int | None
    wrong_images: int


def class_scores(confusion: np.ndarray) -> list[ClassScore]:
    """Recall, precision and most frequent confusion of each class."""
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
    """Pairs (true class, prediction, images) that are confused most often, at most ``count``."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    best = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [
        (*map(int, np.unravel_index(place, wrong.shape)), int(wrong.flat[place])) for place in best
    ]
    return [pair for pair in pairs if pair[2]]
