"""Attention weights of a model on real images.

Hooks keep the input of each attention layer while the model runs in evaluation mode. The layer
computes its weights from that input, because fused kernels never form them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

import torch
from timm.layers import Attention as TimmAttention
from torch import nn

from models import vit
from models.layers import Attention2d, SelfAttention, WindowAttention2d, attention_weights
from models.layers.attention import AttentionParts, split_heads
from models.layers.gpsa import GPSA
from utils import UserError

KINDS = (GPSA, SelfAttention, Attention2d, TimmAttention)
T = TypeVar("T")
CLASS = "class"  # the query that is the class token
PARTS = ("full", "content", "position")


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention layers of ``model`` by name, in order of depth; at least one."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, KINDS)}
    if not layers:
        raise UserError(f"{type(model).__name__} has no attention layer of a known kind")
    return layers


def choose(kind: str, flag: str, wanted: Sequence[int] | None, items: Sequence[T]) -> list[T]:
    """Return the items of the numbers ``wanted``, each once; all if None."""
    if wanted is None:
        return list(items)
    last = len(items) - 1
    for index in wanted:
        if not 0 <= index <= last:
            raise UserError(f"{flag} {index}: no {kind} of this number; choose from 0..{last}")
    return [items[index] for index in dict.fromkeys(wanted)]


def attention_parts(layer: nn.Module, x: torch.Tensor) -> AttentionParts:
    """Return the attention weights that a layer applies to its input, and their parts.

    They are ``B h N N`` each, of windows ``B W h N N``. Layers without a positional part have
    content only.
    """
    if isinstance(layer, GPSA | WindowAttention2d):
        return layer.attention_parts(x)
    if isinstance(layer, TimmAttention):
        q, k, _ = split_heads(layer.qkv(x), 3, layer.num_heads)
        # timm's scale is that of the product, ours that of either factor
        scale = layer.scale if isinstance(layer, vit.Attention) else layer.scale**0.5
        full = attention_weights(layer.q_norm(q), layer.k_norm(k), scale)
    else:
        full = layer.attention_maps(x)
    return AttentionParts(full, full, None)


class Captured(NamedTuple):
    """An attention layer with its input in a forward pass."""

    name: str
    layer: nn.Module
    x: torch.Tensor  # the input
    grid: tuple[int, int]  # height and width of the map or of the grid of patches
    prefix: int  # number of tokens before the patches, of which the class token is the first

    @torch.no_grad()
    def parts(self) -> AttentionParts:
        """See :func:`attention_parts`."""
        return attention_parts(self.layer, self.x)

    def maps(self, weights: torch.Tensor, query: tuple[int, int] | str) -> torch.Tensor:
        """Return the weights of one query as maps ``B h H W``, without those of prefix tokens.

        Args:
            weights: One of the :meth:`parts`.
            query: Row and column of a position, or ``"class"``.
        """
        index = 0
        if query != CLASS:
            position = query[0] * self.grid[1] + query[1]
            if isinstance(self.layer, WindowAttention2d):
                return self.layer.weights_of_query(weights, position, *self.grid)
            index = self.prefix + position
        return weights[:, :, index, self.prefix :].unflatten(-1, self.grid)


def capture(
    model: nn.Module, layers: dict[str, nn.Module], images: torch.Tensor
) -> Iterator[Captured]:
    """Run ``model`` on images ``B 3 H W``; yield every layer with its input."""
    inputs: dict[nn.Module, torch.Tensor] = {}

    def keep(layer: nn.Module, args: tuple) -> None:
        inputs[layer] = args[0]

    with ExitStack() as hooks, torch.no_grad():
        for layer in layers.values():
            hooks.enter_context(layer.register_forward_pre_hook(keep))
        model.eval()(images)
    for name, layer in layers.items():
        x = inputs.pop(layer)
        yield Captured(name, layer, x, *_geometry(model, layer, x, images.shape[-2:]))


def _geometry(
    model: nn.Module, layer: nn.Module, x: torch.Tensor, size: tuple[int, int]
) -> tuple[tuple[int, int], int]:
    """Return the grid of a layer's input, and the number of tokens before it."""
    if x.ndim == 4:
        return tuple(x.shape[1:3] if isinstance(layer, GPSA) else x.shape[2:]), 0
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple):
        grid = (size[0] // patch[0], size[1] // patch[1])
        prefix = x.shape[1] - grid[0] * grid[1]
        if prefix in (0, getattr(model, "num_prefix_tokens", 0)):
            return grid, prefix
    raise UserError(f"{type(model).__name__}: the grid of its {x.shape[1]} tokens is unknown")
