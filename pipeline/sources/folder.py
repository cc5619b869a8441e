"""The datasets that a first command line names: image folders, CIFAR and handwritten digits."""

from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from pipeline.images import DataError
from pipeline.sources.base import Files, Pixels


def open_digits(root: Path | None, is_train: bool, download: bool) -> Pixels:
    """The 1,797 handwritten digits that scikit-learn brings, 8x8 grey, as RGB images.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998. Of each
    class every fifth image is kept for validation (1,442 for training, 355 for validation).
    """
    from sklearn.datasets import load_digits  # optional: only this dataset needs it

    digits = load_digits()
    seen = [0] * 10
    chosen = []
    for index, target in enumerate(digits.target.tolist()):
        seen[target] += 1
        if (seen[target] % 5 != 0) == is_train:
            chosen.append(index)
    grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)  # N H W 3
    return Pixels(pixels, digits.target[chosen], [str(digit) for digit in range(10)])


def open_image_folder(root: Path, is_train: bool, download: bool = False) -> Files:
    """ImageNet layout: ``train/CLASS/*`` and ``val/CLASS/*`` (or ``validation``).

    Raises:
        DataError: A folder is missing, a class has no image, or the two splits have
            different classes.
    """
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist (--data-path)")
    train = root / "train"
    val = next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)
    folder = train if is_train else val
    if folder is None or not folder.is_dir():
        wanted = "train/" if is_train else "val/ or validation/"
        raise DataError(f"{root} has no folder {wanted} (--data-path wants train/ and val/)")
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:  # no classes, or a class without images
        raise DataError(f"{folder}: {error}") from error
    other = val if is_train else train
    if other is not None and other.is_dir():
        others = {entry.name for entry in other.iterdir() if entry.is_dir()}
        if others != set(found.classes):
            lone = sorted(others ^ set(found.classes))
            raise DataError(
                f"{folder} and {other} have different classes: {', '.join(lone[:5])}"
                f"{', ...' if len(lone) > 5 else ''} in only one of them"
            )
    paths, targets = zip(*found.samples, strict=True)
    return Files(paths, targets, found.classes)


def open_cifar10(root: Path, is_train: bool, download: bool) -> Pixels:
    """A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Raises:
        DataError: It is not there, or damaged.
    """
    return _open_cifar(CIFAR10, root, is_train, download)


def open_cifar100(root: Path, is_train: bool, download: bool) -> Pixels:
    """CIFAR-100, as :func:`open_cifar10`."""
    return _open_cifar(CIFAR100, root, is_train, download)


def _open_cifar(cls: type[CIFAR10], root: Path, is_train: bool, download: bool) -> Pixels:
    try:
        found = cls(str(root), train=is_train, download=download)
    except (RuntimeError, OSError) as error:
        hint = "" if download else "; --download fetches it"
        raise DataError(f"no {cls.__name__} in {root}: {error}{hint}") from error
    return Pixels(found.data, found.targets, found.classes)
