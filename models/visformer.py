"""Visformer, "The Vision-friendly Transformer" (arXiv 2104.12533), version 1 and 2.

Convolutional bottlenecks on the large feature maps, self-attention on the small ones, BatchNorm
throughout. Version 2 adds a stage in front, and has attention within the windows of Swin
Transformer (arXiv 2103.14030). Weights use timm's key layout; the original's
(``stage1.0.norm2.bn.weight``) converts by :func:`checkpoint_filter_fn`.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.fx
from timm.layers import (
    LayerNorm2d,
    PatchEmbed,
    create_classifier,
    resample_patch_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices as take_indices
from torch import nn

from .base import StagedModel
from .factory import build_registered, register_model
from .layers import (
    Attention2d,
    Block2d,
    WindowAttention2d,
    checkpoint_blocks,
    drop_path_rates,
    resample_bias_table,
    resample_position_map,
)
from .layers.fuse import Affine2d, fold_after, is_foldable, pack

__all__ = ["Stage", "Visformer"]

torch.fx.wrap("resample_position_map")


class Stage(NamedTuple):
    """One stage: a patch embedding, a position embedding, and blocks of one kind.

    Attributes:
        depth: Number of blocks.
        dim: Channels.
        patch_size: Kernel size and stride of the patch embedding.
        num_heads: Attention heads, ``None`` for blocks without attention.
        mlp_ratio: Hidden channels of the feed-forward part, in multiples of ``dim``.
        spatial_groups: Groups of its 3x3 convolution, ``None`` for none.
        head_dim: Channels per head, ``dim // num_heads`` if not given.
        window: Side of the attention's windows; ``None`` for global attention. A window
            larger than the feature map at ``img_size`` shrinks to it.
    """

    depth: int
    dim: int
    patch_size: int = 2
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    spatial_groups: int | None = None
    head_dim: int | None = None
    window: int | None = None


class Visformer(StagedModel):
    """Visformer classifier and backbone.

    Args:
        stages: Description of the stages, each a :class:`Stage` or the sequence of its values, as
            JSON has it; the last is named ``stage3``.
        init_channels: Channels of the 7x7 stem; ``None`` for no stem.
        width: Multiplies the channels of stem and stages.
        stem_stride: Stride of the stem; 1 for images of few pixels.
        patch_sizes: Of the patch embeddings, instead of the stages' own; with ``(2, 2, 1)`` for
            version 1, all attention of an image of 32 pixels sees 4x4 positions.
        img_size: Height and width of the position embeddings; images of other sizes resample
            them in every forward.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 for no head, the output is then the pooled features.
        global_pool: timm's name of the pooling before the head.
        use_pos_embed: Learn a position embedding for every stage.
        embed_norm: Normalise after patch embeddings.
        qk_scale_factor: Exponent of the query/key pre-scale (see :class:`Attention2d`).
        qkv_bias: Learn a bias for queries, keys and values.
        clamp_shift: Do not shift windows if one covers the shorter side of the feature map, as
            in the original classifier; the original detection backbone always shifts.
        strict_img_size: Raise for sizes that are not multiples of the total stride; otherwise
            patch embeddings leave out the remainder at the right and bottom.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: Dropout before the head,
            after position embeddings, after projections, of attention weights.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        norm_layer: Norm of the channels of a feature map.

    Raises:
        ValueError: ``img_size``, or in the forward the size of the image, does not fit the strides.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        init_channels: int | None,
        width: float = 1.0,
        stem_stride: int = 2,
        patch_sizes: Sequence[int] | None = None,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        use_pos_embed: bool = True,
        embed_norm: bool = True,
        qk_scale_factor: float = -0.25,
        qkv_bias: bool = False,
        clamp_shift: bool = True,
        strict_img_size: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        stages = [Stage(*stage) for stage in stages]
        stages = [stage._replace(dim=round(stage.dim * width)) for stage in stages]
        if patch_sizes is not None:
            if len(patch_sizes) != len(stages):
                raise ValueError(f"patch_sizes {patch_sizes} must be of {len(stages)} stages")
            sizes = zip(stages, patch_sizes, strict=True)
            stages = [stage._replace(patch_size=size) for stage, size in sizes]
        if init_channels is None:
            stem_stride = 1
        else:
            init_channels = round(init_channels * width)
        if min(stem_stride, *(stage.patch_size for stage in stages)) < 1:
            raise ValueError(f"stem_stride {stem_stride} and patch_sizes must be positive")
        self.stages = stages = tuple(stages)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = stages[-1].dim
        self.qk_scale_factor = qk_scale_factor
        self.strict_img_size = strict_img_size
        self.total_stride = stem_stride * math.prod(s.patch_size for s in stages)
        self.check_size(*to_2tuple(img_size))

        size = [math.ceil(side / stem_stride) for side in to_2tuple(img_size)]
        if init_channels is None:
            self.stem = nn.Identity()
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, init_channels, 7, stem_stride, padding=3, bias=False),
                nn.BatchNorm2d(init_channels),
                nn.ReLU(inplace=True),
            )
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.stage_numbers = tuple(range(4 - len(stages), 4))
        self.feature_info = []
        rates = drop_path_rates(drop_path_rate, [stage.depth for stage in stages])
        options = {
            "qk_scale_factor": qk_scale_factor,
            "qkv_bias": qkv_bias,
            "attn_drop": attn_drop_rate,
            "proj_drop": proj_drop_rate,
        }
        dim, reduction = init_channels or in_chans, stem_stride
        index = 0  # of a block in the model
        for number, stage, stage_rates in zip(self.stage_numbers, stages, rates, strict=True):
            embed = PatchEmbed(
                img_size=None,
                patch_size=stage.patch_size,
                in_chans=dim,
                embed_dim=stage.dim,
                norm_layer=norm_layer if embed_norm else None,
                flatten=False,
            )
            size = [s // stage.patch_size for s in size]
            blocks = [
                Block2d(
                    stage.dim,
                    _attention(stage, index + i, min(size), clamp_shift, options),
                    stage.mlp_ratio,
                    stage.spatial_groups,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    norm_layer=norm_layer,
                )
                for i, rate in enumerate(stage_rates)
            ]
            index += stage.depth
            position = nn.Parameter(torch.empty(1, stage.dim, *size)) if use_pos_embed else None
            self.add_module(f"patch_embed{number}", embed)
            self.register_parameter(f"pos_embed{number}", position)
            self.add_module(f"stage{number}", nn.Sequential(*blocks))
            dim, reduction = stage.dim, reduction * stage.patch_size
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"stage{number}"}
            )

        self.norm = norm_layer(dim)
        self.global_pool, self.head = create_classifier(dim, num_classes, pool_type=global_pool)
        self.head_hidden_size = dim * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation of convolutions, normal of std 0.02 for the rest."""
        for name, parameter in self.named_parameters():
            if name.startswith("pos_embed"):
                trunc_normal_(parameter, std=0.02)
        self.apply(self.init_layer)

    @staticmethod
    def init_layer(module: nn.Module) -> None:
        """He initialisation of convolutions, normal of std 0.02 of linear layers."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Groups of parameters in the order of depth, for layer-wise learning-rate decay."""
        first = self.stage_numbers[0]
        stem = rf"^stem|^patch_embed{first}|^pos_embed{first}"
        if coarse:
            return {"stem": stem, "blocks": r"^(?:stage|patch_embed|pos_embed)(\d+)"}
        return {
            "stem": stem,
            "blocks": [
                (r"^(?:patch_embed|pos_embed)(\d+)", (-1,)),
                (r"^stage(\d+)\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one (by none if ``num_classes`` is 0)."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        pool, head = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.global_pool, self.head = pool, self.initialised(head)
        self.head_hidden_size = self.num_features * pool.feat_mult()

    def fuse_(self) -> None:
        """Fold the norms of stem, patch embeddings and final feature map (see :class:`Fusible`)."""
        if isinstance(self.stem, nn.Sequential):
            conv, norm, act = self.stem
            fold_after(conv, norm)
            self.stem = pack(conv, act)
        for number in self.stage_numbers:
            embed = getattr(self, f"patch_embed{number}")
            if is_foldable(embed.norm):
                fold_after(embed.proj, embed.norm)
                embed.norm = nn.Identity()
            embed.proj = pack(embed.proj)
        if is_foldable(self.norm):
            self.norm = Affine2d(self.norm)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Image ``B 3 H W`` to ``B C H/s W/s`` by the stem of stride s."""
        height, width = x.shape[-2:]
        self.check_size(height, width)
        return self.stem(x)

    def forward_stage(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Patch embedding, position embedding and blocks: ``B C H W -> B D H/p W/p``."""
        number = self.stage_numbers[index]
        x = getattr(self, f"patch_embed{number}")(x)
        position = getattr(self, f"pos_embed{number}")
        if position is not None:
            # cast, as the sum with float32 would keep the whole stage's maps in float32
            position = resample_position_map(position, x.shape[-2:]).to(x.dtype)
            x = self.pos_drop(x + position)
        blocks = getattr(self, f"stage{number}")
        if self.grad_checkpointing and self.training:
            return checkpoint_blocks(blocks, x)
        return blocks(x)

    def forward_last(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last stage's feature map, ``B D H W -> B D H W``."""
        return self.norm(x)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove all layers that the given feature maps do not need; return their indices."""
        wanted, last = take_indices(len(self.stages), indices)
        for number in self.stage_numbers[last + 1 :]:
            for name in ("patch_embed", "pos_embed", "stage"):
                delattr(self, f"{name}{number}")
        self.stage_numbers = self.stage_numbers[: last + 1]
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature map ``B D H W`` to logits ``B num_classes``, or to pooled features ``B D``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)


def _attention(
    stage: Stage, index: int, side: int, clamp_shift: bool, options: dict
) -> nn.Module | None:
    """Attention of block ``index`` of the model; ``side``: shorter side of the feature map."""
    if stage.num_heads is None:
        return None
    if stage.window is None:
        return Attention2d(stage.dim, stage.num_heads, stage.head_dim, **options)
    window = min(stage.window, side) if clamp_shift else stage.window
    shift = window // 2 if index % 2 else 0
    return WindowAttention2d(
        stage.dim,
        stage.num_heads,
        window,
        shift,
        clamp_shift,
        head_dim=stage.head_dim,
        **options,
    )


def checkpoint_filter_fn(
    state_dict: dict[str, torch.Tensor], model: Visformer
) -> dict[str, torch.Tensor]:
    """Convert weights in the layout of the original or of timm to the layout of ``model``.

    The original wraps norms (``norm1.bn.weight``), gives those over channels the shape ``C 1 1``,
    and calls the only stage of net1 ``stage2``, its embeddings ``patch_embed1``. Position
    embeddings, relative position biases and patch embeddings of another size are resampled.
    """
    own = model.state_dict()
    single = model.stage_numbers == (3,)
    converted = {}
    for key, value in state_dict.items():
        key = key.replace(".bn.", ".").replace(".ln.", ".")
        if single:
            key = re.sub(r"^(patch_embed|pos_embed|stage)[12]\b", r"\g<1>3", key)
        target = own.get(key, value)
        if key.startswith("pos_embed") and value.ndim == 4:
            value = resample_position_map(value, tuple(target.shape[-2:]))
        elif key.startswith("patch_embed") and value.ndim == 4:
            value = resample_patch_embed(value, list(target.shape[-2:]))
        elif key.endswith("relative_position_bias_table"):
            value = resample_bias_table(value, target.shape[0])
        elif target.ndim == 1 and value.numel() == target.numel():
            value = value.flatten()
        converted[key] = value
    return converted


def _create_visformer(name: str, pretrained: bool, **kwargs) -> Visformer:
    indices = tuple(range(len(kwargs["stages"])))
    return build_registered(Visformer, name, pretrained, checkpoint_filter_fn, indices, **kwargs)


def _cfg(**kwargs) -> dict:
    return {
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "fixed_input_size": True,
        "first_conv": "stem.0",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "visformer_tiny.in1k": _cfg(hf_hub_id="timm/"),
        "visformer_small.in1k": _cfg(hf_hub_id="timm/"),
        **{
            f"visformer_net{i}.untrained": _cfg(
                first_conv="patch_embed3.proj" if i == 1 else "stem.0"
            )
            for i in range(1, 8)
        },
        **{
            f"swin_visformer_{name}.untrained": _cfg()
            for name in (
                "tiny_v2",
                "small_v2",
                "medium_v2",
                "small",
                "small_161010",
                "small_16163",
                "small_13183",
                "small_131111",
            )
        },
    }
)


def _v1(dim: int, num_heads: int, init_channels: int) -> dict:
    """Version 1; ``dim``: channels of the middle stage."""
    stages = (
        Stage(depth=7, dim=dim // 2, patch_size=4, mlp_ratio=2.0, spatial_groups=8),
        Stage(depth=4, dim=dim, num_heads=num_heads),
        Stage(depth=4, dim=dim * 2, num_heads=num_heads),
    )
    return {"stages": stages, "init_channels": init_channels}


def _v2(
    depths: Sequence[int],
    dim: int = 256,
    num_heads: Sequence[int] = (8, 16),
    init_channels: int = 32,
) -> dict:
    """Version 2; ``dim``: channels of the third stage; ``num_heads``: of the last two stages."""
    convolution = {"mlp_ratio": 2.0, "spatial_groups": 8}
    stages = (
        Stage(depths[0], dim // 4, **convolution),
        Stage(depths[1], dim // 2, **convolution),
        Stage(depths[2], dim, num_heads=num_heads[0], window=14),
        Stage(depths[3], dim * 2, num_heads=num_heads[1], window=7),
    )
    return {"stages": stages, "init_channels": init_channels}


def _net(
    depths: Sequence[int], num_heads: int | None = 6, spatial: bool = False, **options
) -> dict:
    """One of the steps from DeiT-S to Visformer-S (section 3.2), after the first."""
    block = {"mlp_ratio": 5 / 6, "spatial_groups": 1} if spatial else {}
    stages = (
        Stage(depths[0], 192, patch_size=4, num_heads=num_heads, head_dim=16, **block),
        Stage(depths[1], 384, num_heads=num_heads, **block),
        Stage(depths[2], 768, num_heads=num_heads, **block),
    )
    return {"stages": stages, "init_channels": 32, "embed_norm": False, **options}


LayerNorm = partial(LayerNorm2d, eps=1e-5)


@register_model
def visformer_tiny(pretrained: bool = False, **kwargs) -> Visformer:
    """Visformer-Ti: 10.3 M parameters, 1.3 GMACs, 78.6 % on ImageNet (paper, table 5)."""
    return _create_visformer("visformer_tiny", pretrained, **_v1(192, 3, 16) | kwargs)


@register_model
def visformer_small(pretrained: bool = False, **kwargs) -> Visformer:
    """Visformer-S: 40.2 M parameters, 4.9 GMACs, 82.2 % on ImageNet (paper, table 5)."""
    return _create_visformer("visformer_small", pretrained, **_v1(384, 6, 32) | kwargs)


@register_model
def visformer_net1(pretrained: bool = False, **kwargs) -> Visformer:
    """Step 1 of section 3.2: DeiT-S with global average pooling, 16x16 patches."""
    stages = (Stage(12, 384, patch_size=16, num_heads=6),)
    defaults = {
        "stages": stages,
        "init_channels": None,
        "embed_norm": False,
        "norm_layer": LayerNorm,
    }
    return _create_visformer("visformer_net1", pretrained, **defaults | kwargs)


@register_model
def visformer_net2(pretrained: bool = False, **kwargs) -> Visformer:
    """Step 2: patch embedding in steps."""
    defaults = _net((0, 12, 0), norm_layer=LayerNorm)
    return _create_visformer("visformer_net2", pretrained, **defaults | kwargs)


@register_model
def visformer_net3(pretrained: bool = False, **kwargs) -> Visformer:
    """Step 3: blocks in three stages."""
    defaults = _net((4, 4, 4), norm_layer=LayerNorm)
    return _create_visformer("visformer_net3", pretrained, **defaults | kwargs)


@register_model
def visformer_net4(pretrained: bool = False, **kwargs) -> Visformer:
    """Step 4: BatchNorm instead of LayerNorm."""
    return _create_visformer("visformer_net4", pretrained, **_net((4, 4, 4)) | kwargs)


@register_model
def visformer_net5(pretrained: bool = False, **kwargs) -> Visformer:
    """Step 5: 3x3 convolutions in the feed-forward part."""
    return _create_visformer("visformer_net5", pretrained, **_net((4, 4, 4), spatial=True) | kwargs)


@register_model
def visformer_net6(pretrained: bool = False, **kwargs) -> Visformer:
    """Step 6: no position embeddings."""
    defaults = _net((4, 4, 4), spatial=True, use_pos_embed=False)
    return _create_visformer("visformer_net6", pretrained, **defaults | kwargs)


@register_model
def visformer_net7(pretrained: bool = False, **kwargs) -> Visformer:
    """Step 7: no attention, a residual network."""
    defaults = _net((6, 7, 7), num_heads=None, spatial=True, use_pos_embed=False)
    return _create_visformer("visformer_net7", pretrained, **defaults | kwargs)


@register_model
def swin_visformer_tiny_v2(pretrained: bool = False, **kwargs) -> Visformer:
    """VisformerV2-Ti: 9.4 M parameters, 1.3 GMACs, 79.6 % on ImageNet."""
    defaults = _v2((1, 4, 6, 3), 192, (6, 12), init_channels=24)
    return _create_visformer("swin_visformer_tiny_v2", pretrained, **defaults | kwargs)


@register_model
def swin_visformer_small_v2(pretrained: bool = False, **kwargs) -> Visformer:
    """VisformerV2-S: 23.6 M parameters, 4.3 GMACs, 83.0 % on ImageNet."""
    defaults = _v2((1, 10, 14, 3))
    return _create_visformer("swin_visformer_small_v2", pretrained, **defaults | kwargs)


@register_model
def swin_visformer_medium_v2(pretrained: bool = False, **kwargs) -> Visformer:
    """VisformerV2-M."""
    defaults = _v2((1, 8, 14, 2), dim=384)
    return _create_visformer("swin_visformer_medium_v2", pretrained, **defaults | kwargs)


@register_model
def swin_visformer_small(pretrained: bool = False, **kwargs) -> Visformer:
    """Visformer-S with windows and an empty first stage."""
    defaults = _v2((0, 7, 4, 4), 384, (6, 6))
    return _create_visformer("swin_visformer_small", pretrained, **defaults | kwargs)


@register_model
def swin_visformer_small_161010(pretrained: bool = False, **kwargs) -> Visformer:
    """Ablation of VisformerV2-S with depths 1, 6, 10, 10."""
    defaults = _v2((1, 6, 10, 10))
    return _create_visformer("swin_visformer_small_161010", pretrained, **defaults | kwargs)


@register_model
def swin_visformer_small_16163(pretrained: bool = False, **kwargs) -> Visformer:
    """Ablation of VisformerV2-S with depths 1, 6, 16, 3."""
    defaults = _v2((1, 6, 16, 3))
    return _create_visformer("swin_visformer_small_16163", pretrained, **defaults | kwargs)


@register_model
def swin_visformer_small_13183(pretrained: bool = False, **kwargs) -> Visformer:
    """Ablation of VisformerV2-S with depths 1, 3, 18, 3."""
    defaults = _v2((1, 3, 18, 3))
    return _create_visformer("swin_visformer_small_13183", pretrained, **defaults | kwargs)


@register_model
def swin_visformer_small_131111(pretrained: bool = False, **kwargs) -> Visformer:
    """Ablation of VisformerV2-S with depths 1, 3, 11, 11."""
    defaults = _v2((1, 3, 11, 11))
    return _create_visformer("swin_visformer_small_131111", pretrained, **defaults | kwargs)
