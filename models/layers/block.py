"""Residual block on feature maps."""

import torch
from torch import nn

from .checkpointing import recomputed
from .drop_path import DropPath, add_branch
from .fuse import fold_before, is_foldable
from .mlp import Mlp2d


class Block2d(nn.Module):
    """Pre-norm residual block: attention (or none), then the feed-forward part.

    Args:
        dim: Channels.
        attn: Attention ``B C H W -> B C H W``, or ``None`` for none.
        mlp_ratio: Hidden channels of the feed-forward part, in multiples of ``dim``.
        spatial_groups: Groups of its 3x3 convolution, or ``None`` for none.
        proj_drop, drop_path: Dropout of the feed-forward part, and stochastic depth.
        norm_layer: Norm of the channels of a feature map.
    """

    recompute_activations = False  # see set_recompute_activations

    def __init__(
        self,
        dim: int,
        attn: nn.Module | None,
        mlp_ratio: float,
        spatial_groups: int | None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        if attn is not None:
            self.norm1 = norm_layer(dim)
            self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.attn = attn
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp2d(dim, round(dim * mlp_ratio), spatial_groups, drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        if self.attn is not None:
            with recomputed(self.norm1, x, self.recompute_activations) as y:
                x = add_branch(x, self.attn(y), self.drop_path1)
        with recomputed(self.norm2, x, self.recompute_activations) as y:
            return add_branch(x, self.mlp(y), self.drop_path2)

    def fuse_(self) -> None:
        """Fold norms into the layers after them (see :class:`models.layers.fuse.Fusible`)."""
        if self.attn is not None and is_foldable(self.norm1):
            self.attn.fold_norm_(self.norm1)
            self.norm1 = nn.Identity()
        if is_foldable(self.norm2):
            fold_before(self.norm2, self.mlp.conv1)
            self.norm2 = nn.Identity()
