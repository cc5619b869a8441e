"""Data in COCO's format: validated annotations, images and training targets."""

import importlib.util
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms.functional import pil_to_tensor

from pipeline.images import DataError, load_image
from samplers import EvalBatchSampler, RASampler, SampleIndex, mix_seed

MIN_SIDE = 1.0  # pixels; smaller boxes are annotation errors
POLYGON = 6  # numbers of the smallest polygon, a triangle


# --- annotations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotations:
    """A validated annotation file.

    Attributes:
        path: The file.
        images: Entries with ``id``, ``file_name``, ``height`` and ``width``.
        categories: Names by id, ids ascending; they need not be contiguous.
        objects: Of each image id, entries with ``id`` (from 1, in the file's order),
            ``source_id`` (the file's), ``image_id``, ``category_id``, ``bbox`` (x, y, width and
            height in pixels), ``area`` in pixels, ``iscrowd``, and ``segmentation`` as polygons or
            RLE, ``None`` where there is none.
    """

    path: Path
    images: list[dict[str, Any]]
    categories: dict[int, str]
    objects: dict[int, list[dict[str, Any]]]

    def first(self, count: int | None) -> "Annotations":
        """Return the annotations of the first ``count`` images, or of all."""
        return replace(self, images=self.images[:count])


def require_pycocotools() -> None:
    """Raise DataError if masks cannot be decoded and evaluated."""
    if importlib.util.find_spec("pycocotools") is None:
        raise DataError("COCO's format needs pycocotools: pip install pycocotools")


def read_annotations(path: Path) -> Annotations:
    """Read and check an ``instances_*.json`` of COCO's format.

    Raises:
        DataError: The file is missing or not JSON, or an entry is invalid; names both.
    """
    try:
        with path.open() as file:
            content = json.load(file)
    except OSError as error:
        raise DataError(f"cannot read annotations {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(p), list) for p in parts):
        raise DataError(f"{path} must have lists of {', '.join(parts)}, as COCO's instances_*.json")
    try:
        images = {entry["id"]: entry for entry in content["images"]}
        _ = [(entry["file_name"], entry["height"], entry["width"]) for entry in images.values()]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: an image does not have {error}") from error
    try:
        categories = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a category does not have {error}") from error
    if not images or not categories:
        raise DataError(f"{path} has {len(images)} images and {len(categories)} categories")
    objects = defaultdict(list)
    for number, entry in enumerate(content["annotations"], start=1):
        checked = _checked_object(entry, number, images, categories, path)
        objects[checked["image_id"]].append(checked)
    return Annotations(path, list(images.values()), dict(sorted(categories.items())), dict(objects))


def _checked_object(
    entry: Mapping[str, Any],
    number: int,
    images: Mapping[int, dict[str, Any]],
    categories: Mapping[int, str],
    path: Path,
) -> dict[str, Any]:
    """Return an annotation with the keys of pycocotools; ``number`` is its place in the file."""
    if not isinstance(entry, dict):
        raise DataError(f"{path}: annotation number {number} is a {type(entry).__name__}")
    where = f"{path}: annotation {entry.get('id', f'number {number}')}"
    for key, known in (("image_id", images), ("category_id", categories)):
        if entry.get(key) not in known:
            raise DataError(f"{where} has the {key} {entry.get(key)!r}, which is not listed")
    bbox = entry.get("bbox")
    try:
        sound = len(bbox) == 4 and all(math.isfinite(value) for value in bbox)
    except TypeError:
        sound = False
    if not sound:
        raise DataError(f"{where} has the bbox {bbox}, which must be x, y, width and height")
    return {
        "id": number,  # the file's may start at 0, which pycocotools takes for "not matched"
        "source_id": entry.get("id", number),
        "image_id": entry["image_id"],
        "category_id": entry["category_id"],
        "bbox": bbox,
        "area": entry.get("area", bbox[2] * bbox[3]),
        "iscrowd": int(entry.get("iscrowd", 0)),
        "segmentation": _checked_mask(entry.get("segmentation"), images[entry["image_id"]], where),
    }


def _checked_mask(
    segmentation: Any, image: Mapping[str, Any], where: str
) -> list[list[float]] | Mapping[str, Any] | None:
    """Return polygons or RLE without empty parts; None if nothing remains."""
    if not segmentation:
        return None
    if isinstance(segmentation, Mapping):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        expected = [image["height"], image["width"]]
        if size != expected:
            raise DataError(f"{where} has a mask of size {size} in an image of {expected}")
        if isinstance(counts, list) and sum(counts) != math.prod(expected):
            raise DataError(f"{where} has an RLE of {sum(counts)} pixels for {expected}")
        return segmentation if counts else None
    if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
        raise DataError(f"{where} has a segmentation that is neither polygons nor RLE")
    return [polygon for polygon in segmentation if len(polygon) >= POLYGON] or None


def find_images(annotations: Annotations, folders: Sequence[Path]) -> Path:
    """Return the first of ``folders`` that contains the images of the annotations.

    Raises:
        DataError: None does.
    """
    name = annotations.images[0]["file_name"]
    for folder in folders:
        if (folder / name).is_file():
            return folder
    looked = ", ".join(map(str, dict.fromkeys(folders)))
    raise DataError(f"image {name} of {annotations.path} is not in {looked} (--images FOLDER)")


def listing(annotations: Annotations, folder: Path) -> Iterator[str]:
    """Yield a line per image: its name and bytes.

    Raises:
        DataError: It cannot be found.
    """
    for image in annotations.images:
        path = folder / image["file_name"]
        try:
            yield f"{image['file_name']}, {path.stat().st_size} bytes"
        except OSError as error:
            raise DataError(f"cannot read image {path}: {error.strerror}") from error


def check_categories(
    annotations: Annotations, known: Mapping[int, str], source: str | Path
) -> None:
    """Raise DataError unless all categories of the annotations are ``known``, from ``source``."""
    unknown = annotations.categories.items() - known.items()
    if unknown:
        names = ", ".join(f"{key} {name!r}" for key, name in sorted(unknown)[:5])
        raise DataError(f"{annotations.path} has categories unlike {source}: {names}")


# --- dataset --------------------------------------------------------------------------------


def to_rle(entry: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mask of an object as COCO's compressed RLE.

    Raises:
        DataError: The polygons or the RLE are corrupted.
    """
    from pycocotools import mask as rle

    height, width = image["height"], image["width"]
    segmentation = entry["segmentation"]
    try:
        if isinstance(segmentation, list):
            return rle.merge(rle.frPyObjects(segmentation, height, width))
        if isinstance(segmentation["counts"], list):
            return rle.frPyObjects(segmentation, height, width)
        rle.area(segmentation)
        return segmentation
    except Exception as error:  # pycocotools raises bare ones
        raise DataError(
            f"annotation {entry['source_id']} of image {image['file_name']} has a damaged "
            f"segmentation: {error}"
        ) from error


class CocoDataset(Dataset):
    """Images and, for training, targets of torchvision's Mask R-CNN.

    Training ignores crowds, objects with an empty mask and objects whose box is less than a pixel
    wide or high within the image. An image may have no objects.

    Args:
        annotations: Images and objects.
        folder: Root of every ``file_name``.
        labels: Class of each category id, from 1; 0 is the background.
        is_train: Return targets, and mirror half of the images that a
            :class:`samplers.SampleIndex` selects.
        seed: Seed of the run.
    """

    def __init__(
        self,
        annotations: Annotations,
        folder: Path,
        labels: Mapping[int, int],
        is_train: bool,
        seed: int = 0,
    ):
        self.annotations, self.folder, self.labels = annotations, folder, labels
        self.is_train, self.seed = is_train, seed

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return an image ``3 H W`` of bytes, and ``image_id`` or the target."""
        entry = self.annotations.images[index]
        path = self.folder / entry["file_name"]
        image = pil_to_tensor(load_image(path))
        size = (entry["height"], entry["width"])
        if image.shape[1:] != size:
            raise DataError(
                f"image {path} is of height and width {tuple(image.shape[1:])}, but "
                f"{self.annotations.path} says {size}"
            )
        if not self.is_train:
            return image, {"image_id": entry["id"]}
        target = self.target(entry)
        if isinstance(index, SampleIndex):
            numbers = random.Random(mix_seed(self.seed, index.epoch, index, index.copy))
            if numbers.random() < 0.5:
                return mirrored(image, target)
        return image, target

    def target(self, image: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """``boxes`` ``N 4`` (x1, y1, x2, y2 in pixels), ``labels`` ``N``, ``masks`` ``N H W``."""
        from pycocotools import mask as rle

        height, width = image["height"], image["width"]
        objects = [
            entry
            for entry in self.annotations.objects.get(image["id"], ())
            if not entry["iscrowd"] and entry["segmentation"] is not None
        ]
        boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32)
        boxes = box_convert(boxes.reshape(-1, 4), "xywh", "xyxy")
        boxes = clip_boxes_to_image(boxes, (height, width))
        labels = torch.tensor([self.labels[entry["category_id"]] for entry in objects]).long()
        masks = torch.zeros(len(objects), height, width, dtype=torch.uint8)
        for mask, entry in zip(masks, objects, strict=True):
            mask.copy_(torch.from_numpy(rle.decode(to_rle(entry, image))))
        keep = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(1) & (masks > 0).flatten(1).any(1)
        return {"boxes": boxes[keep], "labels": labels[keep], "masks": masks[keep]}


def mirrored(
    image: torch.Tensor, target: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return an image ``3 H W`` and its target, mirrored horizontally."""
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    width = image.shape[-1]
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    return image.flip(-1), {**target, "boxes": boxes, "masks": target["masks"].flip(-1)}


def collate(samples: Sequence[tuple]) -> tuple[tuple, ...]:
    """Return images and targets of a batch, not stacked, as their sizes differ."""
    return tuple(zip(*samples, strict=True))


def build_loader(
    dataset: CocoDataset, batch_size: int, num_workers: int, num_replicas: int, rank: int
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
    if dataset.is_train:
        sampler = RASampler(len(dataset), num_replicas, rank, batch_size, 1, dataset.seed)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **options)
    batches = EvalBatchSampler(len(dataset), batch_size, num_replicas, rank)
    return DataLoader(dataset, batch_sampler=batches, **options)


def to_input(image: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move an image ``3 H W`` of bytes to the device; return it in 0..1."""
    return image.to(device, non_blocking=True).float() / 255
