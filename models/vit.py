"""Vision Transformer (arXiv 2010.11929): timm's, with a query/key pre-scale and any image size.

Only the scale of attention differs from timm's ``VisionTransformer``: its weights, tags and tools
fit. Entrypoints have the names of MindCV and of timm.
"""

import math
from dataclasses import replace

import torch
import torch.fx
from timm.layers import Attention as TimmAttention
from timm.models import DefaultCfg
from timm.models import vision_transformer as timm_vit
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import nn

from .factory import build_registered, register_model
from .layers import attention, resample_tokens
from .layers.attention import fold_scale, split_heads
from .layers.fuse import Fusible, pack, pack_mlp
from .layers.tracing import Scriptable

__all__ = ["Attention", "ViT"]

torch.fx.wrap("resample_tokens")


@torch.fx.wrap
def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    fused: bool,
) -> torch.Tensor:
    """:func:`models.layers.attention` with timm's masks (see :meth:`Attention.forward`)."""
    if is_causal:
        raise ValueError("causal attention is not supported: pass it as attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    return attention(q, k, v, mask, scale, dropout_p, fused)


class Attention(TimmAttention):
    """timm's attention on tokens, with queries and keys scaled before their product.

    Both are multiplied by ``head_dim ** qk_scale_factor``: the default -0.25 gives the usual
    ``head_dim ** -0.5`` overall (see :class:`models.layers.Attention2d`).

    Args:
        dim, num_heads: Channels of input and output, and heads.
        qk_scale_factor: Exponent of the pre-scale.
        options: Other keyword arguments of ``timm.layers.Attention``, without ``gated``.

    Raises:
        TypeError: An argument is unknown, or ``gated``.
    """

    prescaled = True

    def __init__(self, dim: int, num_heads: int = 8, qk_scale_factor: float = -0.25, **options):
        if "gated" in options:
            raise TypeError("gated attention is not supported")
        super().__init__(dim, num_heads=num_heads, **options)
        self.scale = self.head_dim**qk_scale_factor

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """``B N C -> B N C``.

        Args:
            x: Tokens.
            attn_mask: Broadcasts to ``B h N N``; boolean, True for pairs that take part, or an
                additive term of the scores.
            is_causal: Not supported.

        Raises:
            ValueError: ``is_causal`` is set.
        """
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout_p = self.attn_drop.p if self.training else 0.0
        options = (self.scale, dropout_p, self.fused_attn)
        x = masked_attention(q, k, v, attn_mask, is_causal, *options)
        x = self.norm(x.transpose(1, 2).flatten(2))  # B N C
        return self.proj_drop(self.proj(x))

    def fuse_(self) -> None:
        """Fold the pre-scale into the projection (see :class:`models.layers.fuse.Fusible`)."""
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            fold_scale(self.qkv, self.scale, 2 * self.num_heads * self.head_dim)
            self.scale, self.prescaled = 1.0, False
        self.qkv, self.proj = pack(self.qkv), pack(self.proj)


class ViT(VisionTransformer, Fusible, Scriptable):
    """timm's Vision Transformer with :class:`Attention`.

    Args:
        args, kwargs: Arguments of ``timm.models.VisionTransformer`` except ``block_fn`` and
            ``attn_layer``.
        qk_scale_factor: Exponent of the query/key pre-scale.
        dynamic_img_size: Accept images of any multiple of the patch size, resampling position
            embeddings in every forward; otherwise only images of ``img_size``.

    Raises:
        TypeError: An argument is unknown.
        AssertionError: In the forward, the image size does not fit.
    """

    def __init__(
        self, *args, qk_scale_factor: float = -0.25, dynamic_img_size: bool = True, **kwargs
    ):
        super().__init__(
            *args,
            dynamic_img_size=dynamic_img_size,
            block_fn=Block,
            attn_layer=Attention,
            **kwargs,
        )
        self.qk_scale_factor = qk_scale_factor
        for block in self.blocks:
            block.attn.scale = block.attn.head_dim**qk_scale_factor

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """Add position embeddings, resampled if need be: ``B H W C``, or ``B N C``, to tokens.

        timm resamples them by an operator whose gradient is not deterministic on CUDA.
        """
        if self.pos_embed is None or not self.dynamic_img_size:
            return super()._pos_embed(x)
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        grid = self.patch_embed.grid_size
        position = resample_tokens(self.pos_embed, grid, x.shape[1:3], prefix)
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        tokens = [token.expand(x.shape[0], -1, -1) for token in tokens]
        x = x.flatten(1, 2)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*tokens, x + position], dim=1))
        return self.pos_drop(torch.cat([*tokens, x], dim=1) + position)

    def fuse_(self) -> None:
        """Pack patch embedding and feed-forward parts (see :class:`Fusible`)."""
        self.patch_embed.proj = pack(self.patch_embed.proj)
        for block in self.blocks:
            pack_mlp(block.mlp)


def _create_vit(name: str, pretrained: bool, **kwargs) -> ViT:
    return build_registered(ViT, name, pretrained, checkpoint_filter_fn, 3, **kwargs)


VARIANTS = [(net, patch, size) for net in "bl" for patch in (16, 32) for size in (224, 384)]
LONG = {"b": "base", "l": "large"}
# MindCV's names and timm's of the same models
NAMES = {f"vit_{n}_{p}_{s}": f"vit_{LONG[n]}_patch{p}_{s}" for n, p, s in VARIANTS}


def _weights_of(timms: str) -> DefaultCfg:
    """Return timm's weights of a model, to be registered under another name."""
    found = timm_vit.default_cfgs[timms]
    # registration completes a bare timm/ by the registered name
    cfgs = {
        tag: replace(cfg, hf_hub_id=f"timm/{timms}.{tag}") if cfg.hf_hub_id == "timm/" else cfg
        for tag, cfg in found.cfgs.items()
    }
    return replace(found, cfgs=cfgs)


default_cfgs = {
    **{name: _weights_of(timms) for name, timms in NAMES.items()},
    **{timms: timm_vit.default_cfgs[timms] for timms in NAMES.values()},
}


def _base(patch_size: int, img_size: int) -> dict:
    width = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return {"patch_size": patch_size, "img_size": img_size, **width}


def _large(patch_size: int, img_size: int) -> dict:
    width = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    return {"patch_size": patch_size, "img_size": img_size, **width}


@register_model
def vit_b_16_224(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-B/16 for 224x224 pixels."""
    return _create_vit("vit_b_16_224", pretrained, **_base(16, 224) | kwargs)


@register_model
def vit_b_16_384(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-B/16 for 384x384 pixels."""
    return _create_vit("vit_b_16_384", pretrained, **_base(16, 384) | kwargs)


@register_model
def vit_b_32_224(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-B/32 for 224x224 pixels."""
    return _create_vit("vit_b_32_224", pretrained, **_base(32, 224) | kwargs)


@register_model
def vit_b_32_384(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-B/32 for 384x384 pixels."""
    return _create_vit("vit_b_32_384", pretrained, **_base(32, 384) | kwargs)


@register_model
def vit_l_16_224(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-L/16 for 224x224 pixels."""
    return _create_vit("vit_l_16_224", pretrained, **_large(16, 224) | kwargs)


@register_model
def vit_l_16_384(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-L/16 for 384x384 pixels."""
    return _create_vit("vit_l_16_384", pretrained, **_large(16, 384) | kwargs)


@register_model
def vit_l_32_224(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-L/32 for 224x224 pixels."""
    return _create_vit("vit_l_32_224", pretrained, **_large(32, 224) | kwargs)


@register_model
def vit_l_32_384(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-L/32 for 384x384 pixels."""
    return _create_vit("vit_l_32_384", pretrained, **_large(32, 384) | kwargs)


@register_model
def vit_base_patch16_224(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-B/16 for 224x224 pixels, timm's weights."""
    return _create_vit("vit_base_patch16_224", pretrained, **_base(16, 224) | kwargs)


@register_model
def vit_base_patch16_384(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-B/16 for 384x384 pixels, timm's weights."""
    return _create_vit("vit_base_patch16_384", pretrained, **_base(16, 384) | kwargs)


@register_model
def vit_base_patch32_224(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-B/32 for 224x224 pixels, timm's weights."""
    return _create_vit("vit_base_patch32_224", pretrained, **_base(32, 224) | kwargs)


@register_model
def vit_base_patch32_384(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-B/32 for 384x384 pixels, timm's weights."""
    return _create_vit("vit_base_patch32_384", pretrained, **_base(32, 384) | kwargs)


@register_model
def vit_large_patch16_224(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-L/16 for 224x224 pixels, timm's weights."""
    return _create_vit("vit_large_patch16_224", pretrained, **_large(16, 224) | kwargs)


@register_model
def vit_large_patch16_384(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-L/16 for 384x384 pixels, timm's weights."""
    return _create_vit("vit_large_patch16_384", pretrained, **_large(16, 384) | kwargs)


@register_model
def vit_large_patch32_224(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-L/32 for 224x224 pixels, timm's weights."""
    return _create_vit("vit_large_patch32_224", pretrained, **_large(32, 224) | kwargs)


@register_model
def vit_large_patch32_384(pretrained: bool = False, **kwargs) -> ViT:
    """ViT-L/32 for 384x384 pixels, timm's weights."""
    return _create_vit("vit_large_patch32_384", pretrained, **_large(32, 384) | kwargs)
