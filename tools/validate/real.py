"""ImageNet-ReaL: several labels of an image, or none (Beyer et al., arXiv 2006.07159)."""

import json
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path

import timm.data
import torch

from pipeline.images import DataError
from tools.validate.classes import NUM_IMAGENET

TIMM = "timm"  # instead of a file: the copy that timm brings
NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


def read_labels(place: str) -> list[list[int]]:
    """The labels of each validation image, in the order of the numbers in their file names.

    Args:
        place: The authors' ``real.json``, or ``timm`` for the copy that it brings.

    Raises:
        DataError: The file cannot be read, or is no list of lists of classes.
    """
    try:
        if place == TIMM:
            data = pkgutil.get_data(timm.data.__name__, "_info/imagenet_real_labels.json")
        else:
            data = Path(place).read_bytes()
        labels = json.loads(data)
    except OSError as error:
        raise DataError(f"cannot read --real-labels {place}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"--real-labels {place} is no JSON file: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(one, list) for one in labels):
        raise DataError(f"--real-labels {place} must be a list with a list for every image")
    for number, one in enumerate(labels, start=1):
        for label in one:
            if not isinstance(label, int) or not 0 <= label < NUM_IMAGENET:
                raise DataError(
                    f"--real-labels {place}: image {number} has label {label!r}, which is none of "
                    f"0 to {NUM_IMAGENET - 1}"
                )
    return labels


def label_table(labels: Sequence[Sequence[int]], files: Sequence[str]) -> torch.Tensor:
    """Which labels each file has, ``N 1000`` of bool.

    Raises:
        DataError: The name of a file has no number, or one beyond the labels.
    """
    table = torch.zeros(len(files), NUM_IMAGENET, dtype=torch.bool)
    for row, file in enumerate(files):
        found = NUMBER.search(Path(file).name)
        if found is None:
            raise DataError(
                f"--real-labels goes by names such as ILSVRC2012_val_00000001.JPEG, not {file}"
            )
        number = int(found[1])
        if not 1 <= number <= len(labels):
            raise DataError(f"--real-labels has images 1 to {len(labels)}, but none for {file}")
        table[row, labels[number - 1]] = True
    return table


class RealCounts:
    """Counts predictions that are among the labels of their image.

    Args:
        table: Of :func:`label_table`, on the device of the logits.
    """

    def __init__(self, table: torch.Tensor):
        self._table = table
        self._counts = torch.zeros(3, dtype=torch.int64, device=table.device)

    def add(self, logits: torch.Tensor, numbers: torch.Tensor) -> None:
        """Count a batch: logits ``B 1000``, and numbers of the images ``B``."""
        labels = self._table[numbers]
        hits = labels.gather(1, logits.topk(5, dim=1).indices)
        hits &= logits.isfinite().all(1, keepdim=True)  # else nothing is predicted
        parts = (labels.any(1), hits[:, 0], hits.any(1))
        self._counts += torch.stack([part.sum() for part in parts])

    def result(self) -> tuple[int, int, int]:
        """Images with labels; those where the prediction, and one of the first five, is one."""
        images, first, five = self._counts.tolist()
        return images, first, five
