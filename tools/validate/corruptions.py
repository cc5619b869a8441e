"""ImageNet-C: errors under common corruptions (Hendrycks and Dietterich, ICLR 2019)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.images import DataError

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
    """Top-1 errors in percent under a corruption, by severity from 1."""

    name: str
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean error over the severities."""
        return sum(self.errors) / len(self.errors)

    @property
    def relative(self) -> float | None:
        """Corruption error, in percent of AlexNet's; None for one that it was not measured on."""
        return 100 * self.mean / ALEXNET[self.name] if self.name in ALEXNET else None


def find_corruptions(folder: Path) -> dict[str, list[Path]]:
    """The folders of each corruption, severity 1 to 5; the paper's first and in its order.

    Raises:
        DataError: The folder is missing or empty, or a severity is missing; names it.
    """
    if not folder.is_dir():
        raise DataError(f"--corruptions {folder} is no folder")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        raise DataError(f"--corruptions {folder} has no folders CORRUPTION/SEVERITY/CLASS")
    names = [name for name in ALEXNET if name in names] + [n for n in names if n not in ALEXNET]
    found = {name: [folder / name / str(severity) for severity in SEVERITIES] for name in names}
    for paths in found.values():
        for path in paths:
            if not path.is_dir():
                raise DataError(f"--corruptions needs severities 1 to 5: there is no folder {path}")
    return found


def measure(
    folders: Mapping[str, Sequence[Path]], top1_error: Callable[[Path], float]
) -> list[Corruption]:
    """The errors of a network in the folders of :func:`find_corruptions`."""
    return [
        Corruption(name, tuple(top1_error(path) for path in paths))
        for name, paths in folders.items()
    ]


def mean_error(measured: Sequence[Corruption]) -> float:
    """Mean error over the corruptions, in percent."""
    return sum(one.mean for one in measured) / len(measured)


def mce(measured: Sequence[Corruption]) -> float | None:
    """Mean corruption error (section 4 of the paper), in percent; None without all 15."""
    relative = {one.name: one.relative for one in measured if one.name in ALEXNET}
    if len(relative) < len(ALEXNET):
        return None
    return sum(relative.values()) / len(relative)
