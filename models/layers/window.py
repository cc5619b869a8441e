"""Attention within shifted windows of a feature map, with relative position bias (Swin)."""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import nn
from torch.autograd.function import once_differentiable
from torch.fx import Proxy

from .attention import (
    Attention2d,
    AttentionParts,
    BiasedAttention,
    attention,
    attention_weights,
    split_heads,
)
from .cache import EvalCache, may_keep
from .tracing import one_node


def relative_position_index(window: int) -> torch.Tensor:
    """Index into the bias table for every pair of positions within a window.

    Swin Transformer, arXiv 2103.14030, section 3.2: rows run over the offsets
    (dy + window - 1) * (2 * window - 1) + dx + window - 1, query minus key.

    Returns:
        ``N N`` of int64, N = window ** 2 in row order.
    """
    steps = torch.arange(window)
    offset = steps[:, None] - steps[None, :] + window - 1  # query, key
    rows = offset[:, None, :, None] * (2 * window - 1)  # qy, qx, ky, kx
    return (rows + offset[None, :, None, :]).reshape(window**2, window**2)


def _in_windows(x: torch.Tensor, window: int) -> torch.Tensor:
    """Positions ``H W`` as ``ny nx wy wx``, of windows ``ny nx``."""
    return x.unflatten(1, [-1, window]).unflatten(0, [-1, window]).transpose(1, 2)


def _regions(size: int, window: int, shift: int, device: torch.device) -> torch.Tensor:
    """Region of every position along a side: 0, or 1 and 2 in the last window of a shifted map."""
    position = torch.arange(size, device=device)
    return (position >= size - window).long() + (position >= size - shift).long()


def shift_mask(
    height: int, width: int, window: int, shift: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Mask between regions that a cyclic shift brings together in one window.

    Args:
        height, width: Size of the map, multiples of ``window``.
        window, shift: Side of a window and step of the shift, in positions.
        dtype, device: Those of the result.

    Returns:
        ``W N N`` for W windows in row order, 0 within a region and -100 between regions.
    """
    rows = _regions(height, window, shift, device)
    columns = _regions(width, window, shift, device)
    region = rows[:, None] * 3 + columns[None, :]
    region = _in_windows(region, window).flatten(2).flatten(0, 1)
    across = region[:, :, None] != region[:, None, :]
    return across.to(dtype) * -100.0  # as in Swin


class Windows(NamedTuple):
    """Index maps between the T positions of a feature map and the P = W N of its windows.

    Attributes:
        source: ``P``, the position in the map of every position of the windows, 0 for padding.
        target: ``T``, the position in the windows of every position of the map.
        padding: Positions of the windows that are padding.
    """

    source: torch.Tensor
    target: torch.Tensor
    padding: torch.Tensor


def _windows(height: int, width: int, window: int, shift: int, device: torch.device) -> Windows:
    count = height * width
    position = torch.arange(count, device=device).view(1, 1, height, width)
    position = F.pad(position, [0, -width % window, 0, -height % window], value=-1.0)
    position = torch.roll(position, [-shift, -shift], dims=[2, 3])
    position = _in_windows(position[0, 0], window).flatten()
    # sorted, padding (-1) comes first, then the positions of the map in row order
    padding, target = position.argsort().split([len(position) - count, count])
    return Windows(position.clamp(min=0), target, padding)


@lru_cache(maxsize=64)
def _kept_windows(*geometry) -> Windows:
    with torch.inference_mode(False):  # cached for backward passes too
        return _windows(*geometry)


@lru_cache(maxsize=8)
def _kept_shift_mask(*geometry) -> torch.Tensor:
    with torch.inference_mode(False):
        return shift_mask(*geometry)


class Arrange(torch.autograd.Function):
    """Permute rows, with ``fill`` in rows that have no source.

    Both directions of the permutation are given, so that the gradient is a selection, too,
    instead of a scatter.
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        fill: torch.Tensor | None,
        index: torch.Tensor,
        holes: torch.Tensor | None,
        back_index: torch.Tensor,
        back_holes: torch.Tensor | None,
    ) -> torch.Tensor:
        """``B R C -> B S C``.

        Args:
            x: Rows.
            fill: ``C``, or ``None`` for zeros.
            index: ``S``, the row of ``x`` for every row of the result.
            holes: Rows of the result that get ``fill``.
            back_index, back_holes: The same for the inverse; holes have no gradient.
        """
        ctx.save_for_backward(holes, back_index, back_holes)
        out = x.index_select(1, index)
        if holes is not None and len(holes):
            out.index_fill_(1, holes, 0.0)
            if fill is not None:
                out[:, holes] = fill.to(out.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of ``x`` and ``fill``."""
        holes, back_index, back_holes = ctx.saved_tensors
        grad_x = grad.index_select(1, back_index)
        if back_holes is not None and len(back_holes):
            grad_x.index_fill_(1, back_holes, 0.0)
        grad_fill = None
        if ctx.needs_input_grad[1]:
            grad_fill = grad.index_select(1, holes).sum((0, 1))
        return grad_x, grad_fill, None, None, None, None


def aligned(bias: torch.Tensor) -> torch.Tensor:
    """Return ``... N N`` with rows padded in memory to a multiple of 8, for kernels on GPUs."""
    count = bias.shape[-1]
    return F.pad(bias, (0, -count % 8))[..., :count]


class LearnedBias(torch.autograd.Function):
    """Relative position bias of a batch, for fused attention that computes its gradient.

    The gradient is added up over images and windows in float32 at least: half precision would
    round it, or overflow.
    """

    @staticmethod
    def forward(
        ctx,
        table: torch.Tensor,
        index: torch.Tensor,
        mask: torch.Tensor | None,
        count: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Table ``T h`` to bias ``count (W h) N N``, rows padded in memory as by :func:`aligned`.

        Args:
            table: Bias of every offset.
            index: Offset of every pair of positions, ``N N``.
            mask: Additive term, ``W 1 N N``, None for none.
            count: Equal parts of the batch, for which the bias is the same.
            dtype: Of the result.
        """
        ctx.save_for_backward(index)
        ctx.rows, ctx.windows = table.shape[0], 1 if mask is None else len(mask)
        ctx.dtype = torch.promote_types(table.dtype, torch.float32)
        padded = F.pad(index, (0, -index.shape[1] % 8))
        bias = table.to(dtype).T.index_select(1, padded.flatten())  # h NM
        bias = bias.unflatten(1, padded.shape)[None, ..., : index.shape[1]]
        if mask is not None:
            bias = aligned(bias + mask.to(dtype))
        return bias.flatten(0, 1).expand(count, -1, -1, -1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of the table."""
        (index,) = ctx.saved_tensors
        summed = grad.sum(0, dtype=ctx.dtype)
        if ctx.windows > 1:
            summed = summed.unflatten(0, (ctx.windows, -1)).sum(0)
        empty = summed.new_zeros(len(summed), ctx.rows)
        grad_table = empty.index_add(1, index.flatten(), summed.flatten(1))
        return grad_table.T, None, None, None, None


class WindowAttention2d(Attention2d):
    """Multi-head self-attention within windows of a feature map.

    The map is padded with zeros at the right and bottom to a multiple of the window (padding is
    not masked), shifted cyclically and cut into windows; after attention, all is undone.

    Args:
        dim, num_heads, head_dim, qk_scale_factor, qkv_bias, attn_drop, proj_drop: See
            :class:`Attention2d`.
        window: Side of a window.
        shift: Step of the cyclic shift; 0 for none.
        clamp_shift: Do not shift if one window covers the shorter side of the map, as in
            classifiers; detection backbones always shift.
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
        """Set the mode and empty the cache of evaluation."""
        self._kept.clear()
        return super().train(mode)

    def table(self) -> torch.Tensor:
        """Bias of every pair of positions within a window, ``h N N``."""
        table, index = self.relative_position_bias_table, self.relative_position_index
        bias = table.T.index_select(1, index.flatten())  # h NN
        return bias.unflatten(1, index.shape)

    def geometry(self, height: int, width: int) -> tuple[int, int, int]:
        """Return height and width of a map after padding, and the step of its shift."""
        covered = self.clamp_shift and min(height, width) <= self.window
        height, width = height + -height % self.window, width + -width % self.window
        return height, width, 0 if covered else self.shift

    def mask(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor | None:
        """Mask of a shifted map of this size, ``W 1 N N``; None without a shift."""
        height, width, shift = self.geometry(height, width)
        if not shift:
            return None
        make = _kept_shift_mask if may_keep(like) else shift_mask
        return make(height, width, self.window, shift, like.dtype, like.device)[:, None]

    def bias(self, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive term of the scores of a map of this size: ``1 h N N``, shifted ``W h N N``."""

        def make() -> torch.Tensor:
            bias = self.table()[None]
            mask = self.mask(height, width, bias)
            return aligned((bias if mask is None else bias + mask).to(dtype))

        size = (height, width) if self.geometry(height, width)[-1] else None
        return self._kept.get(self, (self.relative_position_bias_table,), (size, dtype), make)

    def windows(self, height: int, width: int, like: torch.Tensor) -> Windows | None:
        """Index maps of a feature map of this size; None if one window is the whole map."""
        shift = self.geometry(height, width)[-1]
        if not shift and height == width == self.window:
            return None
        make = _kept_windows if may_keep(like) else _windows
        return make(height, width, self.window, shift, like.device)

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values of a map ``B C H W``, each ``B W h N d``.

        Padding is projected to the bias of the unfused projection.
        """
        tokens = self.qkv(x).flatten(2).transpose(1, 2)  # B HW 3hd
        windows = self.windows(*x.shape[-2:], tokens)
        if windows is None:
            heads = split_heads(tokens.contiguous(), 3, self.num_heads)
            return [part[:, None] for part in heads]
        fill = self.qkv.bias if self.outside is None else self.outside
        source, target, padding = windows
        tokens = Arrange.apply(tokens, fill, source, padding, target, None)  # B WN 3hd
        tokens = tokens.unflatten(1, (-1, self.window**2)).flatten(0, 1)  # (B W) N 3hd
        heads = split_heads(tokens, 3, self.num_heads)
        return [part.unflatten(0, (x.shape[0], -1)) for part in heads]

    def merge(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Outputs of the heads ``B W h N d`` as a map ``B hd H W``, in channels_last."""
        tokens = x.transpose(2, 3).flatten(3).flatten(1, 2)  # B WN hd
        windows = self.windows(height, width, tokens)
        if windows is not None:
            source, target, padding = windows
            tokens = Arrange.apply(tokens, None, target, None, source, padding)  # B HW hd
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        if not torch.jit.is_scripting():
            if isinstance(x, Proxy):
                return one_node(self, x)
            if not torch.jit.is_tracing():
                return self.proj_drop(self.proj(self.merge(self.attend(x), *x.shape[-2:])))
        return self.proj_drop(self.proj(self.traced(x)))

    def traced(self, x: torch.Tensor) -> torch.Tensor:
        """Merged outputs of the heads, ``B hd H W``, by operations that TorchScript and ONNX know.

        For any batch, and while tracing for one size.
        """
        height, width = int(x.shape[-2]), int(x.shape[-1])
        high, wide, shift = self.geometry(height, width)
        tokens = self.qkv(x).flatten(2).transpose(1, 2)  # B HW 3hd
        source, target, padding = _windows(height, width, self.window, shift, x.device)
        bias = self.table()[None]
        if shift > 0:
            mask = shift_mask(high, wide, self.window, shift, bias.dtype, bias.device)
            bias = bias + mask[:, None]  # W h N N
        fill = self.qkv.bias if self.outside is None else self.outside
        if len(padding) > 0:
            empty = torch.zeros_like(tokens[:, :1])
            tokens = torch.cat([tokens, empty if fill is None else empty + fill], dim=1)
            source = source.index_fill(0, padding, height * width)
        tokens = tokens.index_select(1, source)  # B WN 3hd
        area = self.window * self.window
        tokens = tokens.view(-1, high * wide // area, area, 3, self.num_heads, self.head_dim)
        q, k, v = tokens.permute(3, 0, 1, 4, 2, 5).unbind(0)  # B W h N d
        weights = attention_weights(q, k, self.scale, bias.to(q.dtype))
        out = F.dropout(weights, self.attn_drop, self.training) @ v
        out = out.transpose(2, 3).flatten(3).flatten(1, 2).index_select(1, target)  # B HW hd
        return out.transpose(1, 2).view(-1, self.num_heads * self.head_dim, height, width)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs of the heads within the windows of a map ``B C H W``, ``B W h N d``."""
        q, k, v = self.heads(x)
        height, width = x.shape[-2:]
        dropout_p = self.dropout_p
        learns = torch.is_grad_enabled() and self.relative_position_bias_table.requires_grad
        if learns and self.fused_attn and not dropout_p and q.device.type == "cpu":
            mask = self.mask(height, width, q)
            return BiasedAttention.apply(q, k, v, self.table(), mask, self.scale)
        options = (self.scale, dropout_p, self.fused_attn)
        if learns:
            mask = self.mask(height, width, q)
            # windows with masks, the same for all images, are joined with heads, others with images
            joined, size = (0, (q.shape[0], -1)) if mask is None else (1, (-1, self.num_heads))
            q, k, v = (part.flatten(joined, joined + 1) for part in (q, k, v))
            table, index = self.relative_position_bias_table, self.relative_position_index
            bias = LearnedBias.apply(table, index, mask, q.shape[0], q.dtype)
            return attention(q, k, v, bias, *options).unflatten(joined, size)
        bias = self.bias(height, width, q.dtype)
        images = q.shape[0]  # not len(), which would fix it in an exported graph
        single = not torch.compiler.is_exporting() and images == 1
        if len(bias) == 1 or single:
            out = attention(*(part.flatten(0, 1) for part in (q, k, v)), bias, *options)
            return out.unflatten(0, (images, -1))
        out = attention(
            *(part.flatten(1, 2) for part in (q, k, v)), bias.flatten(0, 1)[None], *options
        )
        return out.unflatten(1, (-1, self.num_heads))

    def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Attention weights within every window of a map ``B C H W``, as ``B W h N N``."""
        q, k, _ = self.heads(x)
        return attention_weights(q, k, self.scale, self.bias(*x.shape[-2:], q.dtype))

    def attention_parts(self, x: torch.Tensor) -> AttentionParts:
        """:meth:`attention_maps`, and those of content and of bias alone: ``B W h N N`` each.

        All three are masked where the map is shifted.
        """
        q, k, _ = self.heads(x)
        size = x.shape[-2:]
        bias = self.bias(*size, q.dtype)
        full = attention_weights(q, k, self.scale, bias)
        content = attention_weights(q, k, self.scale, self.mask(*size, q))
        return AttentionParts(full, content, bias.softmax(dim=-1).expand_as(full))

    def weights_of_query(
        self, weights: torch.Tensor, query: int, height: int, width: int
    ) -> torch.Tensor:
        """Attention weights of one position, as a map.

        Args:
            weights: Attention weights of all windows, ``B W h N N``.
            query: Position in the map, in row order.
            height, width: Size of the map.

        Returns:
            ``B h H W``, 0 outside of the position's window; weights of padding are left out.
        """
        windows = self.windows(height, width, weights)
        if windows is None:
            return weights[:, 0, :, query].unflatten(-1, (height, width))
        window, place = divmod(windows.target[query].item(), self.window**2)
        spread = torch.zeros_like(weights[..., 0, :])  # B W h N
        spread[:, window] = weights[:, window, :, place]
        tokens = spread.transpose(1, 2).flatten(2)  # B h WN
        return tokens.index_select(-1, windows.target).unflatten(-1, (height, width))

    def fold_norm_(self, norm: nn.BatchNorm2d) -> None:
        """Fold the BatchNorm before this layer; padding comes after it and stays zero."""
        bias = self.qkv.bias
        self.outside = (
            self.qkv.weight.new_zeros(len(self.qkv.weight)) if bias is None else bias.detach()
        )
        super().fold_norm_(norm)

    def fuse_(self) -> None:
        """Fold the pre-scale into the projection, and into the projection of padding."""
        if self.outside is not None:
            queries_keys, values = self.outside.tensor_split([len(self.outside) // 3 * 2])
            self.outside = torch.cat([queries_keys * self.scale, values])
        super().fuse_()
