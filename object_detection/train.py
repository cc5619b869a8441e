"""Train a detector by mmdet: ``python -m object_detection.train CONFIG``.

On 8 GPUs: ``torchrun --nproc_per_node=8 -m object_detection.train CONFIG --launcher pytorch``.
"""

import argparse
import sys
from pathlib import Path

from object_detection import launch, runtime
from training.parser import Parser
from utils import log


def train(args: argparse.Namespace) -> None:
    """Train ``args.config``, as changed by the flags."""
    config = launch.prepare(args)
    launch.choose_precision(config, args.amp)
    if args.resume == "auto" and not Path(config.work_dir, "last_checkpoint").is_file():
        log(f"--resume: no checkpoint in {config.work_dir} yet, starting from scratch")
    elif args.resume is not None:
        config.resume = True
        config.load_from = None if args.resume == "auto" else args.resume
    runner = launch.build_runner(config, args.config)
    launch.load_data(runner, "train", args.config)
    if config.get("val_cfg"):
        launch.load_data(runner, "val", args.config)
    with runtime.understood(f"{args.config} has no usable optim_wrapper"):
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.train()


def main(argv: list[str]) -> int:
    """Train with the flags ``argv``; return the exit status."""
    parser = Parser(
        prog="python -m object_detection.train", description="Train a detector by mmdet."
    )
    launch.add_options(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="continue a run: the latest checkpoint of --work-dir, or FILE",
    )
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="mixed precision, as the config says if not given; never without a GPU",
    )
    return runtime.run(train, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
