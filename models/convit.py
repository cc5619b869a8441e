"""ConViT, "Improving Vision Transformers with Soft Convolutional Inductive Biases".

arXiv 2103.10697. Gated positional self-attention (GPSA) is initialised as a convolution and can
learn to be global; the class token joins for the last, plain blocks. The key layout is that of
the original and of timm.

The input of GPSA blocks is a grid ``B H W C``, that of plain blocks tokens ``B N C``.
"""

import math
from collections.abc import Sequence

import torch
import torch.fx
from timm.layers import PatchEmbed, global_pool_nlc, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices as take_indices
from torch import nn

from .base import BaseModel
from .factory import build_registered, register_model
from .layers import (
    SelfAttention,
    checkpoint_blocks,
    drop_path_rates,
    resample_tokens,
)
from .layers.fuse import pack
from .layers.gpsa import GPSA, Block, joint_tables

__all__ = ["ConViT"]

torch.fx.wrap("resample_tokens")

POOLS = ("token", "avg", "max", "avgmax", "")


class ConViT(BaseModel):
    """ConViT classifier and backbone.

    Args:
        img_size: Height and width of the position embeddings; images of other sizes resample
            them in every forward.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 for no head, the output is then the pooled features.
        global_pool: ``token``, ``avg``, ``max``, ``avgmax`` over the patches, or '' for none.
        embed_dim: Channels.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the feed-forward part, in multiples of ``embed_dim``.
        qkv_bias: Learn a bias for queries, keys and values.
        qk_scale_factor: Exponent of the query/key pre-scale.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: Dropout before the head,
            after position embeddings, after projections, of attention weights.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        local_up_to_layer: Index of the first block without GPSA, where the class token joins.
        locality_strength: See :class:`GPSA`.
        use_pos_embed: Add learned absolute position embeddings to the patches.

    Raises:
        ValueError: An argument is out of range, or the image size is not a multiple of the patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale_factor: float = -0.25,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        use_pos_embed: bool = True,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if not 0 <= local_up_to_layer < depth:
            raise ValueError(
                f"local_up_to_layer {local_up_to_layer} must be from 0 to {depth - 1}, below "
                f"depth {depth}: the class token joins at the block of that index"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_size = self.total_stride = patch_size
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.local_up_to_layer = local_up_to_layer
        self.qk_scale_factor = qk_scale_factor
        self.set_pool(global_pool)
        height, width = to_2tuple(img_size)
        self.check_size(height, width)
        self.grid_size = (height // patch_size, width // patch_size)

        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, embed_dim, output_fmt="NHWC", strict_img_size=False
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        patches = torch.empty(1, math.prod(self.grid_size), embed_dim)
        self.pos_embed = nn.Parameter(patches) if use_pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        common = {
            "qkv_bias": qkv_bias,
            "qk_scale_factor": qk_scale_factor,
            "attn_drop": attn_drop_rate,
            "proj_drop": proj_drop_rate,
        }
        self.blocks = nn.ModuleList()
        for index, rate in enumerate(drop_path_rates(drop_path_rate, [depth])[0]):
            if index < local_up_to_layer:
                attn = GPSA(embed_dim, num_heads, locality_strength=locality_strength, **common)
            else:
                attn = SelfAttention(embed_dim, num_heads, **common)
            self.blocks.append(Block(embed_dim, attn, mlp_ratio, proj_drop_rate, rate))
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"}
            for index in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Normal of std 0.02 for embeddings and linear layers; GPSA starts local."""
        trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        self.apply(self.init_layer)

    @staticmethod
    def init_layer(module: nn.Module) -> None:
        """Normal of std 0.02 of linear layers; GPSA starts local."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, GPSA):  # comes after the layers within it
            module.init_locality()

    def set_pool(self, global_pool: str) -> None:
        """Set the pooling before the head, by timm's name."""
        if global_pool not in POOLS:
            raise ValueError(f"global_pool {global_pool!r} is not one of {POOLS}")
        self.global_pool = global_pool

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides biases and norms."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Groups of parameters in the order of depth, for layer-wise learning-rate decay."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one (by none if ``num_classes`` is 0)."""
        if global_pool is not None:
            self.set_pool(global_pool)
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = self.initialised(head)

    def fuse_(self) -> None:
        """Pack the patch embedding (see :class:`models.layers.fuse.Fusible`)."""
        self.patch_embed.proj = pack(self.patch_embed.proj)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Image ``B 3 H W`` to patches with position embeddings, ``B H/p W/p C``."""
        height, width = x.shape[-2:]
        self.check_size(height, width)
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            size = x.shape[1:3]
            position = resample_tokens(self.pos_embed, self.grid_size, size)
            x = x + position.unflatten(1, size)
        return self.pos_drop(x)

    def tables(self, x: torch.Tensor) -> list[tuple]:
        """Positional tables of all blocks for a grid ``B H W C``; empty for those without."""
        layers = [block.attn for block in self.blocks if isinstance(block.attn, GPSA)]
        found = []
        is_traced = torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)
        # otherwise, each layer keeps its own, or computes them in its own part of the graph
        if torch.is_grad_enabled() and layers and not is_traced:
            kind, dtype = x.device.type, x.dtype
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
            found = [(tables,) for tables in joint_tables(layers, *x.shape[1:3], dtype)]
        return found + [()] * (len(self.blocks) - len(found))

    def forward_block(self, x: torch.Tensor, index: int, tables: tuple = ()) -> torch.Tensor:
        """One block: ``B H W C``, and from ``local_up_to_layer`` on ``B 1+HW C``, to the same."""
        if index == self.local_up_to_layer:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        if self.grad_checkpointing and self.training:
            return checkpoint_blocks([self.blocks[index]], x, *tables)
        return self.blocks[index](x, *tables)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image ``B 3 H W`` to normalised tokens ``B 1+N C``, the class token first."""
        x = self.embed(x)
        for index, tables in enumerate(self.tables(x)):
            x = self.forward_block(x, index, tables)
        return self.norm(self.tokens(x, len(self.blocks)))

    def tokens(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Output of the first ``count`` blocks as tokens, ``B N C`` or ``B 1+N C``."""
        return x if count > self.local_up_to_layer else x.flatten(1, 2)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[torch.Tensor, list]:
        """Patches after the blocks, as feature maps or tokens.

        Args:
            x: Image, ``B 3 H W``.
            indices: Blocks to return: the last n, those of a sequence, or all.
            return_prefix_tokens: Return pairs of the patches and the class token ``B 1 C``
                (``B 0 C`` before it joins).
            norm: Apply the final norm to each.
            stop_early: Leave out blocks after the last one asked for.
            output_fmt: ``NCHW`` for feature maps ``B C H W``, or ``NLC`` for tokens ``B N C``.
            intermediates_only: Return the list alone.

        Returns:
            The patches, or the final features and the patches.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not one of 'NCHW', 'NLC'")
        wanted, last = take_indices(len(self.blocks), indices)
        x = self.embed(x)
        height, width = x.shape[1:3]
        intermediates = []
        for index, tables in enumerate(self.tables(x)[: last + 1 if stop_early else None]):
            x = self.forward_block(x, index, tables)
            if index not in wanted:
                continue
            tokens = self.tokens(x, index + 1)
            tokens = self.norm(tokens) if norm else tokens
            prefix, patches = tokens.split([tokens.shape[1] - height * width, height * width], 1)
            if output_fmt == "NCHW":
                patches = patches.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # B C y x
            intermediates.append((patches, prefix) if return_prefix_tokens else patches)
        if intermediates_only:
            return intermediates
        return self.norm(self.tokens(x, index + 1)), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove all layers that the given feature maps do not need; return their indices."""
        wanted, last = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if last < self.local_up_to_layer:
            self.cls_token = None
            self.num_prefix_tokens = 0
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens ``B 1+N C`` to logits ``B num_classes``, or to pooled features ``B C``."""
        x = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return x if pre_logits else self.head(x)


def checkpoint_filter_fn(
    state_dict: dict[str, torch.Tensor], model: ConViT
) -> dict[str, torch.Tensor]:
    """Convert weights of the original or of timm to those of ``model``.

    The keys are the same. Computed indices are left out; position embeddings of another square
    grid are resampled.
    """
    converted = {k: v for k, v in state_dict.items() if k.rpartition(".")[2] != "rel_indices"}
    position = converted.get("pos_embed")
    if position is not None and model.pos_embed is not None:
        count = position.shape[1]
        side = math.isqrt(count)
        if side**2 == count:
            converted["pos_embed"] = resample_tokens(position, (side, side), model.grid_size)
    return converted


def _create_convit(name: str, pretrained: bool, **kwargs) -> ConViT:
    return build_registered(ConViT, name, pretrained, checkpoint_filter_fn, 3, **kwargs)


def _cfg(**kwargs) -> dict:
    return {
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "convit_tiny.fb_in1k": _cfg(hf_hub_id="timm/"),
        "convit_small.fb_in1k": _cfg(hf_hub_id="timm/"),
        "convit_base.fb_in1k": _cfg(hf_hub_id="timm/"),
        "convit_tiny_plus.untrained": _cfg(),
        "convit_small_plus.untrained": _cfg(),
        "convit_base_plus.untrained": _cfg(),
    }
)


@register_model
def convit_tiny(pretrained: bool = False, **kwargs) -> ConViT:
    """ConViT-Ti: 5.7 M parameters, 1 GMAC, 73.1 % on ImageNet (paper, table 1)."""
    defaults = {"embed_dim": 192, "num_heads": 4}
    return _create_convit("convit_tiny", pretrained, **defaults | kwargs)


@register_model
def convit_small(pretrained: bool = False, **kwargs) -> ConViT:
    """ConViT-S: 27.8 M parameters, 5.4 GMACs, 81.3 % on ImageNet (paper, table 1)."""
    defaults = {"embed_dim": 432, "num_heads": 9}
    return _create_convit("convit_small", pretrained, **defaults | kwargs)


@register_model
def convit_base(pretrained: bool = False, **kwargs) -> ConViT:
    """ConViT-B: 86.5 M parameters, 17 GMACs, 82.4 % on ImageNet (paper, table 1)."""
    defaults = {"embed_dim": 768, "num_heads": 16}
    return _create_convit("convit_base", pretrained, **defaults | kwargs)


@register_model
def convit_tiny_plus(pretrained: bool = False, **kwargs) -> ConViT:
    """ConViT-Ti+: 10 M parameters, 2 GMACs, 76.7 % on ImageNet (paper, table 1)."""
    defaults = {"embed_dim": 256, "num_heads": 4}
    return _create_convit("convit_tiny_plus", pretrained, **defaults | kwargs)


@register_model
def convit_small_plus(pretrained: bool = False, **kwargs) -> ConViT:
    """ConViT-S+: 48 M parameters, 10 GMACs, 82.2 % on ImageNet (paper, table 1)."""
    defaults = {"embed_dim": 576, "num_heads": 9}
    return _create_convit("convit_small_plus", pretrained, **defaults | kwargs)


@register_model
def convit_base_plus(pretrained: bool = False, **kwargs) -> ConViT:
    """ConViT-B+: 152 M parameters, 30 GMACs, 82.5 % on ImageNet (paper, table 1)."""
    defaults = {"embed_dim": 1024, "num_heads": 16}
    return _create_convit("convit_base_plus", pretrained, **defaults | kwargs)
