"""Training curves from the ``log.txt`` of runs."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from tools.plots import new_figure
from tools.visualize.figures import COLOURS, Picture, integer_ticks, title
from training.output import LOG
from utils import UserError

NEEDED = ("epoch", "train_loss", "test_loss", "test_acc1", "test_acc5", "train_lr")
MEASURED = {"test_loss", "test_acc1", "test_acc5"}  # all or none, see main.py's --val-interval
OPTIONAL = ("ema_loss", "ema_acc1", "ema_acc5")
STYLES = {
    "training": {"linestyle": ":", "marker": "v"},
    "test": {"linestyle": "-", "marker": "."},
    "EMA": {"linestyle": "--", "marker": "x"},
}
PANELS = {
    "loss": {"train_loss": "training", "test_loss": "test", "ema_loss": "EMA"},
    "top-1, %": {"test_acc1": "test", "ema_acc1": "EMA"},
    "top-5, %": {"test_acc5": "test", "ema_acc5": "EMA"},
    "learning rate": {"train_lr": "test"},
}
Log = list[dict[str, float]]


def log_file(path: str) -> Path:
    """Return the log that ``path`` is, or that the run folder ``path`` contains."""
    file = Path(path) / LOG if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no log {file}: give a run folder or its {LOG}")
    return file


def read_log(file: Path) -> Log:
    """Read the lines of a log, by epoch; the last one of an epoch counts, as after a resume.

    A UserError names the line that is invalid.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {file}: {reason}") from error
    epochs: dict[int, dict[str, float]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            row = _parse(line, f"{file} line {number}")
            epochs[int(row["epoch"])] = row
    if not epochs:
        raise UserError(f"{file} is empty: training writes a line after every epoch")
    return [epochs[epoch] for epoch in sorted(epochs)]


def _parse(line: str, where: str) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}; delete the line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, not an object of numbers")
    missing = [key for key in NEEDED if key not in row]
    if missing and set(missing) != MEASURED:
        raise UserError(f"{where} does not have {', '.join(missing)}")
    for key in (*NEEDED, *OPTIONAL):
        if type(row.get(key, 0.0)) not in (int, float):  # True is an int, too
            raise UserError(f"{where}: {key} is {row[key]!r}, not a number")
    if not float(row["epoch"]).is_integer():
        raise UserError(f"{where}: epoch is {row['epoch']}, not an integer")
    return row


def make(args: Namespace) -> Picture:
    """Loss, accuracy and learning rate of one or several runs."""
    files: dict[Path, str] = {}
    notes = []
    for path in args.runs:
        file = log_file(path).resolve()
        if file in files:
            notes.append(f"{path} left out: {files[file]} is the same log")
        else:
            files[file] = path
    if len(files) > len(COLOURS):
        raise UserError(f"{len(files)} runs are too many: give at most {len(COLOURS)}")
    names = [file.parent.name if file.name == LOG else file.name for file in files]
    runs = {
        name if names.count(name) == 1 else path: read_log(file)
        for name, (file, path) in zip(names, files.items(), strict=True)
    }
    rows = [
        {"run": name} | {key: line.get(key) for key in (*NEEDED, *OPTIONAL)}
        for name, lines in runs.items()
        for line in lines
    ]
    return Picture(draw(runs), rows, max(int(row["epoch"]) for row in rows), notes)


def draw(runs: dict[str, Log]) -> Any:
    """Draw four panels, with a colour for every run and a line style for every series."""
    from matplotlib.lines import Line2D

    figure = new_figure(9.5, 6.2)
    colours = dict(zip(runs, COLOURS, strict=False))
    for ax, (what, series) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name, lines in runs.items():
            for key, style in series.items():
                points = [(line["epoch"], line[key]) for line in lines if key in line]
                if points:
                    options = STYLES[style] | ({"marker": ""} if len(points) >= 30 else {})
                    x, y = zip(*points, strict=True)
                    ax.plot(x, y, color=colours[name], markersize=4, **options)
        if what == "loss":
            ax.set_ylim(*_loss_limits(runs))
        ax.set_title(what, fontsize=10)
        ax.set(xlabel="epoch, from 0", ylabel=what)
        ax.grid(alpha=0.3)
        integer_ticks(ax.xaxis)
    handles = [Line2D([], [], color=colours[name], label=title(name)) for name in runs]
    for name, style in STYLES.items():
        handles.append(Line2D([], [], color="grey", label=name, **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _loss_limits(runs: dict[str, Log]) -> tuple[float, float]:
    """Limits below all losses, and above all but the EMA's, which is large in the first epochs."""

    def finite(*keys: str) -> list[float]:
        found = [line.get(key, math.nan) for log in runs.values() for line in log for key in keys]
        return [loss for loss in found if math.isfinite(loss)] or [0.0]

    low = min(finite("train_loss", "test_loss", "ema_loss"))
    high = max(finite("train_loss", "test_loss"))
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin
