"""Command lines: how flags are read and spelled."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from models.errors import did_you_mean
from utils import printable

FLAG = re.compile(r"--?[^\W\d]")  # the start of a flag, unlike that of a negative number


class Parser(argparse.ArgumentParser):
    """Accepts every long flag with dashes and with underscores; its errors are one line.

    Attributes:
        answers: What to use instead of flags of other programs, which are written with dashes, and
            instead of an argument without a flag, under an empty name.
    """

    answers: Mapping[str, str] = {}

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        if not rest:
            return found
        flags = dict.fromkeys(word.partition("=")[0] for word in rest if FLAG.match(word))
        text = "; ".join(map(self.unknown_flag, flags))
        if not flags:
            hint = self.answers.get("", "")
            text = f"unexpected argument {rest[0]}{hint and ': '}{hint}"
        self.error(f"{text} ({self.prog} --help lists all)")

    def unknown_flag(self, flag: str) -> str:
        """Return the message for a flag that this program does not have."""
        name = flag.replace("_", "-")
        if name in self.answers:
            return f"{flag} is not a flag here: {self.answers[name]}"
        known = {known.lstrip("-"): known for known in self._option_string_actions}
        names = [known for short, known in known.items() if len(short) > 1]
        return f"unknown flag {flag}{did_you_mean(name, names)}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            near = did_you_mean(str(value), names)
            text = f"{value!r} must be one of {', '.join(names)}{near}"
            raise argparse.ArgumentError(action, text)

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
