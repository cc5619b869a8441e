"""Attention within shifted windows of a map, with relative position bias (Swin Transformer)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import nn

from models.layers.attention import Attention2d, attention, attention_weights
from models.layers.cache import EvalCache

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


def aligned(bias: torch.Tensor) -> torch.Tensor:
    """``... N N`` in rows of a multiple of 8 numbers, as the kernels on GPUs want to read them."""
    count = bias.shape[-1]
    return F.pad(bias, (0, -count % 8))[..., :count]


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
        self.register_buffer("outside", None, persistent=False)  # see fuse_
        self._kept = EvalCache()

    def train(self, mode: bool = True) -> "WindowAttention2d":
        """Set the mode, and forget what was kept for evaluation."""
        self._kept.clear()
        return super().train(mode)

    def table(self) -> torch.Tensor:
        """Bias of every pair within a window, ``h N N``."""
        table, index = self.relative_position_bias_table, self.relative_position_index
        bias = table.T.index_select(1, index.flatten())  # h NN
        return bias.unflatten(1, index.shape)

    def bias(self, height: int, width: int, shift: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive term of the scores of a padded map: ``1 h N N``, shifted ``1 (W h) N N``."""

        def make() -> torch.Tensor:
            bias = self.table()[None]
            if shift:
                mask = shift_mask(height, width, self.window, shift, like=bias)
                bias = (bias + mask[:, None]).flatten(0, 1)[None]
            return aligned(bias.to(dtype))

        size = (height, width) if shift else None
        sources = (self.relative_position_bias_table,)
        return self._kept.get(self, sources, (size, shift, dtype), make)

    def geometry(self, height: int, width: int) -> tuple[int, int, int]:
        """Height and width of a map after padding, and the step of its shift."""
        covered = self.clamp_shift and min(height, width) <= self.window
        padded = (size + -size % self.window for size in (height, width))
        return *padded, 0 if covered else self.shift

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """Windows ``(B W) C w w`` of a map ``B C H W``, padded and shifted."""
        height, width, shift = self.geometry(*x.shape[-2:])
        x = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
        if shift:
            x = torch.roll(x, (-shift, -shift), dims=(2, 3))
        if height == width == self.window:
            return x
        # to the kernels a map in channels_last is tokens, which need no further copy
        x = rearrange(x, "b c (ny wy) (nx wx) -> (b ny nx) wy wx c", wy=self.window, wx=self.window)
        return x.permute(0, 3, 1, 2)

    def join(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Map ``B C H W`` of this size from its windows ``(B W) C w w``."""
        padded_height, padded_width, shift = self.geometry(height, width)
        if x.shape[-2:] != (padded_height, padded_width):
            x = rearrange(
                x.permute(0, 2, 3, 1),
                "(b ny nx) wy wx c -> b (ny wy) (nx wx) c",
                ny=padded_height // self.window,
                nx=padded_width // self.window,
            ).permute(0, 3, 1, 2)
        if shift:
            x = torch.roll(x, (shift, shift), dims=(2, 3))
        return x[:, :, :height, :width]

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of a map ``B C H W``: ``(B W) h N d``, shifted ``B (W h) N d``.

        Shifted windows differ in what they mask; beside the heads, they share one mask for all
        images.
        """
        height, width, shift = self.geometry(*x.shape[-2:])
        heads = super().heads(self.cut(x))
        if self.outside is not None and (height, width) != x.shape[-2:]:
            heads = self.blank(heads, *x.shape[-2:])
        if shift:
            count = height * width // self.window**2
            heads = [part.unflatten(0, (-1, count)).flatten(1, 2) for part in heads]
        return heads

    def merge(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Heads' outputs as :meth:`heads` arranges them, as windows ``(B W) hd w w``."""
        x = x.unflatten(1, (-1, self.num_heads)).transpose(2, 3)  # B W N h d
        tokens = x.flatten(3).flatten(0, 1)  # (B W) N hd
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        height, width, shift = self.geometry(*x.shape[-2:])
        q, k, v = self.heads(x)
        bias = self.bias(height, width, shift, q.dtype)
        dropout_p = self.attn_drop if self.training else 0.0
        out = attention(q, k, v, bias, self.scale, dropout_p, self.fused_attn)
        out = self.proj(self.merge(out, self.window, self.window))
        return self.proj_drop(self.join(out, *x.shape[-2:]))

    def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Attention weights within every window of a map ``B C H W``, as ``B W h N N``."""
        height, width, shift = self.geometry(*x.shape[-2:])
        q, k, _ = self.heads(x)
        weights = attention_weights(q, k, self.scale, self.bias(height, width, shift, q.dtype))
        return weights.reshape(len(x), -1, self.num_heads, *weights.shape[-2:])

    def blank(self, heads: tuple[torch.Tensor, ...], height: int, width: int) -> list[torch.Tensor]:
        """Put back what padding is projected to, where a folded norm made something else of it."""
        inside = torch.zeros(1, 1, height, width, dtype=torch.bool, device=heads[0].device)
        inside = self.cut(~inside).flatten(2)[..., None]  # W 1 N 1
        outside = self.outside.unflatten(0, (3, self.num_heads, -1))[:, None, :, None]  # 3 1 h 1 d
        heads = [part.unflatten(0, (-1, len(inside))) for part in heads]  # B W h N d
        filled = [
            torch.where(inside, part, value) for part, value in zip(heads, outside, strict=True)
        ]
        return [part.flatten(0, 1) for part in filled]

    def fold_norm_(self, norm: nn.BatchNorm2d) -> None:
        """Let the projection do what BatchNorm before it does as well; padding comes after it."""
        bias = self.qkv.bias
        self.outside = (
            self.qkv.weight.new_zeros(len(self.qkv.weight)) if bias is None else bias.detach()
        )
        super().fold_norm_(norm)

    def fuse_(self) -> None:
        """Fold the pre-scale into the projection, and into what padding is projected to."""
        if self.outside is not None:
            queries_keys, values = self.outside.tensor_split([len(self.outside) // 3 * 2])
            self.outside = torch.cat([queries_keys * self.scale, values])
        super().fuse_()
