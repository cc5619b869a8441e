"""Evaluate checkpoints: ``python -m tools.validate CHECKPOINT [CHECKPOINT ...]``.

Every checkpoint, at every size, with its weights and their moving average, is a row: accuracy,
likelihood, calibration and speed, from one pass over the images.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import engine
from tools import cli, files
from tools.validate import imagenet_c, rows
from tools.validate.classes import RULES
from tools.validate.eval_models import check_sources
from training import launch
from training.flags import Parser
from utils import UserError

ENDINGS = {"csv": ".csv", "per_class": ".csv", "confusion": ".png", "reliability": ".png"}
NETWORK = ("batch_size", "qk_scale_factor", "amp", "amp_dtype", "channels_last", "compile")
OF_SETS = (*rows.WRITERS, "real_labels", "data_path", "data_set")  # not with --corruptions


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser("tools.validate", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="files or addresses")
    add("--model", metavar="NAME", help="for files that do not contain their model's name")
    add("--pretrained", action="store_true", help="timm's weights of --model instead of files")
    add("--input-size", type=int, nargs="+", help="pixels; default: the checkpoint's")
    add("--weights", choices=["model", "ema", "both"], default="both", help="both, if both exist")
    add("--fuse", action="store_true", help="fuse the model for inference first")
    add("--classes", choices=RULES, default="auto", help="how class names match outputs")
    add("--csv", type=Path, metavar="FILE", help="the table; with --corruptions, errors")
    add("--per-class", type=Path, metavar="FILE.csv", help="recall, precision and confusion")
    add("--confusion", type=Path, metavar="FILE.png", help="picture of the confusion matrix")
    add("--reliability", type=Path, metavar="FILE.png", help="accuracy by confidence")
    add("--real-labels", metavar="FILE", help="real.json of ImageNet-ReaL; timm: timm's copy")
    add("--corruptions", type=Path, metavar="FOLDER", help="ImageNet-C: CORRUPTION/SEVERITY/CLASS")
    cli.add_flags(parser, [*NETWORK, *cli.data_flags(), "device"])
    return parser


def check(args: Namespace) -> None:
    """Raise UserError if flags contradict each other, OutputError if a file cannot be written."""
    check_sources(args.checkpoints, args)
    if args.corruptions is not None:
        for name in OF_SETS:
            if getattr(args, name) is not None:
                raise UserError(
                    f"{rows.flag_of(name)} cannot be used with --corruptions, which reads its own "
                    f"folders and counts errors only"
                )
    for name, ending in ENDINGS.items():
        files.check_suffix(rows.flag_of(name), getattr(args, name), ending)
    rows.check_outputs(args, [{}])


@cli.program
def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; return the exit status."""
    args = cli.parse(get_parser, argv)
    check(args)
    device = launch.select_device(args.device)
    engine.set_determinism(False)
    run = rows.validate if args.corruptions is None else imagenet_c.validate
    return run(args, device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
