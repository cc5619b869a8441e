"""Co-training of submodels: cosub (Touvron et al., arXiv 2212.04884), section 3."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class TwoViews:
    """Mixes a batch and repeats its images; replaces timm's ``Mixup``.

    Stochastic depth makes two submodels of the repeats.

    Args:
        mixup_fn: Mixes images and targets; None for no mixing.
    """

    def __init__(self, mixup_fn: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None):
        self.mixup_fn = mixup_fn

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images ``B 3 H W`` and targets to images ``2B 3 H W`` and the same targets."""
        if self.mixup_fn is not None:
            images, targets = self.mixup_fn(images, targets)
        return torch.cat([images, images]), targets


class CosubLoss(nn.Module):
    """``(base(a, y) + base(b, y) + BCE(a, sigmoid(b)) + BCE(b, sigmoid(a))) / 4``.

    Each submodel learns from the labels and from the other one, whose probabilities have no
    gradient; the weights are those of DeiT's code.

    Args:
        base: Binary cross-entropy of (logits, targets).
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Map logits ``2B K`` of :class:`TwoViews` and targets of B images to the loss."""
        a, b = logits.chunk(2)
        labels = self.base(a, targets) + self.base(b, targets)
        agreement = F.binary_cross_entropy_with_logits(a, b.detach().sigmoid())
        agreement = agreement + F.binary_cross_entropy_with_logits(b, a.detach().sigmoid())
        return 0.25 * (labels + agreement)
