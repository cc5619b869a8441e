"""The picture of feature maps, stage by stage."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch

from tools.visualize.capture import choose
from tools.visualize.loading import Subject, load_pictures, load_subject
from tools.visualize.measures import principal_colours
from tools.visualize.panels import grid_of_axes, symmetric, title
from tools.visualize.saving import Picture
from utils import UserError


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this kind."""
    parser.add_argument("subject", metavar="CKPT_OR_MODEL")
    parser.add_argument("--image", required=True, metavar="FILE", help="or a folder")
    parser.add_argument("--layers", type=int, nargs="+", help="stages, or blocks of ViT, from 0")
    parser.add_argument("--channels", type=int, default=6, help="channels of each (6)")
    parser.add_argument(
        "--pick",
        choices=["first", "variance"],
        default="first",
        help="the first channels, or those that vary most over the image",
    )


def make(args: Namespace) -> Picture:
    """Maps after every stage or block."""
    if args.channels < 1:
        raise UserError(f"--channels {args.channels} must be 1 at least")
    subject = load_subject(args.subject, args)
    picture = load_pictures(subject, [args.image])
    maps = stage_maps(subject, picture)
    chosen = choose("stage", "--layers", args.layers, len(maps))
    picked = {index: pick_channels(maps[index], args.channels, args.pick) for index in chosen}
    shown = {index: maps[index] for index in chosen}
    figure = draw(shown, picked, picture[0], subject.label, stage_names(subject, len(maps)))
    rows = [
        {"stage": index, "channel": channel, "y": y, "x": x, "value": value}
        for index, channels in picked.items()
        for channel in channels
        for y, line in enumerate(maps[index][channel].tolist())
        for x, value in enumerate(line)
    ]
    return Picture(figure, rows, subject.epoch or 0)


def stage_maps(subject: Subject, picture: torch.Tensor) -> list[torch.Tensor]:
    """Maps ``C H W`` after the stages, or blocks, for an image ``1 3 H W`` of values in 0..1.

    Raises:
        UserError: The net gives none, or such as are not finite.
    """
    if not hasattr(subject.model, "forward_intermediates"):
        raise UserError(f"{subject.label}: it has no forward_intermediates, and gives no maps")
    with torch.no_grad():
        maps = subject.model.forward_intermediates(
            subject.normalized(picture), intermediates_only=True, output_fmt="NCHW"
        )
    maps = [features[0].float().cpu() for features in maps]
    for name, features in zip(stage_names(subject, len(maps)), maps, strict=True):
        if not features.isfinite().all():
            raise UserError(f"{subject.label}: maps after {name} are not finite")
    return maps


def stage_names(subject: Subject, count: int) -> list[str]:
    """What the net calls its ``count`` stages or blocks."""
    info = list(getattr(subject.model, "feature_info", []))
    if len(info) != count:
        return [f"stage {index}" for index in range(count)]
    return [f"{index}: {entry['module']}" for index, entry in enumerate(info)]


def pick_channels(features: torch.Tensor, count: int, how: str) -> list[int]:
    """Numbers of ``count`` channels of ``C H W``: the first, or of the largest variance."""
    if how == "first":
        return list(range(min(count, len(features))))
    spread = features.flatten(1).var(dim=1, correction=0)
    return spread.argsort(descending=True, stable=True)[:count].tolist()


def draw(
    maps: dict[int, torch.Tensor],
    picked: dict[int, Sequence[int]],
    picture: torch.Tensor,
    label: str,
    names: Sequence[str],
) -> Any:
    """Rows of stages: the image, principal components in colours, channels on a shared scale."""
    most = max(len(channels) for channels in picked.values())
    figure, axes = grid_of_axes(len(maps), 2 + most, 1.25, (1.5, 0.9), "--channels")
    for line, (index, features) in zip(axes, maps.items(), strict=True):
        channels = picked[index]
        line[0].imshow(picture.permute(1, 2, 0).numpy())
        height, width = features.shape[1:]
        line[0].set_ylabel(f"{names[index]}\n{len(features)}x{height}x{width}", fontsize=8)
        line[1].imshow(principal_colours(features).numpy())
        options = symmetric(features[list(channels)])
        for ax, channel in zip(line[2:], channels, strict=False):
            image = ax.imshow(features[channel].numpy(), **options)
            ax.set_title(f"channel {channel}", fontsize=8)
        for ax in line[2 + len(channels) :]:
            ax.set_axis_off()
        bar = figure.colorbar(image, ax=line, shrink=0.85, aspect=10, pad=0.01)
        bar.ax.tick_params(labelsize=7)
        bar.ax.set_title("value", fontsize=7)
    axes[0][0].set_title("image", fontsize=8)
    axes[0][1].set_title("PCA 1-3 as RGB", fontsize=8)
    figure.suptitle(title(f"feature maps, {label}"), fontsize=10)
    return figure
