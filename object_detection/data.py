"""Images and targets of checked annotations, read alike in training, evaluation and inference."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection, VisionDataset, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from object_detection.annotations import Annotations, Object
from object_detection.masks import use_coco_api
from pipeline.images import DataError, load_image
from samplers import EvalBatchSampler, RASampler, SampleIndex, mix_seed
from training.progress import shown


def load_checked(path: Path, entry: Mapping[str, Any], source: Path) -> Image.Image:
    """Return an image as RGB of 8 bits, upright as EXIF says, of the size of its annotations.

    Args:
        path: Image file.
        entry: ``height`` and ``width``.
        source: Annotation file, for messages.

    Raises:
        DataError: It cannot be decoded, or is of another size.
    """
    image = load_image(path, is_upright=True)
    check_size(image, path, entry, source)
    return image


def check_size(
    image: Image.Image, path: str | Path, entry: Mapping[str, Any], source: str | Path
) -> None:
    """Raise DataError if an image is not of the size that its annotations say."""
    expected = (entry["width"], entry["height"])
    if image.size != expected:
        turned = " (EXIF turns it)" if image.size == expected[::-1] else ""
        raise DataError(
            f"image {path} has {image.width}x{image.height} pixels{turned}, but {source} says "
            f"{expected[0]}x{expected[1]}"
        )


def check_files(found: Annotations, folder: Path) -> None:
    """Raise DataError unless every image of the annotations can be decoded; name the first."""
    for entry in shown(found.images, "images", len(found.images)):
        load_checked(folder / entry["file_name"], entry, found.path)


def find_images(found: Annotations, folders: Sequence[Path]) -> Path:
    """Return the first of ``folders`` that contains the images of the annotations.

    Raises:
        DataError: None does.
    """
    name = found.images[0]["file_name"]
    for folder in folders:
        if (folder / name).is_file():
            return folder
    looked = ", ".join(map(str, dict.fromkeys(folders)))
    raise DataError(f"image {name} of {found.path} is not in {looked} (--images FOLDER)")


def listing(found: Annotations, folder: Path) -> Iterator[str]:
    """Yield a line per image: its name and bytes.

    Raises:
        DataError: It cannot be found.
    """
    for image in found.images:
        path = folder / image["file_name"]
        try:
            yield f"{image['file_name']}, {path.stat().st_size} bytes"
        except OSError as error:
            raise DataError(f"cannot read image {path}: {error.strerror}") from error


class CheckedCoco(CocoDetection):
    """torchvision's COCO dataset on checked annotations, without crowds.

    ``category_id`` is the label of torchvision's detectors, the class + 1; an object without a mask
    gets an empty one.

    Args:
        found: Images and objects.
        folder: Root of every ``file_name``.
    """

    def __init__(self, found: Annotations, folder: Path):
        VisionDataset.__init__(self, folder)  # CocoDetection's own would read a file
        self.found = found
        self.entries = {entry["id"]: entry for entry in found.images}
        self.ids = list(self.entries)

    def _load_image(self, id: int) -> Image.Image:
        entry = self.entries[id]
        return load_checked(Path(self.root, entry["file_name"]), entry, self.found.path)

    def _load_target(self, id: int) -> list[Object]:
        use_coco_api()  # in this loader worker, which may be a new process
        return [
            {**entry, "category_id": self.found.labels[entry["category_id"]] + 1}
            for entry in self.found.of_image(id)
            if not entry["iscrowd"]
        ]


class DetectionDataset(Dataset):
    """Images in 0..1, with targets for training and else with their ids.

    A target has ``boxes`` ``N 4`` (x1, y1, x2, y2 in pixels), ``labels`` ``N`` from 1 and ``masks``
    ``N H W`` of uint8, empty for objects without one. Half of the images that a
    :class:`samplers.SampleIndex` selects are mirrored.

    Args:
        found: Images and objects.
        folder: Root of every ``file_name``.
        is_training: Return targets.
        seed: Seed of the run.
    """

    def __init__(self, found: Annotations, folder: Path, is_training: bool, seed: int = 0):
        self.found, self.is_training, self.seed = found, is_training, seed
        keys = ("boxes", "labels", "masks") if is_training else ("image_id",)
        dataset = CheckedCoco(found, folder)
        self.samples = wrap_dataset_for_transforms_v2(dataset, target_keys=keys)
        self.augmentation = v2.RandomHorizontalFlip()
        to_tensors = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        self.to_tensors = v2.Compose(to_tensors)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return an image ``3 H W``, and its target or ``image_id``."""
        sample = self.samples[index]
        if isinstance(index, SampleIndex):
            with torch.random.fork_rng(devices=[]):
                # not torch.manual_seed(), which would seed the GPUs of a loader in this process
                torch.default_generator.manual_seed(
                    mix_seed(self.seed, index.epoch, index, index.copy)
                )
                sample = self.augmentation(*sample)
        image, target = self.to_tensors(*sample)
        if self.is_training and "boxes" not in target:  # torchvision's wrapper leaves them out
            masks = torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
            labels = torch.zeros(0, dtype=torch.int64)
            target = {"boxes": torch.zeros(0, 4), "labels": labels, "masks": masks}
        return image, target


def collate(samples: list[tuple]) -> tuple[list[tuple], None, list[str]]:
    """Return a batch as :func:`engine.train_one_epoch` takes it: not stacked, as sizes differ."""
    return samples, None, []


def build_loader(
    dataset: DetectionDataset, batch_size: int, num_workers: int, num_replicas: int, rank: int
) -> DataLoader:
    """Return the loader of this rank's part, in training shuffled by ``loader.sampler``.

    In evaluation every image comes exactly once, in the batches that one process would form.
    """
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "collate_fn": collate,
        # so that the number of workers does not change the run's random numbers
        "generator": torch.Generator(),
    }
    if dataset.is_training:
        sampler = RASampler(len(dataset), num_replicas, rank, batch_size, 1, dataset.seed)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **options)
    batches = EvalBatchSampler(len(dataset), batch_size, num_replicas, rank)
    return DataLoader(dataset, batch_sampler=batches, **options)
