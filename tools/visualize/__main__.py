"""Pictures of what is within a net: ``python -m tools.visualize KIND ...``.

Attention, positions, gates, kernels, feature maps, of a checkpoint or of a registered model, and
the curves of its training. Every kind has its own ``--help``.
"""

import argparse
import sys
from pathlib import Path

from tools.visualize import attention, curves, distances, features, gates, kernels, positions
from tools.visualize.saving import check_targets, save
from training import launch

KINDS = {
    "gates": gates,
    "nonlocality": distances,
    "attention": attention,
    "bias": positions,
    "kernels": kernels,
    "features": features,
    "curves": curves,
}


def get_parser() -> argparse.ArgumentParser:
    """The flags of every kind."""
    first = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("tools.visualize", description=first)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, module in KINDS.items():
        what = module.__doc__.splitlines()[0]
        kind = kinds.add_parser(name, help=what, description=what)
        module.add_flags(kind)
        if name != "curves":
            add_net_flags(kind)
        add = kind.add_argument
        add("--output", type=Path, metavar="FILE.png", help="the picture")
        add("--tensorboard", type=Path, metavar="DIR", help="the picture as TensorBoard's event")
        add("--csv", type=Path, metavar="FILE.csv", help="the numbers that it shows")
    return parser


def add_net_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which net, of what weights and size, and where it runs."""
    add = parser.add_argument
    add("--model", metavar="NAME", help="timm's name, unless the checkpoint says it")
    add("--pretrained", action="store_true", help="a model's published weights, not random ones")
    add("--weights", choices=["model", "ema"], default="model", help="or the moving average")
    add("--input-size", type=int, help="pixels; the checkpoint's or the model's own if not given")
    add("--seed", type=int, default=0, help="of random weights (0)")
    add("--device", choices=["cpu", "cuda"], help="cuda if present, if not given")


def make(args: argparse.Namespace) -> None:
    """Make and write one picture."""
    check_targets(args)
    picture = KINDS[args.kind].make(args)
    print(*picture.notes, *save(picture, args.kind, args), sep="\n")


def main(argv: list[str]) -> int:
    """Make one picture as the flags ``argv`` say; returns the exit status."""
    args = get_parser().parse_args(argv)
    return launch.run_program(lambda: make(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
