"""One value per head by layer: ConViT's gates, and non-locality."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from models.layers import WindowAttention2d
from models.layers.gpsa import GPSA
from tools.plots import new_figure
from tools.visualize.capture import Captured, attention_layers, capture
from tools.visualize.figures import COLOURS, Picture, as_rows, integer_ticks, short_name, title
from tools.visualize.loading import LoadedModel, find_images, load_images, load_model
from utils import UserError

GATE = r"gate $\sigma(\lambda)$, share of position"
FAR = "non-locality D, patches"
BATCH = 8  # images at once: N x N weights of every head are formed

Values = dict[str, torch.Tensor]  # one per head, h, by layer


def make_gates(args: Namespace) -> Picture:
    """ConViT's gates (share of position) by layer, or over the epochs of checkpoints."""
    return _make(args, lambda model: gates(model.module), "gate", GATE, (-0.03, 1.03))


def make_nonlocality(args: Namespace) -> Picture:
    """Mean distance at which the heads of each layer attend, in patches."""
    if bool(args.image) == bool(args.data_path):
        raise UserError("give either --image IMG ... or --data-path FOLDER")
    paths = args.image or find_images(args.data_path, args.count)
    note = f"mean over {len(paths)} image(s)"
    return _make(args, lambda model: mean_nonlocality(model, paths), "nonlocality", FAR, None, note)


def _make(
    args: Namespace,
    values_of: Callable[[LoadedModel], Values],
    name: str,
    label: str,
    limits: tuple[float, float] | None,
    *more: str,
) -> Picture:
    """Draw values of heads; ``limits`` of None are from 0 to just above the largest value."""
    models = (load_model(path, args) for path in args.checkpoints)
    found, notes = in_order([(model, values_of(model)) for model in models], args.checkpoints)
    if limits is None:
        largest = max(value.max().item() for _, values in found for value in values.values())
        limits = (0.0, 1.05 * largest or 1.0)
    figure = draw_heads(*found[0], label) if len(found) == 1 else draw_epochs(found, label)
    for ax in figure.axes:
        ax.set_ylim(*limits)
    rows = []
    for model, values in found:
        for layer, value in values.items():
            rows += as_rows(value, name, epoch=[model.epoch], layer=[layer], head=None)
    return Picture(figure, rows, found[-1][0].epoch, [*notes, *more])


def gates(model: nn.Module) -> Values:
    """Return sigmoid(lambda), the share of positional attention (arXiv 2103.10697, section 3)."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GPSA)}
    if not layers:
        raise UserError(f"{type(model).__name__} has no gates, as ConViT has")
    return {name: layer.gate().detach().flatten().cpu() for name, layer in layers.items()}


def mean_nonlocality(model: LoadedModel, paths: Sequence[str | Path], batch: int = BATCH) -> Values:
    """Return the non-locality of every head, averaged over images."""
    layers = attention_layers(model.module)
    sums: Values = {}
    for start in range(0, len(paths), batch):
        images = model.normalized(load_images(model, paths[start : start + batch]))
        for captured in capture(model.module, layers, images):
            far = nonlocality_of(captured).double().sum(0).cpu()
            sums[captured.name] = sums.get(captured.name, 0.0) + far
    return {name: total / len(paths) for name, total in sums.items()}


def nonlocality_of(captured: Captured) -> torch.Tensor:
    """Return ``D = 1/L sum_ij A_ij |d_ij|`` of a layer, ``B h``, in patches of its map.

    ConViT, arXiv 2103.10697, section 4. Prefix tokens and the padding of windows are left out, and
    rows are scaled to sum to one again: D is the mean distance among the patches. Otherwise a head
    would seem more local the more it attends to the class token.
    """
    height, width = captured.grid
    weights, windows = captured.parts().full, None
    if isinstance(captured.layer, WindowAttention2d):
        windows = captured.layer.windows(height, width, weights)
    else:
        weights = weights[:, None, :, captured.prefix :, captured.prefix :]  # B W h N N
    source = windows.source if windows else torch.arange(height * width, device=weights.device)
    inside = torch.ones_like(source, dtype=weights.dtype)
    if windows:
        inside[windows.padding] = 0.0
    inside = inside.view(weights.shape[1], 1, -1)  # W 1 N
    points = torch.stack([source // width, source % width], dim=-1).to(weights.dtype)
    points = points.view(*inside.shape, 2)  # W 1 N 2
    distances = (points.transpose(1, 2) - points).norm(dim=-1)  # W N N
    weights = weights * inside[:, None]
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    distances = distances * inside.transpose(1, 2)
    return torch.einsum("bwhij,wij->bh", weights, distances) / (height * width)


def in_order(
    found: Sequence[tuple[LoadedModel, Values]], paths: Sequence[str]
) -> tuple[Sequence[tuple[LoadedModel, Values]], list[str]]:
    """Sort by epoch, keeping the first of each; also return notes of those left out.

    UserError is raised if the epoch of one of several is unknown, or their networks differ.
    """
    if len(found) == 1:
        return found, []
    chosen: dict[int, int] = {}
    notes = []
    shapes = [{name: len(value) for name, value in values.items()} for _, values in found]
    for index, ((model, _), path) in enumerate(zip(found, paths, strict=True)):
        if model.epoch is None:
            raise UserError(
                f"{path} does not contain its epoch, or was saved within one; several checkpoints "
                f"are sorted by epoch: give it alone"
            )
        if (model.network, shapes[index]) != (found[0][0].network, shapes[0]):
            raise UserError(
                f"{path} is of another network ({model.network}) than {paths[0]} "
                f"({found[0][0].network}): give checkpoints of one, with one --input-size"
            )
        first = chosen.setdefault(model.epoch, index)
        if first != index:
            notes.append(f"{path} left out: epoch {model.epoch} is that of {paths[first]}")
    return [found[chosen[epoch]] for epoch in sorted(chosen)], notes


def _style(head: int) -> dict[str, Any]:
    """Colour, marker and label of a head, distinct for 32 heads."""
    marker = "osD^"[head // len(COLOURS) % 4]
    return {"color": COLOURS[head % len(COLOURS)], "marker": marker, "label": f"head {head}"}


def draw_heads(model: LoadedModel, values: Values, what: str) -> Any:
    """Draw heads as points, and their mean as a line, over the layers of one model."""
    table = pad_sequence(list(values.values()), padding_value=torch.nan)  # h L
    heads, layers = table.shape
    places = torch.arange(layers)
    figure = new_figure(2.8 + 0.55 * layers + 0.9 * (heads > 8), 4.2)
    ax = figure.add_subplot()
    for head, points in enumerate(table):
        shift = 0.7 * (head - (heads - 1) / 2) / heads  # equal heads stay apart
        ax.plot(places + shift, points, **_style(head), linestyle="", markersize=5)
    ax.plot(places, table.nanmean(0), color="black", linewidth=1.5, label="mean")
    ax.set_xticks(places, map(short_name, values), rotation=60, ha="right")
    ax.set(xlabel="layer", ylabel=what)
    ax.grid(axis="y", alpha=0.3)
    epoch = "" if model.epoch is None else f", epoch {model.epoch}"
    ax.set_title(title(f"{model.label}{epoch}"), fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, ncols=1 if heads <= 8 else 2)
    return figure


def draw_epochs(found: Sequence[tuple[LoadedModel, Values]], what: str) -> Any:
    """Draw a panel per layer: heads as thin lines over the epochs, their mean as a thick one."""
    first, names = found[0][0], list(found[0][1])
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(2.5 * columns + 1.3, 2.0 * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    epochs = [model.epoch for model, _ in found]
    for ax, name in zip(axes.flat, names, strict=False):
        value = torch.stack([values[name] for _, values in found])  # E h
        ax.plot(epochs, value.mean(1), color="black", linewidth=3, label="mean")
        for head, line in enumerate(value.T):
            ax.plot(epochs, line, **_style(head), linewidth=1, markersize=3)
        ax.set_title(short_name(name), fontsize=9)
        ax.grid(alpha=0.3)
        integer_ticks(ax.xaxis)
    for index, ax in enumerate(axes.flat):
        ax.tick_params(labelbottom=index + columns >= len(names))
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    legends = (ax.get_legend_handles_labels() for ax in axes.flat)
    handles, labels = max(legends, key=lambda legend: len(legend[0]))  # of the most heads
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.supxlabel("epoch, from 0", fontsize=10)
    figure.supylabel(what, fontsize=10)
    figure.suptitle(title(first.network), fontsize=10)
    return figure
