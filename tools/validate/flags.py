"""Flags that tools share with ``main.py``, in its spelling and with its defaults."""

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch

from training.flags import get_args_parser
from utils import UserError

DATA = "data"  # the group of main.py's flags that say where images come from
OF_TRAINING = ("sampling_ratio", "decode_on_device", "dist_eval")
NETWORK = ("batch_size", "qk_scale_factor", "amp", "amp_dtype", "channels_last", "compile")
PLACE = ("device",)


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add flags of ``main.py`` to ``parser``, by the names of their values."""
    group = parser.add_argument_group("as in main.py")
    for action in get_args_parser()._actions:
        if action.dest in names:
            group._add_action(action)


def data_flags() -> list[str]:
    """Names of the flags of ``main.py`` that choose and read an evaluation set."""
    groups = get_args_parser()._action_groups
    found = next(group for group in groups if group.title == DATA)
    return [action.dest for action in found._group_actions if action.dest not in OF_TRAINING]


def parse(make_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str]) -> Namespace:
    """The flags of a tool, and those of ``main.py`` that it has not got, at their defaults.

    Raises:
        UserError: Flags contradict each other, a number is out of its range, or there is no such
            backend of ``--compile``.
    """
    args = vars(make_parser().parse_args(argv))
    silent = make_parser()
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    given = set(vars(silent.parse_args(argv)))
    full = Namespace(**vars(get_args_parser().parse_args([])) | args)
    _check(full, given)
    return full


def _check(args: Namespace, given: set[str]) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be positive")
    if args.num_workers < 0:
        raise UserError(f"--num_workers {args.num_workers} must be 0 or more")
    sizes = args.input_size if isinstance(args.input_size, list) else [args.input_size]
    for size in sizes:
        if size is not None and size < 1:
            raise UserError(f"--input-size {size} must be positive")
    if not 0 < args.eval_crop_ratio <= 1:
        raise UserError(f"--eval-crop-ratio {args.eval_crop_ratio} must be above 0, at most 1")
    if "amp_dtype" in given and not args.amp:
        raise UserError(f"--amp-dtype {args.amp_dtype} does nothing without --amp: give both")
    backend = args.compile
    if backend is not None and backend not in torch.compiler.list_backends(None):
        backends = ", ".join(torch.compiler.list_backends())
        raise UserError(f"--compile {backend} is no backend here; there are {backends}")
