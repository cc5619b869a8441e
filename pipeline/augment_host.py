"""Augmentation of one image on the CPU with NumPy and Pillow.

Results are bitwise equal to Pillow's, except for shears and translations of larger images, which
are computed in float32 instead of float64: there, one pixel in thousands differs by 1.
"""

# Why there is a second implementation: for the default RandAugment at 224 pixels on one core, it
# takes 0.50 ms per image, pipeline.augment_device on batches of one image three times as long and
# Pillow 0.85 ms, where the rest of the loader takes about 1.8 ms.

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from .augment_ops import Kind, Operation

BLOCK = 64  # rows computed at once, so that intermediate results stay in the cache
WHOLE = 2.0**-10  # added to sums, so that whole numbers are not rounded down to the next lower one
SLIDE_PIXELS = 64 * 64  # below, Pillow is faster at shearing, too


def apply(
    image: np.ndarray, operations: Sequence[Operation], fill: tuple[int, int, int]
) -> np.ndarray:
    """Apply operations to an image, in order.

    Args:
        image: RGB, uint8 ``H W 3``; it is not changed.
        operations: Operations sampled for an image of this size.
        fill: Red, green and blue of pixels from outside the image.

    Returns:
        The new image, possibly read-only; the given one if there are no operations.
    """
    for kind, values, bicubic in operations:
        if kind == Kind.AFFINE:
            image = affine(image, values, bicubic, fill)
        elif kind != Kind.NONE:
            image = FUNCTIONS[kind](image, *values)
    return image


def affine(
    image: np.ndarray, values: tuple[float, ...], bicubic: bool, fill: tuple[int, int, int]
) -> np.ndarray:
    """Sample an image ``H W 3`` at the positions of the six ``values``, see ``Kind``."""
    a, b, c, d, e, f = values
    height, width, _ = image.shape
    large = height * width >= SLIDE_PIXELS
    if large and (a, d, e, f) == (1, 0, 1, 0):
        return _slide(image, b * (np.arange(height) + 0.5) + c, 1, bicubic, fill)
    if large and (a, b, c, e) == (1, 0, 0, 1):
        return _slide(image, d * (np.arange(width) + 0.5) + f, 0, bicubic, fill)
    return exact_affine(image, values, bicubic, fill)


def exact_affine(
    image: np.ndarray, values: Sequence[float], bicubic: bool, fill: tuple[int, int, int]
) -> np.ndarray:
    """Do as :func:`affine` does, by Pillow itself."""
    height, width, _ = image.shape
    moved = Image.fromarray(image).transform(
        (width, height),
        Image.Transform.AFFINE,
        values,
        Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR,
        fillcolor=fill,
    )
    return np.asarray(moved)


def _slide(
    image: np.ndarray, shifts: np.ndarray, axis: int, bicubic: bool, fill: tuple[int, int, int]
) -> np.ndarray:
    """Move every row (axis 1) or column (axis 0) of an image ``H W 3`` along itself.

    Pixel i of a line is interpolated at i + shift. Between the centre and the outer edge of an
    outermost pixel its value is repeated; beyond the edge is ``fill``.
    """
    height, width, _ = image.shape
    size = image.shape[axis]
    shifts = np.clip(shifts, -size, size)
    nearest = np.floor(shifts + 0.5).astype(int)
    start, stop = (
        max(0, -nearest.max()),
        min(size, size - nearest.min()),
    )  # some line has pixels
    colours = np.tile(np.uint8(fill), (1, width))
    out = colours.repeat(height, axis=0)  # H 3W
    if start >= stop:
        return out.reshape(image.shape)

    whole = np.floor(shifts)
    gathered = _gather(image, whole.astype(int), start, stop, axis, bicubic)
    weights = _weights(np.float32(shifts - whole), bicubic)
    inner = out[:, 3 * start : 3 * stop] if axis else out[start:stop]
    _interpolate(gathered.reshape(len(gathered), -1), weights, axis, inner)
    _fill_outside(out, colours, nearest, axis, start, stop)
    return out.reshape(image.shape)


def _gather(
    image: np.ndarray, whole: np.ndarray, start: int, stop: int, axis: int, bicubic: bool
) -> np.ndarray:
    """Gather the pixels from which ``start`` to ``stop`` of each line are interpolated.

    Args:
        image: ``H W 3``.
        whole: Shift of each line, in whole pixels.

    Returns:
        ``stop - start`` pixels along the axis, plus one (bilinear) or three.
    """
    size = image.shape[axis]
    first = whole + start - bicubic
    count = stop - start + (3 if bicubic else 1)
    before, after = max(0, -first.min()), max(0, first.max() + count - size)
    pixels = image.swapaxes(0, axis)
    padded = _empty_along(image, axis, before + size + after)
    along = padded.swapaxes(0, axis)
    along[before : before + size] = pixels
    along[max(0, before - 2) : before] = pixels[0]  # pixels further out are filled later
    along[before + size : before + size + 2] = pixels[-1]

    gathered = _empty_along(image, axis, count)
    sources, targets = padded.swapaxes(0, 1 - axis), gathered.swapaxes(0, 1 - axis)
    changes = np.flatnonzero(np.diff(first)) + 1
    for i, j in zip([0, *changes.tolist()], [*changes.tolist(), len(first)], strict=True):
        left = first[i] + before
        targets[i:j] = sources[i:j, left : left + count]
    return gathered


def _empty_along(image: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return an uninitialised array like ``image`` with another size along an axis."""
    shape = list(image.shape)
    shape[axis] = size
    return np.empty(shape, image.dtype)


def _weights(t: np.ndarray, bicubic: bool) -> list[np.ndarray]:
    """Return weights of two or four neighbours at ``t`` between the middle ones.

    Pillow's cubic convolution has slope -1.
    """
    if not bicubic:
        return [1 - t, t]
    u = 1 - t
    return [-t * u * u, 1 - 2 * t**2 + t**3, 1 - 2 * u**2 + u**3, -u * t * t]


def _interpolate(
    gathered: np.ndarray, weights: Sequence[np.ndarray], axis: int, out: np.ndarray
) -> None:
    """Add up weighted neighbours along an axis.

    Args:
        gathered: Result of :func:`_gather`, ``H 3W`` and more along the axis.
        weights: Weights of the neighbours, one number per line each.
        out: Receives the result, uint8 ``H 3W``.
    """
    height, width = out.shape
    columns = [w[:, None] if axis else w.repeat(3)[None] for w in weights]  # H 1 or 1 3W
    extra = len(weights) - 1
    values = np.empty((2, min(BLOCK, height), width), np.float32)
    for top in range(0, height, BLOCK):
        n = min(BLOCK, height - top)
        value, product = values[:, :n]
        if axis:
            part = gathered[top : top + n].astype(np.float32)
            taps = [part[:, 3 * i : 3 * i + width] for i in range(extra + 1)]
            factors = [column[top : top + n] for column in columns]
        else:
            part = gathered[top : top + n + extra].astype(np.float32)
            taps = [part[i : i + n] for i in range(extra + 1)]
            factors = columns
        np.multiply(taps[0], factors[0], out=value)
        for tap, factor in zip(taps[1:], factors[1:], strict=True):
            value += np.multiply(tap, factor, out=product)
        value += WHOLE
        out[top : top + n] = np.clip(value, 0, 255, out=value)


def _fill_outside(
    out: np.ndarray, colours: np.ndarray, nearest: np.ndarray, axis: int, start: int, stop: int
) -> None:
    """Fill pixels from outside the image between ``start`` and ``stop`` of each line.

    Args:
        out: ``H 3W``.
        colours: The fill, ``1 3W``.
        nearest: Shift of each line, rounded to pixels.
    """
    size = len(out) if axis == 0 else out.shape[1] // 3
    low, high = (
        max(0, -nearest.min()),
        min(size, size - nearest.max()),
    )  # all lines have pixels
    for first, last in ((start, low), (high, stop)):
        positions = np.arange(first, last)
        if axis:
            sources = positions.repeat(3) + nearest[:, None]
            band, colour = out[:, 3 * first : 3 * last], colours[:, 3 * first : 3 * last]
        else:
            sources = positions[:, None] + nearest.repeat(3)
            band, colour = out[first:last], colours
        np.copyto(band, colour, where=(sources < 0) | (sources >= size))


def _auto_contrast(image: np.ndarray) -> np.ndarray:
    return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def _equalize(image: np.ndarray) -> np.ndarray:
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def _solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    bright = (image >= int(threshold)).view(np.uint8)  # 0 or 1
    return image ^ -bright


def _solarize_add(image: np.ndarray, addend: float, threshold: float) -> np.ndarray:
    dark = (image < int(threshold)).view(np.uint8)  # 0 or 1
    return image + np.minimum(dark * np.uint8(addend), ~image)


def _posterize(image: np.ndarray, bits: float) -> np.ndarray:
    return image & np.uint8(256 - 2 ** (8 - int(bits)))


def _color(image: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))


def _contrast(image: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(ImageEnhance.Contrast(Image.fromarray(image)).enhance(factor))


def _brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return _blend(np.zeros((), np.int16), image, factor)


def _sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    wide = image.astype(np.uint16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    sharp = image.copy()
    smooth = ((2 * total + 13) // 26).astype(np.int16)  # total / 13, rounded
    sharp[1:-1, 1:-1] = _blend(smooth, image[1:-1, 1:-1], factor)
    return sharp


def _blend(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """Return ``degenerate + factor (image - degenerate)``, clipped and rounded down."""
    value = np.multiply(image - degenerate, np.float32(factor), dtype=np.float32)
    value += degenerate
    return np.clip(value, 0, 255, out=value).astype(np.uint8)


FUNCTIONS = {
    Kind.AUTO_CONTRAST: _auto_contrast,
    Kind.EQUALIZE: _equalize,
    Kind.INVERT: np.invert,
    Kind.SOLARIZE: _solarize,
    Kind.SOLARIZE_ADD: _solarize_add,
    Kind.POSTERIZE: _posterize,
    Kind.COLOR: _color,
    Kind.CONTRAST: _contrast,
    Kind.BRIGHTNESS: _brightness,
    Kind.SHARPNESS: _sharpness,
}
