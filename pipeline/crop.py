"""Crops of images in memory: decode the part of a JPEG that a crop needs, resize it, pad it."""

from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from .augment_ops import Box
from .images import allowed_memory, are_few_scans, count_scans

BASELINE = (0xC0, 0xC1)  # Huffman-coded, the image in one pass
PROGRESSIVE = 0xC2
MARGIN = 16  # rows: one block of chroma at half resolution
REDUCING_GAP = 2  # a decoded crop keeps at least this many pixels for one of the result's


class Header(NamedTuple):
    """Start-of-frame segment of a JPEG.

    Attributes:
        height, width: Size in pixels.
        offset: Offset of the two bytes of the height.
        is_baseline: True if the rows are coded once, from top to bottom.
    """

    height: int
    width: int
    offset: int
    is_baseline: bool


def read_header(data: bytes) -> Header | None:
    """Return the header of a complete 8-bit JPEG with one or three channels, else None."""
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":  # Pillow decides about truncated files
        return None
    start, end = 2, len(data) - 10
    while start < end:
        if data[start] != 0xFF:
            return None
        marker = data[start + 1]
        if marker in BASELINE or marker == PROGRESSIVE:
            height = data[start + 5] << 8 | data[start + 6]
            width = data[start + 7] << 8 | data[start + 8]
            is_known = data[start + 4] == 8 and data[start + 9] in (1, 3) and height and width
            return Header(height, width, start + 5, marker in BASELINE) if is_known else None
        if not (0xE0 <= marker <= 0xFE or marker in (0xC4, 0xDB, 0xDD)):
            return None
        start += 2 + (data[start + 2] << 8 | data[start + 3])
    return None


def is_readable(header: Header | None, data: bytes) -> bool:
    """Return True if :func:`decode_crop` may be tried; Pillow reports images that are too large."""
    if header is None:
        return False
    pixels, limit = header.height * header.width, Image.MAX_IMAGE_PIXELS
    scans = count_scans(data)
    memory = 4 if scans == 1 else 10
    is_small = limit is None or pixels <= 2 * limit
    is_small = is_small and pixels * memory <= allowed_memory(data)
    return is_small and are_few_scans(scans, pixels)


def decode_crop(data: bytes, header: Header, box: Box, size: tuple[int, int]) -> np.ndarray | None:
    """Decode a crop that will be resized to ``size``.

    Rows below the crop are not decoded: the decoder is told a smaller height. A crop at least
    four times as large as its result is decoded at 1/2, 1/4 or 1/8 of its size (scaled inverse
    transform), which moves its border by at most half a pixel of the reduced image. Otherwise
    the pixels equal Pillow's.

    Args:
        data: A JPEG.
        header: Its header.
        box: The crop.
        size: Height and width that the crop will be resized to.

    Returns:
        uint8 ``h w 3``, a view; None if the decoder fails.
    """
    top, left, height, width = box
    scale = 1
    while scale < 8 and min(height / size[0], width / size[1]) >= 2 * scale * REDUCING_GAP:
        scale *= 2
    rows = min(header.height, top + height + MARGIN * scale)
    if header.is_baseline and rows < header.height:
        at = header.offset
        data = b"".join((data[:at], rows.to_bytes(2, "big"), data[at + 2 :]))
    reduced = {}
    if scale > 1:
        shape = (rows if header.is_baseline else header.height, header.width)
        least = [-(-side // scale) for side in shape]
        reduced = {"min_height": least[0], "min_width": least[1], "min_factor": 2}
    try:
        pixels = simplejpeg.decode_jpeg(data, strict=False, **reduced)
    except ValueError:
        return None
    edges = (top, top + height, left, left + width)
    first, last, start, stop = (round(edge / scale) for edge in edges)
    return pixels[first:last, start:stop]


def crop_slices(box: Box) -> tuple[slice, slice]:
    """Return the rows and columns of a box."""
    top, left, height, width = box
    return slice(top, top + height), slice(left, left + width)


def crop_padded(pixels: np.ndarray, top: int, left: int, padding: int) -> np.ndarray:
    """Crop an image ``H W 3`` to its own size at ``top``, ``left`` after padding it with black."""
    height, width, _ = pixels.shape
    part = np.zeros_like(pixels)
    rows, columns = top - padding, left - padding
    part[max(0, -rows) : height - rows, max(0, -columns) : width - columns] = pixels[
        max(0, rows) : height + rows, max(0, columns) : width + columns
    ]
    return part


def resize(pixels: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resize uint8 ``h w 3`` to ``H W 3`` with antialiasing, as Pillow does.

    Args:
        pixels: The image, writable.
        size: New height and width.
        mode: ``bilinear`` or ``bicubic``.
    """
    # 1 3 h w; in this order of calls, PyTorch sees channels last and takes the faster kernel
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(image, size, mode=mode, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def flip(pixels: np.ndarray, axis: int = 1) -> np.ndarray:
    """Flip an image ``H W 3`` along an axis, 1: horizontally."""
    return torch.from_numpy(pixels).flip(axis).numpy()  # several times as fast as NumPy
