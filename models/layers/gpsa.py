"""Gated positional self-attention (ConViT, arXiv 2103.10697), and the blocks of ConViT."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from .attention import (
    AttentionParts,
    MultiHeadAttention,
    attention,
    attention_weights,
    split_heads,
)
from .cache import EvalCache
from .drop_path import DropPath, add_branch
from .fuse import pack_mlp
from .tracing import is_captured, one_node

Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _offsets(size: int, like: torch.Tensor) -> torch.Tensor:
    """Key position minus query position along one axis, ``size size``."""
    position = torch.arange(size, device=like.device, dtype=like.dtype)
    return position[None, :] - position[:, None]


def positional_tables(
    weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positional attention of a grid, as one factor for its rows and one for its columns.

    The score of a key at offset (dx, dy) is ``w . (dx, dy, dx^2 + dy^2) + b``: a sum of
    a term in dx and a term in dy. The exponential of a sum is a product, so that the softmax
    over the grid is the outer product of a softmax over rows and one over columns.

    Args:
        weight, bias: Of the projection of the three relative features, ``h 3`` and ``h``.
        height, width: Of the grid, H and W.

    Returns:
        ``h H H`` and ``h W W``, in float32 at least; every row sums to one. Query (i, j) gives
        key (u, v) the weight ``rows[h, i, u] * columns[h, j, v]``.
    """
    if weight.dtype == torch.float16 or weight.dtype == torch.bfloat16:
        weight, bias = weight.float(), bias.float()
    along_x, along_y, squared = weight[:, :, None, None].unbind(1)  # h 1 1
    dx, dy = _offsets(width, weight), _offsets(height, weight)
    # the bias cancels; DDP waits for the gradient of every parameter, so it takes part
    rows = along_y * dy + squared * dy**2 + bias[:, None, None]
    columns = along_x * dx + squared * dx**2
    return rows.softmax(dim=-1), columns.softmax(dim=-1)


def positional_attention(
    weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Explicit positional attention of a grid.

    The arguments are those of :func:`positional_tables`.

    Returns:
        ``h N N`` with N = H * W in row order, in float32 at least; every row sums to one.
    """
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight, bias = weight.float(), bias.float()
    shape = (height, width, height, width)
    dx = _offsets(width, weight)[None, :, None, :].expand(shape)
    dy = _offsets(height, weight)[:, None, :, None].expand(shape)
    features = torch.stack([dx, dy, dx**2 + dy**2], dim=-1)  # H W H W 3
    device = weight.device.type
    # only where autocast is on: exported graphs stay plain, the meta device does not support it
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        scores = F.linear(features, weight, bias)
    return scores.permute(4, 0, 1, 2, 3).flatten(3).flatten(1, 2).softmax(dim=-1)  # h (i j) (u v)


def _gate(parameter: torch.Tensor) -> torch.Tensor:
    wide = parameter if parameter.dtype == torch.float64 else parameter.float()
    return wide.sigmoid()[:, None, None]


def joint_tables(
    layers: Sequence["GPSA"], height: int, width: int, dtype: torch.dtype
) -> list[Tables]:
    """Positional tables of several layers, computed as those of one with all of their heads.

    Args:
        layers: Layers with equally many heads h each.
        height, width: Of the grid, H and W.
        dtype: Of the results.

    Returns:
        For each layer its tables of rows ``h H H`` and of columns ``h W W`` (see
        :func:`positional_tables`), and its gate ``h 1 1``.
    """
    weights, biases = zip(*(layer.position() for layer in layers), strict=True)
    weight, bias = torch.cat(weights), torch.cat(biases)
    gate = _gate(torch.cat([layer.gating_param for layer in layers]))
    parts = (*positional_tables(weight, bias, height, width), gate)
    chunks = [part.to(dtype).unflatten(0, (len(layers), -1)).unbind(0) for part in parts]
    return list(zip(*chunks, strict=True))


def mix(
    content: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    """``(1 - gate) content + gate (rows (x) columns) v``, the product applied factor by factor.

    Args:
        content: Output of content attention, ``B h N d``.
        v: Values on the grid, ``B h H W d``.
        rows, columns: See :func:`positional_tables`.
        gate: Share of position, ``h 1 1``.

    Returns:
        ``B h N d``.
    """
    positional = columns[:, None] @ v  # B h H W d
    positional = rows @ positional.flatten(3)  # B h H Wd
    return content.lerp(positional.unflatten(3, [-1, content.shape[-1]]).flatten(2, 3), gate)


def recomputed_mix(*inputs: torch.Tensor) -> torch.Tensor:
    """:func:`mix`: its inputs are saved anyway, and its other tensors are cheap to recompute."""
    return checkpoint(mix, *inputs, use_reentrant=False, preserve_rng_state=False)


def head_offsets(num_heads: int) -> torch.Tensor:
    """Initial offsets (Dx, Dy) of the heads' attention, ``h 2`` (section 3).

    A centred grid, as square as the number of heads allows, like the taps of a kernel.
    """
    columns = math.ceil(math.sqrt(num_heads))
    rows = math.ceil(num_heads / columns)
    n = torch.arange(num_heads)
    return torch.stack([n % columns - (columns - 1) / 2, n // columns - (rows - 1) / 2], dim=1)


class GPSA(MultiHeadAttention):
    """Gated positional self-attention on a grid of patches (section 3).

    Every head mixes content and position by a gate of its own, g = sigmoid(gating_param):
    ``A = (1 - g) softmax(q k^T) + g softmax(w . (dx, dy, dx^2 + dy^2))``. No ``N N`` matrix of
    either is formed, unless attention dropout needs it or ``fused_attn`` is off.

    Args:
        dim: Channels.
        num_heads: Heads.
        qkv_bias: Learn a bias for queries, keys and values.
        qk_scale_factor: Exponent of the pre-scale (see
            :class:`models.layers.attention.MultiHeadAttention`).
        locality_strength: Initial concentration of the heads on their offsets: Gaussians of
            variance ``1 / (2 locality_strength)``.
        attn_drop, proj_drop: Dropout probabilities of the attention weights and of the output.
    """

    projections = ("qk", "v", "proj")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        qk_scale_factor: float = -0.25,
        locality_strength: float = 1.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(num_heads, dim // num_heads, qk_scale_factor, attn_drop)
        self.locality_strength = locality_strength
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.empty(num_heads))
        self.proj_drop = nn.Dropout(proj_drop)
        self._kept = EvalCache()
        self.init_locality()

    @torch.no_grad()
    def init_locality(self) -> None:
        """Initialise as a convolution: each head attends to one offset, values pass unchanged.

        ``-s |r - D|^2`` is, but for a constant, ``2 s D . r - s |r|^2``.
        """
        nn.init.eye_(self.v.weight)
        nn.init.ones_(self.gating_param)
        nn.init.zeros_(self.pos_proj.bias)
        self.pos_proj.weight[:, :2] = 2 * self.locality_strength * head_offsets(self.num_heads)
        self.pos_proj.weight[:, 2] = -self.locality_strength

    def train(self, mode: bool = True) -> "GPSA":
        """Set the mode and empty the cache of evaluation."""
        self._kept.clear()
        return super().train(mode)

    def queries_and_keys(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries and keys of a grid ``B H W C``, each ``B h N d``."""
        return split_heads(self.qk(x).flatten(1, 2), 2, self.num_heads)

    def gate(self) -> torch.Tensor:
        """Share of position in every head, ``h 1 1``, in float32 at least."""
        return _gate(self.gating_param)

    def position(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the projection of relative features, ``h 3`` and ``h``.

        A quantised layer has a packed weight, or a wrapped one: both then follow from its outputs
        of unit vectors and zero.
        """
        layer = self.pos_proj
        if isinstance(layer, nn.Linear) and not hasattr(layer.weight, "__tensor_flatten__"):
            return layer.weight, layer.bias
        vectors = torch.eye(4, 3, device=self.gating_param.device, dtype=self.gating_param.dtype)
        outputs = layer(vectors)  # 4 h
        return (outputs[:3] - outputs[3]).T, outputs[3]

    def tables(self, height: int, width: int, dtype: torch.dtype) -> Tables:
        """Tables of rows and columns of a grid, and the gate; see :func:`joint_tables`."""
        if not torch.jit.is_scripting():
            return self._kept_tables(height, width, dtype)
        weight, bias = self.pos_proj.weight, self.pos_proj.bias
        rows, columns = positional_tables(weight, bias, height, width)
        return rows.to(dtype), columns.to(dtype), self.gate().to(dtype)

    def _kept_tables(self, *key) -> Tables:
        sources = (*self.position(), self.gating_param)
        return self._kept.get(self, sources, key, lambda: joint_tables([self], *key)[0])

    def forward(self, x: torch.Tensor, tables: Tables | None = None) -> torch.Tensor:
        """``B H W C -> B H W C``; ``tables`` are those of :func:`joint_tables`."""
        if not torch.jit.is_scripting():
            if isinstance(x, Proxy):
                return one_node(self, x)
            if self.dropout_p > 0.0 or not self.fused_attn:
                v = split_heads(self.v(x).flatten(1, 2), 1, self.num_heads)[0]
                return self.merge(F.dropout(self.attention_maps(x), self.dropout_p) @ v, x)
        return self.merge(self.separable(x, tables), x)

    def merge(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Projected outputs of the heads, ``B h N d``, on the grid of ``x``, ``B H W C``."""
        out = out.transpose(1, 2).flatten(2).unflatten(1, [x.shape[1], x.shape[2]])
        return self.proj_drop(self.proj(out))

    def separable(self, x: torch.Tensor, tables: Tables | None = None) -> torch.Tensor:
        """Outputs of the heads ``B h N d`` of a grid ``B H W C``, without a matrix ``N N``."""
        v = self.v(x)
        if tables is None:
            tables = self.tables(x.shape[1], x.shape[2], v.dtype)
        rows, columns, gate = tables
        v = v.unflatten(-1, [self.num_heads, -1]).permute(0, 3, 1, 2, 4)  # B h H W d
        q, k = self.queries_and_keys(x)
        content = attention(q, k, v.flatten(2, 3), None, self.scale)
        if torch.jit.is_scripting() or is_captured() or not torch.is_grad_enabled():
            return mix(content, v, rows, columns, gate)
        else:  # TorchScript leaves it out
            return recomputed_mix(content, v, rows, columns, gate)

    def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Attention weights of a grid ``B H W C`` as ``B h N N``, N = H * W in row order."""
        return self.attention_parts(x).full

    def attention_parts(self, x: torch.Tensor) -> AttentionParts:
        """:meth:`attention_maps` and the two terms that the gate mixes: ``B h N N`` each."""
        content = attention_weights(*self.queries_and_keys(x), self.scale)
        positional = positional_attention(*self.position(), *x.shape[1:3])
        positional = positional.to(content.dtype)
        full = content.lerp(positional, self.gate().to(content.dtype))
        return AttentionParts(full, content, positional.expand_as(full))


class Block(nn.Module):
    """Pre-norm residual block with either attention.

    Args:
        dim: Channels.
        attn: Attention, ``B H W C -> B H W C`` or ``B N C -> B N C``.
        mlp_ratio: Hidden channels of the feed-forward part, in multiples of ``dim``.
        proj_drop, drop_path: Dropout of the feed-forward part, and stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor, tables: Tables | None = None) -> torch.Tensor:
        """``B H W C -> B H W C``, with tables for GPSA or not, or ``B N C -> B N C``."""
        given = () if tables is None else (tables,)
        x = add_branch(x, self.attn(self.norm1(x), *given), self.drop_path1)
        return add_branch(x, self.mlp(self.norm2(x)), self.drop_path2)

    def fuse_(self) -> None:
        """Join projection and activation (see :class:`models.layers.fuse.Fusible`)."""
        pack_mlp(self.mlp)
