"""The flags of ``object_detection.torchvision_rcnn``, with DeiT's spelling if DeiT has them."""

import argparse
from argparse import BooleanOptionalAction as OnOff
from collections.abc import Sequence

from object_detection.mask_rcnn import CHANNELS, MAX_SIZE, MIN_SIZE
from training.existing_run import check_overwrite
from training.flags import add_precision, add_processes
from training.parser import Parser, flags_of, usable_cpus
from utils import UserError

MODEL = "swin_visformer_small_v2"
WARMUP_ITERS = 500


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = Parser(
        "python -m object_detection.torchvision_rcnn",
        description="Train and evaluate Mask R-CNN.",
        allow_abbrev=False,
    )
    add = flags_of(parser.add_argument_group("run"))
    add("--batch-size", type=int, default=2, help="images per process and step")
    add("--epochs", type=int, default=12, help="number of training epochs")
    add("--output_dir", default="", help="folder of checkpoints and logs; empty for none")
    add("--resume", default="", help="checkpoint of a detector, or auto: of --output_dir")
    add("--overwrite", action="store_true", help="remove a run that --output_dir holds")
    add("--finetune", default="", help="weights of a classifier, for the backbone")
    add("--stop-epoch", type=int, help="stop before this epoch of the schedule for --epochs")
    add("--eval", action="store_true", help="evaluate the checkpoint of --resume and exit")
    add("--seed", type=int, default=0, help="seed of the random numbers")
    add("--log-interval", type=int, default=50, help="steps between log lines")

    add = flags_of(parser.add_argument_group("model"))
    given = "the checkpoint's if not given, or"
    add("--model", help=f"any timm model name; {given} {MODEL}")
    sizes = "shorter side of images: training samples one, evaluation takes the last"
    add("--min-size", type=int, nargs="+", metavar="PIXELS", help=f"{sizes}; {given} {MIN_SIZE}")
    longest = f"maximum of the longer side; {given} {MAX_SIZE}"
    add("--max-size", type=int, metavar="PIXELS", help=longest)
    add("--channels", type=int, help=f"channels of pyramid and heads; {given} {CHANNELS}")
    add("--drop-path", type=float, default=0.0, metavar="RATE", help="stochastic depth rate")
    add(
        "--qk-scale-factor",
        type=float,
        metavar="EXPONENT",
        help="scale queries and keys by head_dim ** EXPONENT each",
    )
    add("--frozen-stages", type=int, default=-1, help="0: freeze the stem, 1: stem and stage 1")
    frozen = "freeze the backbone's BatchNorm statistics"
    add("--norm-eval", action=OnOff, default=False, help=frozen)
    add("--grad-checkpointing", action="store_true", help="recompute blocks to save memory")

    group = parser.add_argument_group("optimisation")
    add = flags_of(group)
    add(
        "--lr",
        type=float,
        default=1e-4,
        help="learning rate of AdamW; not scaled by the batch size",
    )
    add("--weight-decay", type=float, default=0.05, help="weight decay of AdamW")
    add("--clip-grad", type=float, metavar="NORM", help="maximum norm of the gradient")
    add(
        "--warmup-iters",
        type=int,
        help=f"steps of the warm-up; default: {WARMUP_ITERS}, or a shorter first epoch",
    )
    add_precision(group)

    add = flags_of(parser.add_argument_group("data"))
    add("--data-path", metavar="FOLDER", help="folder with annotations/ and images; required")
    for split in ("train", "val"):
        default = f"FOLDER/annotations/instances_{split}.json or instances_{split}2017.json"
        add(f"--{split}-annotations", metavar="FILE", help=f"default: {default}")
    add("--images", help="folder of the images, if not images, train2017 ... in --data-path")
    add("--limit", type=int, metavar="N", help="use only the first N training images")
    workers = min(10, usable_cpus())
    add("--num_workers", type=int, default=workers, help="loader workers per process")
    add_processes(parser.add_argument_group("processes"))
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        UserError: A flag is out of range, or flags contradict each other.
    """
    args = get_args_parser().parse_args(argv)
    for name in ("batch_size", "epochs", "log_interval", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be positive")
    if not args.data_path:
        raise UserError("--data-path FOLDER is required, with data in COCO's format")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto needs --output_dir FOLDER")
    if args.eval and not args.resume:
        raise UserError("--eval needs --resume CHECKPOINT")
    if args.overwrite:
        check_overwrite(args)
    return args
