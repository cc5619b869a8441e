"""Parts that figures share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tools.cli import shown
from utils import UserError

MAGNITUDE, SIGNED = "viridis", "RdBu_r"  # safe for the colour-blind; red is positive
# of Okabe and Ito, which the colour-blind tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MAX_PANELS, MAX_COLUMNS = 600, 64
MIN_WIDTH = 6.0  # inches: titles need them
MAX_TITLE = 70  # letters
HEADS = "--layers and --heads, or one --part"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches, laid out by its content.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def title(text: str) -> str:
    """A text of any length as a title: long ones lose their middle, and $ is a letter."""
    text = shown(text)
    if len(text) > MAX_TITLE:
        half = (MAX_TITLE - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return text.replace("$", r"\$")


def grid_of_axes(
    rows: int, columns: int, side: float, extra: tuple[float, float], flags: str = HEADS
) -> tuple:
    """A figure of ``rows x columns`` square panels without ticks: ``(figure, axes)``.

    Args:
        rows, columns: Panels.
        side: Of a panel, in inches.
        extra: Width and height beside the panels, in inches.
        flags: What there could be fewer panels by.

    Raises:
        UserError: There would be too many to see anything.
    """
    if rows * columns > MAX_PANELS or columns > MAX_COLUMNS:
        raise UserError(
            f"{rows} rows of {columns} panels are more than can be seen, {MAX_COLUMNS} in a row "
            f"and {MAX_PANELS} in all: choose fewer by {flags}"
        )
    figure = new_figure(max(columns * side + extra[0], MIN_WIDTH), rows * side + extra[1])
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure, axes


def name_columns(axes: Any, names: Sequence[str]) -> None:
    """Titles of columns, each above the first panel that there is."""
    for column, name in zip(axes.T, names, strict=True):
        panels = [ax for ax in column if ax.axison]
        if panels:
            panels[0].set_title(name, fontsize=8)


def symmetric(values: torch.Tensor | np.ndarray) -> dict[str, Any]:
    """Arguments of ``imshow`` for signed values: 0 is white."""
    limit = float(abs(values).max()) or 1.0
    return {"cmap": SIGNED, "vmin": -limit, "vmax": limit}


def whole_ticks(axis: Any) -> None:
    """Let ticks stand at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def mosaic(pictures: torch.Tensor, gap: int = 1) -> np.ndarray:
    """Pictures ``R K H W`` side by side in one, NaN between them."""
    rows, columns, height, width = pictures.shape
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    out = np.full(shape, np.nan)
    for i in range(rows):
        for j in range(columns):
            y, x = i * (height + gap), j * (width + gap)
            out[y : y + height, x : x + width] = pictures[i, j].cpu().numpy()
    return out


def short(name: str, parts: Sequence[str] = (".attn", ".token_mixer")) -> str:
    """A layer's name without what all have."""
    for part in parts:
        name = name.removesuffix(part)
    return name
