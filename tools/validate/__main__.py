"""Evaluate checkpoints: ``python -m tools.validate CHECKPOINT [CHECKPOINT ...]``.

Every checkpoint, at every size, with its weights and their moving average, is a row: accuracy,
likelihood, calibration and speed, from one pass over the images.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import datasets
import engine
import models
import utils
from configs import ConfigError, LaunchError, Place
from configs.flags import Parser
from tools.validate import corruptions, flags, pictures, real, tables
from tools.validate.cases import Case, cases, check_sources
from tools.validate.classes import NUM_IMAGENET, RULES
from tools.validate.evaluate import evaluate
from tools.validate.sets import EvalSet, open_class_folders, open_set
from training import OutputError

EXPECTED_ERRORS = (
    ConfigError,
    LaunchError,
    OutputError,
    datasets.DataError,
    engine.NoImagesError,
    models.CheckpointError,
    models.ModelError,
)
PER_ROW = ("per_class", "confusion", "reliability")  # flags whose files are written for each row


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser("tools.validate", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="files or addresses")
    add("--model", metavar="NAME", help="for files that do not name their model")
    add("--pretrained", action="store_true", help="timm's weights of --model instead of files")
    add("--input-size", type=int, nargs="+", help="pixels; the checkpoint's, if not given")
    add("--weights", choices=["model", "ema", "both"], default="both", help="both, where there are")
    add("--fuse", action="store_true", help="fold the net for inference first")
    add("--classes", choices=RULES, default="auto", help="what the names of classes stand for")
    add("--csv", type=Path, metavar="FILE", help="the table; of --corruptions, errors")
    add("--per-class", type=Path, metavar="FILE.csv", help="recall, precision and confusion")
    add("--confusion", type=Path, metavar="FILE.png", help="picture of the confusion matrix")
    add("--reliability", type=Path, metavar="FILE.png", help="accuracy by confidence")
    add("--real-labels", metavar="FILE", help="real.json of ImageNet-ReaL; timm: timm's copy")
    add("--corruptions", type=Path, metavar="FOLDER", help="ImageNet-C: CORRUPTION/SEVERITY/CLASS")
    flags.add_flags(parser, [*flags.NETWORK, *flags.data_flags(), *flags.PLACE])
    return parser


def check(args: Namespace) -> None:
    """What can be known before reading anything.

    Raises:
        ConfigError: Flags contradict each other.
        OutputError: A file cannot be written.
    """
    check_sources(args.checkpoints, args)
    if args.corruptions is not None:
        given = [name for name in (*PER_ROW, "real_labels") if getattr(args, name) is not None]
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            raise ConfigError(f"{flag} is not for --corruptions, which counts errors alone")
    for name in ("csv", *PER_ROW):
        flags.check_folder(f"--{name.replace('_', '-')}", getattr(args, name))
    for name in ("confusion", "reliability"):
        path = getattr(args, name)
        if path is not None:
            pictures.new_figure(1, 1, f"--{name}")  # so that its absence is told now
            if path.suffix != ".png":
                raise OutputError(f"--{name} {path} must end in .png")


def validate(args: Namespace, device: torch.device) -> None:
    """Evaluate everything on one test set, print the table and write the files."""
    labels = real.read_labels(args.real_labels) if args.real_labels else None
    pairs = args.confusion is not None or args.per_class is not None
    rows: list[dict[str, Any]] = []
    sets: dict[int, EvalSet] = {}
    for case in cases(args.checkpoints, args, device):
        size = case.args.input_size
        if size not in sets:
            sets[size] = open_set(case.args, device)
        test_set = sets[size]
        matched = case.match(test_set)
        found = None if labels is None else real_labels_of(case, labels, test_set)
        scores = evaluate(case.model, test_set, matched, case.precision, case.args, pairs, found)
        row = {"number": len(rows) + 1, "checkpoint": case.network.source}
        row |= {"weights": case.weights, "size": size, "matched": matched} | vars(scores)
        rows.append(row)
        print(f"{case.label} on {test_set.title}, {matched}: top-1 {scores.top1:.3f}", flush=True)
    print(f"\n{tables.table(rows)}")
    write(args, rows)


def real_labels_of(case: Case, labels: Sequence[Sequence[int]], test_set: EvalSet) -> torch.Tensor:
    """The labels of ImageNet-ReaL of a set, for a network of ImageNet's classes.

    Raises:
        DataError: The network knows others, or an image has no labels.
    """
    if case.num_outputs != NUM_IMAGENET:
        raise datasets.DataError(
            f"--real-labels are of ImageNet's {NUM_IMAGENET} classes, {case.network.source} knows "
            f"{case.num_outputs}"
        )
    return real.label_table(labels, test_set.file_names())


def write(args: Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Write the files that the flags ask for, and say so."""
    if args.csv:
        tables.write_rows(args.csv, rows)
        print(f"written to {args.csv}")
    for row in rows:
        title = f"{short_source(row['checkpoint'])}, {row['weights']}, {row['size']} pixels"
        for name in PER_ROW:
            path = getattr(args, name)
            if path is None:
                continue
            path = path if len(rows) == 1 else numbered(path, row)
            if name == "per_class":
                tables.write_classes(path, row)
            elif name == "confusion":
                names = row["matched"].column_names
                figure = pictures.confusion_figure(row["confusion"], names, title)
                pictures.save(figure, path)
            else:
                pictures.save(pictures.reliability_figure(row["bins"], title), path)
            print(f"written to {path}")


def short_source(source: str) -> str:
    """The last two parts of a path: folder and file."""
    return "/".join(Path(source).parts[-2:])


def numbered(path: Path, row: dict[str, Any]) -> Path:
    """Name of a row's file among several: ``STEM-NUMBER-WEIGHTS-SIZE.SUFFIX``."""
    return path.with_name(
        f"{path.stem}-{row['number']}-{row['weights']}-{row['size']}{path.suffix}"
    )


def validate_corruptions(args: Namespace, device: torch.device) -> None:
    """Measure errors under corruptions, print a table for every row and write the CSV file."""
    folders = corruptions.find_corruptions(args.corruptions)
    args = Namespace(**vars(args) | {"data_set": "IMNET"})  # for its usual size
    lines: list[tuple] = []
    for case in cases(args.checkpoints, args, device):
        measured, is_imagenet = errors_of(case, folders)
        mce = corruptions.mce(measured) if is_imagenet else None
        head = (case.network.source, case.weights, case.args.input_size)
        print(f"{case.label} on {args.corruptions}")
        print(tables.corruption_table(measured, mce, is_imagenet), flush=True)
        lines += [
            (*head, one.name, *one.errors, one.mean, one.relative if is_imagenet else None)
            for one in measured
        ]
        nothing = [None] * len(corruptions.SEVERITIES)
        lines.append((*head, "mean", *nothing, corruptions.mean_error(measured), mce))
    if args.csv:
        tables.write_corruptions(args.csv, lines)
        print(f"written to {args.csv}")


def errors_of(
    case: Case, folders: Mapping[str, Sequence[Path]]
) -> tuple[list[corruptions.Corruption], bool]:
    """The errors of a network, and whether they are over all of ImageNet's 1000 classes."""
    whole = []

    def top1_error(folder: Path) -> float:
        test_set = open_class_folders(folder, case.args)
        matched = case.match(test_set)
        whole.append(matched.num_outputs == NUM_IMAGENET and not matched.is_subset)
        return 100 - evaluate(case.model, test_set, matched, case.precision, case.args).top1

    return corruptions.measure(folders, top1_error), all(whole)


def start(argv: list[str]) -> None:
    """Run with the flags ``argv``."""
    args = flags.with_defaults(get_parser().parse_args(argv))
    check(args)
    device = utils.select_device(args.device, Place())
    engine.set_determinism(False)
    if args.corruptions is not None:
        validate_corruptions(args, device)
    else:
        validate(args, device)


def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    return utils.exit_status(lambda: start(argv), EXPECTED_ERRORS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
