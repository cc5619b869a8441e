"""The errors of networks on ImageNet-C, see :mod:`tools.validate.corruptions`."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.sources.folder import list_classes
from tools import cli
from tools.validate import corruptions, tables
from tools.validate.cases import Case, again, cases
from tools.validate.classes import NUM_IMAGENET
from tools.validate.evaluate import evaluate
from tools.validate.sets import open_class_folders
from tools.validate.text import shown


def validate(args: Namespace, device: torch.device) -> int:
    """Measure errors under corruptions, print a table for every case and write the CSV file.

    If one fails, what was measured before is printed and written all the same.

    Returns:
        The exit status.
    """
    folders = corruptions.find_corruptions(args.corruptions)
    args = Namespace(**vars(args) | {"data_set": "IMNET"})  # for its usual size
    check_classes(args, device, folders)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    told: set[str] = set()
    try:
        for case in again(args, device):
            measured: list[corruptions.Corruption] = []
            try:
                for name, paths in folders.items():
                    measured.append(measure(case, name, paths, told))
            finally:
                failed += case.complaints(sum(one.nonfinite for one in measured))
                found = tables.corruption_rows(measured, len(measured) == len(folders))
                head = {"checkpoint": case.network.label, "weights": case.weights}
                head["size"] = case.args.input_size
                rows += [head | row for row in found]
                if found:
                    print(shown(f"{case.label} on {args.corruptions}"))
                    print(tables.corruption_table(found), flush=True)
    finally:
        outputs = [(args.csv, partial(tables.write_corruptions, rows=rows))]
        status = cli.finish(outputs if args.csv and rows else [], failed)
    return status


def check_classes(
    args: Namespace, device: torch.device, folders: Mapping[str, Sequence[Path]]
) -> None:
    """Find out what is wrong with any case, or the classes of any folder, before all else.

    Raises:
        DataError: A network does not know a class; see :func:`cases` for more.
    """
    for case in cases(args.checkpoints, args, device):
        for paths in folders.values():
            for path in paths:
                case.match(list_classes(path), str(path))


def measure(case: Case, name: str, paths: Sequence[Path], told: set[str]) -> corruptions.Corruption:
    """Evaluate a network on the folders of a corruption; ``told`` as for :func:`cli.warn`."""
    errors, is_imagenet, corrupt, nonfinite = [], True, 0, 0
    for path in paths:
        test_set = open_class_folders(path, case.args)
        matched = case.match(test_set.classes, test_set.title)
        scores = evaluate(case.model, test_set, matched, case.precision, case.args)
        cli.warn(scores.messages, told)
        errors.append(100 - scores.top1)
        is_imagenet &= matched.num_outputs == NUM_IMAGENET and not matched.is_subset
        corrupt += scores.corrupt
        nonfinite += scores.nonfinite
    return corruptions.Corruption(name, tuple(errors), is_imagenet, corrupt, nonfinite)
