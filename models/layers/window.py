"""Attention within shifted windows of a map, with relative position bias (Swin Transformer)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import nn

from models.layers.attention import Attention2d, attention, attention_weights

MASKED = -100.0  # added to the score of a pair of different regions, as Swin has it


def relative_position_index(window: int) -> torch.Tensor:
    """Row of the bias table for every pair of positions within a window.

    Swin Transformer, arXiv 2103.14030, section 3.2: rows run over the offsets
    (dy + window - 1) * (2 * window - 1) + dx + window - 1, query minus key.

    Returns:
        ``N N`` of int64, N = window ** 2 in row order.
    """
    steps = torch.arange(window)
    offset = steps[:, None] - steps[None, :] + window - 1  # query, key
    rows = offset[:, None, :, None] * (2 * window - 1)  # qy, qx, ky, kx
    return (rows + offset[None, :, None, :]).reshape(window**2, window**2)


def shift_mask(
    height: int, width: int, window: int, shift: int, like: torch.Tensor
) -> torch.Tensor:
    """What keeps apart the regions that a cyclic shift brings together in one window.

    Args:
        height, width: Size of the map, multiples of ``window``.
        window, shift: Side of a window and step of the shift, in positions.
        like: Gives dtype and device.

    Returns:
        ``W N N``, 0 within a region and -100 across, for W windows in row order.
    """

    def regions(size: int) -> torch.Tensor:
        position = torch.arange(size, device=like.device)
        return (position >= size - window).long() + (position >= size - shift).long()

    region = regions(height)[:, None] * 3 + regions(width)[None, :]
    region = rearrange(region, "(ny wy) (nx wx) -> (ny nx) (wy wx)", wy=window, wx=window)
    across = region[:, :, None] != region[:, None, :]
    return across.to(like.dtype) * MASKED


class WindowAttention2d(Attention2d):
    """Multi-head self-attention within windows of a map.

    The map is padded with zeros at the right and bottom to a multiple of the window (padding
    is not masked), shifted cyclically, cut into windows, attended, and put together again.

    Args:
        dim, num_heads, head_dim, qk_scale_factor, qkv_bias, attn_drop, proj_drop: See
            :class:`Attention2d`.
        window: Side of a window.
        shift: Step of the cyclic shift; 0 for none.
        clamp_shift: Do not shift where one window covers the map's shorter side, as
            classifiers do; detection backbones shift regardless.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        shift: int = 0,
        clamp_shift: bool = True,
        **options,
    ):
        super().__init__(dim, num_heads, **options)
        self.window, self.shift, self.clamp_shift = window, shift, clamp_shift
        self.relative_position_bias_table = nn.Parameter(
            trunc_normal_(torch.empty((2 * window - 1) ** 2, num_heads), std=0.02)
        )
        index = relative_position_index(window)
        self.register_buffer("relative_position_index", index, persistent=False)

    def bias(self, height: int, width: int, shift: int) -> torch.Tensor:
        """Additive term of the scores for a padded map, ``1 (W h) N N`` for W windows."""
        table = self.relative_position_bias_table
        bias = table[self.relative_position_index].permute(2, 0, 1)[None]  # 1 h N N
        count = (height // self.window) * (width // self.window)
        bias = bias.expand(count, -1, -1, -1)
        if shift:
            bias = bias + shift_mask(height, width, self.window, shift, like=table)[:, None]
        return bias.reshape(1, -1, *bias.shape[-2:])

    def windows(self, x: torch.Tensor, shift: int) -> tuple[torch.Tensor, ...]:
        """Scaled queries, scaled keys and values of a padded map, each ``B (W h) N d``."""
        if shift:
            x = torch.roll(x, (-shift, -shift), dims=(2, 3))
        q, k, v = rearrange(
            self.qkv(x),
            "b (three h d) (ny wy) (nx wx) -> three b (ny nx h) (wy wx) d",
            three=3,
            h=self.num_heads,
            wy=self.window,
            wx=self.window,
        )
        return q * self.scale, k * self.scale, v

    def pad(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The map padded to a multiple of the window, and the step of its shift."""
        height, width = x.shape[-2:]
        covered = self.clamp_shift and min(height, width) <= self.window
        x = F.pad(x, (0, -width % self.window, 0, -height % self.window))
        return x, 0 if covered else self.shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        height, width = x.shape[-2:]
        x, shift = self.pad(x)
        padded = x.shape[-2:]
        q, k, v = self.windows(x, shift)
        dropout_p = self.attn_drop if self.training else 0.0
        bias = self.bias(*padded, shift).to(q.dtype)
        x = attention(q, k, v, bias, dropout_p=dropout_p, fused=self.fused_attn)
        x = rearrange(
            x,
            "b (ny nx h) (wy wx) d -> b (h d) (ny wy) (nx wx)",
            h=self.num_heads,
            ny=padded[0] // self.window,
            wy=self.window,
        )
        x = self.proj_drop(self.proj(x))
        if shift:
            x = torch.roll(x, (shift, shift), dims=(2, 3))
        return x[:, :, :height, :width]

    def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Attention weights within every window of a map ``B C H W``, as ``B W h N N``."""
        x, shift = self.pad(x)
        q, k, _ = self.windows(x, shift)
        weights = attention_weights(q, k, self.bias(*x.shape[-2:], shift))
        return rearrange(weights, "b (w h) n m -> b w h n m", h=self.num_heads)
