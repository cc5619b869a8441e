"""Visualize the inside of a model: ``python -m tools.visualize KIND ...``.

Attention, positions, gates, kernels and feature maps of a checkpoint or a registered model, and
training curves. Every kind has its own ``--help``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from tools import cli
from tools.visualize import attention, curves, features, heads, kernels, positions
from tools.visualize.capture import PARTS
from tools.visualize.figures import check_targets, save
from training.parser import INPUT_SIZE, Parser, positive

NUMBERS = {"type": int, "nargs": "+"}
IMAGES = {"--image": {"nargs": "+", "metavar": "IMG", "help": "images to average over"}}
FLAGS: dict[str, dict[str, Any]] = {
    "source": {"metavar": "CKPT_OR_MODEL", "help": "checkpoint file or model name"},
    "checkpoints": {"nargs": "+", "metavar": "CKPT", "help": "checkpoint files or model names"},
    "runs": {"nargs": "+", "metavar": "RUN_OR_LOG", "help": "run folders or log.txt files"},
    "--checkpoint": {"metavar": "CKPT", "help": "checkpoint file; else --model NAME"},
    "--image": {"required": True, "metavar": "FILE", "help": "image, or folder for its first one"},
    "--data-path": {"metavar": "FOLDER", "help": "or images from a folder"},
    "--count": {"type": positive, "default": 16, "help": "images of the folder (16)"},
    "--query": {
        "default": "centre",
        "metavar": "X,Y",
        "help": "pixel of the model's input, 0,0 at the upper left; or centre, or class",
    },
    "--part": {"choices": [*PARTS, "all"], "default": "full"},
    "--show": {
        "choices": list(positions.SHOWN),
        "help": "bias tables, GPSA's positional attention or position embeddings; the first of "
        "these that the model has if not given",
    },
    "--layers": NUMBERS | {"help": "layers, stages or blocks by number, from 0"},
    "--heads": NUMBERS | {"help": "heads by number, from 0"},
    "--layer": {"metavar": "NAME", "help": "layer name; the first RepMixer if not given"},
    "--channels": {"type": positive, "default": 6, "help": "number of channels (6)"},
    "--scale": {"choices": ["row", "panel"], "default": "row", "help": "of colours (row)"},
    "--pick": {
        "choices": ["first", "variance"],
        "default": "first",
        "help": "the first channels, or those of the largest variance over the image",
    },
    "--model": {"metavar": "NAME", "help": "model name, for checkpoints that do not contain it"},
    "--pretrained": {"action": "store_true", "help": "timm's weights instead of random ones"},
    "--weights": {"choices": ["model", "ema"], "default": "model", "help": "or the EMA weights"},
    "--input-size": INPUT_SIZE,
    "--exif": {
        "action": argparse.BooleanOptionalAction,
        "help": "turn images by their EXIF orientation; as the weights if not given",
    },
    "--seed": {"type": int, "default": 0, "help": "seed of random weights (0)"},
    "--device": {"choices": ["cpu", "cuda"], "help": "cuda if available, else cpu"},
    "--output": {"type": Path, "metavar": "FILE.png", "help": "figure to write"},
    "--tensorboard": {"type": Path, "metavar": "DIR", "help": "folder for the figure as an event"},
    "--csv": {"type": Path, "metavar": "FILE.csv", "help": "the values in the figure"},
}
MODELS = "--model --pretrained --weights --input-size --seed --device"
PHOTOS = f"{MODELS} --exif"  # of kinds that read images
TARGETS = "--output --tensorboard --csv"
KINDS = {  # kind: (function from flags to Picture, flags ...)
    "gates": (heads.make_gates, "checkpoints", MODELS),
    "nonlocality": (
        heads.make_nonlocality,
        "checkpoints --image --data-path --count",
        MODELS,
    ),
    "attention": (
        attention.make,
        "--checkpoint --image --query --layers --heads --part",
        MODELS,
    ),
    "bias": (positions.make, "source --show --layers", MODELS),
    "kernels": (kernels.make, "source --layer --channels --scale", MODELS),
    "features": (features.make, "source --image --layers --channels --pick", PHOTOS),
    "curves": (curves.make, "runs"),
}


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of all kinds."""
    parser = Parser("tools.visualize", description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (make, *flags) in KINDS.items():
        what = make.__doc__.splitlines()[0]
        kind = kinds.add_parser(name, help=what, description=what)
        options = FLAGS | IMAGES if name == "nonlocality" else FLAGS
        for flag in " ".join([*flags, TARGETS]).split():
            kind.add_argument(flag, **options[flag])
    return parser


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``; make and write one figure."""
    args = get_parser().parse_args(argv)
    check_targets(args)
    picture = KINDS[args.kind][0](args)
    print(*picture.notes, *save(picture, args.kind, args), sep="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
