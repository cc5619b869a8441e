"""The images of an annotation file, read alike in training, evaluation and inference."""

from collections.abc import Iterator, Mapping, Sequence
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


def find_images(found: Annotations, folders: Sequence[Path]) -> Path:
    """Return the first of ``folders`` that contains the images of the annotations.

    Raises:
        DataError: None does.
    """
    name = found.images[0]["file_name"]
    for folder in folders:
        if (folder / name).is_file():
            return folder
    looked = ", ".join(map(str, dict.fromkeys(folders)))
    raise DataError(f"image {name} of {found.path} is not in {looked} (--images FOLDER)")


def listing(found: Annotations, folder: Path) -> Iterator[str]:
    """Yield a line per image: its name and bytes.

    Raises:
        DataError: It cannot be found.
    """
    for image in found.images:
        path = folder / image["file_name"]
        try:
            yield f"{image['file_name']}, {path.stat().st_size} bytes"
        except OSError as error:
            raise DataError(f"cannot read image {path}: {error.strerror}") from error
