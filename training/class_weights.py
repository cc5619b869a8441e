"""Weights of the classes in the loss, for sets whose classes differ in size."""

import csv
import math
from collections.abc import Sequence

import numpy as np
import torch

from utils import UserError

BALANCED = "balanced"


def class_weights(
    spec: str | None, classes: Sequence[str], targets: np.ndarray
) -> torch.Tensor | None:
    """Return the weights of ``--class-weights``, ``K``; their mean over the images is 1.

    Args:
        spec: ``balanced`` (inverse to the number of images), a file of lines ``CLASS,WEIGHT``, or
            None for no weights.
        classes: Names of the classes.
        targets: Class of each training image, ``N``.

    Raises:
        UserError: The file cannot be used, or a class has no images.
    """
    if spec is None:
        return None
    counts = np.bincount(targets, minlength=len(classes))
    if spec == BALANCED:
        if not counts.all():
            raise UserError(f"--class-weights balanced: no images of {classes[counts.argmin()]}")
        weights = 1 / counts
    else:
        weights = np.array(_read(spec, classes))
    total = (weights * counts).sum()
    if not total > 0:
        raise UserError(f"--class-weights {spec}: no class with images has a weight above 0")
    return torch.from_numpy(weights * len(targets) / total).float()


def _read(path: str, classes: Sequence[str]) -> list[float]:
    """Return the weight of each class from a file of names and weights."""
    found: dict[str, float] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if row:
                    _add(row, found, f"--class-weights {path}, line {number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read --class-weights {path}: {reason}; it must be {BALANCED}, or a text "
            f"file of lines CLASS,WEIGHT"
        ) from error
    for name in (*found, *classes):
        if name not in classes:
            raise UserError(f"--class-weights {path}: {name} is not a class of the training set")
        if name not in found:
            raise UserError(f"--class-weights {path}: class {name} has no weight")
    return [found[name] for name in classes]


def _add(row: Sequence[str], found: dict[str, float], where: str) -> None:
    """Add the class and weight of a row; raise UserError for any other row."""
    try:
        name, text = row
        weight = float(text)
        if not 0 <= weight < math.inf:
            raise ValueError
    except ValueError:
        line = ",".join(row)
        raise UserError(
            f"{where}: {line} must be CLASS,WEIGHT with a weight of 0 or more"
        ) from None
    if name in found:
        raise UserError(f"{where}: class {name} comes twice")
    found[name] = weight
