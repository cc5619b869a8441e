"""Resampling of position embeddings and relative position biases."""

import math

import torch
import torch.nn.functional as F


def resample_position_map(embedding: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resample a position embedding to another size.

    Bicubic with antialiasing, computed in float32 at least. Returns the embedding itself if its
    size is already right.

    Args:
        embedding: ``1 C H W``.
        size: Target height and width.

    Returns:
        ``1 C height width`` in the dtype of ``embedding``.
    """
    if embedding.shape[-2:] == size:
        return embedding
    dtype = embedding.dtype
    if dtype in (torch.float16, torch.bfloat16):
        embedding = embedding.float()
    return F.interpolate(embedding, size=size, mode="bicubic", antialias=True).to(dtype)


def resample_bias_table(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Resample a table of relative position biases to another window.

    Args:
        table: ``(2 w - 1) ** 2`` rows, one column per head.
        rows: Target number of rows.
    """
    side, target = math.isqrt(table.shape[0]), math.isqrt(rows)
    grid = table.T.reshape(1, -1, side, side)
    return resample_position_map(grid, (target, target)).reshape(-1, rows).T
