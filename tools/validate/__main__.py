"""Evaluate checkpoints: print accuracy, likelihood, calibration and speed of each.

``python -m tools.validate CHECKPOINT ...`` prints a row for every checkpoint, at every size, with
its weights and with their moving average, from one pass over the images.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models import DataConfig
from pipeline.images import DataError
from pipeline.sources.split import FLAGS, HoldOut
from tools import cli, files, plots, tables
from tools.cli import shortened, shown
from tools.validate import imagenet_c, pictures
from tools.validate.classes import NUM_IMAGENET, RULES, labels, readable
from tools.validate.eval_models import EvalModel, check_sources, eval_models
from tools.validate.metrics import class_scores, evaluate
from tools.validate.sets import EvalSet, open_set, read_real_labels
from training import launch
from training.data import with_recorded_split
from training.network import with_amp_dtype
from training.parser import Parser, image_size
from utils import UserError

NETWORK = (
    "batch_size",
    "in_chans",
    "qk_scale_factor",
    "amp",
    "amp_dtype",
    "tf32",
    "channels_last",
    "compile",
    "compile_mode",
    "compile_blocks",
)
Row = Mapping[str, Any]
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


def write_classes(path: Path, row: Row) -> None:
    """Write the metrics of each class of a row as a CSV file."""
    columns, names = row["matched"].columns, row["matched"].column_names
    lines = []
    for output, name, score in zip(columns, names, class_scores(row["confusion"]), strict=True):
        images, recall, precision, wrong, wrong_images = score
        other = (None, None) if wrong is None else (columns[wrong], readable(names[wrong]))
        numbers = (images, recall, precision, *other, wrong_images)
        lines.append((output, name, readable(name), *numbers))
    tables.write_csv(path, CLASS_COLUMNS, lines)


def title_of(row: Row) -> str:
    """Return the title of a row's pictures: the end of the file's path, weights and size."""
    source = shortened(shown("/".join(Path(row["checkpoint"]).parts[-2:])), SOURCE_WIDTH)
    return f"{source}, {row['weights']}, {row['size']} pixels"


def save_confusion(path: Path, row: Row) -> None:
    """Write the picture of a row's confusion matrix."""
    names = labels(row["matched"].column_names, row["matched"].columns)
    plots.save(pictures.confusion_figure(row["confusion"], names, title_of(row)), path)


def save_reliability(path: Path, row: Row) -> None:
    """Write the reliability diagram of a row."""
    plots.save(pictures.reliability_figure(row["bins"], title_of(row)), path)


WRITERS = {  # of the files of a row
    "per_class": write_classes,
    "confusion": save_confusion,
    "reliability": save_reliability,
}
ENDINGS = {"csv": ".csv", "per_class": ".csv", "confusion": ".png", "reliability": ".png"}
OF_SETS = (*WRITERS, "real_labels", "data_path", "data_set", *FLAGS)
OF_SETS += ("labels",)  # not with --corruptions
SetKey = tuple[DataConfig, HoldOut | None, str | None]  # preprocessing, split and labels


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    description = __doc__.splitlines()[0]
    parser = Parser("python -m tools.validate", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help=f"weights to evaluate: {cli.SOURCES}")
    name = "model name, for files that do not contain it or for --pretrained"
    add("--model", metavar="NAME", help=name)
    published = "evaluate the published weights of --model instead of a CHECKPOINT"
    add("--pretrained", action="store_true", help=published)
    sizes = "image sizes in pixels, as 224 or 224x160 (HxW); default: that of the checkpoint"
    add("--input-size", type=image_size, nargs="+", metavar="SIZE", help=sizes)
    weights = "evaluate the weights, their moving average (ema), or both if there are both"
    add("--weights", choices=["model", "ema", "both"], default="both", help=weights)
    add("--fuse", action="store_true", help="fuse norms and branches for inference first")
    rules = "match class folders to outputs by position, ImageNet wnid or number; auto: by name"
    add("--classes", choices=RULES, default="auto", help=rules)
    table = "write the table; with --corruptions, that of errors"
    add("--csv", type=Path, metavar="FILE.csv", help=table)
    classes = "write recall, precision and confusion of each class"
    add("--per-class", type=Path, metavar="FILE.csv", help=classes)
    add("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix")
    bins = "draw the reliability diagram: accuracy by confidence"
    add("--reliability", type=Path, metavar="FILE.png", help=bins)
    real = "also count by ImageNet-ReaL's labels: its real.json, or timm for timm's copy"
    add("--real-labels", metavar="FILE", help=real)
    corruptions = "evaluate on ImageNet-C, a folder of CORRUPTION/SEVERITY/CLASS/*, instead"
    add("--corruptions", type=Path, metavar="FOLDER", help=corruptions)
    cli.add_flags(parser, [*NETWORK, *cli.data_flags(), "device"])
    return parser


def flag_of(name: str) -> str:
    """Return the flag of a value's name."""
    return f"--{name.replace('_', '-')}"


def check_outputs(args: Namespace, rows: Sequence[Row], images: Sequence[str] = ()) -> None:
    """Raise OutputError if a file of the rows cannot be written, or would overwrite an input."""
    outputs = [("--csv", args.csv)] if args.csv else []
    outputs += [(flag_of(name), path) for row in rows for name, path in paths_of(args, row, rows)]
    inputs = [*args.checkpoints, *filter(None, [args.real_labels, args.labels]), *images]
    files.check_outputs(outputs, inputs)
    for flag, path in outputs:
        files.check_writable(flag, path)


def paths_of(args: Namespace, row: Row, rows: Sequence[Row]) -> Iterator[tuple[str, Path]]:
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


def check(args: Namespace) -> None:
    """Raise UserError if flags contradict each other, OutputError if a file cannot be written."""
    check_sources(args.checkpoints, args)
    given = [flag_of(name) for name in OF_SETS if getattr(args, name) is not None]
    if args.corruptions is not None and given:
        raise UserError(
            f"{given[0]} cannot be used with --corruptions, which reads its own folders and counts "
            f"errors only"
        )
    for name, ending in ENDINGS.items():
        files.check_suffix(flag_of(name), getattr(args, name), ending)
    check_outputs(args, [{}])


def check_fit(subject: EvalModel, test_set: EvalSet) -> None:
    """Raise UserError if a model does not have the classes that the flags need."""
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


def with_split(args: Namespace, subject: EvalModel, told: set[str]) -> Namespace:
    """Return the flags with the split of the model's training; ``told`` has the lines printed."""

    def tell(line: str) -> None:
        if line not in told:
            print(shown(line), flush=True)
            told.add(line)

    source = subject.source
    return with_recorded_split(args, source.checkpoint, source.label, tell, test_folders=True)


def plan(args: Namespace, device: torch.device) -> tuple[dict[SetKey, EvalSet], list[Row]]:
    """Return the test sets by their keys, and the row of each model before it is evaluated."""
    real_labels = read_real_labels(args.real_labels) if args.real_labels else None
    sets: dict[SetKey, EvalSet] = {}
    rows: list[Row] = []
    told: set[str] = set()
    for subject in eval_models(args.checkpoints, args, device):
        flags = with_split(args, subject, told)
        key = (subject.images, HoldOut.of(vars(flags)), flags.labels)
        if key not in sets:
            sets[key] = open_set(flags, device, subject.images)
        test_set = sets[key]
        check_fit(subject, test_set)
        matched = subject.match(test_set.classes, test_set.title)
        if real_labels is not None and test_set.real is None:
            test_set.add_real_labels(real_labels)
        number = len(rows) + 1
        rows.append({"number": number, **subject.row, "matched": matched, "set": key})
    return sets, rows


def finish(
    args: Namespace, rows: Sequence[Row], planned: Sequence[Row], failed: Sequence[str]
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
            print(f"\n{tables.result_table(rows, COLUMNS)}", flush=True)
    finally:
        status = cli.finish(outputs, failed)
    return status


def validate(args: Namespace, device: torch.device) -> int:
    """Evaluate all models on one test set, print the table and write the files.

    After a failure, the rows so far are printed and written. Returns the exit status.
    """
    sets, planned = plan(args, device)  # of all models: errors before hours of work
    check_outputs(args, planned, [path for each in sets.values() for path in each.paths()])
    for line in dict.fromkeys(line for each in sets.values() for line in each.lines()):
        print(shown(line), flush=True)
    pairs = args.confusion is not None or args.per_class is not None
    rows: list[Row] = []
    failed: list[str] = []
    told: set[str] = set()
    try:
        again = eval_models(args.checkpoints, args, device, quiet=True)
        for row, subject in zip(planned, again, strict=True):
            test_set, matched = sets[row["set"]], row["matched"]
            found = evaluate(subject, test_set, matched, pairs)
            rows.append(row | found)
            failed += subject.complaints(found["nonfinite"])
            cli.warn(found["messages"], told)
            line = f"{subject.label} on {test_set.title}, {matched}: top-1 {found['top1']:.3f}"
            print(shown(line), flush=True)
    finally:
        status = finish(args, rows, planned, failed)
    return status


@cli.program
def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; return the exit status."""
    args = cli.parse(get_parser, argv)
    check(args)
    device = launch.select_device(args.device)
    args = with_amp_dtype(args, device)
    run = validate if args.corruptions is None else imagenet_c.validate
    return run(args, device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
