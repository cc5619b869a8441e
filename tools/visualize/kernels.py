"""Kernels of FastViT's reparameterisable layers, branch by branch and fused."""

import copy
from argparse import Namespace
from typing import Any, NamedTuple

import torch
from torch import nn

from models.layers.reparam import ReparamModule, RepMixer
from tools.visualize import figures
from tools.visualize.loading import load_model
from utils import UserError


class Kernels(NamedTuple):
    """Kernels of a layer before and after reparameterisation, ``C I k k`` each."""

    branches: dict[str, torch.Tensor]  # by name, norms and scales folded in, in float64
    total: torch.Tensor  # sum of the branches
    fused: torch.Tensor  # after ReparamModule.reparameterize()
    difference: float  # largest absolute one of total and fused, biases included


def reparam_layers(model: nn.Module) -> dict[str, ReparamModule]:
    """Return the outermost reparameterisable layers that still have branches; at least one."""
    found: dict[str, ReparamModule] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, ReparamModule) and not inner:
            found[name] = module
    branched = {name: m for name, m in found.items() if m.reparam_conv is None}
    if not branched:
        problem = "has no reparameterisable kernels, as FastViT has"
        if found:
            problem = "is reparameterised, its branches are gone: give a checkpoint of the training"
        raise UserError(f"{type(model).__name__} {problem}")
    return branched


@torch.no_grad()
def kernels_of(layer: ReparamModule) -> Kernels:
    """Return the kernels of a layer with branches, which is not changed."""
    branches = copy.deepcopy(layer).double().eval().branch_kernels()
    total, total_bias = map(sum, zip(*branches.values(), strict=True))
    fused = copy.deepcopy(layer).eval()
    fused.reparameterize()
    conv = fused.reparam_conv
    differences = (conv.weight.double() - total, conv.bias.double() - total_bias)
    return Kernels(
        branches={name: weight.detach().cpu() for name, (weight, _) in branches.items()},
        total=total.cpu(),
        fused=conv.weight.double().cpu(),
        difference=max(part.abs().max().item() for part in differences),
    )


def own_slices(kernels: torch.Tensor) -> torch.Tensor:
    """Return of ``C I k k`` the slice for the input channel that belongs to each output, ``C k k``.

    That is the only one of a depthwise convolution; otherwise input ``c mod I`` for output c, which
    an identity branch passes on.
    """
    index = torch.arange(len(kernels))
    return kernels[index, index % kernels.shape[1]]


def make(args: Namespace) -> figures.Picture:
    """FastViT's kernels, branch by branch and reparameterised."""
    model = load_model(args.source, args)
    layers = reparam_layers(model.module)
    mixers = (key for key, layer in layers.items() if isinstance(layer, RepMixer))
    name = args.layer or next(mixers, next(iter(layers)))
    if name not in layers:
        raise UserError(f"unknown --layer {name}; choose one of {', '.join(layers)}")
    kernels = kernels_of(layers[name])
    columns = {**kernels.branches, "sum": kernels.total, "fused": kernels.fused}
    slices = {key: own_slices(kernel)[: args.channels] for key, kernel in columns.items()}
    what = f"{name} ({type(layers[name]).__name__}), {model.label}"
    rows = []
    for branch, part in slices.items():
        rows += figures.as_rows(part, "weight", branch=[branch], channel=None, y=None, x=None)
    return figures.Picture(draw(slices, kernels, what, args.scale == "panel"), rows, model.epoch)


def draw(slices: dict[str, torch.Tensor], kernels: Kernels, what: str, by_panel: bool) -> Any:
    """Draw rows of channels, columns of branches, their sum and the fused kernel.

    Every row has its own colour scale, or every panel if ``by_panel``.
    """
    names = [f"channel {channel}" for channel in range(len(next(iter(slices.values()))))]
    figure, axes = figures.grid_of_axes(names, len(slices), 1.2, (1.2, 1.2), "--channels")
    for channel, line in enumerate(axes):
        largest = [part[channel].abs().max() for part in slices.values()]
        for ax, part, own in zip(line, slices.values(), largest, strict=True):
            limit = own if by_panel else max(largest)
            image = ax.imshow(part[channel].numpy(), **figures.symmetric(limit))
            ax.set_xlabel(f"max |w| {own:.2g}", fontsize=7, labelpad=2)
        if not by_panel:
            figures.add_row_bar(image, line, 0.9, "" if channel else "weight")
    figures.name_columns(axes, list(slices))
    inputs = kernels.fused.shape[1]
    which = "" if inputs == 1 else f"\nslices of input (channel mod {inputs})"
    figure.suptitle(
        f"{figures.title(what)}{which}\n"
        f"largest |sum of branches - fused|, biases too: {kernels.difference:.1e}",
        fontsize=9,
    )
    return figure
