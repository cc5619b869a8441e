"""Test sets: what ``main.py`` evaluates on, or a folder that holds the folders of its classes."""

import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import datasets
from pipeline.images import DataError
from pipeline.prefetch import Prefetcher
from pipeline.sources.base import Encoded, Files
from pipeline.sources.folder import list_classes, open_folder_of_classes


class EvalSet:
    """Images of a test set at one size, which say their number instead of their class.

    Args:
        dataset: The images.
        title: What messages call them.
    """

    def __init__(self, dataset: datasets.LoadedDataset, title: str):
        source = dataset.source
        self.title, self.classes = title, tuple(str(name) for name in source.classes)
        self.targets = source.targets
        self._dataset = dataset
        dataset.targets = np.arange(len(dataset))

    def __len__(self) -> int:
        return len(self._dataset)

    def feed(
        self, args: Namespace, device: torch.device, memory_format: torch.memory_format
    ) -> Prefetcher:
        """Batches of images ``B 3 H W``, their numbers ``B``, and messages of corrupt ones."""
        loader = datasets.build_eval_loader(self._dataset, args, 1, 0)
        return datasets.build_prefetcher(loader, device, torch.float32, memory_format)

    def file_names(self) -> list[str]:
        """The file of each image.

        Raises:
            DataError: The images are not files.
        """
        source = self._dataset.source
        if not isinstance(source, Encoded):
            raise DataError(f"{self.title} has no files, by whose names to find labels")
        return [source.name(index) for index in range(len(source))]

    def paths(self) -> list[str]:
        """Where the images lie; nowhere, if they are in memory or members of shards."""
        return self.file_names() if isinstance(self._dataset.source, Files) else []


def open_set(args: Namespace, device: torch.device) -> EvalSet:
    """The test set of the flags at ``args.input_size``.

    Of an image folder it is ``val`` or ``validation``, or without these and ``train`` the folder.

    Raises:
        DataError: It is missing, or cannot be used.
    """
    name = datasets.data_set_name(args)
    title = str(args.data_path or name)
    if args.data_path and name.startswith("IMNET"):
        return open_class_folders(_folder_of_classes(Path(args.data_path)), args, title)
    return EvalSet(datasets.build_dataset(False, args, device)[0], title)


def _folder_of_classes(folder: Path) -> Path:
    if not os.path.isdir(folder):
        what = "is no folder" if os.path.exists(folder) else "does not exist"
        raise DataError(f"--data-path {folder} {what}")
    names = list_classes(folder)
    for split in ("val", "validation"):
        if split in names:
            return folder / split
    if "train" in names:
        raise DataError(f"--data-path {folder} has train/, but neither val/ nor validation/")
    return folder


def open_class_folders(folder: Path, args: Namespace, title: str | None = None) -> EvalSet:
    """The images of ``folder/CLASS/*`` under the transform of evaluation.

    Args:
        folder: Of the classes.
        args: The flags.
        title: What messages call the set; the folder, if not given.

    Raises:
        DataError: There are no classes, or one has no image.
    """
    source = open_folder_of_classes(folder)
    return EvalSet(datasets.augmented(source, False, args), title or str(folder))
