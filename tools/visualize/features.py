"""Feature maps of every stage or block."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from tools.visualize import figures
from tools.visualize.capture import choose
from tools.visualize.loading import LoadedModel, load_images, load_model
from utils import UserError


def make(args: Namespace) -> figures.Picture:
    """Feature maps of every stage, and their principal components."""
    model = load_model(args.source, args)
    image = load_images(model, [args.image])
    maps = stage_maps(model, image)
    chosen = choose("stage", "--layers", args.layers, list(enumerate(maps)))
    maps = {name: maps[name] for _, name in chosen}
    picked = [pick_channels(part, args.channels, args.pick) for part in maps.values()]
    rows = []
    for (stage, name), channels in zip(chosen, picked, strict=True):
        axes = {"stage": [stage], "channel": channels, "y": None, "x": None}
        rows += figures.as_rows(maps[name][channels], "value", **axes)
    return figures.Picture(draw(maps, picked, image[0], model.label), rows, model.epoch)


def stage_maps(model: LoadedModel, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return maps ``C H W`` after the stages or blocks, by name, for an image ``1 3 H W`` in 0..1.

    UserError is raised if the model returns none, or values that are not finite.
    """
    if not hasattr(model.module, "forward_intermediates"):
        raise UserError(f"{model.label}: the model does not have forward_intermediates")
    with torch.no_grad():
        maps = model.module.forward_intermediates(
            model.normalized(image), intermediates_only=True, output_fmt="NCHW"
        )
    names = [f"stage {index}" for index in range(len(maps))]
    info = list(getattr(model.module, "feature_info", []))
    if len(info) == len(maps):
        names = [f"{index}: {entry['module']}" for index, entry in enumerate(info)]
    found = {name: part[0].float().cpu() for name, part in zip(names, maps, strict=True)}
    for name, features in found.items():
        if not features.isfinite().all():
            raise UserError(f"{model.label}: maps after {name} are not finite")
    return found


def pick_channels(features: torch.Tensor, count: int, how: str) -> list[int]:
    """Return the first ``count`` channels of ``C H W``, or those of the largest variance."""
    if how == "first":
        return list(range(min(count, len(features))))
    spread = features.flatten(1).var(dim=1, correction=0)
    return spread.argsort(descending=True, stable=True)[:count].tolist()


def principal_colours(features: torch.Tensor) -> torch.Tensor:
    """Return the first three principal components of channels as colours.

    Args:
        features: ``C H W``; every position is a sample.

    Returns:
        ``H W 3``, each component scaled to 0..1, or 0.5 if it is constant. The sign of a component
        is such that its largest magnitude is positive.
    """
    samples = features.flatten(1).T.double()  # N C
    u, s, _ = torch.linalg.svd(samples - samples.mean(dim=0), full_matrices=False)
    colours = samples.new_full((len(samples), 3), 0.5)
    for index in range(min(3, len(s))):
        if s[index] > 1e-9 * max(s[0].item(), 1e-30):
            values = u[:, index] * u[u[:, index].abs().argmax(), index].sign()
            colours[:, index] = (values - values.min()) / (values.max() - values.min())
    return colours.view(*features.shape[1:], 3)


def draw(
    maps: dict[str, torch.Tensor],
    picked: Sequence[Sequence[int]],
    image: torch.Tensor,
    label: str,
) -> Any:
    """Draw rows of stages: the image, principal components as colours, channels on one scale."""
    names = [f"{name}\n{'x'.join(map(str, part.shape))}" for name, part in maps.items()]
    columns = 2 + max(map(len, picked))
    figure, axes = figures.grid_of_axes(names, columns, 1.25, (1.5, 0.9), "--channels")
    for line, features, channels in zip(axes, maps.values(), picked, strict=True):
        line[0].imshow(image.permute(1, 2, 0).numpy())
        line[1].imshow(principal_colours(features).numpy())
        options = figures.symmetric(features[channels].abs().max())
        for ax, channel in zip(line[2:], channels, strict=False):
            shades = ax.imshow(features[channel].numpy(), **options)
            ax.set_title(f"channel {channel}", fontsize=8)
        figures.add_row_bar(shades, line, 0.85, "value")
    figures.name_columns(axes, ["image", "PCA 1-3 as RGB"])
    figure.suptitle(figures.title(f"feature maps, {label}"), fontsize=10)
    return figure
