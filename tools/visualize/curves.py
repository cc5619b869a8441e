"""The picture of training curves."""

import math
from argparse import ArgumentParser, Namespace
from typing import Any

from tools.visualize.logs import NEEDED, OPTIONAL, log_file, read_log, run_name
from tools.visualize.panels import COLOURS, new_figure, whole_ticks
from tools.visualize.saving import Picture

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


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this kind."""
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_LOG", help="folders, or log.txt files")


def make(args: Namespace) -> Picture:
    """Curves of one or several runs."""
    runs: dict[str, list[dict[str, float]]] = {}
    for path in args.runs:
        file = log_file(path)
        name = run_name(file)
        runs[name if name not in runs else str(file)] = read_log(file)
    rows = [
        {"run": name} | {key: line.get(key) for key in (*NEEDED, *OPTIONAL)}
        for name, lines in runs.items()
        for line in lines
    ]
    return Picture(draw(runs), rows, max(int(row["epoch"]) for row in rows))


def draw(runs: dict[str, list[dict[str, float]]]) -> Any:
    """Four panels; a colour for every run, a style for every kind of number."""
    from matplotlib.lines import Line2D

    figure = new_figure(9.5, 6.2)
    for ax, (title, curves) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for index, lines in enumerate(runs.values()):
            for key, _, style in curves:
                points = [(line["epoch"], line[key]) for line in lines if key in line]
                if points:
                    marker = "." if len(points) < 30 else ""
                    color = COLOURS[index % len(COLOURS)]
                    ax.plot(*zip(*points, strict=True), style, color=color, marker=marker)
        if title == "loss":
            ax.set_ylim(*_loss_limits(runs))
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("epoch, from 0")
        ax.set_ylabel(title)
        ax.grid(alpha=0.3)
        whole_ticks(ax.xaxis)
    handles = [
        Line2D([], [], color=COLOURS[index % len(COLOURS)], label=name)
        for index, name in enumerate(runs)
    ]
    handles += [
        Line2D([], [], color="grey", linestyle=style, label=name)
        for _, name, style in PANELS["loss"]
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _loss_limits(runs: dict[str, list[dict[str, float]]]) -> tuple[float, float]:
    """What training and test need: the average of a young run would press them to a line."""
    losses = [
        line[key]
        for lines in runs.values()
        for line in lines
        for key in ("train_loss", "test_loss")
    ]
    losses = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    margin = 0.05 * (max(losses) - min(losses)) or 0.1
    return min(losses) - margin, max(losses) + margin
