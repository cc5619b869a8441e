"""The dataset of a run: lines for the log and the content of ``data.json``."""

from argparse import Namespace
from typing import Any

from datasets import data_set_name
from pipeline.sources.base import Source
from pipeline.sources.download import without_query
from pipeline.sources.listing import some_of
from pipeline.sources.summary import record_of


def data_line(args: Namespace, source: Source) -> str:
    """Return the name and place of the dataset of the flags, and its classes."""
    where = f" in {without_query(str(args.data_path))}" if args.data_path else ""
    if not (args.data_path or args.data_set):
        where = ", the demo, as --data-path is missing"
    names = [str(name) for name in source.classes]
    return f"data set {data_set_name(args)}{where}: {len(names):,} classes ({some_of(names)})"


def data_record(args: Namespace, splits: dict[str, Source]) -> dict[str, Any]:
    """Return name, folder and contents of the dataset of the flags, as plain values."""
    return {
        "data_set": data_set_name(args),
        "data_path": without_query(str(args.data_path)) if args.data_path else None,
        "splits": {name: record_of(source) for name, source in splits.items()},
    }
