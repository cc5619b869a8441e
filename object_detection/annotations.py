"""Annotation files of COCO's format (``instances_*.json``), checked before anything uses them.

Training and evaluation on either engine read their annotations here. What would train another
thing than the file says is refused, naming the image and the annotation; what cannot be used, but
does no harm, is left out and counted.
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from models.errors import nearest
from pipeline.images import DataError

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # of an image, as the decoder's
MIN_SIDE = 1.0  # pixels of a box within its image
POLYGON = 6  # numbers of the smallest polygon, a triangle
SIDES = ("height", "width")
SHOWN = 5  # names in a message
CROWD, NO_MASK = "crowd", "without a mask"
TINY, OUTSIDE = "smaller than a pixel", "outside of the image"
CLIPPED, BOX, AREA = "boxes clipped", "boxes computed", "areas computed"
CORNERS = "polygons of fewer than 3 points"

Object = dict[str, Any]


def use_coco_api() -> None:
    """Make ``pycocotools`` importable: faster-coco-eval under its name, or itself.

    Raises:
        DataError: Neither is installed.
    """
    try:
        import faster_coco_eval
    except ImportError:
        try:
            import pycocotools.mask  # noqa: F401
        except ImportError:
            raise DataError("COCO's format needs: pip install faster-coco-eval") from None
    else:
        faster_coco_eval.init_as_pycocotools()


@dataclass(frozen=True)
class Annotations:
    """A checked annotation file.

    Attributes:
        path: The file.
        images: Entries with ``id``, ``file_name``, ``height`` and ``width``, in the file's order.
        categories: Names by id, in the order of the classes: class 0 is the first.
        objects: Of each image id, entries with ``id`` (from 1, in the file's order), ``source_id``
            (the file's), ``image_id``, ``category_id``, ``bbox`` (x, y, width and height in pixels,
            within the image), ``area`` in pixels, ``iscrowd``, and ``segmentation`` as polygons or
            RLE, None where there is no mask.
        counts: What was left out or corrected, by kind.
    """

    path: Path
    images: list[dict[str, Any]]
    categories: dict[int, str]
    objects: dict[int, list[Object]]
    counts: Counter[str]

    def first(self, count: int | None) -> "Annotations":
        """Return the annotations of the first ``count`` images, or of all."""
        images = self.images[:count]
        kept = {image["id"] for image in images}
        objects = {key: found for key, found in self.objects.items() if key in kept}
        return Annotations(self.path, images, self.categories, objects, self.counts)

    @cached_property
    def labels(self) -> dict[int, int]:
        """The class of each category id, from 0."""
        return {key: label for label, key in enumerate(self.categories)}

    def __iter__(self) -> Iterator[Object]:
        """Iterate over the objects in the order of images."""
        for image in self.images:
            yield from self.objects.get(image["id"], ())

    def per_class(self) -> dict[str, int]:
        """Return the number of objects of each class that are no crowds."""
        found = Counter(entry["category_id"] for entry in self if not entry["iscrowd"])
        return {name: found[key] for key, name in self.categories.items()}

    def summary(self, name: str) -> str:
        """Return a line: images, objects, classes, and what was left out or corrected."""
        objects = sum(self.per_class().values())
        empty = sum(not self.objects.get(image["id"]) for image in self.images)
        text = f"{name}: {len(self.images)} images, {objects} objects in "
        text += f"{len(self.categories)} classes ({_listed(self.categories.values())})"
        parts = [f"{self.counts[kind]} {kind}" for kind in sorted(self.counts)]
        parts += [f"{empty} images without objects"] if empty else []
        return f"{text}; left out or corrected: {', '.join(parts)}" if parts else text

    def content(self, maskless: str = "") -> dict[str, Any]:
        """Return the file as COCO's API takes it, categories in the order of the classes.

        Args:
            maskless: What an object without a mask becomes: ``"empty"`` for an object with an empty
                mask; ``"crowd"`` for a crowd that fills its box, in which COCO's evaluation counts
                a detection neither as right nor as wrong; ``""`` for one without the key.
        """
        sizes = {image["id"]: [image["height"], image["width"]] for image in self.images}
        return {
            "images": self.images,
            "categories": [{"id": key, "name": name} for key, name in self.categories.items()],
            "annotations": [  # copies, as the API writes into them
                dict(entry)
                if entry["segmentation"] is not None
                else _without_mask(entry, sizes[entry["image_id"]], maskless)
                for entry in self
            ],
        }


def _without_mask(entry: Object, size: list[int], maskless: str) -> Object:
    if maskless == "empty":
        return entry | {"segmentation": {"size": size, "counts": [math.prod(size)]}}
    if maskless == "crowd":
        x, y, width, height = entry["bbox"]
        left, right = math.floor(x), math.ceil(x + width)  # so that a mask of the box is within
        top, bottom = math.floor(y), math.ceil(y + height)
        corners = [left, top, right, top, right, bottom, left, bottom]
        return entry | {"segmentation": [corners], "iscrowd": 1}
    return {key: value for key, value in entry.items() if key != "segmentation"}


def read(
    path: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    is_training: bool = True,
    masks: bool = True,
    is_empty: bool = False,
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
    objects = reader.objects(content.get("annotations") or [], images, named, categories)
    found = Annotations(reader.path, list(images.values()), categories, objects, reader.counts)
    if not is_empty:
        reader.require(found, masks)
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

    def whole(self, value: Any, where: str, name: str, low: int | None = None) -> int:
        """Return a value that must be a whole number."""
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        if not isinstance(number, int) or isinstance(number, bool):
            self.refuse(f"{where} has the {name} {_short(value)}, which must be a whole number")
        if not (-(2**62) if low is None else low) <= number < 2**62:
            self.refuse(f"{where} has the {name} {_short(value)}, which is out of range")
        return number

    def flag(self, value: Any, where: str, name: str) -> bool:
        """Return a value that must be 0 or 1, or absent for 0."""
        if value is not None and not (isinstance(value, int | float) and value in (0, 1)):
            self.refuse(f"{where} has the {name} {_short(value)}, which must be 0 or 1")
        return bool(value)

    def text(self, value: Any, where: str, name: str) -> str:
        """Return a value that must be a text."""
        if not isinstance(value, str) or not value.strip():
            self.refuse(f"{where} has the {name} {_short(value)}, which must be a text")
        return value

    def images(self, entries: list[Any]) -> dict[int, dict[str, Any]]:
        """Return the checked images by id."""
        images, names = {}, {}
        for number, entry in enumerate(entries, start=1):
            where = f"image number {number}"
            if not isinstance(entry, dict):
                self.refuse(f"{where} is {_short(entry)}, which must be an object")
            key = self.whole(entry.get("id"), where, "id")
            name = self.text(entry.get("file_name"), where, "file_name")
            where = f"image {key} ({name})"
            if key in images:
                self.refuse(f"{where} has the id of {images[key]['file_name']}")
            if name in names:
                self.refuse(f"{where} is the file of image {names[name]}, too")
            parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
            if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
                self.refuse(f"{where} must be named relative to the images' folder")
            sides = {side: self.whole(entry.get(side), where, side, 1) for side in SIDES}
            if math.prod(sides.values()) > MAX_PIXELS:
                self.refuse(f"{where} has {sides}, more than {MAX_PIXELS} pixels")
            images[key], names[name] = {**entry, "id": key, **sides}, key
        if not images:
            self.refuse("it has no images")
        return images

    def categories(self, entries: list[Any]) -> dict[int, str]:
        """Return the names of the categories by ascending id."""
        categories: dict[int, str] = {}
        for number, entry in enumerate(entries, start=1):
            where = f"category number {number}"
            if not isinstance(entry, dict):
                self.refuse(f"{where} is {_short(entry)}, which must be an object")
            key = self.whole(entry.get("id"), where, "id")
            name = self.text(entry.get("name"), where, "name").strip()
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
        entries: list[Any],
        images: Mapping[int, dict[str, Any]],
        named: Mapping[int, str],
        categories: Mapping[int, str],
    ) -> dict[int, list[Object]]:
        """Return the checked objects of the categories by image id."""
        objects, ids = defaultdict(list), {}
        normalised = first = None
        for number, entry in enumerate(entries, start=1):
            where = f"annotation number {number}"
            if not isinstance(entry, dict):
                self.refuse(f"{where} is {_short(entry)}, which must be an object")
            source = entry.get("id")
            if source is not None:
                source = self.whole(source, where, "id")
                where = f"annotation {source}"
                if ids.setdefault(source, number) != number:
                    self.refuse(f"{where}, number {number}, has the id of number {ids[source]}")
            image = images.get(self.whole(entry.get("image_id"), where, "image_id"))
            if image is None:
                self.refuse(f"{where} has the image_id {entry['image_id']}, which no image has")
            where += f" of image {image['file_name']}"
            category = self.whole(entry.get("category_id"), where, "category_id")
            if category not in named:
                self.refuse(f"{where} has the category_id {category}, which no category has")
            checked = self.object(entry, image, where)
            inside = _is_normalised(entry.get("bbox"), image)
            normalised = inside if normalised is None else normalised and inside
            first = first or where
            if category not in categories:
                self.count("of other categories", where)
            elif checked is not None:
                checked |= {"id": number, "source_id": source, "category_id": category}
                objects[image["id"]].append(checked)
        if normalised:
            self.refuse(f"{first} and all others have boxes in 0..1, which must be in pixels")
        return dict(objects)

    def object(self, entry: Object, image: Mapping[str, Any], where: str) -> Object | None:
        """Return a checked object; None for one that is left out."""
        crowds = [self.flag(entry.get(key), where, key) for key in ("iscrowd", "ignore")]
        mask = self.mask(entry.get("segmentation"), image, where)
        box, area = entry.get("bbox"), entry.get("area")
        if box is None and mask is not None:
            self.count(BOX, where)
            box = _rle().toBbox(to_rle(mask, image)).tolist()
        bbox = self.box(box, image, where)
        if area is not None and (_numbers([area]) is None or isinstance(area, list)):
            self.refuse(f"{where} has the area {_short(area)}, which must be a number of pixels")
        if bbox is None:
            return None
        if area is None or area <= 0:
            self.count(AREA, where)
            area = bbox[2] * bbox[3] if mask is None else float(_rle().area(to_rle(mask, image)))
        if any(crowds):
            self.count(CROWD, where)
        elif mask is None:
            self.count(NO_MASK, where)
        return {
            **entry,
            "image_id": image["id"],
            "bbox": bbox,
            "area": area,
            "iscrowd": int(any(crowds)),
            "ignore": 0,
            "segmentation": mask,
        }

    def box(self, box: Any, image: Mapping[str, Any], where: str) -> list[float] | None:
        """Return a box, clipped if it leaves its image; None for less than a pixel of it."""
        values = _numbers(box)
        if values is None or values.shape != (4,):
            self.refuse(f"{where} has the bbox {_short(box)}, which must be x, y, width and height")
        x, y, width, height = values.tolist()
        left, top = max(x, 0.0), max(y, 0.0)
        right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
        if min(right - left, bottom - top) < MIN_SIDE:
            return self.count(TINY if min(width, height) < MIN_SIDE else OUTSIDE, where)
        clipped = [left, top, right - left, bottom - top]
        if max(abs(a - b) for a, b in zip(clipped, (x, y, width, height), strict=True)) <= MIN_SIDE:
            return [x, y, width, height]  # rounded, as COCO's own are
        self.count(CLIPPED, where)
        return clipped

    def mask(self, segmentation: Any, image: Mapping[str, Any], where: str) -> Any:
        """Return polygons or an RLE as they are, None if they have no pixels."""
        size = [image["height"], image["width"]]
        if segmentation in (None, [], {}):
            return None
        if isinstance(segmentation, list):
            segmentation, is_solid = self.polygons(segmentation, image, where)
            if is_solid or not segmentation:
                return segmentation or None
            area = _rle().area(to_rle(segmentation, image))
        elif isinstance(segmentation, Mapping):
            area = sum(self.runs(segmentation, size, where)[1::2])
            segmentation = {"size": size, "counts": segmentation["counts"]}
        else:
            self.refuse(f"{where} has the segmentation {_short(segmentation)}, no polygons or RLE")
        return segmentation if area else None

    def polygons(
        self, polygons: list[Any], image: Mapping[str, Any], where: str
    ) -> tuple[list[list[float]], bool]:
        """Return the polygons of 3 points or more; do they have pixels without doubt?"""
        size, kept, is_solid = np.array([image["width"], image["height"]]), [], False
        for polygon in polygons:
            values = _numbers(polygon)
            if values is None or values.ndim != 1 or len(values) % 2:
                self.refuse(
                    f"{where} has the polygon {_short(polygon)}, which must be x and y of 3 points "
                    f"or more"
                )
            if len(values) < POLYGON:
                self.count(CORNERS, where)
                continue
            points = values.reshape(-1, 2)
            low, high = points.min(0), points.max(0)
            if (low < -size).any() or (high > 2 * size).any():
                self.refuse(f"{where} has a polygon far outside of its {size[0]}x{size[1]} pixels")
            kept.append(polygon)
            is_solid = is_solid or ((low >= 0).all() and (high <= size).all() and _is_wide(points))
        return kept, is_solid

    def runs(self, segmentation: Mapping[str, Any], size: list[int], where: str) -> list[int]:
        """Return the run lengths of an RLE, which are decoded to exactly the image's pixels."""
        counts = segmentation.get("counts")
        if segmentation.get("size") != size:
            given = _short(segmentation.get("size"))
            self.refuse(f"{where} has an RLE of size {given} in an image of {size}")
        runs = decode_runs(counts) if isinstance(counts, str) else _numbers(counts)
        if runs is None or runs.ndim != 1 or (runs != np.floor(runs)).any():
            self.refuse(f"{where} has an RLE whose counts are damaged: {_short(counts)}")
        if len(runs) and (runs.min() < 0 or runs.sum() != math.prod(size)):
            total = runs.sum() if runs.min() >= 0 else f"a negative run ({runs.min():.0f})"
            self.refuse(f"{where} has an RLE of {total} pixels, not {math.prod(size)}")
        return runs.astype(np.int64).tolist()

    def require(self, found: Annotations, masks: bool) -> None:
        """Raise DataError unless objects, and masks if needed, are there."""
        usable = [entry for entry in found if not entry["iscrowd"]]
        if not usable:
            self.refuse(f"no object can be used{self.reasons()}")
        if masks and all(entry["segmentation"] is None for entry in usable):
            self.refuse(f"no object has a mask{self.reasons()}")

    def reasons(self) -> str:
        """Return what was left out, and the first of each kind."""
        kinds = [f"{self.counts[kind]} {kind} ({self.first[kind]})" for kind in self.counts]
        return f": {', '.join(kinds)}" if kinds else ""


def _rle() -> Any:
    from pycocotools import mask

    return mask


def to_rle(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked polygons or RLE as COCO's compressed RLE."""
    size = (image["height"], image["width"])
    if isinstance(segmentation, list):
        return _rle().merge(_rle().frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return _rle().frPyObjects(segmentation, *size)
    return segmentation


def _is_wide(points: np.ndarray) -> bool:
    """Return True if a polygon's area is at least a pixel times its circumference."""
    following = np.roll(points, -1, axis=0)
    area = abs(np.sum(points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0])) / 2
    return area >= np.sum(np.hypot(*(following - points).T))


def decode_runs(text: str) -> np.ndarray | None:
    """Return the run lengths of COCO's compressed RLE; None for a damaged one.

    Each is written in groups of 5 bits, the lowest first, and 48 added to each group; bit 5 says
    that another one follows, and bit 4 of the last is the sign. From the fourth run on, the
    difference to the run before the last is written.
    """
    try:
        groups = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(groups):
        return groups
    last = groups & 0x20 == 0
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(groups)) - np.repeat(starts, np.diff([*starts, len(groups)]))
    if groups.min() < 0 or groups.max() >= 64 or not last[-1] or place.max() > 6:
        return None
    values = np.add.reduceat((groups & 0x1F) << 5 * place, starts)
    values -= np.where(groups[last] & 0x10, 1 << 5 * (place[last] + 1), 0)
    for parity in (1, 2):  # runs 1, 3, 5, ... and 2, 4, 6, ... of which the first is whole
        values[parity::2] = np.cumsum(values[parity::2])
    return values


def _is_normalised(box: Any, image: Mapping[str, Any]) -> bool:
    """Return True for a box in 0..1 of an image that is larger than a few pixels."""
    return box is not None and min(image["width"], image["height"]) > 2 and max(box) <= 1


def _numbers(value: Any) -> np.ndarray | None:
    """Return a list of finite numbers as float64; None for anything else."""
    if not isinstance(value, list):
        return None
    try:
        numbers = np.array(value) if value else np.zeros(0)
    except ValueError:  # of lists of several lengths
        return None
    if numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
        return None
    return numbers.astype(np.float64)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
