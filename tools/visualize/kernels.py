"""The picture of FastViT's kernels, branch by branch and fused."""

from argparse import ArgumentParser, Namespace
from typing import Any

import torch

from tools.visualize.branches import Kernels, choose_layer, kernels_of, own_slices, reparam_layers
from tools.visualize.loading import load_subject
from tools.visualize.panels import grid_of_axes, symmetric, title
from tools.visualize.saving import Picture
from utils import UserError


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this kind."""
    parser.add_argument("subject", metavar="CKPT_OR_MODEL")
    parser.add_argument("--layer", metavar="NAME", help="the first RepMixer if not given")
    parser.add_argument("--channels", type=int, default=6, help="how many channels (6)")
    parser.add_argument("--scale", choices=["row", "panel"], default="row", help="of colours (row)")


def make(args: Namespace) -> Picture:
    """Kernels of the first channels of a layer."""
    if args.channels < 1:
        raise UserError(f"--channels {args.channels} must be 1 at least")
    subject = load_subject(args.subject, args)
    layers = reparam_layers(subject.model)
    name = choose_layer(layers, args.layer)
    kernels = kernels_of(layers[name])
    columns = {**kernels.branches, "sum": kernels.total, "fused": kernels.fused}
    slices = {key: own_slices(kernel)[: args.channels] for key, kernel in columns.items()}
    what = f"{name} ({type(layers[name]).__name__}), {subject.label}"
    figure = draw(slices, kernels, what, args.scale == "panel")
    return Picture(figure, _numbers(slices), subject.epoch or 0)


def _numbers(slices: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    return [
        {"branch": branch, "channel": channel, "y": y, "x": x, "weight": weight}
        for branch, kernels in slices.items()
        for channel, kernel in enumerate(kernels.tolist())
        for y, line in enumerate(kernel)
        for x, weight in enumerate(line)
    ]


def draw(slices: dict[str, torch.Tensor], kernels: Kernels, what: str, by_panel: bool) -> Any:
    """Rows of channels, columns of branches, their sum and the fused kernel.

    Every row is on a scale of its own, or ``by_panel`` every panel.
    """
    count = len(next(iter(slices.values())))
    figure, axes = grid_of_axes(count, len(slices), 1.2, (1.2, 1.2), "--channels")
    for channel, line in enumerate(axes):
        options = symmetric(torch.stack([part[channel] for part in slices.values()]))
        for ax, part in zip(line, slices.values(), strict=True):
            own = symmetric(part[channel]) if by_panel else options
            image = ax.imshow(part[channel].numpy(), **own)
            ax.set_xlabel(f"max |w| {part[channel].abs().max():.2g}", fontsize=7, labelpad=2)
        line[0].set_ylabel(f"channel {channel}", fontsize=8)
        if by_panel:
            continue
        bar = figure.colorbar(image, ax=line, shrink=0.9, aspect=10, pad=0.01)
        bar.ax.tick_params(labelsize=7)
        if channel == 0:
            bar.ax.set_title("weight", fontsize=7)
    for ax, name in zip(axes[0], slices, strict=True):
        ax.set_title(name, fontsize=8)
    depthwise = kernels.fused.shape[1] == 1
    which = "" if depthwise else f"\nslices of input (channel mod {kernels.fused.shape[1]})"
    figure.suptitle(
        f"{title(what)}{which}\n"
        f"largest |sum of branches - fused|, biases too: {kernels.difference:.1e}",
        fontsize=9,
    )
    return figure
