"""The images of an annotation file, read alike in training, evaluation and inference."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from object_detection.annotations import Annotations
from pipeline.images import DataError, load_image
from training.progress import shown


def load_checked(path: Path, entry: Mapping[str, Any], source: Path) -> Image.Image:
    """Return an image as RGB of 8 bits, upright as EXIF says, of the size of its annotations.

    Args:
        path: Image file.
        entry: ``height`` and ``width``.
        source: Annotation file, for messages.

    Raises:
        DataError: It cannot be decoded, or is of another size.
    """
    image = load_image(path, is_upright=True)
    check_size(image, path, entry, source)
    return image


def check_size(
    image: Image.Image, path: str | Path, entry: Mapping[str, Any], source: str | Path
) -> None:
    """Raise DataError if an image is not of the size that its annotations say."""
    expected = (entry["width"], entry["height"])
    if image.size != expected:
        turned = " (EXIF turns it)" if image.size == expected[::-1] else ""
        raise DataError(
            f"image {path} has {image.width}x{image.height} pixels{turned}, but {source} says "
            f"{expected[0]}x{expected[1]}"
        )


def check_files(found: Annotations, folder: Path) -> None:
    """Raise DataError unless every image of the annotations can be decoded; name the first."""
    for entry in shown(found.images, "images", len(found.images)):
        load_checked(folder / entry["file_name"], entry, found.path)
