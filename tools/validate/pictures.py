"""Pictures of a confusion matrix, and reliability diagrams."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tools.plots import DPI, new_figure, plain_text
from tools.validate.metrics import NUM_BINS, Bins, most_confused

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELLED = 30  # classes, at most, that get names and numbers
LISTED = 20  # pairs of classes next to the picture of more
SIDE = 1000  # pixels of the picture of more classes, about
CELLS = 500  # in a row of that, at most
SHARE = "share of the true class"
LIGHT_BLUE, DARK_RED = "#9ecae1", "#a50f15"


def confusion_figure(confusion: np.ndarray, names: Sequence[str], title: str) -> "Figure":
    """Draw the share of predictions of each true class (rows), with counts or a list of pairs.

    ``confusion`` has the images by true class and prediction, ``K K``; there are ``K`` names.
    """
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    names = [plain_text(name) for name in names]
    draw = _few_classes if len(names) <= LABELLED else _many_classes
    return draw(confusion, shares, names, plain_text(title))


def _few_classes(
    confusion: np.ndarray, shares: np.ndarray, names: Sequence[str], title: str
) -> "Figure":
    side = max(6, 0.55 * len(names) + 2)
    figure = new_figure(side, side, "compressed")
    axes = figure.subplots()
    _draw_shares(axes, shares, title)
    places = range(len(names))
    axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, names)
    size = 9 if len(names) <= 15 else 8
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            colour = "white" if shares[row, column] > 0.3 else "black"
            where = {"ha": "center", "va": "center", "color": colour, "fontsize": size}
            axes.text(column, row, str(count), **where)
    return figure


def _many_classes(
    confusion: np.ndarray, shares: np.ndarray, names: Sequence[str], title: str
) -> "Figure":
    """Draw cells of a whole number of pixels, so that equal shares have equal colours."""
    block = math.ceil(len(names) / CELLS)
    shares = largest_of_blocks(shares, block)
    side = len(shares) * (SIDE // len(shares))
    left, bottom, gap, pairs = 60, 60, 30, 600
    # half a pixel more, as the size is rounded down
    width, height = 2 * left + side + 5 * gap + pairs + 0.5, side + 2 * bottom + 0.5
    figure = new_figure(width / DPI, height / DPI, None)

    def add_axes(start: int, pixels: int) -> "Axes":
        return figure.add_axes((start / width, bottom / height, pixels / width, side / height))

    axes, bar = add_axes(left, side), add_axes(left + side + gap, gap)
    largest = f"largest {SHARE}, among {block} × {block} classes"
    _draw_shares(axes, shares, title, largest if block > 1 else SHARE, bar)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_position(("outward", 1))  # a frame on the edge would cover classes
    _list_pairs(add_axes(left + side + 6 * gap, pairs), most_confused(confusion, LISTED), names)
    return figure


def largest_of_blocks(shares: np.ndarray, block: int) -> np.ndarray:
    """Return the maximum of each ``block`` rows and columns; a mean would hide single values."""
    cells = math.ceil(len(shares) / block)
    whole = np.pad(shares, (0, cells * block - len(shares)))
    return whole.reshape(cells, block, cells, block).max((1, 3))


def _draw_shares(
    axes: "Axes", shares: np.ndarray, title: str, what: str = SHARE, bar: "Axes | None" = None
) -> None:
    """Draw shares, and their colours on ``bar`` or next to ``axes``."""
    image = axes.imshow(shares**0.5, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(title=title, xlabel="prediction", ylabel="true class")
    bar = axes.figure.colorbar(image, cax=bar, ax=axes).ax
    ticks = (0, 0.05, 0.25, 0.5, 0.75, 1)
    bar.set_yticks([tick**0.5 for tick in ticks], [f"{100 * tick:.0f}%" for tick in ticks])
    bar.set_ylabel(what)


def _list_pairs(axes: "Axes", pairs: Sequence[tuple[int, int, int]], names: Sequence[str]) -> None:
    axes.set_axis_off()
    heading = "most confused: images, true class → prediction" if pairs else "nothing is confused"
    lines = [f"{count:4d}  {names[a]} → {names[b]}" for a, b, count in pairs]
    axes.text(0, 1, "\n".join([heading, "", *lines]), va="top", fontsize=9, linespacing=1.6)


def reliability_figure(bins: Bins, title: str) -> "Figure":
    """Draw accuracy by confidence above a histogram of confidences, in percent."""
    figure = new_figure(5.5, 7)
    figure.suptitle(f"{plain_text(title)}\nECE {100 * bins.ece:.2f}%")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    width = 100 / NUM_BINS
    left = np.arange(NUM_BINS) * width
    accuracy, confidence = (100 * values for values in bins.means())
    bottom, height = np.nan_to_num(accuracy), np.nan_to_num(confidence - accuracy)
    bars = {"align": "edge", "edgecolor": "white", "color": LIGHT_BLUE, "label": "accuracy"}
    upper.bar(left, bottom, width, **bars)
    # of an underconfident bin the gap lies on the bar
    gap = {"fill": False, "edgecolor": DARK_RED, "hatch": "////", "linewidth": 0}
    gap |= {"label": "gap to the mean confidence"}
    upper.bar(left, height, width, bottom, align="edge", **gap)
    upper.plot([0, 100], [0, 100], color="black", linestyle="--", label="perfectly calibrated")
    upper.set(ylabel="accuracy (%)", ylim=(0, 100))
    shares = 100 * bins.counts / bins.total
    lower.bar(left, shares, width, align="edge", color="tab:gray", edgecolor="white")
    mean = 100 * bins.mean_confidence
    right = 100 * bins.hits.sum() / bins.total
    lower.axvline(mean, color=DARK_RED, label=f"mean confidence {mean:.1f}%")
    lower.axvline(right, color="tab:blue", linestyle="--", label=f"accuracy {right:.1f}%")
    lower.set(xlim=(0, 100), xlabel="confidence (%)", ylabel="images (%)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure
