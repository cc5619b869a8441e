"""The dataset of a run: lines for the log and the content of ``data.json``."""

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.images import DataError
from pipeline.sources.base import Source
from pipeline.sources.download import without_query
from pipeline.sources.folder import VALIDATION
from pipeline.sources.labels import has_validation
from pipeline.sources.listing import some_of
from pipeline.sources.named import data_set_name, is_image_folder
from pipeline.sources.split import HoldOut, record_of_files
from pipeline.sources.summary import record_of
from utils import log


def data_line(args: Namespace, source: Source) -> str:
    """Return the name and place of the dataset of the flags, and its classes."""
    where = f" in {without_query(str(args.data_path))}" if args.data_path else ""
    if not (args.data_path or args.data_set):
        where = ", the demo, as --data-path is missing"
    names = [str(name) for name in source.classes]
    return f"data set {data_set_name(args)}{where}: {len(names):,} classes ({some_of(names)})"


def data_record(args: Namespace, splits: dict[str, Source]) -> dict[str, Any]:
    """Return name, folder and contents of the dataset of the flags, as plain values.

    A validation set that flags chose has the flags, and its files or a digest of them.
    """
    record = {
        "data_set": data_set_name(args),
        "data_path": without_query(str(args.data_path)) if args.data_path else None,
        "splits": {name: record_of(source) for name, source in splits.items()},
    }
    if args.labels is not None:
        record["labels"] = str(args.labels)
    for name, source in splits.items():
        if held_out := getattr(source, "held_out", ""):
            record["splits"][name] |= {"held_out": held_out} | record_of_files(source)
    return record


def with_recorded_split(
    args: Namespace,
    checkpoint: Mapping[str, Any],
    label: str,
    warn: Callable[[str], None] = log,
    test_folders: bool = False,
) -> Namespace:
    """Return the flags, with the split and the labels that a checkpoint was trained with.

    Given flags win, with a warning; no split is taken for data with a validation set, no labels
    for another folder.

    Args:
        args: Flags.
        checkpoint, label: Contents of the checkpoint, and its name for messages.
        warn: Receives a line for what is taken, or differs.
        test_folders: Take nothing for another folder that is called as validation folders are.

    Raises:
        DataError: The recorded values, or a table of labels, cannot be used.
    """
    saved = checkpoint.get("args")
    if not (isinstance(saved, Mapping) and args.data_path and is_image_folder(args)):
        return args
    root, recorded, own = Path(args.data_path), saved.get("labels"), HoldOut.of(vars(args))
    same = os.path.realpath(str(saved.get("data_path"))) == os.path.realpath(root)
    if test_folders and not same and root.name in VALIDATION:
        return args
    try:
        theirs = HoldOut.of(saved)
    except DataError as error:
        raise DataError(f"flags that {label} was trained with: {error}") from error
    if own and theirs and own != theirs:
        warn(
            f"warning: {own}, but {label} was trained with {theirs}: images that it was trained on"
            f" are evaluated"
        )
    taken: dict[str, Any] = {}
    if args.labels is None and isinstance(recorded, str):
        if same:
            taken["labels"] = recorded
        elif not has_validation(root, None):
            warn(f"{label} was trained with --labels {recorded}, of another --data-path: not read")
    labels = taken.get("labels", args.labels)
    if theirs and not own and not has_validation(root, labels):
        taken |= vars(theirs)
    if taken:
        words = [str(theirs)] * ("val_split" in taken)
        words += [f"--labels {recorded}"] * ("labels" in taken)
        warn(f"{' '.join(words)}, as {label} was trained")
    return Namespace(**vars(args) | taken)
