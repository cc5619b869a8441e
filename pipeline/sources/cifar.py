"""CIFAR-10, CIFAR-100 and handwritten digits: small images, held in memory."""

from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from ..images import DataError
from .base import Pixels


def open_cifar10(root: Path, is_train: bool, download: bool) -> Pixels:
    """Open CIFAR-10 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009).

    Raises:
        DataError: It is missing or damaged.
    """
    return _open_cifar(CIFAR10, root, is_train, download)


def open_cifar100(root: Path, is_train: bool, download: bool) -> Pixels:
    """Open CIFAR-100 as :func:`open_cifar10` does."""
    return _open_cifar(CIFAR100, root, is_train, download)


def _open_cifar(cls: type[CIFAR10], root: Path, is_train: bool, download: bool) -> Pixels:
    try:
        found = cls(str(root), train=is_train, download=download)
    except (RuntimeError, OSError) as error:
        hint = "" if download else "; --download fetches it"
        raise DataError(f"no {cls.__name__} in {root}: {error}{hint}") from error
    return Pixels(found.data, found.targets, found.classes)


def open_digits(root: Path | None, is_train: bool, download: bool) -> Pixels:
    """Open scikit-learn's 1,797 handwritten digits, 8x8 grey, as RGB images.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998. Every fifth
    image of each class is kept for validation (1,442 for training, 355 for validation).
    """
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    number = np.zeros(len(digits.target), int)  # of each image within its class, from 1
    for target in range(10):
        of_class = digits.target == target
        number[of_class] = np.arange(of_class.sum()) + 1
    chosen = np.flatnonzero((number % 5 != 0) == is_train)
    grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)  # N H W 3
    return Pixels(pixels, digits.target[chosen], [str(digit) for digit in range(10)])
