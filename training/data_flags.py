"""Flags of ``main.py`` that choose and read the dataset."""

import argparse
from argparse import BooleanOptionalAction as OnOff

from models.data_config import INTERPOLATIONS
from pipeline.sources.fine_grained import INAT_CATEGORIES
from pipeline.sources.named import DATA_SETS, HUB, data_set_named
from training.parser import flags_of, usable_cpus


def _data_set(name: str) -> str:
    try:
        data_set_named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be the part of each class to hold out, such as 0.2"
        ) from None


def add_data(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    names = ", ".join(DATA_SETS)
    add(
        "--data-set",
        type=_data_set,
        metavar="NAME",
        help=f"dataset: {names}, or {HUB}NAME of the Hugging Face Hub; default: IMNET (an image "
        "folder) with --data-path, else DIGITS",
    )
    add(
        *("--data-path", "--data-dir"),
        metavar="PATH",
        help="folder of the dataset, for IMNET with train/CLASS/* and val/CLASS/*; for WDS, also "
        "a pattern of shards, or a URL",
    )
    val_split = "hold out this part of every class for validation, if there is no validation folder"
    add("--val-split", type=_share, metavar="SHARE", help=val_split)
    folds = "divide every class into K folds instead, and hold out --fold"
    add("--k-folds", type=int, metavar="K", help=folds)
    add("--fold", type=int, metavar="I", help="fold to hold out for validation, from 0 to K - 1")
    labels = "table (CSV, TSV) of file and label, instead of a folder for each class"
    add("--labels", metavar="FILE", help=labels)
    shards = "for WDS: validation shards, if they are not next to --data-path"
    add("--val-path", metavar="PATH", help=shards)
    cache = "for WDS: cache of remote shards; default: a folder among the temporary files"
    add("--shard-cache", metavar="FOLDER", help=cache)
    download = ("--download", "--dataset-download")
    add(*download, action="store_true", help="download the dataset into --data-path")
    level = "for INAT*: taxonomic level of the classes"
    add("--inat-category", choices=INAT_CATEGORIES, default="name", help=level)
    images, targets = (f"for {HUB}NAME: column of the {what}" for what in ("images", "classes"))
    add("--input-key", default="image", metavar="COLUMN", help=images)
    add("--target-key", default="label", metavar="COLUMN", help=targets)
    add("--balanced-sampling", action="store_true", help="sample every class equally often")
    part = "fraction of every class to train on; always the same images"
    add("--sampling-ratio", type=float, default=1.0, metavar="SHARE", help=part)
    loader = "input pipeline; timm: DeiT's, the slower reference"
    add("--loader", choices=["fast", "timm"], default="fast", help=loader)
    where = ["auto", "workers", "device"]
    places = "where to apply RandAugment: loader workers or device; auto: the device if it is CUDA"
    add("--augment-on", choices=where, default="auto", help=places)
    decode = "decode training JPEGs on the device; needs --augment-on device"
    add("--decode-on-device", action="store_true", help=decode)
    corrupt = "error: stop at an unreadable image; skip: replace it, or in evaluation leave it out"
    add("--on-corrupt", choices=["error", "skip"], default="error", help=corrupt)
    add(
        *("--eval-crop-ratio", "--crop-pct"),
        type=float,
        metavar="RATIO",
        help="side of the evaluation crop relative to the resized image; default: that of the "
        "weights, else 0.875",
    )
    add(
        "--interpolation",
        choices=INTERPOLATIONS,
        help="resize filter of evaluation; default: that of the weights, else bicubic",
    )
    turned = "turn images by their EXIF orientation; default: as for the weights, else off"
    add("--exif", action=OnOff, help=turned)
    add("--dist-eval", action=OnOff, default=True, help="distribute evaluation over the processes")
    workers = min(10, usable_cpus())
    names = ("--num_workers", "--workers", "-j")
    add(*names, type=int, default=workers, metavar="N", help="loader workers per process")
    pinned = "copy batches to a GPU from pinned memory"
    add("--pin-mem", action=OnOff, default=True, help=pinned)
