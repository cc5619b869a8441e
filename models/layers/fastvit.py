"""Parts of FastViT (arXiv 2303.14189): stem, patch embedding, blocks of both mixers, stages."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .attention import SelfAttention
from .block import add_branch
from .checkpointing import checkpoint_blocks
from .drop_path import DropPath
from .fuse import fold_after, fold_before, is_foldable, pack, pack_mlp, scale_outputs
from .reparam import (
    LargeKernelConv,
    LayerScale2d,
    ReparamConv,
    RepConditionalPosEnc,
    RepMixer,
    conv_norm,
    layer_scale,
)

HEAD_DIM = 32
STEM_STRIDES = {4: (2, 2), 2: (2, 1), 1: (1, 1)}  # of its two 3x3 convolutions


class Stage(NamedTuple):
    """One stage; all but the first start with a patch embedding of stride 2.

    Attributes:
        depth: Number of blocks.
        dim: Channels, a multiple of those of the stage before.
        mlp_ratio: Hidden channels of the feed-forward part, in multiples of ``dim``.
        mixer: Token mixer of the blocks, "repmixer" or "attention".
        position_encoding: Add a conditional position encoding before the blocks.
        patch_se: Squeeze and excitation in the patch embedding.
    """

    depth: int
    dim: int
    mlp_ratio: float = 4.0
    mixer: str = "repmixer"
    position_encoding: bool = False
    patch_se: bool = False


class ConvFfn(nn.Module):
    """Feed-forward part after a 7x7 depthwise convolution (section 3.3).

    Args:
        dim, hidden_dim: Channels of the input and output, and of the hidden layer.
        drop: Dropout after each projection.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        self.conv = conv_norm(dim, dim, 7, groups=dim)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        x = self.drop(self.act(self.fc1(self.conv(x))))
        return self.drop(self.fc2(x))

    def fuse_(self) -> None:
        """Fold the norm after the depthwise convolution (see :class:`Fusible`)."""
        if isinstance(self.conv, nn.Sequential):
            fold_after(self.conv.conv, self.conv.bn)
            self.conv = pack(self.conv.conv)
            pack_mlp(self)


class MapAttention(SelfAttention):
    """Global self-attention over the positions of a feature map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        height, width = x.shape[-2:]
        x = super().forward(x.flatten(2).transpose(1, 2)).transpose(1, 2)  # B C N
        return x.view(-1, self.num_heads * self.head_dim, height, width)

    def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Attention weights of a map ``B C H W``, ``B h N N``, N = H * W in row order."""
        return super().attention_maps(x.flatten(2).transpose(1, 2))


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0.0 else nn.Identity()


def _fold_layer_scale(layer: nn.Conv2d | nn.Linear, scale: nn.Module) -> nn.Module:
    """Fold a layer scale into the ``layer`` before it; return the identity in its place."""
    if isinstance(scale, LayerScale2d):
        scale_outputs(layer, scale.gamma.flatten())
    return nn.Identity()


class RepMixerBlock(nn.Module):
    """RepMixer, then the feed-forward part.

    Args:
        dim: Channels.
        mlp_ratio: Hidden channels of the feed-forward part, in multiples of ``dim``.
        proj_drop, drop_path: Dropout of the feed-forward part, and stochastic depth.
        layer_scale_init_value: Initial scale of both branches, 0 or ``None`` for none.
        inference_mode: Build the reparameterised form.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-5,
        inference_mode: bool = False,
    ):
        super().__init__()
        self.token_mixer = RepMixer(
            dim,
            layer_scale_init_value=layer_scale_init_value,
            inference_mode=inference_mode,
        )
        self.mlp = ConvFfn(dim, int(dim * mlp_ratio), proj_drop)
        self.layer_scale = layer_scale(dim, layer_scale_init_value)
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        x = self.token_mixer(x)
        return add_branch(x, self.layer_scale(self.mlp(x)), self.drop_path)

    def fuse_(self) -> None:
        """Fold the layer scale into the feed-forward part (see :class:`Fusible`)."""
        self.layer_scale = _fold_layer_scale(self.mlp.fc2, self.layer_scale)


class AttentionBlock(nn.Module):
    """Attention after a norm, then the feed-forward part (section 3.3).

    Args:
        dim: Channels, a multiple of 32.
        mlp_ratio: Hidden channels of the feed-forward part, in multiples of ``dim``.
        qk_scale_factor: Exponent of the query/key pre-scale.
        attn_drop, proj_drop, drop_path: Dropout of attention weights and after projections,
            and stochastic depth.
        layer_scale_init_value: Initial scale of both branches, 0 or ``None`` for none.
        norm_layer: Norm before attention.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        qk_scale_factor: float = -0.25,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-5,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f"dim {dim} of an attention stage is not a multiple of {HEAD_DIM}")
        self.norm = norm_layer(dim)
        self.token_mixer = MapAttention(
            dim,
            dim // HEAD_DIM,
            qk_scale_factor=qk_scale_factor,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.mlp = ConvFfn(dim, int(dim * mlp_ratio), proj_drop)
        self.layer_scale_1 = layer_scale(dim, layer_scale_init_value)
        self.layer_scale_2 = layer_scale(dim, layer_scale_init_value)
        self.drop_path1 = _drop_path(drop_path)
        self.drop_path2 = _drop_path(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        x = add_branch(x, self.layer_scale_1(self.token_mixer(self.norm(x))), self.drop_path1)
        return add_branch(x, self.layer_scale_2(self.mlp(x)), self.drop_path2)

    def fuse_(self) -> None:
        """Fold norm and layer scales into projections (see :class:`Fusible`)."""
        if is_foldable(self.norm):
            fold_before(self.norm, self.token_mixer.qkv)
            self.norm = nn.Identity()
        self.layer_scale_1 = _fold_layer_scale(self.token_mixer.proj, self.layer_scale_1)
        self.layer_scale_2 = _fold_layer_scale(self.mlp.fc2, self.layer_scale_2)


def convolutional_stem(in_chans: int, dim: int, stride: int = 4, **options) -> nn.Sequential:
    """Three MobileOne blocks, ``B in_chans H W -> B dim H/s W/s`` (section 3.2: s = 4).

    Args:
        in_chans, dim: Channels of the input and the output.
        stride: 4, 2 or 1.
        options: ``use_scale`` and ``inference_mode`` of :class:`ReparamConv`.
    """
    if stride not in STEM_STRIDES:
        raise ValueError(f"stem_stride {stride} must be one of {', '.join(map(str, STEM_STRIDES))}")
    first, second = STEM_STRIDES[stride]
    return nn.Sequential(
        ReparamConv(in_chans, dim, 3, stride=first, **options),
        ReparamConv(dim, dim, 3, stride=second, groups=dim, **options),
        ReparamConv(dim, dim, 1, **options),
    )


class PatchEmbed(nn.Module):
    """7x7 convolution of stride 2, by groups, and a pointwise one (sections 3.2 and 3.3).

    Args:
        in_chans, dim: Channels of the input and the output.
        inference_mode: Build the reparameterised form.
        options: ``use_se`` and ``use_act`` of :class:`LargeKernelConv`.
    """

    def __init__(self, in_chans: int, dim: int, inference_mode: bool = False, **options):
        super().__init__()
        large = {"stride": 2, "groups": in_chans, "inference_mode": inference_mode, **options}
        self.proj = nn.Sequential(
            LargeKernelConv(in_chans, dim, 7, **large),
            ReparamConv(dim, dim, 1, inference_mode=inference_mode),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B D H/2 W/2``."""
        return self.proj(x)


class FastViTStage(nn.Module):
    """Patch embedding (or none), position encoding (or none), blocks.

    Args:
        stage: Description.
        in_chans: Channels of the input; ``None`` for ``stage.dim`` and no patch embedding.
        rates: Stochastic depth of the blocks.
        attention: Further arguments of attention blocks.
        common: Further arguments of blocks of either kind.
        patch_act: Activation within the patch embedding.
        inference_mode: Build the reparameterised form.
    """

    def __init__(
        self,
        stage: Stage,
        in_chans: int | None,
        rates: Sequence[float],
        attention: dict,
        common: dict,
        patch_act: bool = False,
        inference_mode: bool = False,
    ):
        super().__init__()
        self.grad_checkpointing = False
        dim, fused = stage.dim, {"inference_mode": inference_mode}
        self.downsample = nn.Identity()
        if in_chans is not None:
            options = {"use_se": stage.patch_se, "use_act": patch_act}
            self.downsample = PatchEmbed(in_chans, dim, **fused, **options)
        self.pos_emb = (
            RepConditionalPosEnc(dim, **fused) if stage.position_encoding else nn.Identity()
        )
        block, options = (
            (AttentionBlock, attention) if stage.mixer == "attention" else (RepMixerBlock, fused)
        )
        self.blocks = nn.Sequential(
            *(block(dim, stage.mlp_ratio, drop_path=rate, **options, **common) for rate in rates)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B D H/2 W/2`` (all sizes as they are without a patch embedding)."""
        x = self.pos_emb(self.downsample(x))
        if self.grad_checkpointing and self.training:
            return checkpoint_blocks(self.blocks, x)
        return self.blocks(x)
