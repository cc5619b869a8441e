"""Feature maps of every stage or block."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from tools.visualize.capture import choose
from tools.visualize.figures import Picture, add_row_bar, as_rows, grid_of_axes, symmetric, title
from tools.visualize.loading import LoadedModel, load_images, load_model
from tools.visualize.measures import principal_colours
from utils import UserError


def make(args: Namespace) -> Picture:
    """Feature maps of every stage, and their principal components."""
    model = load_model(args.source, args)
    image = load_images(model, [args.image])
    maps = stage_maps(model, image)
    names = stage_names(model, len(maps))
    chosen = {index: maps[index] for index in choose("stage", "--layers", args.layers, len(maps))}
    picked = {i: pick_channels(part, args.channels, args.pick) for i, part in chosen.items()}
    figure = draw(chosen, picked, image[0], model.label, names)
    rows = [
        row
        for index, channels in picked.items()
        for row in as_rows(
            maps[index][channels], "value", stage=[index], channel=channels, y=None, x=None
        )
    ]
    return Picture(figure, rows, model.epoch or 0)


def stage_maps(model: LoadedModel, image: torch.Tensor) -> list[torch.Tensor]:
    """Return maps ``C H W`` after the stages or blocks, for an image ``1 3 H W`` in 0..1.

    Raises:
        UserError: The model returns none, or values that are not finite.
    """
    if not hasattr(model.module, "forward_intermediates"):
        raise UserError(f"{model.label}: the model does not have forward_intermediates")
    with torch.no_grad():
        maps = model.module.forward_intermediates(
            model.normalized(image), intermediates_only=True, output_fmt="NCHW"
        )
    maps = [features[0].float().cpu() for features in maps]
    for name, features in zip(stage_names(model, len(maps)), maps, strict=True):
        if not features.isfinite().all():
            raise UserError(f"{model.label}: maps after {name} are not finite")
    return maps


def stage_names(model: LoadedModel, count: int) -> list[str]:
    """Return the model's names of its ``count`` stages or blocks."""
    info = list(getattr(model.module, "feature_info", []))
    if len(info) != count:
        return [f"stage {index}" for index in range(count)]
    return [f"{index}: {entry['module']}" for index, entry in enumerate(info)]


def pick_channels(features: torch.Tensor, count: int, how: str) -> list[int]:
    """Return the first ``count`` channels of ``C H W``, or those of the largest variance."""
    if how == "first":
        return list(range(min(count, len(features))))
    spread = features.flatten(1).var(dim=1, correction=0)
    return spread.argsort(descending=True, stable=True)[:count].tolist()


def draw(
    maps: dict[int, torch.Tensor],
    picked: dict[int, Sequence[int]],
    image: torch.Tensor,
    label: str,
    names: Sequence[str],
) -> Any:
    """Draw rows of stages: the image, principal components as colours, channels on one scale."""
    most = max(len(channels) for channels in picked.values())
    figure, axes = grid_of_axes(len(maps), 2 + most, 1.25, (1.5, 0.9), "--channels")
    for line, (index, features) in zip(axes, maps.items(), strict=True):
        channels = picked[index]
        line[0].imshow(image.permute(1, 2, 0).numpy())
        height, width = features.shape[1:]
        line[0].set_ylabel(f"{names[index]}\n{len(features)}x{height}x{width}", fontsize=8)
        line[1].imshow(principal_colours(features).numpy())
        options = symmetric(features[channels].abs().max())
        for ax, channel in zip(line[2:], channels, strict=False):
            shades = ax.imshow(features[channel].numpy(), **options)
            ax.set_title(f"channel {channel}", fontsize=8)
        for ax in line[2 + len(channels) :]:
            ax.set_axis_off()
        add_row_bar(figure, shades, line, 0.85, "value")
    axes[0][0].set_title("image", fontsize=8)
    axes[0][1].set_title("PCA 1-3 as RGB", fontsize=8)
    figure.suptitle(title(f"feature maps, {label}"), fontsize=10)
    return figure
