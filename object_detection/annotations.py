"""Annotation files of COCO's format (``instances_*.json``), checked before anything uses them.

Training and evaluation on either engine read their annotations here. What would train another
thing than the file says is refused, naming the image and the annotation; what cannot be used, but
does no harm, is left out and counted.
"""

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from PIL import Image

from models.errors import nearest
from object_detection.masks import check_mask, numbers, short, to_rle, use_coco_api
from pipeline.images import DataError

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # of an image, as the decoder's
MIN_SIDE = 1.0  # pixels of a box within its image
SIDES = ("height", "width")
SHOWN = 5  # names in a message

Object = dict[str, Any]


@dataclass(frozen=True)
class Annotations:
    """A checked annotation file.

    Attributes:
        path: The file.
        images: Entries with ``id``, ``file_name``, ``height`` and ``width``, in the file's order.
        categories: Names by id, in the order of the classes: class 0 is the first.
        objects: Of each image id, in the order of images: entries with ``id`` (from 1, in the
            file's order), ``source_id`` (the file's), ``image_id``, ``category_id``, ``bbox`` (x,
            y, width and height in pixels, within the image), ``area`` in pixels, ``iscrowd``, and
            ``segmentation`` as polygons or RLE, None where there is no mask.
        counts: What was left out or corrected, by kind.
    """

    path: Path
    images: list[dict[str, Any]]
    categories: dict[int, str]
    objects: dict[int, list[Object]]
    counts: Counter[str]

    @cached_property
    def labels(self) -> dict[int, int]:
        """The class of each category id, from 0."""
        return {key: label for label, key in enumerate(self.categories)}

    def __iter__(self) -> Iterator[Object]:
        """Iterate over the objects in the order of images."""
        return itertools.chain.from_iterable(self.objects.values())

    def per_class(self) -> dict[str, int]:
        """Return the number of objects of each class that are no crowds."""
        found = Counter(entry["category_id"] for entry in self if not entry["iscrowd"])
        return {name: found[key] for key, name in self.categories.items()}

    def summary(self, name: str) -> str:
        """Return a line: images, objects, classes, and what was left out or corrected."""
        objects = sum(self.per_class().values())
        text = f"{name}: {len(self.images)} images, {objects} objects in "
        text += f"{len(self.categories)} classes ({_listed(self.categories.values())})"
        empty = sum(not found for found in self.objects.values())
        kinds = {**dict(sorted(self.counts.items())), "images without objects": empty}
        parts = [f"{count} {kind}" for kind, count in kinds.items() if count]
        return f"{text}; left out or corrected: {', '.join(parts)}" if parts else text

    def of_image(self, key: int, as_crowd: bool = False) -> list[Object]:
        """Return copies of an image's objects, all with a mask.

        Args:
            key: Id of the image.
            as_crowd: An object without a mask becomes a crowd that fills its box, in which COCO's
                evaluation counts a detection neither as right nor as wrong; else its mask is empty.
        """
        size = self._sizes[key]
        return [_with_mask(entry, size, as_crowd) for entry in self.objects[key]]

    @cached_property
    def _sizes(self) -> dict[int, list[int]]:
        return {image["id"]: [image["height"], image["width"]] for image in self.images}

    def content(self, as_crowd: bool = False) -> dict[str, Any]:
        """Return the file as COCO's API takes it, categories in the order of the classes."""
        return {
            "images": self.images,
            "categories": [{"id": key, "name": name} for key, name in self.categories.items()],
            "annotations": [
                entry for key in self.objects for entry in self.of_image(key, as_crowd)
            ],
        }


def _with_mask(entry: Object, size: list[int], as_crowd: bool) -> Object:
    if entry["segmentation"] is not None:
        return dict(entry)
    if not as_crowd:
        return {**entry, "segmentation": {"size": size, "counts": [math.prod(size)]}}
    x, y, width, height = entry["bbox"]
    left, right = math.floor(x), math.ceil(x + width)  # so that a mask of the box is within
    top, bottom = math.floor(y), math.ceil(y + height)
    corners = [left, top, right, top, right, bottom, left, bottom]
    return {**entry, "segmentation": [corners], "iscrowd": 1}


def read(
    path: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    is_training: bool = True,
    masks: bool = True,
    is_empty: bool = False,
    limit: int | None = None,
) -> Annotations:
    """Read and check an ``instances_*.json`` of COCO's format.

    Args:
        path: The file.
        classes: Names of the classes in their order; the file's, by ascending id, if not given.
            Objects of other categories are left out and counted, unless a class is missing, too:
            then one may be the other's misspelling.
        is_training: The file must have all the classes.
        masks: At least one object must have a mask.
        is_empty: The file may have no objects, such as one of test images.
        limit: Use only the first so many images; objects of others are neither checked nor counted.

    Raises:
        DataError: The file cannot be read, or is not what it should be; names the file, and the
            image and the annotation that are wrong.
    """
    use_coco_api()
    reader = _Reader(Path(path))
    content = reader.content(is_empty)
    images = reader.images(content["images"])
    named = reader.categories(content["categories"])
    categories = named if classes is None else reader.chosen(named, classes, is_training)
    used = dict(itertools.islice(images.items(), limit))
    entries = content.get("annotations") or []
    objects = reader.objects(entries, images, used, named, categories)
    found = Annotations(reader.path, list(used.values()), categories, objects, reader.counts)
    usable = [entry for entry in found if not entry["iscrowd"]]
    reasons = [f"{count} {kind} ({reader.first[kind]})" for kind, count in reader.counts.items()]
    reasons = f": {', '.join(reasons)}" if reasons else ""
    if not usable and not is_empty:
        reader.refuse(f"no object can be used{reasons}")
    if masks and not is_empty and all(entry["segmentation"] is None for entry in usable):
        reader.refuse(f"no object has a mask{reasons}")
    return found


class _Reader:
    """Checks the parts of a file; counts what is left out and remembers the first of each kind.

    Args:
        path: Named in messages.
    """

    def __init__(self, path: Path):
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def refuse(self, reason: str) -> NoReturn:
        raise DataError(f"{self.path}: {reason}")

    def count(self, kind: str, where: str) -> None:
        self.counts[kind] += 1
        self.first.setdefault(kind, where)

    def content(self, is_empty: bool) -> dict[str, Any]:
        """Return the file's content, which has the lists of COCO's format."""
        try:
            content = json.loads(self.path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read annotations {self.path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} is not JSON: {error}") from error
        keys = ["images", "categories"] + ([] if is_empty else ["annotations"])
        if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in keys):
            self.refuse(f"it must have lists of {', '.join(keys)}, as COCO's instances_*.json")
        if not isinstance(content.get("annotations") or [], list):
            self.refuse("its annotations must be a list")
        return content

    def entries(self, values: list[Any], kind: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yield the number, the name in messages and the value of each entry of a list."""
        for number, entry in enumerate(values, start=1):
            where = f"{kind} number {number}"
            if not isinstance(entry, dict):
                self.refuse(f"{where} is {short(entry)}, which must be an object")
            yield number, where, entry

    def whole(self, entry: dict[str, Any], name: str, where: str, low: int = -(2**62)) -> int:
        """Return a value that must be a whole number."""
        value = entry.get(name)
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        if not isinstance(number, int) or isinstance(number, bool):
            self.refuse(f"{where} has the {name} {short(value)}, which must be a whole number")
        if not low <= number < 2**62:
            self.refuse(f"{where} has the {name} {short(value)}, which is out of range")
        return number

    def flag(self, entry: dict[str, Any], name: str, where: str) -> bool:
        """Return a value that must be 0 or 1, or absent for 0."""
        value = entry.get(name)
        if value is not None and not (isinstance(value, int | float) and value in (0, 1)):
            self.refuse(f"{where} has the {name} {short(value)}, which must be 0 or 1")
        return bool(value)

    def text(self, entry: dict[str, Any], name: str, where: str) -> str:
        """Return a value that must be a text."""
        value = entry.get(name)
        if not isinstance(value, str) or not value.strip():
            self.refuse(f"{where} has the {name} {short(value)}, which must be a text")
        return value

    def images(self, values: list[Any]) -> dict[int, dict[str, Any]]:
        """Return the checked images by id."""
        images, names = {}, {}
        for _, where, entry in self.entries(values, "image"):
            key, name = self.whole(entry, "id", where), self.text(entry, "file_name", where)
            where = f"image {key} ({name})"
            if key in images:
                self.refuse(f"{where} has the id of {images[key]['file_name']}")
            if name in names:
                self.refuse(f"{where} is the file of image {names[name]}, too")
            parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
            if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
                self.refuse(f"{where} must be named relative to the images' folder")
            sides = {side: self.whole(entry, side, where, low=1) for side in SIDES}
            if math.prod(sides.values()) > MAX_PIXELS:
                self.refuse(f"{where} has {sides}, more than {MAX_PIXELS} pixels")
            images[key], names[name] = {**entry, "id": key, **sides}, key
        if not images:
            self.refuse("it has no images")
        return images

    def categories(self, values: list[Any]) -> dict[int, str]:
        """Return the names of the categories by ascending id."""
        categories: dict[int, str] = {}
        for _, where, entry in self.entries(values, "category"):
            key, name = self.whole(entry, "id", where), self.text(entry, "name", where).strip()
            if key in categories:
                self.refuse(f"category {name!r} has the id {key} of {categories[key]!r}")
            if name in categories.values():
                self.refuse(f"two categories have the name {name!r}")
            categories[key] = name
        if not categories:
            self.refuse("it has no categories")
        return dict(sorted(categories.items()))

    def chosen(
        self, named: Mapping[int, str], classes: Sequence[str], is_training: bool
    ) -> dict[int, str]:
        """Return the categories of the classes, in their order."""
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            self.refuse(f"the classes {classes!r} must be a list of names, such as ('cat',)")
        classes = [name.strip() for name in classes]
        if len(set(classes)) < len(classes):
            self.refuse(f"the classes {_listed(classes)} have a name twice")
        ids = {name: key for key, name in named.items()}
        missing = [name for name in classes if name not in ids]
        others = [name for name in ids if name not in classes]
        if missing and (others or is_training):
            near = nearest(missing[0], others)
            self.refuse(
                f"it has no category {_listed(missing)}, as the detector's classes, but "
                f"{_listed(ids)}{f'; the nearest is {near[0]!r}' if near else ''}"
            )
        for name in missing:
            self.count("classes without a category", name)
        free = max([*named, 0]) + 1
        return {ids.get(name, free + place): name for place, name in enumerate(classes)}

    def objects(
        self,
        values: list[Any],
        images: Mapping[int, dict[str, Any]],
        used: Mapping[int, dict[str, Any]],
        named: Mapping[int, str],
        categories: Mapping[int, str],
    ) -> dict[int, list[Object]]:
        """Return the checked objects of the categories by id of the images used."""
        objects: dict[int, list[Object]] = {key: [] for key in used}
        ids: dict[int, int] = {}
        first, normalised = "", True
        for number, where, entry in self.entries(values, "annotation"):
            source = entry.get("id")
            if source is not None:
                source = self.whole(entry, "id", where)
                where = f"annotation {source}"
                if ids.setdefault(source, number) != number:
                    self.refuse(f"{where}, number {number}, has the id of number {ids[source]}")
            key = self.whole(entry, "image_id", where)
            if key not in images:
                self.refuse(f"{where} has the image_id {key}, which no image has")
            if key not in used:
                continue
            where += f" of image {images[key]['file_name']}"
            category = self.whole(entry, "category_id", where)
            if category not in named:
                self.refuse(f"{where} has the category_id {category}, which no category has")
            checked = self.object(entry, images[key], where)
            first = first or where
            normalised = normalised and _is_normalised(entry.get("bbox"), images[key])
            if category not in categories:
                self.count("of other categories", where)
            elif checked is not None:
                checked |= {"id": number, "source_id": source, "category_id": category}
                objects[key].append(checked)
        if first and normalised:
            self.refuse(f"{first} and all others have boxes in 0..1, which must be in pixels")
        return objects

    def object(self, entry: Object, image: Mapping[str, Any], where: str) -> Object | None:
        """Return a checked object; None for one that is left out."""
        is_crowd, is_ignored = (self.flag(entry, key, where) for key in ("iscrowd", "ignore"))
        try:
            mask, pixels, cut = check_mask(entry.get("segmentation"), image)
        except DataError as error:
            self.refuse(f"{where} has {error}")
        if cut:
            self.count("with polygons of fewer than 3 points", where)
        box, area = entry.get("bbox"), entry.get("area")
        if box is None and mask is not None:
            from pycocotools.mask import toBbox

            self.count("boxes computed", where)
            box = toBbox(to_rle(mask, image)).tolist()
        bbox = self.box(box, image, where)
        if isinstance(area, list) or (area is not None and numbers([area]) is None):
            self.refuse(f"{where} has the area {short(area)}, which must be a number of pixels")
        if bbox is None:
            return None
        if area is None or area <= 0:
            self.count("areas computed", where)
            area = float(pixels) or bbox[2] * bbox[3]
        if is_crowd or is_ignored:
            self.count("crowd", where)
        elif mask is None:
            self.count("without a mask", where)
        checked = {"image_id": image["id"], "bbox": bbox, "area": area, "segmentation": mask}
        return {**entry, **checked, "iscrowd": int(is_crowd or is_ignored), "ignore": 0}

    def box(self, box: Any, image: Mapping[str, Any], where: str) -> list[float] | None:
        """Return a box, clipped if it leaves its image; None for less than a pixel of it."""
        values = numbers(box)
        if values is None or values.shape != (4,):
            self.refuse(f"{where} has the bbox {short(box)}, which must be x, y, width and height")
        x, y, width, height = values.tolist()
        left, top = max(x, 0.0), max(y, 0.0)
        right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
        if min(right - left, bottom - top) < MIN_SIDE:
            tiny = min(width, height) < MIN_SIDE
            return self.count("smaller than a pixel" if tiny else "outside of the image", where)
        clipped = [left, top, right - left, bottom - top]
        if max(abs(a - b) for a, b in zip(clipped, (x, y, width, height), strict=True)) <= MIN_SIDE:
            return [x, y, width, height]  # rounded, as COCO's own are
        self.count("boxes clipped", where)
        return clipped


def _is_normalised(box: Any, image: Mapping[str, Any]) -> bool:
    """Return True for a box in 0..1 of an image that is larger than a few pixels."""
    return box is not None and min(image["width"], image["height"]) > 2 and max(box) <= 1


def _listed(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
