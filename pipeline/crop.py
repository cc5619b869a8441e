"""Decoding of what a crop needs of a JPEG."""

from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

BASELINE = (0xC0, 0xC1)  # Huffman-coded, the image in one pass
PROGRESSIVE = 0xC2
MARGIN = 16  # rows: one block of chroma at half resolution
REDUCING_GAP = 2  # a decoded crop keeps at least this many pixels for one of the result's


class Header(NamedTuple):
    """What the start-of-frame segment of a JPEG says.

    Attributes:
        height, width: Size in pixels.
        offset: Of the two bytes of the height.
        is_baseline: Whether rows are coded from top to bottom, once.
    """

    height: int
    width: int
    offset: int
    is_baseline: bool


def read_header(data: bytes) -> Header | None:
    """The header of a whole JPEG of 8 bits, grey or of three colours; else None."""
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":  # a cut one is for others to judge
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


def is_readable(header: Header | None) -> bool:
    """Whether :func:`decode_crop` may be tried: larger images are an error of the usual way."""
    limit = Image.MAX_IMAGE_PIXELS
    return header is not None and (limit is None or header.height * header.width <= 2 * limit)


def decode_crop(
    data: bytes, header: Header, box: tuple[int, int, int, int], size: int
) -> np.ndarray | None:
    """Decode a crop that is to be resized to ``size``.

    Rows below the crop are not decoded: the decoder is told a smaller height. Of a crop that is
    at least four times as large as its result, all frequencies that the result has no use for
    are left out (scaled inverse transform, by 1/2, 1/4 or 1/8), which moves its border by at
    most half a pixel of the reduced image. Other pixels are those that Pillow decodes.

    Args:
        data: A JPEG.
        header: Its header.
        box: Top, left, height and width of the crop.
        size: Of the side that the crop will be resized to.

    Returns:
        ``h w 3`` of uint8, a view; None where the decoder gives up.
    """
    top, left, height, width = box
    scale = 1
    while scale < 8 and min(height, width) >= 2 * scale * REDUCING_GAP * size:
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
