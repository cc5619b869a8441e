"""Find objects in images: ``python -m object_detection.infer CHECKPOINT IMAGE ...``.

Boxes, masks and labels are drawn into a PNG for each image.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models import CheckpointError
from object_detection import checkpoints, recipe, runtime
from object_detection.drawing import draw, drawn_names
from pipeline.images import load_image
from pipeline.sources.listing import Listing, find_images
from training.files import names_of_pictures
from training.launch import select_device
from training.parser import Parser
from utils import UserError, log, printable

ENDING = "_objects.png"  # of the pictures in a folder


def class_names(checkpoint: dict[str, Any], number: int) -> list[str]:
    """Return the class names of a checkpoint, or the numbers of the classes if it has none."""
    meta = checkpoint.get("meta", {})
    names = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES") or ()
    names = [names] if isinstance(names, str) else list(names)
    return names if len(names) == number else [str(index) for index in range(number)]


def detect(model: Any, pipeline: list[dict[str, Any]], image: Image.Image) -> Any:
    """Return mmdet's instances with ``bboxes N 4``, ``labels``, ``scores`` and ``masks``."""
    from mmcv.transforms import Compose

    # the pipeline's first step reads a file, and mmdet's images are BGR
    compose = Compose([{"type": "mmdet.LoadImageFromNDArray"}, *pipeline[1:]])
    pixels = np.ascontiguousarray(np.asarray(image)[..., ::-1])
    data = compose({"img": pixels, "img_id": 0})
    with torch.no_grad():
        samples = model.test_step(
            {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}
        )
    return samples[0].pred_instances.cpu()


def described(found: Any, names: list[str]) -> list[tuple[str, float]]:
    """Return class name and score of every instance."""
    pairs = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    return [(names[label], score) for label, score in pairs]


def plan(args: argparse.Namespace) -> tuple[Listing, list[Path]]:
    """Return the images of the flags, and the path of each one's picture.

    Raises:
        DataError: A folder has no images.
        UserError: ``--out`` is a file for several images.
    """
    listing = find_images(args.images, ENDING)
    names = names_of_pictures(list(map(Path, listing.paths)), ENDING)
    out = Path(args.out or "")
    if args.out and len(names) == 1 and not any(map(os.path.isdir, [out, *args.images])):
        return listing, [out]
    if out.suffix.lower() == ".png" and not out.is_dir():
        raise UserError(f"--out {out} is one file for {len(names)} image(s): give a folder")
    return listing, [out / name for name in names]


def infer(args: argparse.Namespace) -> None:
    """Print what ``args.checkpoint`` finds in ``args.images``, and draw it into ``args.out``."""
    from mmengine.config import Config

    listing, pictures = plan(args)
    if any(map(os.path.isdir, args.images)):
        log(str(listing))
    load_image(listing.paths[0], is_upright=True)  # an error before the model is built
    checkpoint = checkpoints.read(args.checkpoint)
    if args.config:
        config = recipe.read_config(args.config)
    else:
        carried = checkpoints.read_config_of(checkpoint, args.checkpoint)
        if carried is None:
            raise CheckpointError(f"{args.checkpoint} does not contain a config: give --config")
        config = Config(carried)
    model = runtime.build_model(config, args.config or args.checkpoint)
    checkpoints.load(model, checkpoint, args.checkpoint)
    model.to(select_device(args.device)).eval()
    names = class_names(checkpoint, runtime.number_of_classes(model))
    steps = checkpoints.test_pipeline(config)
    texts, legend = drawn_names(names)
    for path, picture in zip(listing.paths, pictures, strict=True):
        if len(pictures) > 1:
            print(f"{printable(path)}:")
        image = load_image(path, is_upright=True)
        found = detect(model, steps, image)
        show(image, found[found.scores >= args.score_thr], names, texts, picture)
    for line in legend:
        print(printable(line))


def show(image: Image.Image, found: Any, names: list[str], texts: list[str], out: Path) -> None:
    """Print the instances of an image, and draw them with their texts into the file ``out``."""
    for (name, score), box in zip(described(found, names), found.bboxes.tolist(), strict=True):
        print(f"{printable(name)} {score:.3f} at {', '.join(f'{side:.0f}' for side in box)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        labels = [f"{text} {score:.2f}" for text, score in described(found, texts)]
        masks = found.masks.bool() if "masks" in found else None
        draw(image, found.bboxes, labels, masks).save(out, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    print(f"{len(found)} object(s) drawn into {printable(str(out))}")


def main(argv: list[str]) -> int:
    """Find objects with the flags ``argv``; return the exit status."""
    parser = Parser(prog="python -m object_detection.infer", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="file that training wrote, or an address")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders of them")
    parser.add_argument("--config", help="config, if the checkpoint does not contain one")
    parser.add_argument(
        "--out", metavar="PLACE", help="FILE.png for one image, or folder; default: here"
    )
    parser.add_argument("--score-thr", type=float, default=0.3, help="lowest score to show")
    parser.add_argument("--device", help="cuda or cpu")
    return runtime.run(infer, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
