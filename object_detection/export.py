"""Export a detector to ONNX: ``python -m object_detection.export CHECKPOINT --output FILE.onnx``.

The program takes ``pixels``, an RGB image ``H W 3`` of uint8, and returns ``boxes`` ``N 4`` (x1,
y1, x2, y2 in pixels), ``labels`` ``N`` (1 for the first class), ``scores`` ``N`` and ``masks``
``N 1 H W`` in 0..1. With --features, it takes ``image``, ``1 3 H W``, normalised, and returns the
backbone's feature maps. The file is kept if onnxruntime agrees with torch.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import models
from object_detection.onnx_models import OUTPUTS, backbone_to_onnx, check, detector_to_onnx, margin
from object_detection.torchvision_rcnn import build_detector, classes_of
from pipeline.images import load_image
from training.files import write_atomically
from training.launch import run_program
from training.parser import Parser, positive
from utils import UserError, log

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def read_pixels(file: str | None, size: Sequence[int]) -> torch.Tensor:
    """Return a photograph, resized, or random pixels, ``H W 3`` of uint8."""
    if not file:
        return torch.randint(256, (*size, 3), dtype=torch.uint8)
    return torch.from_numpy(np.array(load_image(file, is_upright=True).resize(size[::-1])))


@torch.no_grad()
def export(args: argparse.Namespace) -> None:
    """Write ``args.output`` once it is verified."""
    if not all(map(importlib.util.find_spec, PACKAGES)):
        raise UserError(f"this needs {', '.join(PACKAGES)}: pip install {' '.join(PACKAGES)}")
    if args.output.suffix != ".onnx" or not args.output.parent.is_dir():
        raise UserError(f"--output {args.output} must be a FILE.onnx in a folder that exists")
    if not args.checkpoint and not (args.features and args.model):
        raise UserError("give the CHECKPOINT of a detector, or --features --model NAME")
    checkpoint = models.read_weights(args.checkpoint) if args.checkpoint else {}
    name = (args.model if args.features else None) or checkpoint.get("model_name")
    classes, size, margins = [], args.size or [224, 224], []
    if not args.features:
        classes = classes_of(checkpoint, args.checkpoint)
        size = args.size or [checkpoint["min_size"][-1], checkpoint["max_size"]]
        model = build_detector({**checkpoint, "classes": classes})
        log(str(models.load_weights(model, checkpoint, args.checkpoint)))
    elif name:
        model = models.VisionBackbone(name)
        if args.checkpoint:
            log(str(models.load_backbone(model, args.checkpoint)))
    else:
        raise UserError(f"{args.checkpoint} does not name its model: give --model NAME")
    model.eval().requires_grad_(False)
    example = read_pixels(args.image, size)
    image = example.permute(2, 0, 1) / 255
    if args.features:
        config = model.net.pretrained_cfg
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
        example = ((image - mean) / std)[None]
        expected, program = model(example), backbone_to_onnx(model, example)
        margins = list(map(margin, expected, model.double()(example.double())))
    else:
        expected = list(map(model([image])[0].get, OUTPUTS))
        program = detector_to_onnx(model, example)
    metadata = {"project": "visformer", "model": name, "classes": json.dumps(classes)}
    metadata |= {"input_size": json.dumps(size)}
    metadata |= {"preprocessing": "outside" if args.features else "inside"}
    for key, value in metadata.items():
        program.metadata_props.add(key=key, value=value)
    write_atomically(
        args.output,
        lambda file: file.write(program.SerializeToString()),
        lambda path: check(path, example, expected, margins),
    )
    print(f"written to {args.output}: {name}, images of {size[0]}x{size[1]}")


def main(argv: list[str]) -> int:
    """Export with the flags ``argv``; return the exit status."""
    what = "Export a detector or a backbone to ONNX, for images of one size."
    parser = Parser(prog="python -m object_detection.export", description=what)
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="of object_detection.torchvision_rcnn")
    add("--output", required=True, type=Path, metavar="FILE.onnx")
    size = "of every image, as windows depend on it; default: --min-size and --max-size of training"
    add("--size", nargs=2, type=positive, metavar=("HEIGHT", "WIDTH"), help=size)
    add("--image", metavar="FILE", help="photograph to compare on, instead of random pixels")
    add("--features", action="store_true", help="feature maps of a backbone, of any weights")
    add("--model", metavar="NAME", help="for --features: the model, if CHECKPOINT does not name it")
    return run_program(lambda: export(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
