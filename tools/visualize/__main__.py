"""Draw attention, feature maps, kernels and other parts of a model, or training curves.

``python -m tools.visualize KIND ...``: attention, positions, gates, kernels and feature maps of a
checkpoint or a registered model, and training curves. Every kind has its own ``--help``.
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
DEVICE = "device to compute on; default: cuda if available, else cpu"
SOURCE = "file, URL, hf-hub:ORG/NAME, local-dir:FOLDER or model name"
FLAGS: dict[str, dict[str, Any]] = {
    "source": {"metavar": "CKPT_OR_MODEL", "help": SOURCE},
    "checkpoints": {"nargs": "+", "metavar": "CKPT", "help": SOURCE},
    "runs": {"nargs": "+", "metavar": "RUN_OR_LOG", "help": "folders of runs, or log.txt files"},
    "--image": {"required": True, "metavar": "FILE", "help": "image, or folder for its first one"},
    "--data-path": {"metavar": "FOLDER", "help": "average over images of this folder instead"},
    "--count": {"type": positive, "default": 16, "help": "number of images of --data-path"},
    "--query": {
        "default": "centre",
        "metavar": "X,Y",
        "help": "pixel of the model's input, 0,0 at the upper left; or centre, or class (token)",
    },
    "--part": {
        "choices": [*PARTS, "all"],
        "default": "full",
        "help": "attention as a whole, by content, by position, or all three",
    },
    "--show": {
        "choices": list(positions.SHOWN),
        "help": "bias tables, GPSA's positional attention or position embeddings; default: the "
        "first of these that the model has",
    },
    "--layers": NUMBERS | {"help": "layers, stages or blocks by number, from 0; default: all"},
    "--heads": NUMBERS | {"help": "heads by number, from 0; default: all"},
    "--layer": {"metavar": "NAME", "help": "name of the layer; default: the first RepMixer"},
    "--channels": {"type": positive, "default": 6, "metavar": "N", "help": "number of channels"},
    "--scale": {
        "choices": ["row", "panel"],
        "default": "row",
        "help": "give each row or each panel its own scale of colours",
    },
    "--pick": {
        "choices": ["first", "variance"],
        "default": "first",
        "help": "show the first channels, or those of the largest variance over the image",
    },
    "--model": {"metavar": "NAME", "help": "model name, for checkpoints that do not contain it"},
    "--pretrained": {"action": "store_true", "help": "load published weights, not random ones"},
    "--weights": {"choices": ["model", "ema"], "default": "model", "help": cli.WEIGHTS},
    "--input-size": INPUT_SIZE,
    "--exif": {
        "action": argparse.BooleanOptionalAction,
        "help": "turn images by their EXIF orientation; default: as for the weights",
    },
    "--seed": {"type": int, "default": 0, "metavar": "N", "help": "seed of random weights"},
    "--device": {"choices": ["cpu", "cuda"], "help": DEVICE},
    "--output": {"type": Path, "metavar": "FILE.png", "help": "write the figure"},
    "--tensorboard": {"type": Path, "metavar": "DIR", "help": "log the figure to TensorBoard"},
    "--csv": {"type": Path, "metavar": "FILE.csv", "help": "write the values in the figure"},
}
MODELS = "--model --pretrained --weights --input-size --seed --device"
PHOTOS = f"{MODELS} --exif"  # of kinds that read images
TARGETS = "--output --tensorboard --csv"
KINDS = {  # kind: (function from flags to Picture, flags ...)
    "gates": (heads.make_gates, "checkpoints", MODELS),
    "nonlocality": (
        heads.make_nonlocality,
        "checkpoints --image --data-path --count",
        PHOTOS,
    ),
    "attention": (
        attention.make,
        "source --image --query --layers --heads --part",
        PHOTOS,
    ),
    "bias": (positions.make, "source --show --layers", MODELS),
    "kernels": (kernels.make, "source --layer --channels --scale", MODELS),
    "features": (features.make, "source --image --layers --channels --pick", PHOTOS),
    "curves": (curves.make, "runs"),
}


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of all kinds."""
    parser = Parser("python -m tools.visualize", description=__doc__.splitlines()[0])
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
