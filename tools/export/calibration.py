"""Images of a folder, by which int8 programs are calibrated and all programs are measured."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.augmentation import Augmentation
from pipeline.images import DataError
from pipeline.sources.base import Files
from pipeline.sources.folder import open_folder_of_classes
from pipeline.sources.listing import list_folders, list_images
from tools.export.source import ExportSource
from tools.validate.classes import match_classes

MOST = 1000  # images, of a larger folder
BATCH_SIZE = 16  # where any will do


class CalibrationSet:
    """At most :data:`MOST` images of a folder, evenly spaced, preprocessed as in the evaluation.

    Args:
        folder: Has images, or folders of them, one for each class.
        source: The model.

    Attributes:
        targets: Output of the class of each image, ``N``; None without folders of classes.

    Raises:
        DataError: There are no images, or a class is not one of the model's.
    """

    def __init__(self, folder: Path, source: ExportSource):
        if not folder.is_dir():
            raise DataError(f"--calibration {folder} is not a folder of images")
        self.folder, self.targets = folder, None
        has_classes = bool(list_folders(folder))
        if has_classes:
            files = open_folder_of_classes(folder)
        else:
            paths = list_images(folder, recursive=False).paths
            if not paths:
                raise DataError(f"--calibration {folder} has no images")
            files = Files(paths, [0] * len(paths), [""], folder)
        spaced = np.linspace(0, len(files) - 1, min(len(files), MOST)).round().astype(int)
        files = files.select(spaced)
        if has_classes:
            known, title = source.classes or None, f"--calibration {folder}"
            names = (files.classes, source.num_classes, known)
            matched = match_classes(*names, title=title, source=source.name)
            self.targets = torch.tensor(matched.outputs)[files.targets]
        self._files = files.decoded_as(source.images.exif, source.images.is_grey)
        stages = Augmentation.for_evaluation(source.images).stages()
        pixels = partial(_pixels, channels=source.images.in_chans)
        end = [pixels] if source.preprocessing else stages.normalize
        self._steps = [*stages.resize, *stages.crop, *end]

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, start: int, size: int) -> torch.Tensor:
        """Return ``size`` inputs of the program; the last image fills the last batch."""
        inputs = []
        for index in np.minimum(np.arange(start, start + size), len(self) - 1):
            image = self._files.open(index)
            for step in self._steps:
                image = step(image)
            inputs.append(image)
        return torch.stack(inputs)

    def batches(self, size: int | None) -> Iterator[torch.Tensor]:
        """Yield all inputs, ``size`` at a time, or :data:`BATCH_SIZE`."""
        size = size or BATCH_SIZE
        for start in range(0, len(self), size):
            yield self.batch(start, size)


def _pixels(image: Image.Image, channels: int) -> torch.Tensor:
    """Return ``H W C`` of uint8; a grey image has three equal channels."""
    return torch.from_numpy(np.array(image)[..., :channels])
