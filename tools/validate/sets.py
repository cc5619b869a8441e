"""Test sets: the datasets of ``main.py``, folders of class folders, and ImageNet-ReaL's labels."""

import json
import os
import pkgutil
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm.data
import torch
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

import datasets
from pipeline.fast import FastDataset
from pipeline.images import DataError
from pipeline.prefetch import Prefetcher
from pipeline.reference import AugmentedDataset
from pipeline.sources.base import Encoded, Files
from tools.files import subfolders
from tools.validate.classes import NUM_IMAGENET

TIMM = "timm"  # value of --real-labels for the copy in timm
NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


class EvalSet:
    """Images of a test set at one size, with their indices as targets.

    Args:
        dataset: The images.
        title: Name in messages.
    """

    def __init__(self, dataset: datasets.LoadedDataset, title: str):
        source = dataset.source
        self.title, self.classes = title, tuple(str(name) for name in source.classes)
        self.targets = source.targets
        self._dataset = dataset
        dataset.targets = np.arange(len(dataset))

    def loader(
        self, args: Namespace, device: torch.device, memory_format: torch.memory_format
    ) -> Prefetcher:
        """Return the batches: images ``B 3 H W``, their indices ``B``, messages of corrupt ones."""
        loader = datasets.build_eval_loader(self._dataset, args, 1, 0)
        return datasets.build_prefetcher(loader, args, device, torch.float32, memory_format)

    def file_names(self) -> list[str]:
        """Return the file name of each image.

        Raises:
            DataError: The images are not files.
        """
        source = self._dataset.source
        if not isinstance(source, Encoded):
            raise DataError(f"{self.title} has no file names, which labels need")
        return [source.name(index) for index in range(len(source))]

    def paths(self) -> list[str]:
        """Return the paths of the images; none if they are in memory or in shards."""
        return self.file_names() if isinstance(self._dataset.source, Files) else []


class VisibleFolder(ImageFolder):
    """``FOLDER/CLASS/*`` without hidden files and folders, such as those of notebooks."""

    def __init__(self, folder: Path):
        hidden = f"{os.sep}."

        def is_visible_image(path: str) -> bool:
            return is_image_file(path) and hidden not in path.removeprefix(str(folder))

        super().__init__(str(folder), is_valid_file=is_visible_image)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Return the class names and their indices."""
        names = class_names(Path(directory))
        return names, {name: index for index, name in enumerate(names)}


def class_names(folder: Path) -> list[str]:
    """Return the classes of ``folder/CLASS/*``.

    Raises:
        DataError: The folder has no subfolders, or cannot be read.
    """
    names = [path.name for path in subfolders(folder)]
    if not names:
        raise DataError(f"{folder} has no class folders")
    return names


def open_set(args: Namespace, device: torch.device) -> EvalSet:
    """Open the test set of the flags at ``args.input_size``.

    Of an image folder, ``val`` or ``validation`` is read, or, without these and ``train``, the
    folder itself.

    Raises:
        DataError: The test set is missing or unusable.
    """
    name = datasets.data_set_name(args)
    title = str(args.data_path or name)
    if args.data_path and name.startswith("IMNET"):
        return open_class_folders(_folder_of_classes(Path(args.data_path)), args, title)
    return EvalSet(datasets.build_dataset(False, args, device)[0], title)


def _folder_of_classes(folder: Path) -> Path:
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise DataError(f"--data-path {folder} {what}")
    names = class_names(folder)
    for split in ("val", "validation"):
        if split in names:
            return folder / split
    if "train" in names:
        raise DataError(f"--data-path {folder} has train/, but neither val/ nor validation/")
    return folder


def open_class_folders(folder: Path, args: Namespace, title: str | None = None) -> EvalSet:
    """Open ``folder/CLASS/*`` with the evaluation transform.

    Args:
        folder: Folder of the class folders.
        args: The flags.
        title: Name in messages, the folder by default.

    Raises:
        DataError: There are no classes, or a class has no image.
    """
    try:
        found = VisibleFolder(folder)
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
    return EvalSet(dataset, title or str(folder))


def read_real_labels(place: str) -> list[list[int]]:
    """Read the ImageNet-ReaL labels of each validation image (Beyer et al., arXiv 2006.07159).

    Args:
        place: The authors' ``real.json``, or ``timm`` for timm's copy.

    Returns:
        Labels, possibly none, by the number in the image's file name, from 1.

    Raises:
        DataError: The file cannot be read, or is not a list of lists of classes.
    """
    try:
        if place == TIMM:
            data = pkgutil.get_data(timm.data.__name__, "_info/imagenet_real_labels.json")
        else:
            data = Path(place).read_bytes()
        labels = json.loads(data)
    except OSError as error:
        raise DataError(f"cannot read --real-labels {place}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"--real-labels {place} is not a JSON file: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(one, list) for one in labels):
        raise DataError(f"--real-labels {place} must be a list with a list for every image")
    for number, one in enumerate(labels, start=1):
        for label in one:
            if not isinstance(label, int) or not 0 <= label < NUM_IMAGENET:
                raise DataError(
                    f"--real-labels {place}: label {label!r} of image {number} must be from 0 to "
                    f"{NUM_IMAGENET - 1}"
                )
    return labels


def real_label_table(labels: Sequence[Sequence[int]], files: Sequence[str]) -> torch.Tensor:
    """Return the labels of each file, ``N 1000`` of bool.

    Raises:
        DataError: A file name has no number, or one that has no labels.
    """
    table = torch.zeros(len(files), NUM_IMAGENET, dtype=torch.bool)
    for row, file in enumerate(files):
        found = NUMBER.search(Path(file).name)
        if found is None:
            raise DataError(
                f"--real-labels needs file names such as ILSVRC2012_val_00000001.JPEG, not {file}"
            )
        number = int(found[1])
        if not 1 <= number <= len(labels):
            raise DataError(f"--real-labels has images 1 to {len(labels)}, but none for {file}")
        table[row, labels[number - 1]] = True
    return table
