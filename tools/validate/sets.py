"""Test sets: the datasets of ``main.py``, folders of class folders, and ImageNet-ReaL's labels."""

import json
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch

import datasets
from models import DataConfig
from pipeline.images import DataError
from pipeline.prefetch import Prefetcher
from pipeline.sources import named
from pipeline.sources.base import Encoded, Files
from pipeline.sources.folder import find_validation, list_classes, open_folder_of_classes
from pipeline.sources.labels import open_labels
from pipeline.sources.split import HoldOut
from pipeline.sources.summary import lines_of, orientation_lines
from tools.validate.classes import NUM_IMAGENET

TIMM = "timm"  # value of --real-labels for the copy in timm
NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


class EvalSet:
    """Images of a test set under one preprocessing, with their indices as targets.

    Messages call them ``title``. ``targets`` has the class of each image, ``N`` of int64, and
    ``real``, after :meth:`add_real_labels`, its ImageNet-ReaL labels, ``N 1000`` of bool.
    """

    def __init__(self, dataset: datasets.LoadedDataset, title: str):
        source = dataset.source
        self.title, self.classes = title, tuple(str(name) for name in source.classes)
        self.targets = source.targets
        self.real: torch.Tensor | None = None
        self.source, self._dataset = source, dataset
        dataset.targets = np.arange(len(dataset))

    def loader(
        self, args: Namespace, device: torch.device, memory_format: torch.memory_format
    ) -> Prefetcher:
        """Return the batches: images ``B 3 H W``, their indices ``B``, messages of corrupt ones."""
        loader = datasets.build_eval_loader(self._dataset, args, 1, 0)
        return datasets.build_prefetcher(loader, device, torch.float32, memory_format)

    def lines(self) -> list[str]:
        """Return the lines that say which images these are, and what was left out."""
        return lines_of(self.title, self.source) + orientation_lines(self.source)

    def paths(self) -> list[str]:
        """Return the paths of the images; none if they are in memory or in shards."""
        source = self.source
        return [source.name(i) for i in range(len(source))] if isinstance(source, Files) else []

    def add_real_labels(self, labels: Sequence[Sequence[int]]) -> None:
        """Find the labels of :func:`read_real_labels` by the numbers in the file names.

        Raises:
            DataError: An image has no file name, no number in it, or one without labels.
        """
        source = self.source
        if not isinstance(source, Encoded):
            raise DataError(f"{self.title} has no file names, which labels need")
        self.real = torch.zeros(len(source), NUM_IMAGENET, dtype=torch.bool)
        for row in range(len(source)):
            file = source.name(row)
            found = NUMBER.search(Path(file).name)
            if found is None:
                raise DataError(
                    f"--real-labels needs file names such as ILSVRC2012_val_00000001.JPEG, not "
                    f"{file}"
                )
            number = int(found[1])
            if not 1 <= number <= len(labels):
                raise DataError(f"--real-labels has images 1 to {len(labels)}, but none for {file}")
            self.real[row, labels[number - 1]] = True


def open_set(args: Namespace, device: torch.device, images: DataConfig) -> EvalSet:
    """Open the test set of the flags, under a model's preprocessing.

    Of an image folder, ``val`` or another folder of :func:`find_validation` is read, or, without
    these and ``train``, the folder itself; of a table ``--labels`` that does not divide its
    images, all, unless the flags do.
    """
    name = named.data_set_name(args)
    title, held_out = str(args.data_path or name), HoldOut.of(vars(args))
    if held_out:
        title += f" ({held_out})"
        return EvalSet(datasets.build_dataset(False, args, device, images)[0], title)
    if args.labels and args.data_path and named.is_image_folder(args):
        source = open_labels(Path(args.data_path), False, Path(args.labels), whole=True)
        return EvalSet(datasets.augmented(source, False, args, images=images), title)
    if not args.data_path or not named.is_image_folder(args):
        return EvalSet(datasets.build_dataset(False, args, device, images)[0], title)
    folder = Path(args.data_path)
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise DataError(f"--data-path {folder} {what}")
    names = list_classes(folder)
    split, notices = find_validation(folder)
    if split is None and "train" in names:
        raise DataError(
            f"--data-path {folder} has train/, but neither val/ nor validation/:"
            " --val-split 0.2 takes a fifth of train/"
        )
    found = open_class_folders(split or folder, args, images, title)
    found.source.notices = notices + found.source.notices
    return found


def open_class_folders(
    folder: Path, args: Namespace, images: DataConfig, title: str | None = None
) -> EvalSet:
    """Open ``folder/CLASS/*``, which messages call ``title``, with the evaluation transform."""
    source = open_folder_of_classes(folder)
    dataset = datasets.augmented(source, False, args, images=images)
    return EvalSet(dataset, title or str(folder))


def read_real_labels(place: str) -> list[list[int]]:
    """Read the ImageNet-ReaL labels of each validation image (Beyer et al., arXiv 2006.07159).

    Args:
        place: The authors' ``real.json``, or ``timm`` for timm's copy.

    Returns:
        Labels, possibly none, by the number in the image's file name, from 1.
    """
    copy = resources.files("timm.data") / "_info" / "imagenet_real_labels.json"
    try:
        labels = json.loads((copy if place == TIMM else Path(place)).read_bytes())
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
