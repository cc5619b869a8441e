"""Annotation files of COCO's format, right and wrong, of 4 images of 96x80 with 2 squares each."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT, IMAGES = 96, 80, 4
CLASSES = ("cat", "dog")
BOXES = ((10, 10, 30, 30), (50, 20, 24, 24))
PIXELS = WIDTH * HEIGHT


def polygon(x, y, width, height):
    """The corners of a rectangle."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def rle(x, y, width, height):
    """Run lengths of a rectangle, down the columns."""
    runs = [x * HEIGHT + y, height]
    for _ in range(width - 1):
        runs += [HEIGHT - height, height]
    return {"size": [HEIGHT, WIDTH], "counts": [*runs, PIXELS - sum(runs)]}


def compressed(runs):
    """COCO's text of run lengths: groups of 5 bits, differences from the fourth run on."""
    text = ""
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        while True:
            group, value = value & 0x1F, value >> 5
            more = value != (-1 if group & 0x10 else 0)
            text += chr((group | 0x20 * more) + 48)
            if not more:
                break
    return text


def content():
    """A file with nothing wrong."""
    images = [
        {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT}
        for number in range(1, IMAGES + 1)
    ]
    annotations = [
        {
            "id": 2 * number + place + 1,
            "image_id": number + 1,
            "category_id": place + 1,
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [polygon(*box)],
        }
        for number in range(IMAGES)
        for place, box in enumerate(BOXES)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, changed: Any = None) -> Path:
    """Write images and an annotation file into a folder, and return the file."""
    numbers = np.random.default_rng(0)
    for number in range(1, IMAGES + 1):
        pixels = numbers.integers(0, 100, (HEIGHT, WIDTH, 3), np.uint8)
        for x, y, width, height in BOXES:
            pixels[y : y + height, x : x + width] += 120
        Image.fromarray(pixels).save(folder / f"{number}.png")
    file = folder / "instances.json"
    file.write_text(json.dumps(content() if changed is None else changed))
    return file


@dataclass
class Case:
    """A change of the file, and what must come of it.

    Attributes:
        change: Changes the content in place.
        objects, masks: Objects to train on, and those with a mask; None if the file is refused.
        names: What the refusal must name.
        classes: Of the detector.
    """

    change: Any
    objects: int | None = 8
    masks: int | None = None
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = CLASSES


def _all(**values):
    def change(content):
        for entry in content["annotations"]:
            entry.update(values)

    return change


def _third(**values):
    """Change annotation 3, of image 2."""
    return lambda content: content["annotations"][2].update(values)


def _without(key, count=8):
    def change(content):
        for entry in content["annotations"][:count]:
            del entry[key]

    return change


def _image(**values):
    return lambda content: content["images"][1].update(values)


def _category(**values):
    return lambda content: content["categories"][1].update(values)


def _each(make):
    def change(content):
        for entry in content["annotations"]:
            entry.update(make(entry))

    return change


def _replaced(value):
    def change(content):
        content.clear()
        content.update(value)

    return change


def _swapped(content):
    content["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]


def _other_order(content):
    content["categories"].reverse()


def _more_categories(content):
    content["categories"].append({"id": 7, "name": "bird"})
    content["annotations"][0]["category_id"] = 7


def _unused_image(content):
    content["annotations"] = content["annotations"][2:]


def _normalised(entry):
    x, y, width, height = entry["bbox"]
    return {"bbox": [x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT]}


def _compressed_rle(entry):
    size = [HEIGHT, WIDTH]
    counts = compressed(rle(*entry["bbox"])["counts"])
    return {"segmentation": {"size": size, "counts": counts}}


def _rle(**values):
    return _third(segmentation={**rle(*BOXES[0]), **values})


AT = ("annotation 3", "2.png")
WHOLE = rle(*BOXES[0])["counts"]
CASES = {
    # --- right, or right enough
    "as it is": Case(lambda content: None),
    "names in another order than ids": Case(_other_order),
    "ids in another order than names": Case(_swapped),
    "ids of categories far apart": Case(
        lambda content: [
            *(entry.update(id=entry["id"] * 1000) for entry in content["categories"]),
            *(e.update(category_id=e["category_id"] * 1000) for e in content["annotations"]),
        ]
    ),
    "ids of images from 0": Case(
        lambda content: [
            *(entry.update(id=entry["id"] - 1) for entry in content["images"]),
            *(entry.update(image_id=entry["image_id"] - 1) for entry in content["annotations"]),
        ]
    ),
    "a category that the detector does not know": Case(_more_categories, 7),
    "an image without objects": Case(_unused_image, 6),
    "whole numbers as floats": Case(_each(lambda entry: {"image_id": float(entry["image_id"])})),
    "no ids": Case(_without("id")),
    "ids null": Case(_all(id=None)),
    "no areas": Case(_without("area")),
    "areas null": Case(_all(area=None)),
    "areas 0": Case(_all(area=0)),
    "areas negative": Case(_all(area=-1.0)),
    "no iscrowd": Case(_without("iscrowd")),
    "iscrowd null": Case(_all(iscrowd=None)),
    "iscrowd true and false": Case(_each(lambda entry: {"iscrowd": entry["id"] == 3}), 7),
    "some crowds": Case(_third(iscrowd=1, segmentation=rle(*BOXES[0])), 7),
    "some to ignore": Case(_third(ignore=1), 7),
    "boxes null": Case(_all(bbox=None)),
    "no boxes": Case(_without("bbox")),
    "boxes beyond the border": Case(_third(bbox=[80, 60, 40, 40])),
    "a box outside": Case(_third(bbox=[100, 10, 20, 20]), 7),
    "a box without width": Case(_third(bbox=[10, 10, 0, 20]), 7),
    "a box of negative width": Case(_third(bbox=[10, 10, -5, 20]), 7),
    "a box smaller than a pixel": Case(_third(bbox=[10, 10, 0.5, 0.5]), 7),
    "half without masks": Case(_without("segmentation", 4), 8, 4),
    "a mask null": Case(_third(segmentation=None), 8, 7),
    "a mask of no polygons": Case(_third(segmentation=[]), 8, 7),
    "a mask of an empty polygon": Case(_third(segmentation=[[]]), 8, 7),
    "a polygon of two points": Case(_third(segmentation=[[10, 10, 40, 40]]), 8, 7),
    "a polygon beside one of two points": Case(
        _third(segmentation=[[10, 10, 40, 40], polygon(*BOXES[0])])
    ),
    "a polygon without area": Case(_third(segmentation=[[10, 10, 40, 10, 20, 10]]), 8, 7),
    "a polygon in 0..1": Case(_third(segmentation=[polygon(0.1, 0.1, 0.3, 0.3)]), 8, 7),
    "a polygon that leaves the image": Case(_third(segmentation=[polygon(80, 60, 40, 40)])),
    "run lengths": Case(_each(lambda entry: {"segmentation": rle(*entry["bbox"])})),
    "compressed run lengths": Case(_each(_compressed_rle)),
    "run lengths of nothing": Case(_rle(counts=[PIXELS]), 8, 7),
    "no run lengths": Case(_rle(counts=[]), 8, 7),
    "an empty text of run lengths": Case(_rle(counts=""), 8, 7),
    "keys of others": Case(_all(attributes={"x": [1, None]}, score=None)),
    # --- refused
    "not a dict": Case(_replaced({"images": {}}), None, names=("images", "annotations")),
    "no annotations' list": Case(
        lambda content: content.pop("annotations"), None, names=("annotations",)
    ),
    "no annotations": Case(lambda content: content["annotations"].clear(), None, names=("object",)),
    "no images": Case(lambda content: content["images"].clear(), None, names=("images",)),
    "no categories": Case(
        lambda content: content["categories"].clear(), None, names=("categories",)
    ),
    "all crowds": Case(_all(iscrowd=1), None, names=("8 crowd",)),
    "no masks": Case(_without("segmentation"), None, names=("mask", "annotation 1", "1.png")),
    "masks null": Case(_all(segmentation=None), None, names=("mask", "annotation 1", "1.png")),
    "masks of 4 numbers": Case(
        _all(segmentation=[[10, 10, 40, 40]]), None, names=("mask", "3 points", "1.png")
    ),
    "masks of pairs of points": Case(
        _all(segmentation=[[10, 10], [40, 10], [40, 40]]), None, names=("3 points", "1.png")
    ),
    "boxes in 0..1": Case(_each(_normalised), None, names=("0..1", "annotation 1", "1.png")),
    "an image id twice": Case(_image(id=1), None, names=("2.png", "1.png")),
    "an image file twice": Case(_image(file_name="1.png"), None, names=("1.png",)),
    "an image id as a text": Case(_image(id="2"), None, names=('"2"',)),
    "an image without a file": Case(_image(file_name=None), None, names=("file_name", "null")),
    "an image of another folder": Case(_image(file_name="../2.png"), None, names=("../2.png",)),
    "an image of the root": Case(_image(file_name="/etc/2.png"), None, names=("/etc/2.png",)),
    "a width null": Case(_image(width=None), None, names=("2.png", "width", "null")),
    "a width as a text": Case(_image(width="96"), None, names=("2.png", "width", '"96"')),
    "a width of 0": Case(_image(width=0), None, names=("2.png", "width")),
    "a width of 10^12": Case(_image(width=10**12), None, names=("2.png", str(10**12))),
    "an image as a list": Case(
        lambda content: content["images"].__setitem__(1, [2]), None, names=("image number 2",)
    ),
    "a category id twice": Case(_category(id=1), None, names=("'dog'", "'cat'")),
    "a category name twice": Case(_category(name="cat"), None, names=("'cat'",)),
    "a category name null": Case(_category(name=None), None, names=("name", "null")),
    "a category's other spelling": Case(_category(name="Dog"), None, names=("'dog'", "'Dog'")),
    "a class that the file does not have": Case(
        lambda content: None, None, names=("'bird'",), classes=("cat", "bird")
    ),
    "one class as a text": Case(lambda content: None, None, names=("'cat'",), classes="cat"),
    "a class twice": Case(lambda content: None, None, names=("'cat'",), classes=("cat", "cat")),
    "an annotation id twice": Case(_third(id=1), None, names=("annotation 1",)),
    "an annotation id as a text": Case(_third(id="x"), None, names=("number 3", '"x"')),
    "an annotation as a number": Case(
        lambda content: content["annotations"].__setitem__(2, 5), None, names=("number 3", "5")
    ),
    "an image_id null": Case(_third(image_id=None), None, names=("annotation 3", "image_id")),
    "an unknown image_id": Case(_third(image_id=99), None, names=("annotation 3", "99")),
    "a category_id as a text": Case(_third(category_id="1"), None, names=(*AT, '"1"')),
    "a category_id as a list": Case(_third(category_id=[1]), None, names=(*AT, "[1]")),
    "an unknown category_id": Case(_third(category_id=0), None, names=(*AT, "0")),
    "a box of 3 numbers": Case(_third(bbox=[1, 2, 3]), None, names=(*AT, "[1, 2, 3]")),
    "a box of texts": Case(_third(bbox=["1", "2", "3", "4"]), None, names=(*AT, '"1"')),
    "a box with null": Case(_third(bbox=[1, 2, None, 4]), None, names=(*AT, "null")),
    "a box with NaN": Case(_third(bbox=[1, 2, float("nan"), 4]), None, names=(*AT, "NaN")),
    "a box as a text": Case(_third(bbox="1 2 3 4"), None, names=(*AT, "1 2 3 4")),
    "neither box nor mask": Case(_third(bbox=None, segmentation=None), None, names=(*AT, "bbox")),
    "an area as a text": Case(_third(area="900"), None, names=(*AT, '"900"')),
    "an infinite area": Case(_third(area=float("inf")), None, names=(*AT, "Infinity")),
    "an iscrowd of 2": Case(_third(iscrowd=2), None, names=(*AT, "iscrowd", "2")),
    "an iscrowd as a text": Case(_third(iscrowd="0"), None, names=(*AT, "iscrowd")),
    "an iscrowd as a list": Case(_third(iscrowd=[0]), None, names=(*AT, "iscrowd")),
    "a polygon that is no list of lists": Case(
        _third(segmentation=polygon(*BOXES[0])), None, names=(*AT, "10")
    ),
    "a polygon of points": Case(
        _third(segmentation=[[[10, 10], [40, 10], [40, 40]]]), None, names=AT
    ),
    "an odd number of coordinates": Case(
        _third(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), None, names=AT
    ),
    "a polygon of texts": Case(_third(segmentation=[["1"] * 6]), None, names=AT),
    "a polygon with null": Case(_third(segmentation=[[1, 1, 9, 1, 9, None]]), None, names=AT),
    "a polygon far outside": Case(_third(segmentation=[[1, 1, 1e9, 1, 1e9, 1e9]]), None, names=AT),
    "a mask as a text": Case(_third(segmentation="mask.png"), None, names=(*AT, "mask.png")),
    "a mask as a number": Case(_third(segmentation=0), None, names=AT),
    "run lengths of another size": Case(_rle(size=[WIDTH, HEIGHT]), None, names=(*AT, "[96, 80]")),
    "run lengths without a size": Case(_rle(size=None), None, names=AT),
    "run lengths null": Case(_rle(counts=None), None, names=AT),
    "run lengths that end early": Case(_rle(counts=WHOLE[:-1]), None, names=(*AT, str(PIXELS))),
    "run lengths that go on": Case(_rle(counts=[*WHOLE, 5]), None, names=(*AT, str(PIXELS))),
    "negative run lengths": Case(_rle(counts=[-5, PIXELS + 5]), None, names=(*AT, "-5")),
    "broken run lengths": Case(_rle(counts=[0.5, PIXELS - 0.5]), None, names=AT),
    "compressed run lengths cut": Case(_rle(counts=compressed(WHOLE)[:-2]), None, names=AT),
    "compressed run lengths damaged": Case(
        _rle(counts="o" + compressed(WHOLE)[1:]), None, names=AT
    ),
    "compressed run lengths without end": Case(_rle(counts="o" * 50), None, names=AT),
    "compressed run lengths in other letters": Case(_rle(counts="猫"), None, names=AT),
}
