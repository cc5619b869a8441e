"""Find objects in images: ``python -m object_detection.infer CONFIG CHECKPOINT IMAGE ...``.

Boxes, masks and labels are drawn into a PNG for each image.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from object_detection import checkpoints, runtime
from object_detection.drawing import draw, drawn_names
from pipeline.images import load_image
from pipeline.sources.listing import Listing, find_images
from training.files import names_of_pictures
from training.launch import select_device
from training.parser import Parser
from utils import log, printable

ENDING = "_objects.png"  # of the pictures


def class_names(checkpoint: dict[str, Any], number: int) -> list[str]:
    """Return the class names of a checkpoint, or the numbers of the classes if it has none."""
    meta = checkpoint.get("meta", {})
    names = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES") or ()
    names = [names] if isinstance(names, str) else list(names)
    return names if len(names) == number else [str(index) for index in range(number)]


def plan(args: argparse.Namespace) -> tuple[Listing, list[Path]]:
    """Return the images of the flags, and the path of each one's picture.

    Raises:
        DataError: A folder has no images.
    """
    listing = find_images(args.images, ENDING)
    names = names_of_pictures(list(map(Path, listing.paths)), ENDING)
    return listing, [Path(args.out, name) for name in names]


def infer(args: argparse.Namespace) -> None:
    """Print what ``args.checkpoint`` finds in ``args.images``, and draw it into ``args.out``."""
    from mmdet.apis import inference_detector
    from mmengine.runner import load_checkpoint

    listing, pictures = plan(args)
    if any(map(os.path.isdir, args.images)):
        log(str(listing))
    load_image(listing.paths[0], is_upright=True)  # an error before the model is built
    config = runtime.read_config(args.config)
    model = runtime.build_model(config, args.config)
    checkpoint = load_checkpoint(model, args.checkpoint)
    checkpoints.check_fit(model, checkpoint, args.checkpoint)
    model.to(select_device(args.device)).eval()
    model.cfg = config  # whose pipeline mmdet takes
    names = class_names(checkpoint, runtime.number_of_classes(model))
    texts, legend = drawn_names(names)
    os.makedirs(args.out, exist_ok=True)
    for path, picture in zip(listing.paths, pictures, strict=True):
        image = load_image(path, is_upright=True)
        pixels = np.ascontiguousarray(np.asarray(image)[..., ::-1])  # mmdet's images are BGR
        found = inference_detector(model, pixels).pred_instances.cpu()
        found = found[found.scores >= args.score_thr]
        print(f"{printable(path)}:")
        labels = []
        columns = (found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist())
        for label, score, box in zip(*columns, strict=True):
            sides = ", ".join(f"{side:.0f}" for side in box)
            print(f"{printable(names[label])} {score:.3f} at {sides}")
            labels.append(f"{texts[label]} {score:.2f}")
        masks = found.masks.bool() if "masks" in found else None
        draw(image, found.bboxes, labels, masks).save(picture)
        print(f"{len(found)} object(s) drawn into {printable(str(picture))}")
    for line in legend:
        print(printable(line))


def main(argv: list[str]) -> int:
    """Find objects with the flags ``argv``; return the exit status."""
    parser = Parser(prog="python -m object_detection.infer", description="Find objects in images.")
    parser.add_argument("config", help="config file of mmdet 3")
    parser.add_argument("checkpoint", help="file that training wrote, or an address")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders of them")
    parser.add_argument("--out", default=".", metavar="FOLDER", help="folder of the pictures")
    parser.add_argument("--score-thr", type=float, default=0.3, help="lowest score to show")
    parser.add_argument("--device", help="cuda or cpu; default: cuda if available")
    return runtime.run(infer, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
