"""Image folders: folders of classes, and ImageNet's layout."""

import os
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from ..images import DataError
from .base import Files
from .listing import (
    STRAY,
    LeftOut,
    Row,
    kinds,
    list_folders,
    named_images,
    some_of,
    walk,
)
from .split import HoldOut

VALIDATION = ("val", "validation", "valid", "test")  # folders of the split, the first is taken
IMAGES, FOLDERS = 100_000, 20_000  # counted at most, for a message
ONE_CLASS = "images have one class each, as FOLDER/CLASS/IMAGE"


def list_classes(folder: str | Path) -> list[str]:
    """Return the sorted names of the classes of ``folder/CLASS/*``.

    Raises:
        DataError: There are none, or the folder cannot be read.
    """
    names = list_folders(folder)
    if not names:
        raise DataError(f"{folder} has no folders of classes; {ONE_CLASS}{_others(folder)}")
    return names


def _others(folder: str | Path) -> str:
    """Return what a folder has next to what was looked for, for messages."""
    names = sorted(os.listdir(folder))
    loose = any(not top for top, _ in named_images(folder, 1))
    hint = ": --labels FILE takes the classes of images from a table" if loose else ""
    return f", but there are only {some_of(names, 3)}{hint}" if names else ""


def open_folder_of_classes(
    folder: str | Path, classes: Sequence[str] | None = None, *, is_train: bool = False
) -> Files:
    """Open the images of ``folder/CLASS/*``, at any depth within a class.

    Args:
        folder: Folder of the classes.
        classes: Classes of the training set, by which the images are numbered; default: those of
            the folder.
        is_train: Every class must have images. Else the classes without images are not among
            the classes, and a notice names them.

    Raises:
        DataError: There are no classes or no images, a training class has no images, a class is
            not one of ``classes``, a folder cannot be read, or a link leads to a folder above it.
    """
    list_classes(folder)  # an error, if there are none
    left_out = LeftOut(folder)
    by_class: dict[str, list[Row]] = {}
    for row in walk(folder, left_out):
        if row.top:
            by_class.setdefault(row.top, []).append(row)
        for path in row.images if not row.top else ():
            left_out.add(STRAY, path)
    found = {
        name: [path for row in sorted(by_class[name]) for path in row.images]
        for name in sorted(by_class)
    }
    empty = [name for name, paths in found.items() if not paths]
    if empty and (is_train or len(empty) == len(found)):
        raise DataError(
            f"{folder}: no images ({kinds()}) of class {some_of(empty)}{left_out.note()}"
        )
    for name in empty:
        del found[name]
    targets = np.repeat(np.arange(len(found)), [len(paths) for paths in found.values()])
    source = Files(list(chain.from_iterable(found.values())), targets, list(found), folder)
    source.left_out = left_out
    if absent := [name for name in empty if name not in (classes or ())]:
        source.notices += (f"{folder} has no images of class {some_of(absent)}",)
    return source if classes is None else source.in_classes(classes, str(folder))


def find_validation(root: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Return the folder of the validation split of ``root``, if there is one, and notices.

    ``valid`` and ``test`` count if they have folders of classes: ImageNet's ``test`` has none.
    """
    found = [
        name
        for name in VALIDATION
        if (root / name).is_dir() and (name in VALIDATION[:2] or list_folders(root / name))
    ]
    if not found:
        return None, ()
    notices = []
    if found[0] not in VALIDATION[:2]:
        notices.append(f"{root / found[0]} is the validation set: there is no val/ or validation/")
    if others := ", ".join(f"{name}/" for name in found[1:]):
        notices.append(f"{root / found[0]} is the validation set; {others} of {root} not used")
    return root / found[0], tuple(notices[-1:])


def check_folder(root: Path) -> None:
    """Raise DataError if the data folder does not exist, or is not a folder."""
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"data folder {root} {what} (--data-path); {ONE_CLASS}")


def open_image_folder(
    root: Path, is_train: bool, download: bool = False, held_out: HoldOut | None = None
) -> Files:
    """Open ImageNet's layout: ``train/CLASS/*``, and ``val/CLASS/*`` or another of ``VALIDATION``.

    Validation images are numbered by the classes of ``train``, if it is there.

    Args:
        root: Folder of the dataset.
        is_train: Open the training split (else validation).
        download: Accepted as by other openers; has no effect.
        held_out: Divides ``train/CLASS/*``, or ``CLASS/*`` of ``root``, instead.

    Raises:
        DataError: A folder is missing, a training class has no image, a validation class is
            not one of training, or there is a validation folder next to ``held_out``.
    """
    check_folder(root)
    train = root / "train"
    val, notices = find_validation(root)
    if held_out is not None:
        if val is not None:
            raise DataError(f"{held_out}: {val} is the validation set already: leave the flag out")
        return held_out.part(open_folder_of_classes(_undivided(root), is_train=True), is_train)
    folder = train if is_train else val
    if folder is None or not os.path.isdir(folder):
        wanted = "train/" if is_train else "val/ or validation/"
        raise DataError(
            f"{root} has no folder {wanted} (--data-path needs train/ and val/, in which"
            f" {ONE_CLASS}){(val is None and _undivided_images(root)) or _others(root)}"
        )
    if is_train:
        return open_folder_of_classes(folder, is_train=True)
    classes = list_classes(train) if train.is_dir() else None
    source = open_folder_of_classes(folder, classes)
    source.notices = notices + source.notices
    return source


def _undivided(root: Path) -> Path:
    """Return the folder of classes of a dataset without a validation folder."""
    train = root / "train"  # a class may be called so, too
    return train if train.is_dir() and list_folders(train) else root


def _undivided_images(root: Path) -> str:
    """Return which images a dataset without a validation folder has, for messages; or nothing."""
    folder = _undivided(root)
    tops = [top for top, _ in islice(named_images(folder, FOLDERS), IMAGES) if top]
    classes = len({*tops})
    if classes < 2:
        return ""
    more = "at least " if len(tops) == IMAGES else ""
    return (
        f", but {folder} has {more}{len(tops):,} images in {classes:,} folders of classes:"
        f" --val-split 0.2 would validate on a fifth of each"
    )
