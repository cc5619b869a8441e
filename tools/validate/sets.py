"""Test sets: what ``main.py`` evaluates on, or a folder that holds the folders of its classes."""

import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

import datasets
from pipeline.images import DataError
from pipeline.prefetch import Prefetcher
from pipeline.sources.base import Encoded, Files
from tools.files import subfolders


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


class VisibleFolder(ImageFolder):
    """``FOLDER/CLASS/*`` without what is hidden, such as the copies that notebooks keep."""

    def __init__(self, folder: Path):
        hidden = f"{os.sep}."

        def is_visible_image(path: str) -> bool:
            return is_image_file(path) and hidden not in path.removeprefix(str(folder))

        super().__init__(str(folder), is_valid_file=is_visible_image)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Names of the classes, and their numbers."""
        names = class_names(Path(directory))
        return names, {name: index for index, name in enumerate(names)}


def class_names(folder: Path) -> list[str]:
    """The classes of ``folder/CLASS/*``.

    Raises:
        DataError: There are none, or the folder cannot be read.
    """
    names = [path.name for path in subfolders(folder)]
    if not names:
        raise DataError(f"{folder} has no folders of classes")
    return names


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
    names = class_names(folder)
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
    try:
        found = VisibleFolder(folder)
    except OSError as error:
        raise DataError(f"{folder}: {error}") from error
    paths, targets = zip(*found.samples, strict=True)
    source = Files(paths, targets, found.classes)
    return EvalSet(datasets.augmented(source, False, args), title or str(folder))
