"""Test sets: what ``main.py`` evaluates on, or a folder that holds the folders of its classes."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import ImageFolder

import datasets
from pipeline.fast import FastDataset
from pipeline.finish import Feed
from pipeline.images import DataError
from pipeline.reference import AugmentedDataset
from pipeline.sources import Encoded, Files

SPLITS = ("train", "val", "validation")


class EvalSet:
    """Images of a test set at one size, which say their number instead of their class.

    Args:
        dataset: The images.
        title: What messages call them.
    """

    def __init__(self, dataset: datasets.LoadedDataset, title: str):
        source = dataset.source
        self.title, self.classes = title, [str(name) for name in source.classes]
        self.targets = source.targets
        self._dataset = dataset
        dataset.targets = np.arange(len(dataset))

    def __len__(self) -> int:
        return len(self._dataset)

    def feed(
        self, args: Namespace, device: torch.device, memory_format: torch.memory_format
    ) -> Feed:
        """Batches of images ``B 3 H W``, their numbers ``B``, and messages of corrupt ones."""
        loader = datasets.build_eval_loader(self._dataset, args, 1, 0)
        return datasets.build_feed(loader, args, device, torch.float32, memory_format)

    def file_names(self) -> list[str]:
        """The file of each image.

        Raises:
            DataError: The images are not files.
        """
        source = self._dataset.source
        if not isinstance(source, Encoded):
            raise DataError(f"{self.title} has no files, by whose names to find labels")
        return [source.name(index) for index in range(len(source))]


def open_set(args: Namespace, device: torch.device) -> EvalSet:
    """The test set of the flags at ``args.input_size``.

    An image folder without ``train``, ``val`` and ``validation`` is itself the set.

    Raises:
        DataError: It is missing, or cannot be used.
    """
    name = datasets.data_set_name(args)
    folder = Path(args.data_path) if args.data_path else None
    is_folder = folder is not None and name.startswith("IMNET") and folder.is_dir()
    if is_folder and not any((folder / split).is_dir() for split in SPLITS):
        return open_class_folders(folder, args)
    title = str(args.data_path or name)
    return EvalSet(datasets.build_dataset(False, args, device)[0], title)


def open_class_folders(folder: Path, args: Namespace) -> EvalSet:
    """The images of ``folder/CLASS/*`` under the transform of evaluation.

    Raises:
        DataError: There are no classes, or one has no image.
    """
    try:
        found = ImageFolder(str(folder))
    except OSError as error:
        raise DataError(f"{folder}: {error}") from error
    paths, targets = zip(*found.samples, strict=True)
    source = Files(paths, targets, found.classes)
    transform = datasets.build_transform(False, args)
    skip = args.on_corrupt == "skip"
    if args.loader == "timm":
        dataset = AugmentedDataset(source, transform, False, skip_corrupt=skip)
    else:
        size = datasets.input_size_of(args)
        dataset = FastDataset(source, transform, False, size, skip_corrupt=skip)
    return EvalSet(dataset, str(folder))
