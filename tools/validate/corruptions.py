"""ImageNet-C: errors under common corruptions (Hendrycks and Dietterich, ICLR 2019)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.images import DataError
from pipeline.sources.folder import list_folders

SEVERITIES = (1, 2, 3, 4, 5)
ALEXNET = {  # AlexNet's top-1 errors in percent, means over the severities
    "gaussian_noise": 88.6,
    "shot_noise": 89.4,
    "impulse_noise": 92.3,
    "defocus_blur": 82.0,
    "glass_blur": 82.6,
    "motion_blur": 78.6,
    "zoom_blur": 79.8,
    "snow": 86.7,
    "frost": 82.7,
    "fog": 81.9,
    "brightness": 56.5,
    "contrast": 85.3,
    "elastic_transform": 64.6,
    "pixelate": 71.8,
    "jpeg_compression": 60.7,
}


@dataclass(frozen=True)
class Corruption:
    """What a network achieves under a corruption.

    Attributes:
        name: Of the corruption.
        errors: Top-1 errors in percent, by severity from 1.
        is_imagenet: Whether they are over all of ImageNet's 1000 classes.
        corrupt: Files that were left out.
        nonfinite: Images whose outputs are not finite.
    """

    name: str
    errors: tuple[float, ...]
    is_imagenet: bool
    corrupt: int = 0
    nonfinite: int = 0

    @property
    def mean(self) -> float:
        """Mean error over the severities."""
        return sum(self.errors) / len(self.errors)

    @property
    def relative(self) -> float | None:
        """Corruption error, in percent of AlexNet's; None where it was not measured on the same."""
        is_measured = self.is_imagenet and self.name in ALEXNET
        return 100 * self.mean / ALEXNET[self.name] if is_measured else None


def find_corruptions(folder: Path) -> dict[str, list[Path]]:
    """The folders of each corruption, severity 1 to 5; the paper's first and in its order.

    Raises:
        DataError: The folder is missing or empty, or a severity is missing; names it.
    """
    if not os.path.isdir(folder):
        raise DataError(f"--corruptions {folder} is no folder")
    names = list_folders(folder)
    if not names:
        raise DataError(f"--corruptions {folder} has no folders CORRUPTION/SEVERITY/CLASS")
    names = [name for name in ALEXNET if name in names] + [n for n in names if n not in ALEXNET]
    found = {name: [folder / name / str(severity) for severity in SEVERITIES] for name in names}
    for paths in found.values():
        for path in paths:
            if not os.path.isdir(path):
                raise DataError(f"--corruptions needs severities 1 to 5: there is no folder {path}")
    return found


def mean_error(measured: Sequence[Corruption]) -> float:
    """Mean error over the corruptions, in percent."""
    return sum(one.mean for one in measured) / len(measured)


def mce(measured: Sequence[Corruption]) -> float | None:
    """Mean corruption error (section 4 of the paper), in percent; None without all 15."""
    relative = [one.relative for one in measured if one.relative is not None]
    return sum(relative) / len(relative) if len(relative) == len(ALEXNET) else None
