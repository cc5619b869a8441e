"""The picture of training curves."""

import math
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from tools.plots import new_figure
from tools.visualize.logs import NEEDED, OPTIONAL, log_file, read_log, run_name
from tools.visualize.panels import COLOURS, title, whole_ticks
from tools.visualize.saving import Picture
from utils import UserError

PANELS = {
    "loss": (
        ("train_loss", "training", ":"),
        ("test_loss", "test", "-"),
        ("ema_loss", "EMA", "--"),
    ),
    "top-1, %": (("test_acc1", "test", "-"), ("ema_acc1", "EMA", "--")),
    "top-5, %": (("test_acc5", "test", "-"), ("ema_acc5", "EMA", "--")),
    "learning rate": (("train_lr", "", "-"),),
}
NEEDED_LOSSES = ("train_loss", "test_loss")
MARKERS = {":": "v", "-": ".", "--": "x"}


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this kind."""
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_LOG", help="folders, or log.txt files")


def make(args: Namespace) -> Picture:
    """Curves of one or several runs."""
    files: dict[Path, str] = {}
    notes = []
    for path in args.runs:
        file = log_file(path)
        if file.resolve() in files:
            notes.append(f"{path} left out: {files[file.resolve()]} is the same log")
        else:
            files[file.resolve()] = path
    if len(files) > len(COLOURS):
        raise UserError(
            f"{len(files)} runs are more than there are colours, {len(COLOURS)}: give fewer"
        )
    names = Counter(run_name(file) for file in files)
    runs = {
        run_name(file) if names[run_name(file)] == 1 else path: read_log(file)
        for file, path in files.items()
    }
    rows = [
        {"run": name} | {key: line.get(key) for key in (*NEEDED, *OPTIONAL)}
        for name, lines in runs.items()
        for line in lines
    ]
    return Picture(draw(runs), rows, max(int(row["epoch"]) for row in rows), notes)


def draw(runs: dict[str, list[dict[str, float]]]) -> Any:
    """Four panels; a colour for every run, a style for every kind of number."""
    from matplotlib.lines import Line2D

    figure = new_figure(9.5, 6.2)
    for ax, (what, curves) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for index, lines in enumerate(runs.values()):
            for key, _, style in curves:
                points = [(line["epoch"], line[key]) for line in lines if key in line]
                if points:
                    marker = MARKERS[style] if len(points) < 30 else ""
                    options = {"color": COLOURS[index], "marker": marker, "markersize": 4}
                    ax.plot(*zip(*points, strict=True), style, **options)
        if what == "loss":
            ax.set_ylim(*_loss_limits(runs))
        ax.set_title(what, fontsize=10)
        ax.set_xlabel("epoch, from 0")
        ax.set_ylabel(what)
        ax.grid(alpha=0.3)
        whole_ticks(ax.xaxis)
    handles = [
        Line2D([], [], color=COLOURS[index], label=title(name)) for index, name in enumerate(runs)
    ]
    handles += [
        Line2D([], [], color="grey", linestyle=style, marker=MARKERS[style], label=name)
        for _, name, style in PANELS["loss"]
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _loss_limits(runs: dict[str, list[dict[str, float]]]) -> tuple[float, float]:
    """Below for all; above for training and test, which a young average would press to a line."""
    every = [line for lines in runs.values() for line in lines]

    def finite(*keys: str) -> list[float]:
        found = [line[key] for line in every for key in keys if key in line]
        return [loss for loss in found if math.isfinite(loss)] or [0.0]

    low, high = min(finite(*NEEDED_LOSSES, "ema_loss")), max(finite(*NEEDED_LOSSES))
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin
