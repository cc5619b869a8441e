"""Pictures of what nets know of positions: bias tables, positional attention, embeddings."""

from argparse import ArgumentParser, Namespace
from typing import Any

import torch

from models.layers import WindowAttention2d
from models.layers.gpsa import GPSA
from tools.plots import new_figure
from tools.visualize.capture import capture, choose
from tools.visualize.loading import Subject, load_subject
from tools.visualize.measures import (
    bias_pictures,
    centre_positions,
    cosine_similarities,
    position_embeddings,
)
from tools.visualize.panels import (
    MAGNITUDE,
    SIGNED,
    grid_of_axes,
    mosaic,
    name_columns,
    short,
    symmetric,
    title,
)
from tools.visualize.saving import Picture
from utils import UserError

MOST = 7  # positions a side whose similarities are shown


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this kind."""
    parser.add_argument("subject", metavar="CKPT_OR_MODEL")
    parser.add_argument(
        "--show",
        choices=["table", "gpsa", "embedding"],
        help="relative position bias tables, GPSA's positional attention, or position "
        "embeddings; the first of these that the net has, if not given",
    )
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of the layers, from 0")


def make(args: Namespace) -> Picture:
    """One of the three pictures."""
    subject = load_subject(args.subject, args)
    modules = dict(subject.model.named_modules())
    tables = {n: m for n, m in modules.items() if isinstance(m, WindowAttention2d)}
    gated = {n: m for n, m in modules.items() if isinstance(m, GPSA)}
    embeddings = position_embeddings(subject.model)
    has = {"table": tables, "gpsa": gated, "embedding": embeddings}
    there = [kind for kind, parts in has.items() if parts]
    if not there:
        raise UserError(
            f"{subject.label}: it has no bias table, GPSA or position embedding of a known kind"
        )
    show = args.show or there[0]
    if show not in there:
        raise UserError(f"--show {show}: {subject.label} has only {', '.join(there)}")
    names = list(has[show])
    chosen = choose(f"{show} layer", "--layers", args.layers, len(names))
    parts = {names[index]: has[show][names[index]] for index in chosen}
    figure, rows = {"table": _tables, "gpsa": _gpsa, "embedding": _embeddings}[show](subject, parts)
    return Picture(figure, rows, subject.epoch or 0)


def _named(subject: Subject) -> str:
    """What titles call a net whose positions are shown."""
    return title(subject.label) + (", resampled" if subject.resampled else "")


def _numbers(maps: dict[str, torch.Tensor], value: str, first: int = 0) -> list[dict[str, Any]]:
    """A row for every number of ``h H W`` maps by layer."""
    return [
        {"layer": name, "head": head, "y": y + first, "x": x + first, value: number}
        for name, picture in maps.items()
        for head, lines in enumerate(picture.tolist())
        for y, line in enumerate(lines)
        for x, number in enumerate(line)
    ]


def _tables(subject: Subject, layers: dict[str, WindowAttention2d]) -> tuple:
    """Bias tables, rows of layers and columns of heads, on one scale."""
    maps = {name: bias_pictures(layer).cpu() for name, layer in layers.items()}
    limit = max(picture.abs().max().item() for picture in maps.values()) or 1.0
    options = {"cmap": SIGNED, "vmin": -limit, "vmax": limit}
    reach = {name: layer.window - 1 for name, layer in layers.items()}
    figure = _rows_of_heads(maps, options, "bias added to the score", reach)
    figure.suptitle(
        f"relative position bias, {_named(subject)}\n"
        f"query minus key, in positions: dx to the right, dy downwards",
        fontsize=10,
    )
    rows = [
        row | {"y": row["y"] - reach[row["layer"]], "x": row["x"] - reach[row["layer"]]}
        for row in _numbers(maps, "bias")
    ]
    return figure, [
        {"dy" if k == "y" else "dx" if k == "x" else k: v for k, v in r.items()} for r in rows
    ]


def _gpsa(subject: Subject, layers: dict[str, GPSA]) -> tuple:
    """Positional attention of the centre patch, rows of layers and columns of heads."""
    image = torch.zeros(1, 3, subject.size, subject.size)
    grids = {c.name: c.grid for c in capture(subject.model, layers, subject.normalized(image))}
    maps = {n: centre_positions(layer, *grids[n]).cpu() for n, layer in layers.items()}
    options = {"cmap": MAGNITUDE, "vmin": 0.0}
    options["vmax"] = max(picture.max().item() for picture in maps.values())
    figure = _rows_of_heads(maps, options, "weight", None)
    height, width = next(iter(grids.values()))
    figure.suptitle(
        f"positional attention of patch ({height // 2}, {width // 2}), marked, of a grid of "
        f"{height}x{width}\n{_named(subject)}",
        fontsize=10,
    )
    return figure, _numbers(maps, "weight")


def _rows_of_heads(
    maps: dict[str, torch.Tensor], options: dict, what: str, reach: dict[str, int] | None
) -> Any:
    heads = max(len(picture) for picture in maps.values())
    figure, axes = grid_of_axes(len(maps), heads, 1.1, (1.6, 1.1))
    image = None
    for line, (name, picture) in zip(axes, maps.items(), strict=True):
        for head, ax in enumerate(line):
            if head >= len(picture):
                ax.set_axis_off()
                continue
            values = picture[head].numpy()
            if reach is None:
                image = ax.imshow(values, **options)
                ax.plot(values.shape[1] // 2, values.shape[0] // 2, "r+", markersize=5)
            else:
                r = reach[name]
                image = ax.imshow(values, extent=(-r - 0.5, r + 0.5, r + 0.5, -r - 0.5), **options)
                ax.set_xticks([-r, 0, r] if head == 0 else [])
                ax.set_yticks([-r, 0, r] if head == 0 else [])
                ax.tick_params(labelsize=6)
        line[0].set_ylabel(short(name), fontsize=8)
    name_columns(axes, [f"head {head}" for head in range(heads)])
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3.0 / len(maps)), aspect=15, pad=0.01)
    bar.set_label(what, fontsize=8)
    return figure


def _embeddings(subject: Subject, embeddings: dict[str, torch.Tensor]) -> tuple:
    """Similarity of each of some positions to all, for every embedding."""
    figure = new_figure(4.2 * len(embeddings) + 1.8, 5.1)
    axes = figure.subplots(1, len(embeddings), squeeze=False)[0]
    rows, image = [], None
    for ax, (name, embedding) in zip(axes, embeddings.items(), strict=True):
        similar = cosine_similarities(embedding.cpu())
        picked = [_spread(side) for side in similar.shape[:2]]
        some = similar[picked[0]][:, picked[1]]  # R K H W
        height, width = similar.shape[:2]
        gap = max(1, height // 10)
        image = ax.imshow(mosaic(some, gap), **symmetric(torch.ones(1)))
        ax.set_facecolor("0.6")  # of the gaps: white would be a similarity of 0
        ax.set_title(f"{name}, {height}x{width} positions", fontsize=9)
        ax.set_xticks(
            [j * (width + gap) + width / 2 - 0.5 for j in range(len(picked[1]))],
            picked[1],
            fontsize=7,
        )
        ax.set_yticks(
            [i * (height + gap) + height / 2 - 0.5 for i in range(len(picked[0]))],
            picked[0],
            fontsize=7,
        )
        ax.set_xlabel("column of the position", fontsize=8)
        ax.set_ylabel("row of the position", fontsize=8)
        rows += [
            {"layer": name, "row": r, "column": c, "y": y, "x": x, "similarity": value}
            for r, line in zip(picked[0], some.tolist(), strict=True)
            for c, picture in zip(picked[1], line, strict=True)
            for y, numbers in enumerate(picture)
            for x, value in enumerate(numbers)
        ]
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
    bar.set_label("cosine similarity", fontsize=8)
    figure.suptitle(
        f"position embeddings, {_named(subject)}\neach tile: one position with all others",
        fontsize=10,
    )
    return figure, rows


def _spread(count: int) -> list[int]:
    """At most :data:`MOST` indices, evenly over ``count``."""
    shown = min(MOST, count)
    return [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]
