"""Pictures of a confusion matrix and of the reliability of confidences."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.validate.classes import readable
from tools.validate.counts import NUM_BINS, Bins, most_confused
from training.files import OutputError, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELLED = 30  # classes, at most, that get names and numbers
LISTED = 20  # pairs of classes beside the picture of more
NAME_WIDTH = 24


def new_figure(width: float, height: float, flag: str, layout: str = "constrained") -> "Figure":
    """An empty figure, in inches.

    Raises:
        OutputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # optional: only pictures need it
    except ImportError as error:
        raise OutputError(f"{flag} needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout=layout)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120, bbox_inches="tight")
    write_atomically(path, lambda file: file.write(data.getvalue()))


def short(name: str, width: int = NAME_WIDTH) -> str:
    """The first of the names of a class, cut to ``width``."""
    first = readable(name).split(",")[0]
    return plain_text(first if len(first) <= width else f"{first[: width - 1]}…")


def plain_text(text: str) -> str:
    """``text`` as matplotlib shows it letter by letter: dollars begin no formula."""
    return text.replace("$", r"\$")


def confusion_figure(confusion: np.ndarray, names: Sequence[str], title: str) -> "Figure":
    """Shares of each true class (rows) by prediction; counts in it, or pairs beside it.

    Args:
        confusion: Images by true class and prediction, ``K K``.
        names: Of the classes, ``K``.
        title: Above the picture.
    """
    is_small = len(names) <= LABELLED
    side = max(6, 0.55 * len(names) + 2) if is_small else 10
    figure = new_figure(side if is_small else side + 5, side, "--confusion", "compressed")
    figure.suptitle(plain_text(title))
    axes = figure.subplots(1, 1 if is_small else 2, width_ratios=None if is_small else [2, 1])
    left = axes if is_small else axes[0]
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    # pixels of far more classes than the picture has would otherwise be skipped
    drawn = left.imshow(shares**0.5, cmap="Blues", vmin=0, vmax=1, interpolation="auto")
    left.set_xlabel("prediction")
    left.set_ylabel("true class")
    bar = figure.colorbar(drawn, ax=left, label="share of the true class")
    ticks = (0, 0.05, 0.25, 0.5, 0.75, 1)
    bar.set_ticks([tick**0.5 for tick in ticks], labels=[f"{100 * tick:.0f}%" for tick in ticks])
    if is_small:
        _label(left, confusion, shares, names)
    else:
        left.set_xticks([])
        left.set_yticks([])
        _list_pairs(axes[1], most_confused(confusion, LISTED), names)
    return figure


def _label(axes: "Axes", confusion: np.ndarray, shares: np.ndarray, names: Sequence[str]) -> None:
    places = range(len(names))
    texts = [short(name) for name in names]
    axes.set_xticks(places, texts, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, texts)
    size = 9 if len(names) <= 15 else 8
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            colour = "white" if shares[row, column] > 0.3 else "black"
            axes.text(
                column, row, str(count), ha="center", va="center", color=colour, fontsize=size
            )


def _list_pairs(axes: "Axes", pairs: Sequence[tuple[int, int, int]], names: Sequence[str]) -> None:
    axes.set_axis_off()
    heading = "most confused: images, true class → prediction" if pairs else "nothing is confused"
    lines = [f"{count:4d}  {short(names[a])} → {short(names[b])}" for a, b, count in pairs]
    axes.text(0, 1, "\n".join([heading, "", *lines]), va="top", fontsize=9, linespacing=1.6)


def reliability_figure(bins: Bins, title: str) -> "Figure":
    """Accuracy over confidence above a histogram of confidences, for all in percent."""
    figure = new_figure(5.5, 7, "--reliability")
    figure.suptitle(f"{plain_text(title)}\nECE {100 * bins.ece:.2f}%")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    width = 100 / NUM_BINS
    left = np.arange(NUM_BINS) * width
    accuracy, confidence = (100 * values for values in bins.means())
    upper.bar(
        left, np.nan_to_num(accuracy), width, align="edge", edgecolor="white", label="accuracy"
    )
    gap = {"fill": False, "edgecolor": "tab:red", "hatch": "////", "linewidth": 0}
    gap |= {"label": "gap to the mean confidence"}
    bottom, height = np.nan_to_num(accuracy), np.nan_to_num(confidence - accuracy)
    upper.bar(left, height, width, bottom, align="edge", **gap)
    upper.plot([0, 100], [0, 100], color="black", linestyle="--", label="perfectly calibrated")
    upper.set_ylabel("accuracy (%)")
    upper.set_ylim(0, 100)
    shares = 100 * bins.counts / bins.counts.sum()
    lower.bar(left, shares, width, align="edge", color="tab:gray", edgecolor="white")
    mean = 100 * bins.mean_confidence
    right = 100 * bins.hits.sum() / bins.counts.sum()
    lower.axvline(mean, color="tab:red", label=f"mean confidence {mean:.1f}%")
    lower.axvline(right, color="tab:blue", linestyle="--", label=f"accuracy {right:.1f}%")
    lower.set_xlim(0, 100)
    lower.set_xlabel("confidence (%)")
    lower.set_ylabel("images (%)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure
