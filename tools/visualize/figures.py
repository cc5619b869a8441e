"""Parts that figures share, and writing them with their values."""

import io
import itertools
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from tools import plots
from tools.cli import shown
from tools.files import check_outputs, check_suffix, check_writable
from tools.tables import write_csv
from training.files import OutputError
from utils import UserError

MAGNITUDE, SIGNED = "viridis", "RdBu_r"  # safe for colour-blind readers; red is positive
# of Okabe and Ito, distinct for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MAX_PANELS, MAX_COLUMNS = 600, 64
MIN_WIDTH = 6.0  # inches: titles need them
MAX_TITLE = 70  # letters
DPI, PADDING = 110, 0.08
INPUTS = ("image", "source", "checkpoint", "checkpoints", "runs")  # flags of files that are read


class Picture(NamedTuple):
    """A figure and its values."""

    figure: Any
    rows: Sequence[dict[str, Any]]  # the values for the CSV file, with the same keys each
    epoch: int | None  # of the last weights shown, None if unknown: TensorBoard's step
    notes: Sequence[str] = ()  # lines to print


def as_rows(values: torch.Tensor, name: str, **axes: Sequence | None) -> list[dict[str, Any]]:
    """Return a row for every element of a tensor: its coordinates, and its value under ``name``.

    The axes are columns with the labels of a dimension each, None for indices. Those that the
    tensor does not have come first, with one label each.
    """
    sizes = (1,) * (len(axes) - values.ndim) + values.shape
    pairs = zip(axes.values(), sizes, strict=True)
    places = itertools.product(*(range(size) if axis is None else axis for axis, size in pairs))
    return [
        dict(zip(axes, place, strict=True)) | {name: number}
        for place, number in zip(places, values.flatten().tolist(), strict=True)
    ]


def title(text: str) -> str:
    """Return a text as a title: without its middle if it is long, and without formulas."""
    text = shown(text)
    if len(text) > MAX_TITLE:
        half = (MAX_TITLE - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return plots.plain_text(text)


def short_name(layer: str) -> str:
    """Return a layer's name without the suffix that all layers have."""
    return layer.removesuffix(".attn").removesuffix(".token_mixer")


def grid_of_axes(
    names: Sequence[str],
    columns: int,
    side: float,
    extra: tuple[float, float],
    flags: str = "--layers and --heads, or one --part",
) -> tuple:
    """Return a figure of square panels without ticks, and its axes, rows by columns.

    Args:
        names: Labels of the rows.
        columns: Number of panels in a row.
        side: Side of a panel in inches.
        extra: Width and height next to the panels in inches.
        flags: Flags that reduce the number of panels, named where there are too many to see.
    """
    rows = len(names)
    if rows * columns > MAX_PANELS or columns > MAX_COLUMNS:
        raise UserError(
            f"{rows} rows of {columns} panels are too many (at most {MAX_COLUMNS} in a row, "
            f"{MAX_PANELS} in all): choose fewer with {flags}"
        )
    figure = plots.new_figure(max(columns * side + extra[0], MIN_WIDTH), rows * side + extra[1])
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name, fontsize=8)
    return figure, axes


def name_columns(axes: Any, names: Sequence[str]) -> None:
    """Hide empty panels; set titles of the first columns, each above its first visible panel."""
    for ax in axes.flat:
        if not ax.has_data():
            ax.set_axis_off()
    for column, name in zip(axes.T, names, strict=False):
        for ax in [ax for ax in column if ax.axison][:1]:
            ax.set_title(name, fontsize=8)


def add_colour_bar(image: Any, axes: Any, label: str) -> Any:
    """Add a colour bar for all panels of a grid; return it."""
    shrink = min(1.0, 3.0 / len(axes))
    bar = image.figure.colorbar(image, ax=axes, shrink=shrink, aspect=15, pad=0.01)
    bar.set_label(label, fontsize=8)
    return bar


def add_row_bar(image: Any, line: Any, shrink: float, label: str) -> None:
    """Add a small colour bar for one row of panels; ``shrink`` is its share of their height."""
    bar = image.figure.colorbar(image, ax=line, shrink=shrink, aspect=10, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.ax.set_title(label, fontsize=7)


def symmetric(limit: float) -> dict[str, Any]:
    """Return arguments of ``imshow`` for signed values up to a magnitude; 0 is white."""
    limit = float(limit) or 1.0
    return {"cmap": SIGNED, "vmin": -limit, "vmax": limit}


def integer_ticks(axis: Any) -> None:
    """Place ticks at integers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def check_targets(args: Namespace) -> None:
    """Raise UserError if an output is missing, misnamed or cannot be written, or is an input."""
    if not (args.output or args.csv or args.tensorboard):
        raise UserError("give --output FILE.png, --tensorboard DIR or --csv FILE")
    check_suffix("--output", args.output, ".png")
    check_suffix("--csv", args.csv, ".csv")
    files = [("--output", args.output), ("--csv", args.csv)]
    files = [(flag, path) for flag, path in files if path is not None]
    inputs = [getattr(args, name, None) or [] for name in INPUTS]
    inputs = [[value] if isinstance(value, str) else value for value in inputs]
    check_outputs(files, itertools.chain(*inputs))
    for flag, path in files:
        check_writable(flag, path)
    folder = args.tensorboard
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"--tensorboard {folder} is not a folder")


def save(picture: Picture, kind: str, args: Namespace) -> list[str]:
    """Write the outputs that the flags name; return a line for each.

    TensorBoard gets the figure under ``visualize/KIND``. Of a file that cannot be written
    (OutputError), the previous one is unchanged.
    """
    lines = [f"written to {path}" for path in (args.output, args.csv) if path]
    if args.output:
        plots.save(picture.figure, args.output, DPI, PADDING)
    if args.csv:
        write_csv(args.csv, list(picture.rows[0]), picture.rows)
    if args.tensorboard:
        tag, step = f"visualize/{kind}", picture.epoch or 0
        _to_tensorboard(picture.figure, tag, step, args.tensorboard)
        lines.append(f"{tag} at step {step} in {args.tensorboard}")
    return lines


def _to_tensorboard(figure: Any, tag: str, step: int, folder: Path) -> None:
    from training.events import EventFile  # takes seconds to import

    png = io.BytesIO(plots.as_png(figure, DPI, PADDING))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        image = np.asarray(Image.open(png).convert("RGB"))
        EventFile(folder).add_image(tag, image, step, dataformats="HWC")
    except (OSError, ValueError) as error:  # ValueError: a step that is too large
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write to {folder}: {reason}") from error
