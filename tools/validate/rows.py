"""The rows of a table of networks, all evaluated on one test set, and their files."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.images import DataError
from tools import cli, files
from tools.validate import pictures, real, tables
from tools.validate.cases import Case, again, cases
from tools.validate.classes import NUM_IMAGENET, ClassMap
from tools.validate.evaluate import evaluate
from tools.validate.sets import EvalSet, open_set
from tools.validate.text import labels, shortened, shown
from utils import UserError

PER_ROW = ("per_class", "confusion", "reliability")  # flags whose files are written for each row
SOURCE_WIDTH = 32  # of a checkpoint's name above a picture
Row = dict[str, Any]


def flag_of(name: str) -> str:
    """The flag whose value is called ``name``."""
    return f"--{name.replace('_', '-')}"


def check_outputs(args: Namespace, rows: Sequence[Row], images: Sequence[str] = ()) -> None:
    """Refuse files of rows that cannot be written, or would overwrite something.

    Raises:
        OutputError: See :func:`files.check_outputs` and :func:`files.check_writable`.
    """
    outputs = [("--csv", args.csv)] if args.csv else []
    outputs += [(flag_of(name), path) for row in rows for name, path in paths_of(args, row, rows)]
    labels = [args.real_labels] if args.real_labels else []
    files.check_outputs(outputs, [*args.checkpoints, *labels, *images])
    for flag, path in outputs:
        files.check_writable(flag, path)


def paths_of(args: Namespace, row: Row, rows: Sequence[Row]) -> Iterator[tuple[str, Path]]:
    """The files of a row, by the names of their flags.

    Among several rows they are called ``STEM-NUMBER-WEIGHTS-SIZE.SUFFIX``.
    """
    for name in PER_ROW:
        path = getattr(args, name)
        if path is not None and len(rows) > 1:
            number = f"{row['number']}-{row['weights']}-{row['size']}"
            path = path.with_name(f"{path.stem}-{number}{path.suffix}")
        if path is not None:
            yield name, path


class Bench:
    """What networks are evaluated on: the test set at their sizes, and ImageNet-ReaL's labels."""

    def __init__(self, args: Namespace, device: torch.device):
        self.args, self.device = args, device
        self.labels = real.read_labels(args.real_labels) if args.real_labels else None
        self.sets: dict[int, EvalSet] = {}

    def fit(self, case: Case) -> tuple[EvalSet, ClassMap, torch.Tensor | None]:
        """The set of a case, the outputs of its classes, and its labels of ImageNet-ReaL, if any.

        Raises:
            UserError: There is no ``--data-path``, and the network is not one of the digits.
            DataError: The set cannot be had, or is not one of the network's classes.
        """
        size = case.args.input_size
        if size not in self.sets:
            self.sets[size] = open_set(case.args, self.device)
        test_set = self.sets[size]
        if self.args.data_path is None and self.args.data_set is None:
            known = case.network.classes or test_set.classes
            if (known, case.num_outputs) != (test_set.classes, len(test_set.classes)):
                raise UserError(
                    f"--data-path is missing: without it, images are of {test_set.title}, whose "
                    f"classes are not those of {case.network.label}"
                )
        matched = case.match(test_set.classes, test_set.title)
        found = None if self.labels is None else real_labels_of(case, self.labels, test_set)
        return test_set, matched, found

    def plan(self) -> list[Row]:
        """The rows to come; finds out what is wrong with any of them before hours go into one."""
        rows = []
        for case in cases(self.args.checkpoints, self.args, self.device):
            self.fit(case)
            row = {"number": len(rows) + 1, "checkpoint": case.network.label}
            rows.append(row | {"weights": case.weights, "size": case.args.input_size})
        return rows

    def images(self) -> list[str]:
        """Files of the set."""
        return next(iter(self.sets.values())).paths()


def real_labels_of(case: Case, labels: Sequence[Sequence[int]], test_set: EvalSet) -> torch.Tensor:
    """The labels of ImageNet-ReaL of a set, for a network of ImageNet's classes.

    Raises:
        DataError: The network knows others, or an image has no labels.
    """
    if case.num_outputs != NUM_IMAGENET:
        raise DataError(
            f"--real-labels are of ImageNet's {NUM_IMAGENET} classes, {case.network.label} knows "
            f"{case.num_outputs}"
        )
    return real.label_table(labels, test_set.file_names())


def validate(args: Namespace, device: torch.device) -> int:
    """Evaluate everything on one test set, print the table and write the files.

    If one case fails, the rows before it are printed and written all the same.

    Returns:
        The exit status.
    """
    bench = Bench(args, device)
    planned = bench.plan()
    check_outputs(args, planned, bench.images())
    pairs = args.confusion is not None or args.per_class is not None
    rows: list[Row] = []
    failed: list[str] = []
    told: set[str] = set()
    try:
        for row, case in zip(planned, again(args, device), strict=True):
            test_set, matched, found = bench.fit(case)
            scores = evaluate(
                case.model, test_set, matched, case.precision, case.args, pairs, found
            )
            rows.append(row | {"matched": matched} | vars(scores))
            failed += case.complaints(scores.nonfinite)
            cli.warn(scores.messages, told)
            line = f"{case.label} on {test_set.title}, {matched}: top-1 {scores.top1:.3f}"
            print(shown(line), flush=True)
    finally:
        status = finish(args, rows, planned, failed)
    return status


def finish(
    args: Namespace, rows: Sequence[Row], planned: Sequence[Row], failed: Sequence[str]
) -> int:
    """Print the table of the rows that are done, and write their files; the exit status."""
    write = {"per_class": tables.write_classes, "confusion": save_confusion}
    write["reliability"] = save_reliability
    outputs = [(args.csv, partial(tables.write_rows, rows=rows))] if args.csv and rows else []
    outputs += [
        (path, partial(write[name], row=row))
        for row in rows
        for name, path in paths_of(args, row, planned)
    ]
    try:
        if rows:
            print(f"\n{tables.table(rows)}", flush=True)
    finally:
        status = cli.finish(outputs, failed)
    return status


def title_of(row: Row) -> str:
    """What stands above the pictures of a row: the last parts of the file's path, and the rest."""
    source = shortened(shown("/".join(Path(row["checkpoint"]).parts[-2:])), SOURCE_WIDTH)
    return f"{source}, {row['weights']}, {row['size']} pixels"


def save_confusion(path: Path, row: Row) -> None:
    """Write the picture of a row's confusion matrix."""
    names = labels(row["matched"].column_names, row["matched"].columns)
    pictures.save(pictures.confusion_figure(row["confusion"], names, title_of(row)), path)


def save_reliability(path: Path, row: Row) -> None:
    """Write the picture of the reliability of a row's confidences."""
    pictures.save(pictures.reliability_figure(row["bins"], title_of(row)), path)
