"""ImageNet-C: errors under common corruptions (Hendrycks and Dietterich, ICLR 2019)."""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.images import DataError
from pipeline.sources.folder import list_classes
from pipeline.sources.listing import list_folders
from tools import cli, tables
from tools.validate.classes import NUM_IMAGENET
from tools.validate.eval_models import EvalModel, eval_models
from tools.validate.metrics import evaluate
from tools.validate.sets import open_class_folders

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
COLUMNS = {  # of a row: heading, decimals
    "corruption": ("corruption", 0),
    **{f"severity_{number}": (str(number), 2) for number in SEVERITIES},
    "error": ("mean error", 2),
    "relative": ("of AlexNet's", 1),
    "corrupt": ("corrupt", 0),
}


class Corruption(NamedTuple):
    """Results of a model under a corruption."""

    name: str
    errors: tuple[float, ...]  # top-1 errors in percent, by severity from 1
    is_imagenet: bool  # the errors are over all of ImageNet's 1000 classes
    corrupt: int = 0  # files left out
    nonfinite: int = 0  # images with non-finite outputs

    @property
    def mean(self) -> float:
        """Mean error over the severities."""
        return sum(self.errors) / len(self.errors)

    @property
    def relative(self) -> float | None:
        """Corruption error, in percent of AlexNet's; None where AlexNet's is unknown."""
        is_known = self.is_imagenet and self.name in ALEXNET
        return 100 * self.mean / ALEXNET[self.name] if is_known else None


def find_corruptions(folder: Path) -> dict[str, list[Path]]:
    """Return the folders of each corruption, severity 1 to 5, the paper's corruptions first."""
    if not os.path.isdir(folder):
        raise DataError(f"--corruptions {folder} is not a folder")
    names = list_folders(folder)
    if not names:
        raise DataError(f"--corruptions {folder} has no folders CORRUPTION/SEVERITY/CLASS")
    names = [name for name in ALEXNET if name in names] + [n for n in names if n not in ALEXNET]
    found = {name: [folder / name / str(severity) for severity in SEVERITIES] for name in names}
    for path in chain.from_iterable(found.values()):
        if not os.path.isdir(path):
            raise DataError(f"--corruptions needs severities 1 to 5: {path} does not exist")
    return found


def mce(measured: Sequence[Corruption]) -> float | None:
    """Mean corruption error (section 4 of the paper), in percent; None without all 15."""
    relative = [one.relative for one in measured if one.relative is not None]
    return sum(relative) / len(relative) if len(relative) == len(ALEXNET) else None


def rows_of(measured: Sequence[Corruption], is_complete: bool) -> list[dict[str, Any]]:
    """Return a row for each corruption and, if none is missing, one of their means."""
    rows = [
        {"corruption": one.name}
        | {f"severity_{number}": error for number, error in enumerate(one.errors, start=1)}
        | {"error": one.mean, "relative": one.relative, "corrupt": one.corrupt}
        for one in measured
    ]
    if is_complete:
        error = sum(one.mean for one in measured) / len(measured)
        means = {"corruption": "mean", "error": error, "relative": mce(measured)}
        rows.append(means | {"corrupt": sum(one.corrupt for one in measured)})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a model's rows, and its mCE if it is known."""
    mean = rows[-1]["relative"] if rows[-1]["corruption"] == "mean" else None
    text = tables.result_table(rows, COLUMNS)
    return text if mean is None else f"{text}\nmCE {mean:.1f}"


def measure(subject: EvalModel, name: str, paths: Sequence[Path], told: set[str]) -> Corruption:
    """Evaluate a model on the folders of a corruption; ``told`` as for :func:`cli.warn`."""
    found, is_imagenet = [], True
    for path in paths:
        test_set = open_class_folders(path, subject.args, subject.images)
        matched = subject.match(test_set.classes, test_set.title)
        for line in test_set.lines():
            print(cli.shown(line), flush=True)
        is_imagenet &= matched.num_outputs == NUM_IMAGENET and not matched.is_subset
        found.append(evaluate(subject, test_set, matched))
        cli.warn(found[-1]["messages"], told)
    errors = tuple(100 - one["top1"] for one in found)
    corrupt, nonfinite = (sum(one[key] for one in found) for key in ("corrupt", "nonfinite"))
    return Corruption(name, errors, is_imagenet, corrupt, nonfinite)


def validate(args: Namespace, device: torch.device) -> int:
    """Measure errors under corruptions, print a table for every model, write the CSV file.

    After a failure, the results so far are printed and written. Returns the exit status.
    """
    folders = find_corruptions(args.corruptions)
    for subject in eval_models(args.checkpoints, args, device):  # errors before hours of work
        for path in chain.from_iterable(folders.values()):
            subject.match(list_classes(path), str(path))
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    told: set[str] = set()
    try:
        for subject in eval_models(args.checkpoints, args, device, quiet=True):
            measured: list[Corruption] = []
            try:
                for name, paths in folders.items():
                    measured.append(measure(subject, name, paths, told))
            finally:
                failed += subject.complaints(sum(one.nonfinite for one in measured))
                found = rows_of(measured, len(measured) == len(folders))
                rows += [subject.row | row for row in found]
                if found:
                    print(cli.shown(f"{subject.label} on {args.corruptions}"))
                    print(table(found), flush=True)
    finally:
        heads = ("checkpoint", "weights", "size", *COLUMNS)
        status = cli.finish(tables.csv_output(args.csv, heads, rows), failed)
    return status
