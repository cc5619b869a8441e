"""The picture of ConViT's gates."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch

from tools.plots import new_figure
from tools.visualize.loading import Snapshot, in_order, load_subject
from tools.visualize.measures import gates
from tools.visualize.panels import COLOURS, short, title, whole_ticks
from tools.visualize.saving import Picture

GATE = r"gate $\sigma(\lambda)$, share of position"


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this kind."""
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="files, or models' names")


def make(args: Namespace) -> Picture:
    """Gates by layer of one checkpoint, or over the epochs of several."""
    found = []
    for path in args.checkpoints:
        subject = load_subject(path, args)
        found.append(Snapshot(subject, gates(subject.model)))
    snapshots, notes = in_order(found, args.checkpoints)
    figure = draw_heads(snapshots[0], GATE) if len(snapshots) == 1 else draw_epochs(snapshots, GATE)
    for ax in figure.axes:
        ax.set_ylim(-0.03, 1.03)
    return Picture(figure, rows_of(snapshots, "gate"), snapshots[-1].epoch or 0, notes)


def rows_of(snapshots: Sequence[Snapshot], what: str) -> list[dict[str, Any]]:
    """A row for every epoch, layer and head."""
    return [
        {"epoch": snapshot.epoch, "layer": name, "head": head, what: value}
        for snapshot in snapshots
        for name, values in snapshot.values.items()
        for head, value in enumerate(values.tolist())
    ]


def _style(head: int) -> dict[str, Any]:
    """Colour, marker and name of a head; no two of 32 look the same."""
    marker = "osD^"[head // len(COLOURS) % 4]
    return {"color": COLOURS[head % len(COLOURS)], "marker": marker, "label": f"head {head}"}


def draw_heads(snapshot: Snapshot, what: str) -> Any:
    """Heads as points, and their mean as a line, over the layers of one net."""
    names = list(snapshot.values)
    heads = max(len(values) for values in snapshot.values.values())
    figure = new_figure(2.8 + 0.55 * len(names) + 0.9 * (heads > 8), 4.2)
    ax = figure.add_subplot()
    for head in range(heads):
        shift = 0.7 * (head - (heads - 1) / 2) / heads  # equal heads stay apart
        points = [
            (index + shift, values[head].item())
            for index, values in enumerate(snapshot.values.values())
            if head < len(values)
        ]
        ax.plot(*zip(*points, strict=True), **_style(head), linestyle="", markersize=5)
    means = [values.mean().item() for values in snapshot.values.values()]
    ax.plot(range(len(names)), means, color="black", linewidth=1.5, label="mean")
    ax.set_xticks(range(len(names)), [short(name) for name in names], rotation=60, ha="right")
    ax.set_xlabel("layer")
    ax.set_ylabel(what)
    ax.grid(axis="y", alpha=0.3)
    epoch = "" if snapshot.epoch is None else f", epoch {snapshot.epoch}"
    ax.set_title(title(f"{snapshot.subject.label}{epoch}"), fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, ncols=1 if heads <= 8 else 2)
    return figure


def draw_epochs(snapshots: Sequence[Snapshot], what: str) -> Any:
    """A panel per layer: heads as thin lines over the epochs, their mean as a thick one."""
    names = list(snapshots[0].values)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(2.5 * columns + 1.3, 2.0 * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    epochs = [snapshot.epoch for snapshot in snapshots]
    for ax, name in zip(axes.flat, names, strict=False):
        values = torch.stack([snapshot.values[name] for snapshot in snapshots])  # E h
        ax.plot(epochs, values.mean(1), color="black", linewidth=3, label="mean")
        for head, line in enumerate(values.T):
            ax.plot(epochs, line, **_style(head), linewidth=1, markersize=3)
        ax.set_title(short(name), fontsize=9)
        ax.grid(alpha=0.3)
        whole_ticks(ax.xaxis)
    for index, ax in enumerate(axes.flat):
        ax.tick_params(labelbottom=index + columns >= len(names))
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    most = max(range(len(names)), key=lambda index: len(snapshots[0].values[names[index]]))
    handles, labels = axes.flat[most].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.supxlabel("epoch, from 0", fontsize=10)
    figure.supylabel(what, fontsize=10)
    figure.suptitle(title(snapshots[0].net), fontsize=10)
    return figure
