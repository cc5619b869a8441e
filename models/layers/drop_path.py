"""Stochastic depth (arXiv 1603.09382): its schedule, and the layer."""

from collections.abc import Sequence

import timm.layers
import torch
from torch import nn


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop rates that grow linearly from 0 at the first block to ``rate`` at the last.

    Deep Networks with Stochastic Depth, arXiv 1603.09382, section 3.

    Returns:
        One list per stage, one rate per block.
    """
    total = sum(depths)
    rates = [rate * i / max(total - 1, 1) for i in range(total)]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


class DropPath(timm.layers.DropPath):
    """timm's drop path, which may be given what was drawn for it.

    Attributes:
        factor: Factor of every sample of the next batch, ``B``; None to draw by itself.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__(drop_prob, scale_by_keep)
        self.factor: torch.Tensor | None = None

    def factors(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return :attr:`factor` in the shape ``B 1 1 ...``, once; None if there is none."""
        factor = self.factor
        if factor is None:
            return None
        self.factor = None
        return factor.view(-1, *[1] * (x.ndim - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop whole samples of ``B ...`` in training, and scale up the others."""
        if not torch.jit.is_scripting():
            factors = self.factors(x)
            if factors is not None:
                return x * factors
        return timm.layers.drop_path(x, self.drop_prob, self.training, self.scale_by_keep)


def add_branch(x: torch.Tensor, branch: torch.Tensor, drop_path: nn.Module) -> torch.Tensor:
    """Return ``x + drop_path(branch)``, both ``B ...``, in one pass if the factors are given."""
    given = isinstance(drop_path, DropPath) and drop_path.factor is not None
    if given and x.dtype == branch.dtype:
        return torch.addcmul(x, branch, drop_path.factors(branch))
    return x + drop_path(branch)
