"""Attention as one function on tokens, and the layers that apply it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import nn
from torch.autograd.function import once_differentiable

from .fuse import fold_before, pack, scale_outputs


class AttentionParts(NamedTuple):
    """Attention weights of a layer, and those of content and of position alone.

    Every row of each sums to one.

    Attributes:
        full: Weights that the layer applies to the values, ``... h N M``.
        content: Softmax of queries times keys.
        position: Softmax of the scores that depend on positions alone.
    """

    full: torch.Tensor
    content: torch.Tensor
    position: torch.Tensor


def attention_weights(
    q: torch.Tensor, k: torch.Tensor, scale: float = 1.0, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention maps ``softmax((s q) (s k)^T + bias)``, for inspection and the explicit path.

    Args:
        q: Queries, ``B h N d``.
        k: Keys, ``B h M d``.
        scale: Factor s of queries *and* of keys.
        bias: Additive term that broadcasts to ``B h N M``.

    Returns:
        ``B h N M``; every row sums to one.
    """
    scores = (q * scale) @ (k * scale).transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    fused: bool = True,
) -> torch.Tensor:
    """Scaled dot-product attention, queries and keys scaled before their product.

    That keeps float16 from overflowing (Visformer, arXiv 2104.12533, and its V2 recipes). Fused
    kernels get the scale as an argument: they add up scores in float32, and PyTorch's fallback
    scales both factors as well.

    Args:
        q, k: Queries ``B h N d`` and keys ``B h M d``.
        v: Values, ``B h M d``.
        bias: Additive term that broadcasts to ``B h N M``.
        scale: Factor of queries and of keys, each.
        dropout_p: Dropout probability of the attention weights (0 in evaluation).
        fused: Use PyTorch's fused kernels; otherwise write the product out.

    Returns:
        ``B h N d``.
    """
    learns_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if learns_bias and q.device.type == "cpu":
        fused = False  # no fused kernel on the CPU computes the gradient of the bias
    if fused:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale * scale
        )
    weights = attention_weights(q, k, scale, bias)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return weights @ v


class BiasedAttention(torch.autograd.Function):
    """Attention with a learned bias, for devices without a fused kernel for its gradient.

    The backward pass recomputes the attention weights, so that neither they nor the output are
    saved: with P the weights and dO the output's gradient, dV = P^T dO, dP = dO V^T,
    dS = P (dP - rowsum(P dP)), dQ = s^2 dS K, dK = s^2 dS^T Q, and the gradient of the bias is dS
    summed over its broadcast dimensions (FlashAttention, arXiv 2205.14135, appendix B.2).
    """

    @staticmethod
    def weights(
        q: torch.Tensor,
        k: torch.Tensor,
        bias: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """:func:`attention_weights`, in one buffer."""
        scores = (q * scale) @ (k * scale).transpose(-2, -1)
        scores.add_(bias.to(scores.dtype))
        if mask is not None:
            scores.add_(mask)
        return torch.softmax(scores, dim=-1, out=scores)

    @staticmethod
    def forward(
        ctx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Queries ``... N d``, keys and values ``... M d`` to ``... N d``.

        Args:
            q, k, v: Queries, keys, values.
            bias: Additive term ``h N M``; its gradient is added up in its own dtype.
            mask: Additive term without a gradient that broadcasts to ``... N M``, or None.
            scale: Factor of queries and of keys, each.
        """
        ctx.save_for_backward(q, k, v, bias, mask)
        ctx.scale = scale
        return BiasedAttention.weights(q, k, bias, mask, scale) @ v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of queries, keys, values and bias."""
        q, k, v, bias, mask = ctx.saved_tensors
        squared = ctx.scale * ctx.scale
        weights = BiasedAttention.weights(q, k, bias, mask, ctx.scale)
        grad_v = weights.transpose(-2, -1) @ grad
        grad_weights = grad @ v.transpose(-2, -1)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, q.dtype)
        del grad_weights, weights
        grad_q = (grad_scores @ k).mul_(squared)
        grad_k = (grad_scores.transpose(-2, -1) @ q).mul_(squared)
        grad_bias = grad_scores.flatten(0, -4).sum(0, dtype=bias.dtype)
        return grad_q, grad_k, grad_v, grad_bias, None, None


def split_heads(tokens: torch.Tensor, parts: int, num_heads: int) -> list[torch.Tensor]:
    """Split projected tokens ``B N (parts h d)`` into views ``B h N d``, without a copy.

    In the order in which their gradients are stacked in the memory format of the tokens.
    """
    split = tokens.unflatten(-1, [parts, num_heads, -1]).unbind(2)
    return [split[i].transpose(1, 2) for i in range(parts)]  # by index, for symbolic tracing


def fold_scale(layer: nn.Module, scale: float, count: int) -> None:
    """Multiply the first ``count`` outputs of a projection, its queries and keys, by ``scale``."""
    factor = layer.weight.new_ones(len(layer.weight), dtype=torch.float64)
    factor[:count] = scale
    scale_outputs(layer, factor)


class MultiHeadAttention(nn.Module):
    """Base of attention layers: heads, the query/key pre-scale, dropout of weights.

    Queries and keys are each multiplied by ``head_dim ** qk_scale_factor`` before their
    product, so that the softmax sees ``head_dim ** (2 * qk_scale_factor)`` overall: the
    default -0.25 gives the usual ``head_dim ** -0.5``.

    Args:
        num_heads: Heads.
        head_dim: Channels per head.
        qk_scale_factor: Exponent of the pre-scale.
        attn_drop: Dropout probability of the attention weights.
    """

    projections = ("qkv", "proj")  # queries and keys are the first outputs of the first
    prescaled = True  # queries and keys carry ``scale = head_dim ** exponent``, each

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        qk_scale_factor: float = -0.25,
        attn_drop: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = head_dim**qk_scale_factor
        self.attn_drop = attn_drop
        self.fused_attn = use_fused_attn()

    @property
    def dropout_p(self) -> float:
        """Dropout probability of the attention weights in the present mode."""
        return self.attn_drop if self.training else 0.0

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values, each ``B h N d``."""
        raise NotImplementedError

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs of the heads, ``B h N d``."""
        return attention(*self.heads(x), None, self.scale, self.dropout_p, self.fused_attn)

    def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Attention weights of the input of the layer, ``B h N N``, positions in row order."""
        q, k, _ = self.heads(x)
        return attention_weights(q, k, self.scale)

    def fuse_(self) -> None:
        """Fold the pre-scale into the projection (see :class:`models.layers.fuse.Fusible`)."""
        first = getattr(self, self.projections[0])
        fold_scale(first, self.scale, 2 * self.num_heads * self.head_dim)
        self.scale, self.prescaled = 1.0, False
        for name in self.projections:
            setattr(self, name, pack(getattr(self, name)))


class SelfAttention(MultiHeadAttention):
    """Multi-head self-attention on tokens, the class token included.

    Args:
        dim: Channels of the input and the output.
        num_heads: Heads.
        qkv_bias: Learn a bias for queries, keys and values.
        qk_scale_factor: Exponent of the pre-scale (see :class:`MultiHeadAttention`).
        attn_drop, proj_drop: Dropout probabilities of the attention weights and of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        qk_scale_factor: float = -0.25,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(num_heads, dim // num_heads, qk_scale_factor, attn_drop)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values of tokens ``B N C``, each ``B h N d``."""
        return split_heads(self.qkv(x), 3, self.num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B N C -> B N C``."""
        return self.proj_drop(self.proj(self.attend(x).transpose(1, 2).flatten(2)))


class Attention2d(MultiHeadAttention):
    """Global multi-head self-attention over a feature map, projections by 1x1 convolutions.

    Args:
        dim: Channels of the input and the output.
        num_heads: Heads.
        head_dim: Channels per head; ``dim // num_heads`` if not given.
        qk_scale_factor: Exponent of the pre-scale (see :class:`MultiHeadAttention`).
        qkv_bias: Learn a bias for queries, keys and values.
        attn_drop, proj_drop: Dropout probabilities of the attention weights and of the output.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim`` and ``head_dim`` is not given.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        qk_scale_factor: float = -0.25,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
            head_dim = dim // num_heads
        super().__init__(num_heads, head_dim, qk_scale_factor, attn_drop)
        self.qkv = nn.Conv2d(dim, 3 * num_heads * head_dim, 1, bias=qkv_bias)
        self.proj = nn.Conv2d(num_heads * head_dim, dim, 1, bias=False)
        self.proj_drop = nn.Dropout(proj_drop)

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values of a map ``B C H W``, each ``B h N d``.

        In channels_last, a map is already laid out as tokens; otherwise it is copied once.
        """
        tokens = self.qkv(x).flatten(2).transpose(1, 2).contiguous()  # B N 3hd
        return split_heads(tokens, 3, self.num_heads)

    def merge(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Outputs of the heads ``B h N d`` as a map ``B hd H W``, in channels_last."""
        tokens = x.transpose(1, 2).flatten(2)  # B N hd
        channels = self.num_heads * self.head_dim
        return tokens.transpose(1, 2).view(-1, channels, height, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        height, width = x.shape[-2:]
        return self.proj_drop(self.proj(self.merge(self.attend(x), height, width)))

    def fold_norm_(self, norm: nn.BatchNorm2d) -> None:
        """Fold the BatchNorm before this layer into its first projection."""
        fold_before(norm, self.qkv)


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Switch all attention layers of ``model`` between fused kernels and the explicit product.

    Both compute the same function; the explicit product is for export and inspection.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def set_qk_scale_factor(model: nn.Module, exponent: float) -> None:
    """Set the exponent of the query/key pre-scale in all attention layers of ``model``.

    Weights are trained for one exponent; another changes the function of the model.
    """
    for module in model.modules():
        if getattr(module, "prescaled", False):
            module.scale = module.head_dim**exponent
    model.qk_scale_factor = exponent


def set_gelu(model: nn.Module, approximate: str) -> None:
    """Set all GELUs of ``model`` to the exact form, ``"none"``, or to the ``"tanh"`` one."""
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = approximate
