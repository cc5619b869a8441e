"""Evaluate checkpoints: ``python -m tools.validate CHECKPOINT [CHECKPOINT ...]``.

Every checkpoint, at every size, with its weights and their moving average, is a row: accuracy,
likelihood, calibration and speed, from one pass over the images.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import engine
from tools import files
from tools.validate import flags, imagenet_c, pictures, rows
from tools.validate.cases import check_sources
from tools.validate.classes import RULES
from training import launch
from training.flags import Parser
from utils import UserError

ENDINGS = {"csv": ".csv", "per_class": ".csv", "confusion": ".png", "reliability": ".png"}
OF_SETS = (*rows.PER_ROW, "real_labels", "data_path", "data_set")  # not of --corruptions


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser("tools.validate", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="files or addresses")
    add("--model", metavar="NAME", help="for files that do not name their model")
    add("--pretrained", action="store_true", help="timm's weights of --model instead of files")
    add("--input-size", type=int, nargs="+", help="pixels; the checkpoint's, if not given")
    add("--weights", choices=["model", "ema", "both"], default="both", help="both, where there are")
    add("--fuse", action="store_true", help="fold the net for inference first")
    add("--classes", choices=RULES, default="auto", help="what the names of classes stand for")
    add("--csv", type=Path, metavar="FILE", help="the table; of --corruptions, errors")
    add("--per-class", type=Path, metavar="FILE.csv", help="recall, precision and confusion")
    add("--confusion", type=Path, metavar="FILE.png", help="picture of the confusion matrix")
    add("--reliability", type=Path, metavar="FILE.png", help="accuracy by confidence")
    add("--real-labels", metavar="FILE", help="real.json of ImageNet-ReaL; timm: timm's copy")
    add("--corruptions", type=Path, metavar="FOLDER", help="ImageNet-C: CORRUPTION/SEVERITY/CLASS")
    flags.add_flags(parser, [*flags.NETWORK, *flags.data_flags(), *flags.PLACE])
    return parser


def check(args: Namespace) -> None:
    """What can be known before reading anything.

    Raises:
        UserError: Flags contradict each other.
        OutputError: A file cannot be written.
    """
    check_sources(args.checkpoints, args)
    if args.corruptions is not None:
        for name in OF_SETS:
            if getattr(args, name) is not None:
                raise UserError(
                    f"{rows.flag_of(name)} is not for --corruptions, which counts errors alone, "
                    f"in its own folders"
                )
    for name, ending in ENDINGS.items():
        files.check_suffix(rows.flag_of(name), getattr(args, name), ending)
        if ending == ".png" and getattr(args, name) is not None:
            pictures.new_figure(1, 1, rows.flag_of(name))  # so that its absence is told now
    rows.check_outputs(args, [{}])


def start(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    args = flags.parse(get_parser, argv)
    check(args)
    device = launch.select_device(args.device)
    engine.set_determinism(False)
    run = rows.validate if args.corruptions is None else imagenet_c.validate
    return run(args, device)


def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    return launch.run_program(lambda: start(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
