"""The residual block on maps."""

import torch
from timm.layers import DropPath
from torch import nn

from models.layers.attention import Attention2d
from models.layers.mlp import Mlp2d


class Block2d(nn.Module):
    """Pre-norm residual block: attention (or none), then the feed-forward part.

    Args:
        dim: Channels.
        num_heads: Attention heads; ``None`` makes a block without attention.
        mlp_ratio: Hidden channels of the feed-forward part, in multiples of ``dim``.
        spatial_groups: Groups of its 3x3 convolution; ``None`` leaves that out.
        qk_scale_factor: Exponent of the query/key pre-scale.
        proj_drop, attn_drop, drop_path: Dropout of projections, attention weights, branches.
        norm_layer: Normalisation over the channels of a map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None,
        mlp_ratio: float,
        spatial_groups: int | None,
        qk_scale_factor: float = -0.25,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        if num_heads is None:
            self.attn = None
        else:
            self.norm1 = norm_layer(dim)
            self.attn = Attention2d(
                dim,
                num_heads,
                qk_scale_factor=qk_scale_factor,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
            )
            self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp2d(dim, int(dim * mlp_ratio), spatial_groups, drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        if self.attn is not None:
            x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x
