"""Positions in a model: relative position bias, positional attention, position embeddings."""

import math
from argparse import Namespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from models.layers import WindowAttention2d
from models.layers.gpsa import GPSA, positional_attention
from tools.plots import new_figure
from tools.visualize import figures
from tools.visualize.capture import capture, choose
from tools.visualize.loading import LoadedModel, load_model
from utils import UserError

MOST = 7  # positions per side whose similarities are shown
MOST_PREFIX_TOKENS = 16  # class, distillation and register tokens


def make(args: Namespace) -> figures.Picture:
    """Relative position bias, positional attention or position embeddings."""
    model = load_model(args.source, args)
    modules = dict(model.module.named_modules())
    found = {
        "table": {n: m for n, m in modules.items() if isinstance(m, WindowAttention2d)},
        "gpsa": {n: m for n, m in modules.items() if isinstance(m, GPSA)},
        "embedding": position_embeddings(model.module),
    }
    found = {kind: parts for kind, parts in found.items() if parts}
    if not found:
        raise UserError(f"{model.label}: no bias table, GPSA or position embedding of a known kind")
    show = args.show or next(iter(found))
    if show not in found:
        raise UserError(f"--show {show}: {model.label} has only {', '.join(found)}")
    names = choose(f"{show} layer", "--layers", args.layers, list(found[show]))
    parts = {name: found[show][name] for name in names}
    what = figures.title(model.label) + (", resampled" if model.resampled else "")
    return figures.Picture(*SHOWN[show](model, parts, what), model.epoch)


def _tables(model: LoadedModel, layers: dict[str, WindowAttention2d], what: str) -> tuple:
    """Bias tables: rows of layers and columns of heads, on one scale."""
    maps = {name: bias_pictures(layer).cpu() for name, layer in layers.items()}
    options = figures.symmetric(max(part.abs().max() for part in maps.values()))
    heading = f"relative position bias, {what}"
    heading += "\nquery minus key, in positions: dx to the right, dy downwards"
    figure = _rows_of_heads(maps, options, "bias added to the score", heading, offsets=True)
    rows = []
    for name, layer in layers.items():
        steps = range(1 - layer.window, layer.window)
        rows += figures.as_rows(maps[name], "bias", layer=[name], head=None, dy=steps, dx=steps)
    return figure, rows


def bias_pictures(layer: WindowAttention2d) -> torch.Tensor:
    """Return the relative position bias, ``h 2w-1 2w-1``: rows dy, columns dx, query minus key."""
    side = 2 * layer.window - 1
    return layer.relative_position_bias_table.detach().T.unflatten(-1, (side, side))


def _gpsa(model: LoadedModel, layers: dict[str, GPSA], what: str) -> tuple:
    """Positional attention of the centre patch: rows of layers and columns of heads."""
    image = torch.zeros(1, 3, *model.images.input_size)
    grids = {c.name: c.grid for c in capture(model.module, layers, model.normalized(image))}
    maps = {name: centre_positions(layer, *grids[name]).cpu() for name, layer in layers.items()}
    largest = max(part.max().item() for part in maps.values())
    options = {"cmap": figures.MAGNITUDE, "vmin": 0.0, "vmax": largest}
    height, width = next(iter(grids.values()))
    patch = f"patch ({height // 2}, {width // 2}), marked, of a grid of {height}x{width}"
    heading = f"positional attention of {patch}\n{what}"
    figure = _rows_of_heads(maps, options, "weight", heading, offsets=False)
    rows = []
    for name, part in maps.items():
        rows += figures.as_rows(part, "weight", layer=[name], head=None, y=None, x=None)
    return figure, rows


@torch.no_grad()
def centre_positions(layer: GPSA, height: int, width: int) -> torch.Tensor:
    """Return the positional attention of a GPSA layer for the centre patch, ``h H W``."""
    weights = positional_attention(layer.pos_proj.weight, layer.pos_proj.bias, height, width)
    return weights[:, height // 2 * width + width // 2].unflatten(-1, (height, width))


def _rows_of_heads(
    maps: dict[str, torch.Tensor], options: dict[str, Any], what: str, heading: str, offsets: bool
) -> Any:
    """Draw ``h H W`` maps by layer, with offsets from the centre, or with the centre marked."""
    heads = max(map(len, maps.values()))
    names = list(map(figures.short_name, maps))
    figure, axes = figures.grid_of_axes(names, heads, 1.1, (1.6, 1.1))
    for line, part in zip(axes, maps.values(), strict=True):
        y, x = (side // 2 for side in part.shape[1:])
        for ax, values in zip(line, part.numpy(), strict=False):
            if offsets:
                image = ax.imshow(values, extent=(-x - 0.5, x + 0.5, y + 0.5, -y - 0.5), **options)
                ax.tick_params(labelsize=6)
            else:
                image = ax.imshow(values, **options)
                ax.plot(x, y, "r+", markersize=5)
        if offsets:
            line[0].set(xticks=[-x, 0, x], yticks=[-y, 0, y])
    figures.name_columns(axes, [f"head {head}" for head in range(heads)])
    figures.add_colour_bar(image, axes, what)
    figure.suptitle(heading, fontsize=10)
    return figure


def position_embeddings(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return learned absolute position embeddings by name, as maps ``C H W``.

    Those of tokens have the grid of the model, or a square one (UserError if they fit neither);
    prefix tokens are left out.
    """
    patches = getattr(model, "patch_embed", None)
    grid = getattr(model, "grid_size", getattr(patches, "grid_size", None))
    found = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("pos_embed"):
            continue
        value = parameter.detach()[0]  # C H W, H W C or N C
        if value.ndim == 2:
            side = math.isqrt(len(value))
            height, width = grid or (side, side)
            prefix = len(value) - height * width
            if not 0 <= prefix <= MOST_PREFIX_TOKENS:
                raise UserError(f"{name} has {len(value)} tokens, no grid of {height}x{width}")
            value = value[prefix:].T.unflatten(-1, (height, width))
        elif value.shape[0] == value.shape[1] != value.shape[2]:
            value = value.permute(2, 0, 1)
        found[name] = value
    return found


def cosine_similarities(embedding: torch.Tensor) -> torch.Tensor:
    """Return cosine similarities of embeddings ``C H W``, ``H W H W``."""
    flat = F.normalize(embedding.flatten(1).double(), dim=0)
    return (flat.T @ flat).view(*embedding.shape[1:], *embedding.shape[1:])


def _embeddings(model: LoadedModel, embeddings: dict[str, torch.Tensor], what: str) -> tuple:
    """Similarities of some positions to all, for every embedding."""
    figure = new_figure(4.2 * len(embeddings) + 1.8, 5.1)
    axes = figure.subplots(1, len(embeddings), squeeze=False)[0]
    rows = []
    for ax, (name, embedding) in zip(axes, embeddings.items(), strict=True):
        similar = cosine_similarities(embedding.cpu())
        height, width = similar.shape[:2]
        down, across = _spread(height), _spread(width)
        some = similar[down][:, across]  # R K H W
        gap = max(1, height // 10)
        tiles = F.pad(some, (0, gap, 0, gap), value=torch.nan)
        tiles = rearrange(tiles, "r k h w -> (r h) (k w)")[:-gap, :-gap]
        image = ax.imshow(tiles.numpy(), **figures.symmetric(1.0))
        ax.set_facecolor("0.6")  # of the gaps: white would be a similarity of 0
        ax.set_title(f"{name}, {height}x{width} positions", fontsize=9)
        # of the tiles' middles
        ax.set_xticks(np.arange(len(across)) * (width + gap) + (width - 1) / 2, across, fontsize=7)
        ax.set_yticks(np.arange(len(down)) * (height + gap) + (height - 1) / 2, down, fontsize=7)
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


SHOWN = {"table": _tables, "gpsa": _gpsa, "embedding": _embeddings}  # in the order of preference
