"""Evaluate a detector by mmdet: ``python -m object_detection.test CONFIG CHECKPOINT``."""

import argparse
import sys

from object_detection import launch, runtime
from training.parser import Parser
from utils import log


def test(args: argparse.Namespace) -> None:
    """Print the metrics of ``args.checkpoint`` on the test data of ``args.config``."""
    config = launch.prepare(args)
    config.load_from, config.resume = args.checkpoint, False
    runner = launch.build_runner(config, args.config, evaluating=True)
    launch.load_data(runner, "test", args.config)
    metrics = runner.test()
    for name, value in metrics.items():
        log(f"{name} {value:.3f}")


def main(argv: list[str]) -> int:
    """Evaluate with the flags ``argv``; return the exit status."""
    parser = Parser(
        prog="python -m object_detection.test", description="Evaluate a detector by mmdet."
    )
    launch.add_options(parser)
    parser.add_argument("checkpoint", help="file that training wrote, or an address")
    return runtime.run(test, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
