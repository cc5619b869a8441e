"""Windowed attention as the original detector computes it, to measure ours against.

Danczs/Visformer, ObjectDetection: windows are cut out by a copy, heads by another, the product
of queries and keys is written out, the bias gathered in every block, the mask made in every
forward pass and added by itself.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from models.detection_backbone import Backbone
from models.layers import set_recompute_activations
from models.layers.window import WindowAttention2d


def _mask(height: int, width: int, window: int, shift: int, device: torch.device) -> torch.Tensor:
    """``W N N`` for a map of this size after padding: -100 across regions."""
    region = torch.zeros(1, 1, height, width, device=device)
    parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in parts for c in parts):
        region[:, :, rows, columns] = number
    region = _cut(region, window).flatten(1)
    across = region.unsqueeze(1) - region.unsqueeze(2)
    return across.masked_fill(across != 0, -100.0).masked_fill(across == 0, 0.0)


def _cut(x: torch.Tensor, window: int) -> torch.Tensor:
    return rearrange(x, "b c (y h) (x w) -> (b y x) c h w", h=window, w=window).contiguous()


class OriginalWindowAttention(nn.Module):
    """The same function as the layer whose weights it takes.

    Args:
        layer: What it takes the place of.
        masks: One for the blocks of a stage, which the stage makes anew in every forward pass.
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
        rows = x.shape[-2] // self.window
        windows = self.attend(_cut(x, self.window), self.masks["mask"] if self.shift else None)
        x = rearrange(
            windows, "(b y x) c h w -> b c (y h) (x w)", y=rows, x=x.shape[-1] // self.window
        ).contiguous()
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), dims=(2, 3))
        return x[:, :, :height, :width].contiguous()


def as_original(backbone: Backbone) -> Backbone:
    """Replace the attention of ``backbone``, in place; its function stays the same."""
    for stage in backbone.net.children():
        blocks = stage if isinstance(stage, nn.Sequential) else ()
        layers = [
            block for block in blocks if isinstance(getattr(block, "attn", None), WindowAttention2d)
        ]
        if not layers:
            continue
        masks: dict[str, torch.Tensor] = {}
        window = layers[0].attn.window
        shift = window // 2

        def make_mask(module, inputs, masks=masks, window=window, shift=shift) -> None:
            height, width = (size + -size % window for size in inputs[0].shape[-2:])
            masks["mask"] = _mask(height, width, window, shift, inputs[0].device)

        stage.register_forward_pre_hook(make_mask)
        for block in layers:
            block.attn = OriginalWindowAttention(block.attn, masks)
    backbone.net.channels_last = False
    set_recompute_activations(backbone, False)
    return backbone.to(memory_format=torch.contiguous_format)
