"""Windowed attention as the original detector computes it, for comparison with ours.

Danczs/Visformer, ObjectDetection: windows and heads are cut by copies, the product of queries and
keys is written out, the bias gathered in every block, the mask made in every forward pass.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from models.detection_backbone import Backbone
from models.layers import set_recompute_activations
from models.layers.window import WindowAttention2d


def _cut(x: torch.Tensor, window: int) -> torch.Tensor:
    return rearrange(x, "b c (y h) (x w) -> (b y x) c h w", h=window, w=window).contiguous()


def _mask(height: int, width: int, window: int, device: torch.device) -> torch.Tensor:
    """Return the mask ``W N N`` of a padded feature map: -100 across regions."""
    region, shift = torch.zeros(1, 1, height, width, device=device), window // 2
    parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in parts for c in parts):
        region[:, :, rows, columns] = number
    region = _cut(region, window).flatten(1)
    return -100.0 * (region.unsqueeze(1) != region.unsqueeze(2))


class OriginalWindowAttention(nn.Module):
    """The same function as ``layer``, with its weights.

    Args:
        layer: Layer to replace.
        masks: Holds the ``mask`` of a stage, made in every forward pass of the stage.
    """

    def __init__(self, layer: WindowAttention2d, masks: dict[str, torch.Tensor]):
        super().__init__()
        self.num_heads, self.scale = layer.num_heads, layer.scale
        self.window, self.shift = layer.window, layer.shift
        self.qkv, self.proj = layer.qkv, layer.proj
        self.relative_position_bias_table = layer.relative_position_bias_table
        self.register_buffer("index", layer.relative_position_index, persistent=False)
        self.masks = masks

    def attend(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Windows ``(B W) C w w -> (B W) C w w``."""
        qkv = rearrange(self.qkv(x), "b (t n d) h w -> t b n (h w) d", t=3, n=self.num_heads)
        q, k, v = qkv.unbind(0)
        scores = (q * self.scale) @ (k.transpose(-2, -1) * self.scale)
        count = len(self.index)
        bias = self.relative_position_bias_table[self.index.view(-1)].view(count, count, -1)
        scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            scores = scores.view(-1, len(mask), self.num_heads, count, count)
            scores = (scores + mask[None, :, None]).view(-1, self.num_heads, count, count)
        x = scores.softmax(-1) @ v
        return self.proj(rearrange(x, "b n (h w) d -> b (n d) h w", h=self.window))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.window, 0, -height % self.window))
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), dims=(2, 3))
        rows, batch = x.shape[-2] // self.window, len(x)
        x = self.attend(_cut(x, self.window), self.masks["mask"] if self.shift else None)
        x = rearrange(x, "(b y x) c h w -> b c (y h) (x w)", b=batch, y=rows).contiguous()
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), dims=(2, 3))
        return x[:, :, :height, :width].contiguous()


def as_original(backbone: Backbone) -> Backbone:
    """Replace the attention of ``backbone`` in place; its function stays the same."""
    for stage in backbone.net.children():
        blocks = [
            block
            for block in (stage if isinstance(stage, nn.Sequential) else ())
            if isinstance(getattr(block, "attn", None), WindowAttention2d)
        ]
        if not blocks:
            continue
        masks: dict[str, torch.Tensor] = {}

        def make_mask(_, inputs, masks=masks, window=blocks[0].attn.window) -> None:
            height, width = (size + -size % window for size in inputs[0].shape[-2:])
            masks["mask"] = _mask(height, width, window, inputs[0].device)

        stage.register_forward_pre_hook(make_mask)
        for block in blocks:
            block.attn = OriginalWindowAttention(block.attn, masks)
    backbone.net.channels_last = False
    set_recompute_activations(backbone, False)
    return backbone.to(memory_format=torch.contiguous_format)
