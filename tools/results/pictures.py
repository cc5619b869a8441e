"""Pictures of the claims: accuracy by epoch with the range over seeds, and paired differences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import plots
from tools.visualize.figures import integer_ticks


def curves(claims: dict[str, dict[str, list[Sequence[float]]]], path: Path) -> None:
    """Plot accuracy by epoch, a panel for each claim, a line for each arm.

    Args:
        claims: Title of a claim: name of an arm: for each seed, the accuracy after each epoch.
        path: PNG file.
    """
    columns = 2
    rows = -(-len(claims) // columns)
    figure = plots.new_figure(9, 2.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, arms) in zip(panels, claims.items(), strict=False):
        for name, seeds in arms.items():
            _band(axes, name, seeds)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="epoch, from 1", ylabel="top-1 (%)")
        axes.grid()
        axes.legend(fontsize=8)
        integer_ticks(axes.xaxis)
    for axes in list(panels):  # those without a claim
        axes.set_axis_off()
    plots.save(figure, path, dpi=130)


def _band(axes: Any, name: str, seeds: Sequence[Sequence[float]]) -> None:
    """Draw the mean over seeds, and the range from the lowest to the highest."""
    epochs = range(1, min(map(len, seeds)) + 1)
    by_epoch = list(zip(*seeds, strict=False))
    means = [sum(values) / len(values) for values in by_epoch]
    (line,) = axes.plot(
        epochs, means, marker="o", markersize=3, label=f"{name}, {len(seeds)} seed(s)"
    )
    lows, highs = zip(*((min(values), max(values)) for values in by_epoch), strict=True)
    axes.fill_between(epochs, lows, highs, color=line.get_color(), alpha=0.25, linewidth=0)


def differences(rows: Sequence[tuple[str, float, float]], path: Path) -> None:
    """Plot paired differences as bars with their standard errors.

    Args:
        rows: Label, mean and standard error in points of top-1.
        path: PNG file.
    """
    figure = plots.new_figure(8, 0.9 + 0.38 * len(rows))
    axes = figure.add_subplot()
    labels = [label for label, *_ in rows]
    means = [mean for _, mean, _ in rows]
    errors = [error for *_, error in rows]
    colours = ["tab:blue" if mean >= 0 else "tab:red" for mean in means]
    axes.barh(labels, means, xerr=errors, color=colours, height=0.6, ecolor="black", capsize=3)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel("difference of top-1 in points, mean and standard error over seeds")
    axes.grid(axis="x")
    axes.invert_yaxis()
    plots.save(figure, path, dpi=130)
