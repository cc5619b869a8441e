"""Positions in a model: relative position bias, positional attention, position embeddings."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from models.layers import WindowAttention2d
from models.layers.gpsa import GPSA
from tools.plots import new_figure
from tools.visualize import figures, measures
from tools.visualize.capture import capture, choose
from tools.visualize.loading import LoadedModel, load_model
from utils import UserError

MOST = 7  # positions per side whose similarities are shown


def make(args: Namespace) -> figures.Picture:
    """Relative position bias, positional attention or position embeddings."""
    model = load_model(args.source, args)
    modules = dict(model.module.named_modules())
    found = {
        "table": {n: m for n, m in modules.items() if isinstance(m, WindowAttention2d)},
        "gpsa": {n: m for n, m in modules.items() if isinstance(m, GPSA)},
        "embedding": measures.position_embeddings(model.module),
    }
    found = {kind: parts for kind, parts in found.items() if parts}
    if not found:
        raise UserError(f"{model.label}: no bias table, GPSA or position embedding of a known kind")
    show = args.show or next(iter(found))
    if show not in found:
        raise UserError(f"--show {show}: {model.label} has only {', '.join(found)}")
    names = list(found[show])
    chosen = choose(f"{show} layer", "--layers", args.layers, len(names))
    parts = {names[index]: found[show][names[index]] for index in chosen}
    what = figures.title(model.label) + (", resampled" if model.resampled else "")
    figure, rows = SHOWN[show](model, parts, what)
    return figures.Picture(figure, rows, model.epoch or 0)


def _tables(model: LoadedModel, layers: dict[str, WindowAttention2d], what: str) -> tuple:
    """Bias tables: rows of layers and columns of heads, on one scale."""
    maps = {name: measures.bias_pictures(layer).cpu() for name, layer in layers.items()}
    reach = {name: layer.window - 1 for name, layer in layers.items()}
    options = figures.symmetric(max(part.abs().max() for part in maps.values()))
    figure = _rows_of_heads(maps, options, "bias added to the score", reach)
    figure.suptitle(
        f"relative position bias, {what}\n"
        f"query minus key, in positions: dx to the right, dy downwards",
        fontsize=10,
    )
    rows = []
    for name, part in maps.items():
        steps = range(-reach[name], reach[name] + 1)
        rows += figures.as_rows(part, "bias", layer=[name], head=None, dy=steps, dx=steps)
    return figure, rows


def _gpsa(model: LoadedModel, layers: dict[str, GPSA], what: str) -> tuple:
    """Positional attention of the centre patch: rows of layers and columns of heads."""
    image = torch.zeros(1, 3, model.size, model.size)
    grids = {c.name: c.grid for c in capture(model.module, layers, model.normalized(image))}
    maps = {n: measures.centre_positions(layer, *grids[n]).cpu() for n, layer in layers.items()}
    largest = max(part.max().item() for part in maps.values())
    options = {"cmap": figures.MAGNITUDE, "vmin": 0.0, "vmax": largest}
    figure = _rows_of_heads(maps, options, "weight")
    height, width = next(iter(grids.values()))
    figure.suptitle(
        f"positional attention of patch ({height // 2}, {width // 2}), marked, of a grid of "
        f"{height}x{width}\n{what}",
        fontsize=10,
    )
    rows = [
        row
        for name, part in maps.items()
        for row in figures.as_rows(part, "weight", layer=[name], head=None, y=None, x=None)
    ]
    return figure, rows


def _rows_of_heads(
    maps: dict[str, torch.Tensor],
    options: dict[str, Any],
    what: str,
    reach: dict[str, int] | None = None,
) -> Any:
    """Draw ``h H W`` maps by layer, with the centre marked, or with offsets up to ``reach``."""
    heads = max(len(part) for part in maps.values())
    figure, axes = figures.grid_of_axes(len(maps), heads, 1.1, (1.6, 1.1))
    for line, (name, part) in zip(axes, maps.items(), strict=True):
        for ax in line[len(part) :]:
            ax.set_axis_off()
        for head, (ax, values) in enumerate(zip(line, part.numpy(), strict=False)):
            if reach is None:
                image = ax.imshow(values, **options)
                ax.plot(values.shape[1] // 2, values.shape[0] // 2, "r+", markersize=5)
            else:
                r = reach[name]
                image = ax.imshow(values, extent=(-r - 0.5, r + 0.5, r + 0.5, -r - 0.5), **options)
                ax.set_xticks([-r, 0, r] if head == 0 else [])
                ax.set_yticks([-r, 0, r] if head == 0 else [])
                ax.tick_params(labelsize=6)
        line[0].set_ylabel(figures.short_name(name), fontsize=8)
    figures.name_columns(axes, [f"head {head}" for head in range(heads)])
    figures.add_colour_bar(figure, image, axes, what)
    return figure


def _embeddings(model: LoadedModel, embeddings: dict[str, torch.Tensor], what: str) -> tuple:
    """Similarities of some positions to all, for every embedding."""
    figure = new_figure(4.2 * len(embeddings) + 1.8, 5.1)
    axes = figure.subplots(1, len(embeddings), squeeze=False)[0]
    rows = []
    for ax, (name, embedding) in zip(axes, embeddings.items(), strict=True):
        similar = measures.cosine_similarities(embedding.cpu())
        height, width = similar.shape[:2]
        down, across = _spread(height), _spread(width)
        some = similar[down][:, across]  # R K H W
        gap = max(1, height // 10)
        image = ax.imshow(mosaic(some, gap), **figures.symmetric(1.0))
        ax.set_facecolor("0.6")  # of the gaps: white would be a similarity of 0
        ax.set_title(f"{name}, {height}x{width} positions", fontsize=9)
        ax.set_xticks(_middles(width, gap, across), across, fontsize=7)
        ax.set_yticks(_middles(height, gap, down), down, fontsize=7)
        ax.set_xlabel("column of the position", fontsize=8)
        ax.set_ylabel("row of the position", fontsize=8)
        places = {"layer": [name], "row": down, "column": across, "y": None, "x": None}
        rows += figures.as_rows(some, "similarity", **places)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
    bar.set_label("cosine similarity", fontsize=8)
    figure.suptitle(
        f"position embeddings, {what}\neach tile: one position with all others", fontsize=10
    )
    return figure, rows


def _spread(count: int) -> list[int]:
    """At most :data:`MOST` indices, evenly over ``count``."""
    shown = min(MOST, count)
    return [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]


def _middles(size: int, gap: int, tiles: Sequence[int]) -> list[float]:
    """Centres of tiles of a size in a mosaic."""
    return [index * (size + gap) + size / 2 - 0.5 for index in range(len(tiles))]


def mosaic(tiles: torch.Tensor, gap: int) -> np.ndarray:
    """Join tiles ``R K H W`` into one map, with a gap of NaN between them."""
    padded = torch.nn.functional.pad(tiles, (0, gap, 0, gap), value=torch.nan)
    return padded.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-gap, :-gap].numpy()


SHOWN = {"table": _tables, "gpsa": _gpsa, "embedding": _embeddings}  # in the order of preference
