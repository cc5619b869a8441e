"""Check an annotation file of COCO's format: ``python -m object_detection.check FILE``.

Prints what training and evaluation would use and leave out. With ``--images FOLDER``, also checks
that all images are there in the sizes that the file says, and draws a contact sheet of 16 with
their boxes and masks: look at it before training.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from object_detection import annotations
from object_detection.annotations import Annotations
from object_detection.drawing import contact_sheet, drawn_names
from object_detection.pixels import check_files, load_checked
from training.launch import run_program
from training.parser import Parser
from utils import UserError, log, printable

IMAGES = 16


def to_mask(entry: annotations.Object, image: Mapping[str, Any]) -> np.ndarray:
    """Return the mask of an object, ``H W`` of 0 and 1; of one without a mask, zeros."""
    from pycocotools import mask as rle

    if entry["segmentation"] is None:
        return np.zeros((image["height"], image["width"]), np.uint8)
    return rle.decode(annotations.to_rle(entry["segmentation"], image))


def draw_sheet(found: Annotations, folder: Path, texts: list[str]) -> Image.Image:
    """Return the contact sheet of images spread over those with objects."""
    images = [image for image in found.images if found.objects.get(image["id"])]
    places = np.linspace(0, len(images) - 1, min(IMAGES, len(images))).round().astype(int)
    samples = []
    for image in (images[place] for place in places):
        objects = found.objects[image["id"]]
        boxes = torch.tensor([entry["bbox"] for entry in objects])
        boxes[:, 2:] += boxes[:, :2]
        crowd = ("", " (crowd)")
        samples.append(
            {
                "image": load_checked(folder / image["file_name"], image, found.path),
                "boxes": boxes,
                "labels": [
                    texts[found.labels[entry["category_id"]]] + crowd[entry["iscrowd"]]
                    for entry in objects
                ],
                "masks": torch.from_numpy(np.stack([to_mask(e, image) for e in objects])).bool(),
            }
        )
    return contact_sheet(samples)


def check(args: argparse.Namespace) -> None:
    """Check ``args.annotations``; draw ``args.output``."""
    found = annotations.read(args.annotations, args.classes, masks=not args.boxes)
    log(found.summary(Path(args.annotations).stem))
    for name, number in found.per_class().items():
        log(f"  {name}: {number}")
    if not args.images:
        return
    check_files(found, Path(args.images))
    texts, legend = drawn_names(list(found.categories.values()))
    sheet = draw_sheet(found, Path(args.images), texts)
    for line in legend:
        log(line)
    try:
        sheet.save(args.output, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror or error}") from error
    print(f"images with their objects: {printable(os.fspath(args.output))}")


def main(argv: list[str]) -> int:
    """Check with the flags ``argv``; return the exit status."""
    parser = Parser(prog="python -m object_detection.check", description=__doc__.splitlines()[0])
    parser.add_argument("annotations", metavar="FILE", help="instances_*.json of COCO's format")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the images")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="names in the detector's order"
    )
    parser.add_argument("--boxes", action="store_true", help="masks are not needed")
    parser.add_argument(
        "--output", default="annotations.png", metavar="FILE.png", help="annotations.png"
    )
    args = parser.parse_args(argv)
    return run_program(lambda: check(args), "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
