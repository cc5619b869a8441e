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
from tools.validate.classes import NUM_IMAGENET, labels, readable
from tools.validate.eval_models import EvalModel, eval_models
from tools.validate.metrics import class_scores, evaluate
from tools.validate.sets import EvalSet, open_set, read_real_labels
from utils import UserError

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


def write_classes(path: Path, row: Mapping[str, Any]) -> None:
    """Write the metrics of each class of a row as a CSV file."""
    columns, names = row["matched"].columns, row["matched"].column_names
    lines = []
    for output, name, score in zip(columns, names, class_scores(row["confusion"]), strict=True):
        images, recall, precision, wrong, wrong_images = score
        other = (None, None) if wrong is None else (columns[wrong], readable(names[wrong]))
        numbers = (images, recall, precision, *other, wrong_images)
        lines.append((output, name, readable(name), *numbers))
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


# by flag, the functions that write the file of a row
WRITERS = {
    "per_class": write_classes,
    "confusion": save_confusion,
    "reliability": save_reliability,
}


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
    for name in WRITERS:
        path = getattr(args, name)
        if path is not None and len(rows) > 1:
            number = f"{row['number']}-{row['weights']}-{row['size']}"
            path = path.with_name(f"{path.stem}-{number}{path.suffix}")
        if path is not None:
            yield name, path


def result_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, int]] = COLUMNS
) -> str:
    """Return the table of all rows, without empty columns.

    ``columns`` maps the keys of rows to their headings and decimals.
    """
    keys = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    if not any(row.get("corrupt") for row in rows):
        keys.remove("corrupt")

    def cell(value: object, decimals: int) -> str:
        text = "" if value is None else str(value)
        return f"{value:.{decimals}f}" if isinstance(value, float) else text

    cells = [[cell(row.get(key), columns[key][1]) for key in keys] for row in rows]
    return tables.aligned([columns[key][0] for key in keys], cells)


def finish(
    args: Namespace,
    rows: Sequence[Mapping[str, Any]],
    planned: Sequence[Mapping[str, Any]],
    failed: Sequence[str],
) -> int:
    """Print the table of the finished rows and write their files; return the exit status."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    outputs = tables.csv_output(args.csv, keys, rows)
    outputs += [
        (path, partial(WRITERS[name], row=row))
        for row in rows
        for name, path in paths_of(args, row, planned)
    ]
    try:
        if rows:
            print(f"\n{result_table(rows)}", flush=True)
    finally:
        status = cli.finish(outputs, failed)
    return status


def check_fit(subject: EvalModel, test_set: EvalSet) -> None:
    """Check that a model has the classes that the flags need.

    Raises:
        UserError: ``--data-path`` is missing, and the model is not one of the digits.
        DataError: ``--real-labels`` needs a model of ImageNet's classes.
    """
    args, source = subject.args, subject.source
    if args.data_path is None and args.data_set is None:
        known = source.classes or test_set.classes
        if (known, subject.num_outputs) != (test_set.classes, len(test_set.classes)):
            raise UserError(
                f"--data-path is missing: the default is {test_set.title}, whose classes are not "
                f"those of {source.label}"
            )
    if args.real_labels and subject.num_outputs != NUM_IMAGENET:
        raise DataError(
            f"--real-labels needs a model of ImageNet's {NUM_IMAGENET} classes; {source.label} has "
            f"{subject.num_outputs}"
        )


def open_sets(args: Namespace, device: torch.device) -> tuple[dict[int, EvalSet], list[dict]]:
    """Return the test set by size, and a row for each model without its results.

    Raises:
        UserError: A model cannot be evaluated.
    """
    labels = read_real_labels(args.real_labels) if args.real_labels else None
    sets: dict[int, EvalSet] = {}
    rows: list[dict[str, Any]] = []
    for subject in eval_models(args.checkpoints, args, device):
        size = subject.args.input_size
        if size not in sets:
            sets[size] = open_set(subject.args, device)
        check_fit(subject, sets[size])
        matched = subject.match(sets[size].classes, sets[size].title)
        if labels is not None and sets[size].real is None:
            sets[size].add_real_labels(labels)
        rows.append({"number": len(rows) + 1, **subject.row, "matched": matched})
    return sets, rows


def validate(args: Namespace, device: torch.device) -> int:
    """Evaluate all models on one test set, print the table and write the files.

    After a failure, the rows so far are printed and written.

    Returns:
        The exit status.
    """
    sets, planned = open_sets(args, device)  # of all models: errors before hours of work
    check_outputs(args, planned, next(iter(sets.values())).paths())
    pairs = args.confusion is not None or args.per_class is not None
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    told: set[str] = set()
    try:
        again = eval_models(args.checkpoints, args, device, quiet=True)
        for row, subject in zip(planned, again, strict=True):
            test_set, matched = sets[row["size"]], row["matched"]
            found = evaluate(subject, test_set, matched, pairs)
            rows.append(row | found)
            failed += subject.complaints(found["nonfinite"])
            cli.warn(found["messages"], told)
            line = f"{subject.label} on {test_set.title}, {matched}: top-1 {found['top1']:.3f}"
            print(shown(line), flush=True)
    finally:
        status = finish(args, rows, planned, failed)
    return status
