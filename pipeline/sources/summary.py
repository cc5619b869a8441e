"""What a split of a dataset has: as lines for the log, and as plain values for a file."""

from collections import Counter
from typing import Any

import numpy as np

from ..images import TURNED, DataError, orientation_of
from .base import Encoded, Source

LOOKED_AT = 200  # images of a source whose orientation is read
UNEQUAL = 2  # times as many images in the largest class as in the smallest are mentioned


def class_counts(source: Source) -> np.ndarray:
    """Return the number of images of each class, ``C`` of int64."""
    return np.bincount(source.targets, minlength=len(source.classes))


def lines_of(split: str, source: Source) -> list[str]:
    """Return the lines that say what a split has, what was left out, and its notices."""
    counts, names = class_counts(source), source.classes
    used = np.flatnonzero(counts)
    share = f"{len(names):,}" if len(used) == len(names) else f"{len(used):,} of {len(names):,}"
    lines = [f"{split}: {len(source):,} images in {share} classes{source.left_out.note()}"]
    low, high = used[counts[used].argmin()], used[counts[used].argmax()]
    if counts[high] > UNEQUAL * counts[low]:
        lines.append(
            f"{split}: from {counts[low]:,} images of class {names[low]} to {counts[high]:,} of"
            f" class {names[high]}"
        )
    return lines + [f"notice: {notice}" for notice in source.notices]


def orientation_lines(*sources: Source) -> list[str]:
    """Return a notice if images have an EXIF orientation that is not applied, else nothing.

    Up to ``LOOKED_AT`` of each source are looked at, evenly spread. Remote ones are not.
    """
    seen, turned = 0, 0
    for source in sources:
        if not isinstance(source, Encoded) or source.is_upright or source.is_remote:
            continue
        for index in np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int):
            try:
                turned += orientation_of(source.read(int(index))) in TURNED
                seen += 1
            except DataError:  # reported where it is used
                continue
    if not turned:
        return []
    return [
        f"notice: {turned} of {seen} images looked at have an EXIF rotation, which is not applied:"
        f" --exif turns them"
    ]


def record_of(source: Source) -> dict[str, Any]:
    """Return images, classes, images per class and what was left out, as plain values."""
    left_out = {
        reason: {"count": count, "first": source.left_out.names.get(reason, [])}
        for reason, count in source.left_out.counts.items()
    }
    per_class: Counter[str] = Counter()  # two classes may have one name
    for name, count in zip(source.classes, class_counts(source).tolist(), strict=True):
        per_class[str(name)] += count
    return {
        "images": len(source),
        "classes": len(source.classes),
        "images_per_class": dict(per_class),
        "left_out": left_out,
    }
