"""Masks of COCO's format, polygons and run lengths (RLE), checked before they are decoded.

The decoder of a damaged RLE may never end, or write beyond its memory.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.images import DataError

POLYGON = 6  # numbers of the smallest polygon, a triangle


def use_coco_api() -> None:
    """Make ``pycocotools`` importable: faster-coco-eval under its name, or itself.

    Raises:
        DataError: Neither is installed.
    """
    try:
        import faster_coco_eval
    except ImportError:
        try:
            import pycocotools.mask  # noqa: F401
        except ImportError:
            raise DataError("COCO's format needs: pip install faster-coco-eval") from None
    else:
        faster_coco_eval.init_as_pycocotools()


def to_rle(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked polygons or RLE as COCO's compressed RLE."""
    from pycocotools import mask

    size = (image["height"], image["width"])
    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return mask.frPyObjects(segmentation, *size)
    return segmentation


def check_mask(segmentation: Any, image: Mapping[str, Any]) -> tuple[Any, int, int]:
    """Return polygons or an RLE, its area in pixels, and the number of polygons left out.

    Polygons of fewer than 3 points are left out; what has no pixels becomes None.

    Args:
        segmentation: Value of an annotation.
        image: Its ``height`` and ``width``.

    Raises:
        DataError: It is damaged; the message continues "the annotation has".
    """
    from pycocotools import mask

    given = 0
    if segmentation in (None, [], {}):
        return None, 0, 0
    if isinstance(segmentation, list):
        given = len(segmentation)
        segmentation = _check_polygons(segmentation, image)
    elif isinstance(segmentation, Mapping):
        segmentation = _check_rle(segmentation, [image["height"], image["width"]])
    else:
        raise DataError(f"the segmentation {short(segmentation)}, no polygons or RLE")
    area = int(mask.area(to_rle(segmentation, image))) if segmentation else 0
    return segmentation if area else None, area, given - len(segmentation) if given else 0


def _check_polygons(polygons: list[Any], image: Mapping[str, Any]) -> list[list[float]]:
    """Return the polygons of 3 points or more."""
    size, kept = (image["width"], image["height"]), []
    for polygon in polygons:
        points = numbers(polygon)
        if points is None or points.ndim != 1 or len(points) % 2:
            raise DataError(
                f"the polygon {short(polygon)}, which must be x and y of 3 points or more"
            )
        if len(points) < POLYGON:
            continue
        for side, values in zip(size, (points[::2], points[1::2]), strict=True):
            if values.min() < -side or values.max() > 2 * side:
                raise DataError(f"a polygon far outside of its {size[0]}x{size[1]} pixels")
        kept.append(polygon)
    return kept


def _check_rle(rle: Mapping[str, Any], size: list[int]) -> dict[str, Any] | None:
    """Return an RLE that decodes to exactly the image's pixels; None for one without runs."""
    counts = rle.get("counts")
    if rle.get("size") != size:
        raise DataError(f"an RLE of size {short(rle.get('size'))} in an image of {size}")
    runs = numbers(decode_runs(counts) if isinstance(counts, str) else counts)
    if runs is None or runs.ndim != 1 or (runs != np.floor(runs)).any():
        raise DataError(f"an RLE whose counts are damaged: {short(counts)}")
    if not len(runs):
        return None
    if runs.min() < 0 or runs.sum() != math.prod(size):
        total = runs.sum() if runs.min() >= 0 else f"a negative run ({runs.min():.0f})"
        raise DataError(f"an RLE of {total} pixels, not {math.prod(size)}")
    return {
        "size": size,
        "counts": counts if isinstance(counts, str) else runs.astype(int).tolist(),
    }


def decode_runs(text: str) -> list[int] | None:
    """Return the run lengths of COCO's compressed RLE; None for a damaged one.

    Each is written in groups of 5 bits, the lowest first, and 48 added to each group; bit 5 says
    that another one follows, and bit 4 of the last is the sign. From the fourth run on, the
    difference to the run before the last is written.
    """
    runs, value, shift = [], 0, 0
    for group in text.encode(errors="surrogatepass"):
        group -= 48
        if not 0 <= group < 64 or shift > 30:
            return None
        value |= (group & 31) << shift
        shift += 5
        if group < 32:
            value -= (group & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def numbers(value: Any) -> np.ndarray | None:
    """Return a list of finite numbers as float64; None for anything else."""
    if not isinstance(value, list):
        return None
    try:
        found = np.array(value) if value else np.zeros(0)
    except ValueError:  # of lists of several lengths
        return None
    if found.dtype.kind not in "iuf" or not np.isfinite(found).all():
        return None
    return found.astype(np.float64)


def short(value: Any) -> str:
    """Return a value of a JSON file for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
