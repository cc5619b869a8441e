"""Decoding image files, and the errors of data that cannot be used."""

import errno
import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision import transforms

MAX_ASPECT = 8
# Pillow also reads formats that it recognises by guesswork, or by calling Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
MAX_BYTES = 1 << 28  # of an encoded image
# bytes that decoding an image may take: more for large files, as real photographs are, than for
# small ones that claim many pixels
MAX_MEMORY, MEMORY_PER_BYTE = 480_000_000, 100
MEMORY_PER_PIXEL = {"JPEG2000": 24, "AVIF": 12, "WEBP": 16}  # bytes; others: 4, and 5 to convert
MAX_READS = 1 << 17  # Pillow parses markers, chunks, tags and strips in Python
MAX_TAGS = 1 << 21  # bytes of numbers in a TIFF's tags, which Pillow unpacks to Python's
MAX_EXIF = 32  # segments of 64 kB, whose numbers Pillow unpacks for the resolution
MAX_PLAIN = 1 << 23  # bytes of a PPM in decimal digits, parsed in Python
# scans of a progressive JPEG: those of libjpeg's, mozjpeg's and jpegtran's scripts, and any
USUAL_SCANS, MAX_SCANS = 20, 100
MAX_SCANNED = 1 << 30  # pixels times scans, of more than the usual number
# of TIFF's types; 0 for bytes, texts and unknown ones, which Pillow does not unpack
NUMBER_BYTES = np.array([0, 0, 0, 2, 4, 8, 1, 0, 2, 4, 8, 4, 8, 4, 0, 0, 8, 0], np.float64)
EXIF_MARKS = (b"Exif", b"EXIF", b"eXIf", b"exif", b"tiff:Orientation")  # of all formats but TIFF
TURNED = range(2, 9)  # EXIF orientations other than upright
GREY_OF_16_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # 0..65535 to 0..255
RRC_SCALE, RRC_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # timm's random resized crop


class DataError(Exception):
    """The data cannot be used as given; the message names the path and what would be right.

    Not a UserError, of which the package of models and images knows nothing.
    """


class CorruptImageError(DataError):
    """An image file cannot be decoded."""


class _CountedReads(io.BytesIO):
    """An encoded image of which no more than ``MAX_READS`` parts are read."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError(f"it has more than {MAX_READS} parts")
        return super().read(size)


def open_regular(path: str | Path) -> int:
    """Return a descriptor of a regular file, without waiting for the writer of a named pipe.

    Raises:
        OSError: It is missing, or not a regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def read_file(path: str | Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        CorruptImageError: It is missing, empty, or not a regular file; names the path.
    """
    try:
        descriptor = open_regular(path)
        try:
            status = os.fstat(descriptor)
            if status.st_size == 0:
                raise OSError("empty file")
            if status.st_size > MAX_BYTES:
                raise OSError(f"{status.st_size:,} bytes, of which at most {MAX_BYTES:,} are read")
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CorruptImageError(f"cannot decode image {path}: {_reason(error)}") from error


def decode_image(
    data: bytes, name: str | Path, is_upright: bool = False, is_grey: bool = False
) -> Image.Image:
    """Decode an encoded image to RGB, 8 bits per channel.

    The content tells the format. Of several frames or pages, the first is used. As in the
    published results, alpha is dropped, and neither a colour profile nor, by default, the EXIF
    orientation is applied. Grey of 16 bits is scaled to 8. Up to 179 million pixels (twice
    ``PIL.Image.MAX_IMAGE_PIXELS``) are decoded, and fewer of small files that claim many.

    Args:
        data: Encoded image.
        name: Its name for messages.
        is_upright: Apply the EXIF orientation.
        is_grey: See :func:`to_grey`.

    Raises:
        CorruptImageError: It is truncated, not an image, too large, or of a colour mode without
            a defined range; names it and the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF, palette transparency, many pixels
            _check_tags(data)
            with Image.open(_CountedReads(data), formats=IMAGE_FORMATS) as image:
                _check_cost(image, data)
                if is_upright:
                    image.getexif()  # kept by Pillow, which would also write it without the tag
                    image.info.pop("exif", None)
                    ImageOps.exif_transpose(image, in_place=True)
                image = _to_rgb(image)
                return to_grey(image) if is_grey else image
    except MemoryError:  # not a property of the file
        raise
    except Exception as error:  # on damaged files the decoders raise errors of any kind
        raise CorruptImageError(f"cannot decode image {name}: {_reason(error)}") from error


def orientation_of(data: bytes) -> int:
    """Return the EXIF orientation of an encoded image without decoding it.

    Returns:
        1 (upright or not given) to 8; 0 if it cannot be read, as :func:`decode_image` will say.
    """
    if data[:2] not in (b"II", b"MM") and not any(mark in data for mark in EXIF_MARKS):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_tags(data)
            with Image.open(_CountedReads(data), formats=IMAGE_FORMATS) as image:
                found = image.getexif().get(ExifTags.Base.Orientation, 1)
                return found if found in TURNED else 1
    except MemoryError:
        raise
    except Exception:  # on damaged files the decoders raise errors of any kind
        return 0


def _check_tags(data: bytes) -> None:
    """Check that the metadata of an encoded TIFF or JPEG take bounded time and memory to open.

    Raises:
        ValueError: They take more.
    """
    if data[:2] == b"\xff\xd8" and (count := data.count(b"Exif\0\0")) > MAX_EXIF:
        raise ValueError(f"{count} segments of EXIF, of which at most {MAX_EXIF} are read")
    if data[:2] not in (b"II", b"MM") or not {42, 43} & {*data[2:4]}:
        return
    order, is_big = "<" if data[:2] == b"II" else ">", data[2] == 43
    word, many = ("u8", "u8") if is_big else ("u4", "u2")
    kinds = [("tag", "u2"), ("type", "u2"), ("count", word), ("value", word)]
    entry = np.dtype([(name, order + kind) for name, kind in kinds])

    def number(kind: str, at: int) -> int:
        size = np.dtype(kind).itemsize
        return int(np.frombuffer(data[at : at + size].ljust(size, b"\0"), order + kind)[0])

    start = number(word, 8 if is_big else 4)
    table = data[start + np.dtype(many).itemsize :][: number(many, start) * entry.itemsize]
    entries = np.frombuffer(table, entry, len(table) // entry.itemsize)
    sizes = entries["count"] * NUMBER_BYTES[np.minimum(entries["type"], len(NUMBER_BYTES) - 1)]
    if (size := int(sizes[sizes <= len(data)].sum())) > MAX_TAGS:  # larger ones are not read
        raise ValueError(f"{size} bytes of tags, of which at most {MAX_TAGS} are read")


def _check_cost(image: Image.Image, data: bytes) -> None:
    """Check that an opened image takes bounded time and memory to decode.

    Raises:
        ValueError: It takes more.
    """
    pixels = image.width * image.height
    memory = MEMORY_PER_PIXEL.get(image.format, 4 if image.mode == "RGB" else 9)
    if image.format in ("JPEG", "MPO") and (scans := count_scans(data)) > 1:
        if not are_few_scans(scans, pixels):
            raise ValueError(
                f"{scans} scans of {pixels} pixels, of which at most"
                f" {min(MAX_SCANS, MAX_SCANNED // pixels)} are decoded"
            )
        memory += 2 * len(image.getbands())  # coefficients of all scans
    if pixels * memory > (allowed := allowed_memory(data)):
        raise ValueError(
            f"{pixels} pixels, of which at most {allowed // memory} are decoded in {image.format}"
            f" of mode {image.mode} and {len(data)} bytes"
        )
    if image.tile and image.tile[0][0] == "ppm_plain" and len(data) > MAX_PLAIN:
        raise ValueError(f"{len(data)} bytes of plain PPM, of which at most {MAX_PLAIN} are read")


def allowed_memory(data: bytes) -> int:
    """Return the bytes that decoding an encoded image may take."""
    return MAX_MEMORY + MEMORY_PER_BYTE * len(data)


def count_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG, or more if its metadata have some, too.

    It is 1 if the decoder stops after the first scan, as it does where that has all components.
    """
    at, components = 2, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xDA and 0 < components <= data[at + 4]:
            return 1
        if marker in (0xC0, 0xC1):  # sequential
            components = data[at + 9]
        elif not (0xE0 <= marker <= 0xFE or marker in (0xC4, 0xDB, 0xDD)) or length < 2:
            break
        at += 2 + length
    return data.count(b"\xff\xda")


def are_few_scans(scans: int, pixels: int) -> bool:
    """Return True if a JPEG of so many scans is decoded in bounded time."""
    return scans <= USUAL_SCANS or (scans <= MAX_SCANS and scans * pixels <= MAX_SCANNED)


def load_image(path: str | Path, is_upright: bool = False, is_grey: bool = False) -> Image.Image:
    """Decode an image file as :func:`decode_image` does.

    Raises:
        CorruptImageError: It cannot be read or decoded.
    """
    return decode_image(read_file(path), path, is_upright, is_grey)


def to_grey(image: Image.Image) -> Image.Image:
    """Return Pillow's luma of an RGB image, in three equal channels.

    Augmentation treats channels alike, so that they stay equal, and one of them is the input.
    """
    return image.convert("L").convert("RGB")


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
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image._new(image.im)  # without a copy, and without the file and its metadata


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
    """Repeat the pixels of a tiny image 4 times in each direction, until it is not tiny any more.

    Of so few pixels, timm's random resized crop may select a box whose sides round to 0. Other
    images are unchanged.

    Args:
        scale, ratio: Ranges of the crop's area and aspect ratio; timm's by default, with which an
            image of fewer than 5 pixels is tiny.
    """

    def __init__(
        self, scale: tuple[float, float] = RRC_SCALE, ratio: tuple[float, float] = RRC_RATIO
    ):
        widest = max(ratio[0], ratio[1], 1 / ratio[0], 1 / ratio[1])
        self.pixels = 0.25 * widest / scale[0]  # sides above 0.5 round to 1 or more
        self.side = max(ratio[0], 1 / ratio[1]) / 2  # of the crop of an image that is too narrow

    def is_tiny(self, height: int, width: int) -> bool:
        """Return True if an image of this size is enlarged."""
        return height * width <= self.pixels or min(height, width) <= self.side

    def __call__(self, image: Image.Image) -> Image.Image:
        while self.is_tiny(image.height, image.width):
            size = (4 * image.width, 4 * image.height)
            image = image.resize(size, Image.Resampling.NEAREST)
        return image
