"""Feed-forward part of a block, on feature maps."""

import torch
from torch import nn

from .checkpointing import recomputed
from .fuse import pack


class Mlp2d(nn.Module):
    """1x1 convolution, an optional 3x3 group convolution, 1x1 convolution; no biases.

    With ``spatial_groups`` this is Visformer's bottleneck of early stages (arXiv 2104.12533,
    section 3.3), otherwise the transformer's MLP.

    Args:
        dim: Channels of the input and the output.
        hidden_dim: Channels in between.
        spatial_groups: Groups of the 3x3 convolution, or ``None`` for none.
        drop: Dropout probability after the activation and at the output.
        act_layer: Activation.
    """

    recompute_activations = False  # see set_recompute_activations

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        spatial_groups: int | None = None,
        drop: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden_dim, 1, bias=False)
        self.act1 = act_layer()
        self.drop1 = nn.Dropout(drop)
        if spatial_groups is None:
            self.conv2 = None
        else:
            self.conv2 = nn.Conv2d(
                hidden_dim, hidden_dim, 3, padding=1, groups=spatial_groups, bias=False
            )
            self.act2 = act_layer()
        self.conv3 = nn.Conv2d(hidden_dim, dim, 1, bias=False)
        self.drop3 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        enabled = self.recompute_activations and not self.drop1.p
        with recomputed(self.act1, self.conv1(x), enabled) as x:
            x = self.drop1(x)
            x = self.conv3(x) if self.conv2 is None else self.conv2(x)
        if self.conv2 is not None:
            with recomputed(self.act2, x, self.recompute_activations) as x:
                x = self.conv3(x)
        return self.drop3(x)

    def fuse_(self) -> None:
        """Join convolutions and activations (see :class:`models.layers.fuse.Fusible`)."""
        self.conv1, self.act1 = pack(self.conv1, self.act1), nn.Identity()
        if self.conv2 is not None:
            self.conv2, self.act2 = pack(self.conv2, self.act2), nn.Identity()
        self.conv3 = pack(self.conv3)
