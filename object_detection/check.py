"""Check an annotation file of COCO's format: ``python -m object_detection.check FILE``.

Prints what training and evaluation would use and leave out. With ``--images FOLDER``, also checks
that all images are there in the sizes that the file says, and draws a contact sheet of 16 with the
boxes and masks to train on: look at it before training.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from object_detection import annotations
from object_detection.data import DetectionDataset, check_files
from object_detection.drawing import contact_sheet, drawn_names
from training.launch import run_program
from training.parser import Parser
from utils import UserError, log, printable

IMAGES = 16


def draw_sheet(dataset: DetectionDataset, texts: list[str]) -> Image.Image:
    """Return the contact sheet of images spread over those with objects."""
    found = dataset.found
    used = {entry["image_id"] for entry in found if not entry["iscrowd"]}
    filled = [place for place, image in enumerate(found.images) if image["id"] in used]
    chosen = np.linspace(0, len(filled) - 1, min(IMAGES, len(filled))).round().astype(int)
    samples = []
    for place in chosen:
        image, target = dataset[filled[place]]
        labels = [texts[label - 1] for label in target["labels"]]
        sample = {"image": to_pil_image(image), "boxes": target["boxes"], "labels": labels}
        samples.append({**sample, "masks": target["masks"].bool()})
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
    sheet = draw_sheet(DetectionDataset(found, Path(args.images), is_training=True), texts)
    for line in legend:
        log(line)
    try:
        sheet.save(args.output, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror or error}") from error
    log(f"images with their objects: {printable(args.output)}")


def main(argv: list[str]) -> int:
    """Check with the flags ``argv``; return the exit status."""
    parser = Parser(
        prog="python -m object_detection.check",
        description="Check an annotation file of COCO's format.",
    )
    add = parser.add_argument
    add("annotations", metavar="FILE", help="instances_*.json of COCO's format")
    add("--images", metavar="FOLDER", help="folder of the images")
    add("--classes", nargs="+", metavar="NAME", help="names in the detector's order")
    add("--boxes", action="store_true", help="masks are not needed")
    add("--output", default="annotations.png", metavar="FILE.png", help="annotations.png")
    args = parser.parse_args(argv)
    return run_program(lambda: check(args), "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
