"""Resampling of position embeddings and relative position biases."""

import contextlib
import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from .cache import may_keep


def _line_weights(size: int, target: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the matrix ``target size`` that resamples a line: what becomes of each unit vector."""
    lines = torch.eye(size, dtype=dtype, device=device)[None, None]
    return F.interpolate(lines, size=(target, size), mode="bicubic", antialias=True)[0, 0]


@lru_cache(maxsize=64)
def _kept_line_weights(*geometry) -> torch.Tensor:
    with torch.inference_mode(False):  # cached for backward passes too
        return _line_weights(*geometry)


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


def resample_position_map(embedding: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Resample a position embedding to another size.

    Bicubic with antialiasing, computed in float32 at least, as a product with a matrix for each
    side: on CUDA, the gradient of ``interpolate`` is not deterministic. Returns the embedding
    itself if its size is already right.

    Args:
        embedding: ``1 C H W``.
        size: Target height and width.

    Returns:
        ``1 C height width`` in the dtype of ``embedding``.
    """
    if embedding.shape[-2:] == size:
        return embedding
    dtype, device = embedding.dtype, embedding.device
    is_half = dtype == torch.float16 or dtype == torch.bfloat16
    wide = embedding.float() if is_half else embedding
    if torch.jit.is_scripting():
        return F.interpolate(wide, size, mode="bicubic", antialias=True).to(dtype)
    else:  # TorchScript leaves it out
        make = _kept_line_weights if may_keep(embedding) else _line_weights
        rows, columns = (
            make(n, target, wide.dtype, device)
            for n, target in zip(embedding.shape[-2:], size, strict=True)
        )
        grid = wide[0].permute(1, 2, 0)  # H W C
        with _without_autocast(device.type):
            grid = columns @ (rows @ grid.flatten(1)).unflatten(1, grid.shape[1:])
        return grid.permute(2, 0, 1)[None].to(dtype)


def resample_tokens(
    embedding: torch.Tensor, grid: tuple[int, int], size: list[int], prefix: int = 0
) -> torch.Tensor:
    """Resample position embeddings ``1 P+N C`` of a grid to ``1 P+N' C`` of another size.

    Args:
        embedding: Of ``prefix`` tokens without a place, and of the grid in row order.
        grid, size: Height and width before and after.
        prefix: Number P of tokens that stay as they are.
    """
    height, width = grid
    if height == size[0] and width == size[1]:
        return embedding
    kept, moved = embedding[:, :prefix], embedding[:, prefix:]
    moved = moved.unflatten(1, [height, width]).permute(0, 3, 1, 2)  # 1 C y x
    moved = resample_position_map(moved, size).flatten(2).transpose(1, 2)
    return torch.cat([kept, moved], dim=1) if prefix > 0 else moved


def resample_bias_table(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Resample a table of relative position biases to another window.

    Args:
        table: ``(2 w - 1) ** 2`` rows, one column per head.
        rows: Target number of rows.
    """
    side, target = math.isqrt(table.shape[0]), math.isqrt(rows)
    grid = table.T.reshape(1, -1, side, side)
    return resample_position_map(grid, (target, target)).reshape(-1, rows).T
