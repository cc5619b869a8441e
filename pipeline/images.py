"""Decoding image files, and the errors of data that cannot be used."""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision import transforms

from utils import UserError

MAX_ASPECT = 8
# Pillow also reads formats that it recognises by guesswork, or by calling Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
GREY_OF_16_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # 0..65535 to 0..255


class DataError(UserError):
    """The data cannot be used as given; the message names the path and what would be right."""


class CorruptImageError(DataError):
    """An image file cannot be decoded."""


def read_file(path: str | Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        CorruptImageError: It is missing, empty, or not a regular file; names the path.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)  # without waiting for the writer of a named pipe
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            if status.st_size == 0:
                raise OSError("empty file")
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CorruptImageError(f"cannot decode image {path}: {_reason(error)}") from error


def decode_image(data: bytes, name: str | Path) -> Image.Image:
    """Decode an encoded image to RGB, 8 bits per channel.

    The content tells the format. Of several frames or pages, the first is used. As in the
    published results, alpha is dropped, and neither the EXIF orientation nor a colour profile is
    applied. Grey of 16 bits is scaled to 8. Up to 179 million pixels (twice
    ``PIL.Image.MAX_IMAGE_PIXELS``) are decoded without a warning, more are an error.

    Args:
        data: Encoded image.
        name: Its name for messages.

    Raises:
        CorruptImageError: It is truncated, not an image, too large, or of a colour mode without
            a defined range; names it and the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF, palette transparency, many pixels
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                return _to_rgb(image)
    except MemoryError:  # not a property of the file
        raise
    except Exception as error:  # on damaged files the decoders raise errors of any kind
        raise CorruptImageError(f"cannot decode image {name}: {_reason(error)}") from error


def load_image(path: str | Path) -> Image.Image:
    """Decode an image file as :func:`decode_image` does.

    Raises:
        CorruptImageError: It cannot be read or decoded.
    """
    return decode_image(read_file(path), path)


def _reason(error: Exception) -> str:
    """Return the message of an error in one line, never empty, without the path."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; where Pillow would clip 16 bits to white, scale to 8 bits.

    Raises:
        ValueError: The values have no defined range.
    """
    if image.mode == "F":
        raise ValueError("mode F (floating point) has no defined range of values")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= 2**16:
            raise ValueError(
                f"mode I (32-bit integers) has no defined range of values: {low}..{high} is not"
                " within 0..65535"
            )
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF may have 12
        image = Image.fromarray(GREY_OF_16_BITS[values << max(0, 16 - bits)])
    return image.convert("RGB")


class CropLongSide:
    """Crop an image around its centre to at most 8 times its short side.

    Resizing 30000x10 pixels by the short side to 256 would yield 768000x256 pixels, 790 MB.
    Other images are unchanged.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        longest = MAX_ASPECT * min(image.size)
        if max(image.size) <= longest:
            return image
        size = [min(image.height, longest), min(image.width, longest)]
        return transforms.functional.center_crop(image, size)


class EnlargeTiny:
    """Repeat the pixels of an image of fewer than 5 pixels 4 times in each direction.

    Of so few, timm's random crop may select a box whose sides round to 0. Other images are
    unchanged.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.width * image.height >= 5:
            return image
        return image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST)
