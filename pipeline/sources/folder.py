"""Image folders: the images of a folder, of folders of classes, and of ImageNet's layout."""

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from pipeline.images import DataError
from pipeline.sources.base import Files


def list_images(
    folder: str | Path,
    *,
    suffixes: Sequence[str] = IMG_EXTENSIONS,
    recursive: bool = True,
    hidden: bool = False,
) -> list[str]:
    """Return the paths of the images of a folder, sorted by folder, then by name.

    Args:
        folder: Folder of the images; links to folders are followed.
        suffixes: Lower-case suffixes of image files.
        recursive: List the folders within it, too.
        hidden: Also list files and folders whose names begin with a dot.

    Raises:
        DataError: A folder cannot be read.
    """
    found = []
    for place, _, names in sorted(_walk(folder, recursive, hidden)):
        found += [
            os.path.join(place, name)
            for name in sorted(names)
            if name.lower().endswith(tuple(suffixes)) and (hidden or not name.startswith("."))
        ]
    return found


def list_folders(folder: str | Path, *, hidden: bool = False) -> list[str]:
    """Return the sorted names of the folders in a folder.

    Args:
        folder: Folder of the folders; links to folders count.
        hidden: Also list names that begin with a dot.

    Raises:
        DataError: The folder cannot be read.
    """
    _, names, _ = next(_walk(folder, False, hidden))
    return sorted(names)


def list_classes(folder: str | Path, *, hidden: bool = False) -> list[str]:
    """Return the names of the classes of ``folder/CLASS/*`` as :func:`list_folders` does.

    Raises:
        DataError: There are none, or the folder cannot be read.
    """
    names = list_folders(folder, hidden=hidden)
    if not names:
        raise DataError(f"{folder} has no folders of classes")
    return names


def _walk(folder: str | Path, recursive: bool, hidden: bool) -> Iterator[tuple[str, list, list]]:
    """Yield the rows of ``os.walk`` for one folder, or also for all within it."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".")]
        yield place, folders, names
        if not recursive:
            return


def open_folder_of_classes(folder: str | Path, *, hidden: bool = False) -> Files:
    """Open the images of ``folder/CLASS/*``, at any depth within a class.

    Args:
        folder: Folder of the classes.
        hidden: Include names that begin with a dot, as torchvision's ``ImageFolder`` does.

    Raises:
        DataError: There are no classes, a class has no images, or a folder cannot be read.
    """
    classes = list_classes(folder, hidden=hidden)
    found = [list_images(os.path.join(folder, name), hidden=hidden) for name in classes]
    if empty := [name for name, paths in zip(classes, found, strict=True) if not paths]:
        raise DataError(
            f"{folder}: no images ({', '.join(IMG_EXTENSIONS)}) of class {some_of(empty)}"
        )
    targets = np.repeat(np.arange(len(classes)), [len(paths) for paths in found])
    return Files(list(chain.from_iterable(found)), targets, classes)


def open_image_folder(root: Path, is_train: bool, download: bool = False) -> Files:
    """Open ImageNet's layout: ``train/CLASS/*`` and ``val/CLASS/*`` (or ``validation``).

    Raises:
        DataError: A folder is missing, a class has no image, or the two splits have
            different classes.
    """
    if not os.path.isdir(root):
        raise DataError(f"data folder {root} does not exist (--data-path)")
    train = root / "train"
    val = next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)
    folder, other = (train, val) if is_train else (val, train)
    if folder is None or not os.path.isdir(folder):
        wanted = "train/" if is_train else "val/ or validation/"
        raise DataError(f"{root} has no folder {wanted} (--data-path needs train/ and val/)")
    found = open_folder_of_classes(folder, hidden=True)
    if other is not None and other.is_dir():
        others = list_folders(other, hidden=True)
        if others != found.classes:
            different = sorted(set(others) ^ set(found.classes))
            raise DataError(
                f"{folder} and {other} have different classes: {some_of(different)} in only one"
            )
    return found


def some_of(names: Sequence[str], count: int = 5) -> str:
    """Return the first names for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
