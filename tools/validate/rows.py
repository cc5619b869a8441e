"""Rows of a table of models evaluated on one test set, and their files."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.images import DataError
from tools import cli, files, plots, tables
from tools.cli import shortened, shown
from tools.validate import pictures
from tools.validate.classes import NUM_IMAGENET, ClassMap, labels, readable
from tools.validate.eval_models import EvalModel, eval_models
from tools.validate.metrics import class_scores, evaluate
from tools.validate.sets import EvalSet, open_set, read_real_labels, real_label_table
from utils import UserError

PER_ROW = ("per_class", "confusion", "reliability")  # flags whose files are written for each row
SOURCE_WIDTH = 32  # of a checkpoint's name above a picture
COLUMNS = {  # of a row: heading, decimals
    "number": ("#", 0),
    "checkpoint": ("checkpoint", 0),
    "weights": ("weights", 0),
    "size": ("size", 0),
    "top1": ("top-1", 3),
    "top5": ("top-5", 3),
    "nll": ("NLL", 3),
    "ece": ("ECE", 3),
    "confidence": ("confidence", 3),
    "images": ("images", 0),
    "corrupt": ("corrupt", 0),
    "real_top1": ("ReaL top-1", 3),
    "real_top5": ("ReaL top-5", 3),
    "real_images": ("ReaL images", 0),
    "network_rate": ("network images/s", 1),
    "rate": ("images/s", 1),
}
CLASS_COLUMNS = ("class", "folder", "name", "images", "recall", "precision")
CLASS_COLUMNS += ("wrong_class", "wrong", "wrong_images")


def flag_of(name: str) -> str:
    """Return the flag of a value's name."""
    return f"--{name.replace('_', '-')}"


def check_outputs(
    args: Namespace, rows: Sequence[Mapping[str, Any]], images: Sequence[str] = ()
) -> None:
    """Raise OutputError if a file of the rows cannot be written, or would overwrite an input."""
    outputs = [("--csv", args.csv)] if args.csv else []
    outputs += [(flag_of(name), path) for row in rows for name, path in paths_of(args, row, rows)]
    real = [args.real_labels] if args.real_labels else []
    files.check_outputs(outputs, [*args.checkpoints, *real, *images])
    for flag, path in outputs:
        files.check_writable(flag, path)


def paths_of(
    args: Namespace, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Path]]:
    """Yield the name of the flag and the path of each file of a row.

    With several rows the files are called ``STEM-NUMBER-WEIGHTS-SIZE.SUFFIX``.
    """
    for name in PER_ROW:
        path = getattr(args, name)
        if path is not None and len(rows) > 1:
            number = f"{row['number']}-{row['weights']}-{row['size']}"
            path = path.with_name(f"{path.stem}-{number}{path.suffix}")
        if path is not None:
            yield name, path


class EvalSets:
    """The test set at the sizes of the models, and ImageNet-ReaL's labels."""

    def __init__(self, args: Namespace, device: torch.device):
        self.args, self.device = args, device
        self.labels = read_real_labels(args.real_labels) if args.real_labels else None
        self.by_size: dict[int, EvalSet] = {}

    def fit(self, subject: EvalModel) -> tuple[EvalSet, ClassMap, torch.Tensor | None]:
        """Return the test set of a model, the outputs of its classes, and ReaL labels, if any.

        Raises:
            UserError: ``--data-path`` is missing, and the model is not one of the digits.
            DataError: The test set is missing, or has classes or labels unknown to the model.
        """
        size = subject.args.input_size
        if size not in self.by_size:
            self.by_size[size] = open_set(subject.args, self.device)
        test_set = self.by_size[size]
        if self.args.data_path is None and self.args.data_set is None:
            known = subject.source.classes or test_set.classes
            if (known, subject.num_outputs) != (test_set.classes, len(test_set.classes)):
                raise UserError(
                    f"--data-path is missing: the default is {test_set.title}, whose classes are "
                    f"not those of {subject.source.label}"
                )
        matched = subject.match(test_set.classes, test_set.title)
        if self.labels is None:
            return test_set, matched, None
        if subject.num_outputs != NUM_IMAGENET:
            raise DataError(
                f"--real-labels needs a model of ImageNet's {NUM_IMAGENET} classes; "
                f"{subject.source.label} has {subject.num_outputs}"
            )
        return test_set, matched, real_label_table(self.labels, test_set.file_names())


def validate(args: Namespace, device: torch.device) -> int:
    """Evaluate all models on one test set, print the table and write the files.

    After a failure, the rows so far are printed and written.

    Returns:
        The exit status.
    """
    sets = EvalSets(args, device)
    planned: list[dict[str, Any]] = []  # of all models: errors before hours of work
    for subject in eval_models(args.checkpoints, args, device):
        sets.fit(subject)
        row = {"number": len(planned) + 1, "checkpoint": subject.source.label}
        planned.append(row | {"weights": subject.weights, "size": subject.args.input_size})
    check_outputs(args, planned, next(iter(sets.by_size.values())).paths())
    pairs = args.confusion is not None or args.per_class is not None
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    told: set[str] = set()
    try:
        again = eval_models(args.checkpoints, args, device, say=cli.silent)
        for row, subject in zip(planned, again, strict=True):
            test_set, matched, real = sets.fit(subject)
            found = evaluate(subject, test_set, matched, pairs, real)
            rows.append(row | {"matched": matched} | found)
            failed += subject.complaints(found["nonfinite"])
            cli.warn(found["messages"], told)
            line = f"{subject.label} on {test_set.title}, {matched}: top-1 {found['top1']:.3f}"
            print(shown(line), flush=True)
    finally:
        status = finish(args, rows, planned, failed)
    return status


def finish(
    args: Namespace,
    rows: Sequence[Mapping[str, Any]],
    planned: Sequence[Mapping[str, Any]],
    failed: Sequence[str],
) -> int:
    """Print the table of the finished rows and write their files; return the exit status."""
    write = {"per_class": write_classes, "confusion": save_confusion}
    write["reliability"] = save_reliability
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    write_rows = partial(tables.write_csv, heads=keys, rows=rows)
    outputs = [(args.csv, write_rows)] if args.csv and rows else []
    outputs += [
        (path, partial(write[name], row=row))
        for row in rows
        for name, path in paths_of(args, row, planned)
    ]
    try:
        if rows:
            print(f"\n{result_table(rows)}", flush=True)
    finally:
        status = cli.finish(outputs, failed)
    return status


def result_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, int]] = COLUMNS
) -> str:
    """Return the table of all rows, without empty columns.

    Args:
        rows: Values by the keys of columns.
        columns: Heading and decimals of each.
    """
    keys = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    if not any(row.get("corrupt") for row in rows):
        keys.remove("corrupt")

    def cell(value: object, decimals: int) -> str:
        text = "" if value is None else str(value)
        return f"{value:.{decimals}f}" if isinstance(value, float) else text

    cells = [[cell(row.get(key), columns[key][1]) for key in keys] for row in rows]
    return tables.aligned([columns[key][0] for key in keys], cells)


def write_classes(path: Path, row: Mapping[str, Any]) -> None:
    """Write the metrics of each class of a row as a CSV file."""
    matched, lines = row["matched"], []
    names = matched.column_names
    for output, name, score in zip(
        matched.columns, names, class_scores(row["confusion"]), strict=True
    ):
        wrong = (None, None)
        if score.wrong is not None:
            wrong = (matched.columns[score.wrong], readable(names[score.wrong]))
        numbers = (score.images, score.recall, score.precision)
        lines.append((output, name, readable(name), *numbers, *wrong, score.wrong_images))
    tables.write_csv(path, CLASS_COLUMNS, lines)


def title_of(row: Mapping[str, Any]) -> str:
    """Return the title of a row's pictures: the end of the file's path, weights and size."""
    source = shortened(shown("/".join(Path(row["checkpoint"]).parts[-2:])), SOURCE_WIDTH)
    return f"{source}, {row['weights']}, {row['size']} pixels"


def save_confusion(path: Path, row: Mapping[str, Any]) -> None:
    """Write the picture of a row's confusion matrix."""
    names = labels(row["matched"].column_names, row["matched"].columns)
    plots.save(pictures.confusion_figure(row["confusion"], names, title_of(row)), path)


def save_reliability(path: Path, row: Mapping[str, Any]) -> None:
    """Write the reliability diagram of a row."""
    plots.save(pictures.reliability_figure(row["bins"], title_of(row)), path)
