"""Affine sampling of a batch in float32, from a plan made on the host.

Coordinates are sums of a term for the column and one for the row, in fixed point: the host has both
from float64. Shears and translations need the neighbours along one axis only.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TAPS = np.arange(-1, 3)  # neighbours of a position, from the one at or before it
# Weights of the neighbours as polynomials of the position between the middle ones, by degree.
# Pillow's cubic convolution has slope -1.
LINEAR = ((0, 1, 0, 0), (0, -1, 1, 0), (0, 0, 0, 0), (0, 0, 0, 0))
CUBIC = ((0, 1, 0, 0), (-1, 0, 1, 0), (2, -2, 1, -1), (-1, 1, -1, 1))
POLYNOMIALS = np.float32([LINEAR, CUBIC])  # filter, degree, neighbour
WHOLE = 2.0**-12  # added to sums, so that whole numbers are not rounded down to the next lower one


def is_along_axis(values: np.ndarray) -> np.ndarray:
    """Return which of the affine ``values`` ``N 6`` move pixels along rows or columns only."""
    return _is_along_x(values) | (values[:, [0, 1, 2, 4]] == (1, 0, 0, 1)).all(1)


def _is_along_x(values: np.ndarray) -> np.ndarray:
    return (values[:, [0, 3, 4, 5]] == (1, 0, 1, 0)).all(1)


def plan(
    values: np.ndarray, bicubic: np.ndarray, lines: int, height: int, width: int
) -> dict[str, np.ndarray]:
    """Prepare :func:`sample` on the host.

    Args:
        values: float64 ``N 6``, see ``Kind``; the first ``lines`` are along an axis.
        bicubic: bool ``N``.
        lines: How many move pixels along an axis.
        height, width: Of the images.

    Returns:
        Small arrays to upload. There is one coordinate for an image along an axis; for the others
        there is x, and after those y: ``M`` in all.
    """
    is_x = _is_along_x(values[:lines])
    turned = values[lines:]
    line = np.where(is_x[:, None], values[:lines, :3], values[:lines, 3:])
    coefficients = np.concatenate([line, turned[:, :3], turned[:, 3:]])  # M 3
    is_x = np.concatenate([is_x, np.arange(2 * len(turned)) < len(turned)])  # M
    size = np.where(is_x, width, height)
    side = max(height, width)
    unit = 1 << (31 - (8 * side).bit_length())  # of fixed point: sums stay below 8 sides
    columns = coefficients[:, :1] * (np.arange(width) + 0.5) + coefficients[:, 2:] - 0.5
    rows = coefficients[:, 1:2] * (np.arange(height) + 0.5)
    area, images = height * width, np.arange(len(values))
    first = np.zeros(len(is_x), int)
    first[lines : len(values)] = area * images[lines:]
    across = is_x[:lines]
    integers = {
        "columns": np.rint(unit * columns.clip(-4 * side, 4 * side))[:, None],  # M 1 W
        "rows": np.rint(unit * rows.clip(-2 * side, 2 * side))[:, :, None],  # M H 1
        "least": np.full((len(is_x), 1, 1), -unit // 2),
        "most": (size * unit - unit // 2 - 1)[:, None, None],
        "taps": (first[:, None] + TAPS)[:, None, None],  # M 1 1 4
        "first": first[:, None, None, None],
        "last": (first + size - 1)[:, None, None, None],
        "stride": np.where(across, 1, width)[:, None, None, None],
        "line_rows": (
            area * images[:lines, None] + np.where(across[:, None], width * np.arange(height), 0)
        )[:, :, None, None],
        "line_columns": np.where(across[:, None], 0, np.arange(width))[:, None, :, None],
    }
    arrays = {name: array.astype(np.int32) for name, array in integers.items()}
    # along an axis, all pixels of a row or of a column are at the same place between two others
    between = (unit - 1) & (arrays["columns"] + arrays["rows"][:, :1])[:lines, 0]  # lines W
    columns = _weights(between / unit, bicubic[:lines])[:, None]
    between = (unit - 1) & (arrays["columns"][..., :1] + arrays["rows"])[:lines, :, 0]  # lines H
    rows = _weights(between / unit, bicubic[:lines])[:, :, None]
    across = across[:, None, None, None]
    degrees = unit ** -np.arange(4.0)[:, None]
    floats = {
        "line_row_weights": np.where(across, rows, 1),  # lines H 1 4
        "line_column_weights": np.where(across, 1, columns),  # lines 1 W 4
        "weights": np.tile(POLYNOMIALS[bicubic[lines:].astype(int)] * degrees, (2, 1, 1)),
    }
    return arrays | {name: array.astype(np.float32) for name, array in floats.items()}


def _weights(between: np.ndarray, bicubic: np.ndarray) -> np.ndarray:
    """Return the weights of four neighbours at places ``N L`` between the middle ones."""
    return between[..., None] ** np.arange(4) @ POLYNOMIALS[bicubic.astype(int)]


def sample(pixels: Tensor, fill: Tensor, plan: dict[str, Tensor]) -> None:
    """Replace images by what :func:`plan` has samples of.

    Args:
        pixels: uint8 ``N H W 3``, contiguous; they are changed.
        fill: uint8 ``3``, the colour of pixels from outside an image.
        plan: The arrays on the device.
    """
    height, width = pixels.shape[1:3]
    shift = 31 - (8 * max(height, width)).bit_length()
    lines = len(plan["stride"])
    table = (pixels + WHOLE).view(-1, 3)
    at = plan["columns"] + plan["rows"]  # M H W
    inside = at == at.clamp(plan["least"], plan["most"])
    taps = (at >> shift)[..., None] + plan["taps"]
    taps = taps.clamp_(plan["first"], plan["last"])  # M H W 4
    if lines:
        index = torch.addcmul(
            plan["line_rows"] + plan["line_columns"], taps[:lines], plan["stride"]
        )
        weights = plan["line_row_weights"] * plan["line_column_weights"]
        _combine(pixels[:lines], table, index, weights, inside[:lines], fill)
    if lines < len(pixels):
        x, y = taps[lines:].chunk(2)
        between = (at[lines:] & ((1 << shift) - 1))[..., None]
        constant, first, second, third = plan["weights"][:, None, None].unbind(3)  # M 1 1 4
        weights = torch.addcmul(second, between, third)
        weights = torch.addcmul(first, between, weights)
        across, down = torch.addcmul(constant, between, weights).chunk(2)  # N H W 4
        index = torch.add(x[..., None, :], y[..., None], alpha=width).flatten(3)  # N H W 16
        weights = (down[..., None] * across[..., None, :]).flatten(3)
        both = torch.logical_and(*inside[lines:].chunk(2))
        _combine(pixels[lines:], table, index, weights, both, fill)


def _combine(
    pixels: Tensor, table: Tensor, index: Tensor, weights: Tensor, inside: Tensor, fill: Tensor
) -> None:
    """Write into ``N H W 3`` the weighted sums of the rows of a table at ``index`` ``N H W K``."""
    index, weights = index.flatten(0, 2), weights.flatten(0, 2)
    if index.numel() >= 2**31:
        index = index.long()
    value = F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)
    pixels.copy_(value.clamp_(0, 255).view_as(pixels))
    torch.where(inside[..., None], pixels, fill, out=pixels)
