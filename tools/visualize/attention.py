"""Attention of a query to the positions of an image."""

import itertools
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from models import height_and_width
from tools.visualize import figures
from tools.visualize.capture import CLASS, PARTS, attention_layers, capture, choose
from tools.visualize.loading import LoadedModel, load_images, load_model
from utils import UserError


class LayerMaps(NamedTuple):
    """Attention maps of a layer for one query."""

    name: str
    place: tuple[int, int] | None  # row and column in the layer's grid, None for the class token
    heads: list[int]  # their numbers
    maps: dict[str, torch.Tensor]  # h H W by part, of those that the layer has


def make(args: Namespace) -> figures.Picture:
    """Attention of a patch, or of the class token, over an image."""
    model = load_model(args.source, args)
    query = parse_query(args.query, model.size)
    image = load_images(model, [args.image])
    parts = PARTS if args.part == "all" else (args.part,)
    layers = list(measure(model, image, query, parts, args.layers, args.heads))
    if not layers:
        raise UserError(f"--query {CLASS}: no layer of {model.label} has a class token")
    notes = [f"{one.name} left out: no attention by position" for one in layers if not one.maps]
    layers = [one for one in layers if one.maps]
    if not layers:
        raise UserError(f"--part {args.part}: no chosen layer attends by position")
    parts = [part for part in parts if any(part in one.maps for one in layers)]
    figure = draw(layers, parts, image[0], f"{model.label}, query {args.query}")
    rows = []
    for one in layers:
        for part, maps in one.maps.items():
            axes = {"layer": [one.name], "head": one.heads, "part": [part], "y": None, "x": None}
            rows += figures.as_rows(maps[:, None], "weight", **axes)
    return figures.Picture(figure, rows, model.epoch, notes)


def parse_query(text: str, size: int | tuple[int, int]) -> tuple[int, int] | str:
    """Return ``"class"``, or the pixel ``(x, y)`` of ``X,Y`` or ``centre`` within the image.

    ``size`` is the side of the image, or height and width.
    """
    height, width = height_and_width(size)
    if text == CLASS:
        return CLASS
    if text in ("centre", "center"):
        return width // 2, height // 2
    try:
        x, y = (int(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(f"--query {text} must be X,Y, centre or class") from error
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"--query {text} is outside the model's input of {width}x{height} pixels")
    return x, y


def measure(
    model: LoadedModel,
    image: torch.Tensor,
    query: tuple[int, int] | str,
    parts: Sequence[str] = PARTS,
    chosen: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Iterator[LayerMaps]:
    """Run the model on an image ``1 3 H W``; yield the maps of one query, layer by layer.

    Args:
        model, image: Model and image in 0..1.
        query: See :func:`parse_query`. Layers without a class token have no maps of it; chosen
            ones raise UserError.
        parts: Of :data:`PARTS`.
        chosen, heads: Numbers of layers and heads; all if None.
    """
    layers = attention_layers(model.module)
    names = list(layers)
    layers = {n: layers[n] for n in choose("attention layer", "--layers", chosen, names)}
    if heads is not None:
        fewest = min(layers, key=lambda name: layers[name].num_heads)
        kind = f"head of {fewest} (--layers chooses others)"
        heads = choose(kind, "--heads", heads, range(layers[fewest].num_heads))
    has_class = getattr(model.module, "cls_token", None) is not None
    for captured in capture(model.module, layers, model.normalized(image)):
        place = None
        if query != CLASS:
            (x, y), (rows, columns), (height, width) = query, captured.grid, model.images.input_size
            place = (y * rows // height, x * columns // width)
        elif not (captured.prefix and has_class):
            if chosen is None:
                continue
            number = names.index(captured.name)
            raise UserError(f"--query {CLASS}: layer {number} ({captured.name}) has no class token")
        shown = heads or list(range(captured.layer.num_heads))
        weights = captured.parts()._asdict()
        maps = {
            part: captured.maps(weights[part], place or CLASS)[0, shown].cpu()
            for part in parts
            if weights[part] is not None
        }
        yield LayerMaps(captured.name, place, shown, maps)


def draw(layers: Sequence[LayerMaps], parts: Sequence[str], image: torch.Tensor, what: str) -> Any:
    """Draw rows of layers: the image, then a column for every part and head.

    Colours of a panel go from 0 to its largest weight, which is below it, as is the sum where
    prefix tokens or padding get the rest.
    """
    from matplotlib.patches import Rectangle

    numbers = max((one.heads for one in layers), key=len)
    columns = list(itertools.product(parts, range(len(numbers))))
    names = [figures.short_name(one.name) for one in layers]
    figure, axes = figures.grid_of_axes(names, 1 + len(columns), 1.15, (1.2, 0.9))
    height, width = image.shape[-2:]
    extent = (0, width, height, 0)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1, "extent": extent}
    colours = {"cmap": figures.MAGNITUDE, "vmin": 0, "vmax": 1, "alpha": 0.75, "extent": extent}
    for one, line in zip(layers, axes, strict=True):
        line[0].imshow(image.permute(1, 2, 0).numpy(), extent=extent)
        for (part, head), ax in zip(columns, line[1:], strict=True):
            if part in one.maps and head < len(one.heads):
                values = one.maps[part][head].numpy()
                ax.imshow(image.mean(0).numpy(), **grey)
                shades = ax.imshow(values / (float(values.max()) or 1.0), **colours)
                total = values.sum()
                rest = f"\nsum {total:.3g}" if total < 0.9995 else ""
                ax.set_xlabel(f"max {values.max():.2g}{rest}", fontsize=7, labelpad=2)
        if one.place is None:
            continue
        grid = next(iter(one.maps.values())).shape[-2:]
        high, wide = height / grid[0], width / grid[1]  # of a position, in pixels
        corner = (one.place[1] * wide, one.place[0] * high)
        for ax in (panel for panel in line if panel.has_data()):
            ax.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor="red", lw=1.3))
            ax.set(xlim=(0, width), ylim=(height, 0))
    names = [f"{part}\nhead {numbers[head]}" for part, head in columns]
    if list(parts) == ["full"]:
        names = [f"head {number}" for number in numbers]
    figures.name_columns(axes, ["image", *names])
    bar = figures.add_colour_bar(shades, axes, "attention weight /\nlargest of the panel")
    bar.ax.set_facecolor("0.5")  # as the grey image under the colours of the panels
    figure.suptitle(figures.title(what), fontsize=10)
    return figure
