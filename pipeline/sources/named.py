"""The datasets that ``--data-set`` can name."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from models.data_config import SMALL_SIZE
from models.errors import did_you_mean

from ..images import DataError
from .base import Source
from .cifar import open_cifar10, open_cifar100, open_digits
from .download import Cache
from .fine_grained import (
    open_cars,
    open_flowers,
    open_imagenette,
    open_inat,
    open_inat2021,
    open_pets,
)
from .hf_datasets import open_hub
from .labels import open_images
from .shards import open_shards
from .split import HoldOut

HUB = "hfds/"  # prefix of names on the Hugging Face Hub, as in timm


@dataclass(frozen=True)
class DataSet:
    """A dataset that ``--data-set`` can name.

    Attributes:
        open: Opens the training split, else validation, from the flags and ``is_train``.
        input_size: Input size if ``--input-size`` is not given.
        hflip: Probability of flipping a training image horizontally.
    """

    open: Callable[[Namespace, bool], Source]
    input_size: int = 224
    hflip: float = 0.5


def _at_path(
    open_folder: Callable[..., Source], default: str | None = None, **options: Any
) -> Callable[[Namespace, bool], Source]:
    """Return an opener of ``--data-path``, or of ``default`` if it is not given."""

    def open_source(args: Namespace, is_train: bool) -> Source:
        path = args.data_path or default
        if path is None:
            raise DataError(f"--data-set {data_set_name(args)} needs --data-path")
        return open_folder(Path(path), is_train, args.download, **options)

    return open_source


def _open_inat(args: Namespace, is_train: bool, opener: Callable[..., Source]) -> Source:
    return _at_path(opener, category=args.inat_category)(args, is_train)


def _open_wds(args: Namespace, is_train: bool) -> Source:
    if args.data_path is None:
        raise DataError("--data-set WDS needs --data-path: a folder or a pattern of shards")
    cache = Cache(Path(args.shard_cache)) if args.shard_cache else None
    return open_shards(args.data_path, is_train, args.val_path, cache)


def _open_hub(args: Namespace, is_train: bool) -> Source:
    name = data_set_name(args).removeprefix(HUB)
    root = Path(args.data_path) if args.data_path else None
    return open_hub(name, root, is_train, args.download, args.input_key, args.target_key)


def _open_images(args: Namespace, is_train: bool) -> Source:
    if args.data_path is None:
        raise DataError(f"--data-set {data_set_name(args)} needs --data-path")
    return open_images(Path(args.data_path), is_train, HoldOut.of(vars(args)), args.labels)


_FOLDER = DataSet(_open_images)
_CIFAR100 = DataSet(_at_path(open_cifar100, "./dataset"))
DATA_SETS = {
    "IMNET": _FOLDER,
    "IMNET100": _FOLDER,  # in Visformer's command lines; the classes are counted anyway
    "IMNET10": _FOLDER,
    "CIFAR": _CIFAR100,
    "CIFAR10": DataSet(_at_path(open_cifar10, "./dataset")),
    "CIFAR100": _CIFAR100,
    "DIGITS": DataSet(_at_path(open_digits, ""), input_size=SMALL_SIZE, hflip=0.0),
    "INAT": DataSet(partial(_open_inat, opener=open_inat)),
    "INAT19": DataSet(partial(_open_inat, opener=partial(open_inat, year=2019))),
    "INAT2021": DataSet(partial(_open_inat, opener=open_inat2021)),
    "INAT2021_MINI": DataSet(partial(_open_inat, opener=partial(open_inat2021, mini=True))),
    "FLOWERS": DataSet(_at_path(open_flowers, "./dataset")),
    "CARS": DataSet(_at_path(open_cars, "./dataset")),
    "PETS": DataSet(_at_path(open_pets, "./dataset")),
    "IMAGENETTE": DataSet(_at_path(open_imagenette, "./dataset", name="imagenette2")),
    "IMAGEWOOF": DataSet(_at_path(open_imagenette, "./dataset", name="imagewoof2")),
    "WDS": DataSet(_open_wds),
}


def data_set_named(name: str) -> DataSet:
    """Return the dataset of a name.

    Raises:
        ValueError: The name is unknown.
    """
    if name.startswith(HUB) and name != HUB:
        return DataSet(_open_hub)
    if name not in DATA_SETS:
        known = f"{', '.join(DATA_SETS)} or {HUB}NAME"
        raise ValueError(f"{name!r} must be one of {known}{did_you_mean(name, DATA_SETS)}")
    return DATA_SETS[name]


def data_set_name(args: Namespace) -> str:
    """Return ``--data-set``; if not given, IMNET with ``--data-path`` and DIGITS without."""
    return args.data_set or ("IMNET" if args.data_path else "DIGITS")


def is_image_folder(args: Namespace) -> bool:
    """Return True if the dataset of the flags is an image folder of the user's."""
    return data_set_named(data_set_name(args)) is _FOLDER
