"""Folding for inference: BatchNorm with fixed statistics into neighbouring layers."""

import copy

import torch
from timm.models import reparameterize_model
from torch import nn

from ..errors import ModelError
from .packed import PackedConv2d, PackedLinear


def is_foldable(norm: nn.Module) -> bool:
    """Return True for BatchNorm with running statistics: constant factors and offsets."""
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None


def norm_constants(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and offset of BatchNorm in evaluation, in float64, each ``C``.

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
    """Replace weight and bias of ``layer``, keeping its dtype."""
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype))
    layer.bias = nn.Parameter(bias.to(dtype))


@torch.no_grad()
def fold_before(norm: nn.BatchNorm2d, layer: nn.Conv2d | nn.Linear) -> None:
    """Fold BatchNorm into the ``layer`` after it, in place.

    Args:
        norm: Normalises the input of ``layer``.
        layer: Linear layer, or convolution without padding and groups.

    Raises:
        ValueError: The convolution has groups, or pads with zeros, which BatchNorm would shift.
    """
    factor, offset = norm_constants(norm)
    weight = layer.weight.double()
    if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or any(layer.padding)):
        raise ValueError(f"cannot fold BatchNorm into {layer}: padding or groups are not supported")
    shape = (1, -1, *[1] * (weight.ndim - 2))
    bias = (weight * offset.view(shape)).flatten(1).sum(1)
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    set_affine(layer, weight * factor.view(shape), bias)


@torch.no_grad()
def scale_outputs(
    layer: nn.Conv2d | nn.Linear, factor: torch.Tensor, offset: torch.Tensor | float = 0.0
) -> None:
    """Scale the outputs of ``layer`` by ``factor`` and add ``offset``, each ``O``, in place."""
    weight, factor = layer.weight.double(), factor.double()
    bias = offset + (0.0 if layer.bias is None else layer.bias.double() * factor)
    shape = (-1, *[1] * (weight.ndim - 1))
    set_affine(layer, weight * factor.view(shape), torch.zeros_like(factor) + bias)


def fold_after(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold BatchNorm into the ``layer`` before it, in place."""
    scale_outputs(layer, *norm_constants(norm))


class Affine2d(nn.Module):
    """Factor and offset of every channel of a feature map: BatchNorm in evaluation."""

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
    """Join ``layer`` and its activation; return other layers than Conv2d and Linear unchanged."""
    if type(layer) is nn.Conv2d:
        return PackedConv2d.of(layer, act)
    return PackedLinear.of(layer, act) if type(layer) is nn.Linear else layer


def pack_mlp(mlp: nn.Module) -> None:
    """Join the first layer and the activation of timm's ``Mlp``, in place."""
    mlp.fc1, mlp.act = pack(mlp.fc1, mlp.act), nn.Identity()
    mlp.fc2 = pack(mlp.fc2)


class Fusible(nn.Module):
    """Model that can be fused for inference."""

    def fuse(self) -> "Fusible":
        """Return a copy for inference that computes the same function, in evaluation mode.

        BatchNorm and layer scales are folded into neighbouring convolutions, query/key scales
        into their projection, train-time branches into one convolution. The copy cannot be
        trained. Fusing it again copies it.
        """
        fused = copy.deepcopy(self).eval()
        with torch.no_grad():
            _fuse(fused)
        return fused.requires_grad_(False)


def is_fusible(model: nn.Module) -> bool:
    """Return True if :func:`fused` has something to do."""
    own = ("fuse", "reparameterize", "switch_to_deploy")  # what reparameterize_model calls
    layers = (module for module in model.modules() if module is not model)
    return hasattr(model, "fuse") or any(hasattr(layer, name) for layer in layers for name in own)


@torch.no_grad()
def fused(model: nn.Module, name: str) -> nn.Module:
    """Return a copy of a model for inference that computes the same function.

    timm's models are reparameterised by timm, ours are fused (see :class:`Fusible`).

    Args:
        model: Model, of this repository or of timm.
        name: Name of the model, for the message.

    Raises:
        ModelError: The model has nothing to fold.
    """
    if not is_fusible(model):
        raise ModelError(f"{name} has no branches to fuse: leave --fuse out")
    if hasattr(model, "fuse"):
        return model.fuse()
    return reparameterize_model(model).eval().requires_grad_(False)


def _fuse(module: nn.Module) -> None:
    """Call ``fuse_`` of ``module`` and of all its submodules, parents first."""
    if hasattr(module, "fuse_"):
        module.fuse_()
    for child in module.children():
        _fuse(child)
