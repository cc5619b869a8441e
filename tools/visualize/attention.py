"""The picture of what heads attend to, over the image."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tools.visualize.capture import CLASS, PARTS, Captured, attention_layers, capture, choose
from tools.visualize.loading import Subject, load_pictures, load_subject
from tools.visualize.panels import MAGNITUDE, grid_of_axes, name_columns, short, title
from tools.visualize.saving import Picture
from utils import UserError

CENTRE = ("centre", "center")


@dataclass(frozen=True)
class Row:
    """A layer's maps of one query.

    Attributes:
        name: The layer.
        place: Row and column of the query in the layer's grid, None for the class token.
        heads: Numbers of the heads.
        maps: ``h H W`` by part; a part that the layer has not is missing.
    """

    name: str
    place: tuple[int, int] | None
    heads: list[int]
    maps: dict[str, torch.Tensor]


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this kind."""
    parser.add_argument("--checkpoint", metavar="CKPT", help="file; else --model NAME")
    parser.add_argument("--image", required=True, metavar="FILE", help="or a folder")
    parser.add_argument(
        "--query",
        default="centre",
        metavar="X,Y",
        help="pixel of the net's input, whose corner 0,0 is at the upper left; or centre, or class",
    )
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of attention layers, from 0")
    parser.add_argument("--heads", type=int, nargs="+", help="numbers of heads, from 0")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="full")


def make(args: Namespace) -> Picture:
    """Maps of layers and heads for one query, over the image."""
    if bool(args.checkpoint) == bool(args.model) and not args.checkpoint:
        raise UserError("give --checkpoint CKPT or --model NAME")
    subject = _subject(args)
    query = parse_query(args.query, subject.size)
    picture = load_pictures(subject, [args.image])
    parts = PARTS if args.part == "all" else (args.part,)
    rows = list(_rows(subject, picture, query, parts, args))
    if not rows:
        raise UserError(f"--query class: no layer of {subject.label} has a class token")
    notes = [f"{row.name} left out: it does not attend by position" for row in rows if not row.maps]
    rows = [row for row in rows if row.maps]
    if not rows:
        raise UserError(f"--part {args.part}: no chosen layer attends by position")
    parts = [part for part in parts if any(part in row.maps for row in rows)]
    figure = draw(rows, parts, picture[0], f"{subject.label}, query {args.query}")
    return Picture(figure, _numbers(rows), subject.epoch or 0, notes)


def _subject(args: Namespace) -> Subject:
    if args.checkpoint:
        return load_subject(args.checkpoint, args)
    return load_subject(args.model, Namespace(**vars(args) | {"model": None}))


def parse_query(text: str, size: int) -> tuple[int, int] | str:
    """``"class"``, or the pixel ``(x, y)`` that ``X,Y`` or ``centre`` says.

    Raises:
        UserError: It is none of them, or outside of the image.
    """
    if text == CLASS:
        return CLASS
    if text in CENTRE:
        return size // 2, size // 2
    try:
        x, y = (int(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(f"--query {text!r} is none of X,Y, centre and class") from error
    if not (0 <= x < size and 0 <= y < size):
        raise UserError(
            f"--query {text} is outside of the net's input, {size}x{size} pixels from 0,0"
        )
    return x, y


def _rows(
    subject: Subject,
    picture: torch.Tensor,
    query: tuple[int, int] | str,
    parts: Sequence[str],
    args: Namespace,
) -> Iterator[Row]:
    layers = attention_layers(subject.model)
    names = list(layers)
    chosen = choose("attention layer", "--layers", args.layers, len(names))
    layers = {names[index]: layers[names[index]] for index in chosen}
    heads = args.heads
    if heads is not None:
        fewest = min(layers, key=lambda name: layers[name].num_heads)
        kind = f"head of {fewest} (--layers chooses others)"
        heads = choose(kind, "--heads", heads, layers[fewest].num_heads)
    has_class = getattr(subject.model, "cls_token", None) is not None
    for captured in capture(subject.model, layers, subject.normalized(picture)):
        if query == CLASS and not (captured.prefix and has_class):
            if args.layers is not None:
                raise UserError(
                    f"--query class: layer {names.index(captured.name)} ({captured.name}) has no "
                    f"class token"
                )
            continue
        yield _row(captured, query, parts, heads, subject.size)


def _row(
    captured: Captured,
    query: tuple[int, int] | str,
    parts: Sequence[str],
    heads: list[int] | None,
    size: int,
) -> Row:
    place = None
    if query != CLASS:
        (x, y), (height, width) = query, captured.grid
        place = (y * height // size, x * width // size)
    heads = list(range(captured.num_heads)) if heads is None else heads
    weights = captured.parts()._asdict()
    if weights["position"] is None:
        weights.pop("position")
    maps = {
        part: captured.maps(weights[part], query if place is None else place)[0, heads].cpu()
        for part in parts
        if part in weights
    }
    return Row(captured.name, place, heads, maps)


def _numbers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for every weight that is shown."""
    return [
        {"layer": row.name, "head": head, "part": part, "y": y, "x": x, "weight": weight}
        for row in rows
        for part, maps in row.maps.items()
        for head, values in zip(row.heads, maps.tolist(), strict=True)
        for y, line in enumerate(values)
        for x, weight in enumerate(line)
    ]


def draw(rows: Sequence[Row], parts: Sequence[str], picture: torch.Tensor, what: str) -> Any:
    """Rows of layers, columns of heads, beside each other for the parts; the image comes first.

    Every panel's colours go from 0 to its largest weight, which stands beneath it; and so does
    the sum, where tokens without a place or padding have the rest.
    """
    numbers = max((row.heads for row in rows), key=len)
    heads = len(numbers)
    figure, axes = grid_of_axes(len(rows), 1 + heads * len(parts), 1.15, (1.2, 0.9))
    size = picture.shape[-1]
    grey = picture.mean(0).numpy()
    shades = None
    for row, line in zip(rows, axes, strict=True):
        line[0].imshow(picture.permute(1, 2, 0).numpy(), extent=(0, size, size, 0))
        line[0].set_ylabel(short(row.name), fontsize=8)
        for index, ax in enumerate(line[1:]):
            part, head = parts[index // heads], index % heads
            if part not in row.maps or head >= len(row.heads):
                ax.set_axis_off()
                continue
            values = row.maps[part][head].numpy()
            largest = float(values.max()) or 1.0
            ax.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, size, size, 0))
            shades = ax.imshow(
                values / largest,
                cmap=MAGNITUDE,
                vmin=0,
                vmax=1,
                alpha=0.75,
                extent=(0, size, size, 0),
            )
            ax.set_xlabel(_caption(values), fontsize=7, labelpad=2)
        _mark(line, row, size)
    heading = [f"{part}\n" if len(parts) > 1 or part != "full" else "" for part in parts]
    name_columns(axes, ["image", *(f"{part}head {n}" for part in heading for n in numbers)])
    bar = figure.colorbar(shades, ax=axes, shrink=min(1.0, 3.0 / len(rows)), aspect=15, pad=0.01)
    bar.set_label("attention weight /\nlargest of the panel", fontsize=8)
    bar.ax.set_facecolor("0.5")  # as the image is, beneath the colours of the panels
    figure.suptitle(title(what), fontsize=10)
    return figure


def _caption(values: np.ndarray) -> str:
    total = values.sum()
    rest = f"\nsum {total:.3g}" if total < 0.9995 else ""
    return f"max {values.max():.2g}{rest}"


def _mark(line: Sequence[Any], row: Row, size: int) -> None:
    """A frame around the query patch."""
    if row.place is None:
        return
    from matplotlib.patches import Rectangle

    height, width = next(iter(row.maps.values())).shape[-2:]
    y, x = row.place
    for ax in (panel for panel in line if panel.axison):
        corner = (x * size / width, y * size / height)
        sides = (size / width, size / height)
        ax.add_patch(Rectangle(corner, *sides, fill=False, edgecolor="red", linewidth=1.3))
        ax.set_xlim(0, size)
        ax.set_ylim(size, 0)
