"""Command lines: how flags are read and spelled."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from utils import printable


class Parser(argparse.ArgumentParser):
    """Accepts every long flag with dashes and with underscores; its errors are one line."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))

    def parse_known_args(self, args=None, namespace=None):
        known = {option.replace("_", "-"): option for option in self._option_string_actions}
        words = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                flag = known.get(flag.replace("_", "-"), flag)
            words.append(flag + equals + value)
        return super().parse_known_args(words, namespace)


def positive(text: str) -> int:
    """Convert the text of a flag to an integer of at least 1; a type for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def flags_of(group: argparse._ArgumentGroup) -> Callable[..., None]:
    """Return ``add_argument`` of a group with the default value as default help text."""

    def add(*names: str, **options: Any) -> None:
        options.setdefault("help", "default: %(default)s")
        group.add_argument(*names, **options)

    return add


def usable_cpus() -> int:
    """Return the number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return the values of the flags in ``argv``, without defaults; the parser loses its own."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))
