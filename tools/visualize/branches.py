"""Kernels of FastViT's reparameterised blocks, branch by branch."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from models.layers.reparam import ReparamModule, RepMixer
from utils import UserError


@dataclass(frozen=True)
class Kernels:
    """Kernels of a layer before and after reparameterisation, ``C I k k`` each.

    Attributes:
        branches: What each branch adds, norms and scales folded in, by name; in float64.
        total: Their sum.
        fused: The kernel that :meth:`ReparamModule.reparameterize` puts in their place.
        difference: Largest absolute difference of ``total`` and ``fused``, biases included.
    """

    branches: dict[str, torch.Tensor]
    total: torch.Tensor
    fused: torch.Tensor
    difference: float


def reparam_layers(model: nn.Module) -> dict[str, ReparamModule]:
    """Outermost reparameterisable layers with branches, by name.

    Raises:
        UserError: There are none, or they have no branches any more.
    """
    found: dict[str, ReparamModule] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, ReparamModule) and not inner:
            found[name] = module
    if not found:
        raise UserError(
            f"{type(model).__name__} has no kernels that are reparameterised: FastViT has"
        )
    branched = {name: m for name, m in found.items() if m.reparam_conv is None}
    if not branched:
        raise UserError(
            "the net is reparameterised already: its branches are gone, take weights of training"
        )
    return branched


def choose_layer(layers: dict[str, ReparamModule], name: str | None) -> str:
    """``name``, or the first RepMixer, or the first layer.

    Raises:
        UserError: There is no layer of this name; names those there are.
    """
    if name is None:
        mixers = (key for key, layer in layers.items() if isinstance(layer, RepMixer))
        return next(mixers, next(iter(layers)))
    if name not in layers:
        raise UserError(f"--layer {name!r} is none of {', '.join(layers)}")
    return name


@torch.no_grad()
def kernels_of(layer: ReparamModule) -> Kernels:
    """Kernels of a layer that has branches, which stays as it is."""
    double = copy.deepcopy(layer).double().eval()
    branches = double.branch_kernels()
    total = sum(weight for weight, _ in branches.values())
    total_bias = sum(bias for _, bias in branches.values())
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
    """Of kernels ``C I k k`` the slice of the input channel that passes to each output: ``C k k``.

    Of a depthwise convolution there is no other. Otherwise output c takes input ``c mod I``, the
    one that an identity branch passes on.
    """
    index = torch.arange(len(kernels))
    return kernels[index, index % kernels.shape[1]]
