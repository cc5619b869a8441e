"""Folding for inference: normalisation into neighbouring layers, once its statistics are fixed."""

import copy

import torch
from torch import nn

from models.layers.packed import PackedConv2d, PackedLinear


def is_foldable(norm: nn.Module) -> bool:
    """Whether a layer multiplies and adds constants: BatchNorm with running statistics."""
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None


def norm_constants(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """What BatchNorm multiplies by and adds in evaluation, in float64, each ``C``.

    Factor ``t = gamma / sqrt(var + eps)`` and offset ``beta - t mean`` (arXiv 1502.03167,
    algorithm 2).
    """
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    offset = -norm.running_mean.double() * factor
    return factor, offset if norm.bias is None else offset + norm.bias.double()


@torch.no_grad()
def set_affine(layer: nn.Conv2d | nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Give ``layer`` another weight and bias, in its own dtype."""
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype))
    layer.bias = nn.Parameter(bias.to(dtype))


@torch.no_grad()
def fold_before(norm: nn.BatchNorm2d, layer: nn.Conv2d | nn.Linear) -> None:
    """Let ``layer`` do what BatchNorm before it does as well, in place.

    Args:
        norm: Normalises the input of ``layer``.
        layer: Linear layer, or convolution without padding and groups.

    Raises:
        ValueError: The convolution pads with zeros, which stand for other values before BatchNorm.
    """
    factor, offset = norm_constants(norm)
    weight = layer.weight.double()
    if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or any(layer.padding)):
        raise ValueError(f"cannot fold BatchNorm into {layer}: it pads, or has groups")
    shape = (1, -1, *[1] * (weight.ndim - 2))
    bias = (weight * offset.view(shape)).flatten(1).sum(1)
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    set_affine(layer, weight * factor.view(shape), bias)


@torch.no_grad()
def scale_outputs(
    layer: nn.Conv2d | nn.Linear, factor: torch.Tensor, offset: torch.Tensor | float = 0.0
) -> None:
    """Let ``layer`` multiply its outputs by ``factor`` and add ``offset``, each ``O``, in place."""
    weight, factor = layer.weight.double(), factor.double()
    bias = offset + (0.0 if layer.bias is None else layer.bias.double() * factor)
    shape = (-1, *[1] * (weight.ndim - 1))
    set_affine(layer, weight * factor.view(shape), torch.zeros_like(factor) + bias)


def fold_after(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Let ``layer`` do what BatchNorm after it does as well, in place."""
    scale_outputs(layer, *norm_constants(norm))


class Affine2d(nn.Module):
    """Factor and offset of every channel of a map: what BatchNorm is in evaluation."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        dtype = norm.running_mean.dtype if norm.weight is None else norm.weight.dtype
        factor, offset = (c.to(dtype)[:, None, None] for c in norm_constants(norm))
        self.weight = nn.Parameter(factor)
        self.bias = nn.Parameter(offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        return torch.addcmul(self.bias, x, self.weight)


def pack(layer: nn.Module, act: nn.Module | None = None) -> nn.Module:
    """``layer`` with its activation; anything but a convolution or projection stays itself."""
    if type(layer) is nn.Conv2d:
        return PackedConv2d.of(layer, act)
    return PackedLinear.of(layer, act) if type(layer) is nn.Linear else layer


def pack_mlp(mlp: nn.Module) -> None:
    """Join the first layer and the activation of an ``Mlp`` of timm's, in place."""
    mlp.fc1, mlp.act = pack(mlp.fc1, mlp.act), nn.Identity()
    mlp.fc2 = pack(mlp.fc2)


class Fusible(nn.Module):
    """Model with an inference net of the same function."""

    def fuse(self) -> "Fusible":
        """An inference net of the same function, in evaluation mode; this one stays as it is.

        BatchNorm and layer scales are folded into neighbouring convolutions, query/key scales
        into their projection, train-time branches into one convolution; tables of positions are
        computed. The net cannot be trained. Fusing it again copies it.
        """
        net = copy.deepcopy(self).eval()
        with torch.no_grad():
            _fuse(net)
        return net.requires_grad_(False)


def _fuse(module: nn.Module) -> None:
    """Call ``fuse_`` of ``module`` and of what is within, the parents first."""
    if hasattr(module, "fuse_"):
        module.fuse_()
    for child in module.children():
        _fuse(child)
