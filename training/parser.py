"""Command lines: how flags are read and spelled."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from models import ModelError, height_and_width
from models.errors import did_you_mean
from utils import printable

FLAG = re.compile(r"--?[^\W\d]")  # the start of a flag, unlike that of a negative number
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?")
PIXELS = "image size in pixels: one side, or height and width"


class DefaultsFormatter(argparse.HelpFormatter):
    """Adds defaults to help texts that do not state them, as they are given on a command line."""

    def _get_help_string(self, action: argparse.Action) -> str:
        # before Python 3.13, argparse adds it to switches with a --no- form
        text = action.help.removesuffix(" (default: %(default)s)")
        value = action.default
        if isinstance(action, argparse.BooleanOptionalAction) and value is not None:
            value = "on" if value else "off"
        elif action.nargs == 0 or value in (None, "", [], argparse.SUPPRESS):
            return text
        words = value if isinstance(value, list | tuple) else [value]
        default = " ".join(map(str, words)).replace("%", "%%")
        return text if "default" in text else f"{text} (default: {default})"


class Parser(argparse.ArgumentParser):
    """Accepts every long flag with dashes and with underscores; its errors are one line.

    Its help shows defaults, see :class:`DefaultsFormatter`.

    Numbers after a flag of type :func:`image_size` are one value, so that what follows them can be
    positional.

    Attributes:
        answers: What to use instead of flags of other programs, which are written with dashes, and
            instead of an argument without a flag, under an empty name.
    """

    answers: Mapping[str, str] = {}

    def __init__(self, *args, formatter_class: Any = DefaultsFormatter, **kwargs):
        super().__init__(*args, formatter_class=formatter_class, **kwargs)

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
        words, link = [], ""  # what joins a number to the word before
        for word in sys.argv[1:] if args is None else args:
            if link and NUMBER.fullmatch(word):
                words[-1] += link + word
                link = "x"
                continue
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                flag = known.get(flag.replace("_", "-"), flag)
            action = self._option_string_actions.get(flag)
            link = "=" if action and takes_image_size(action) and not equals else ""
            words.append(flag + equals + value)
        return super().parse_known_args(words, namespace)


def image_size(text: str) -> int | tuple[int, int]:
    """Convert ``N``, ``HxW`` or timm's ``3xHxW`` to a side, or height and width; for argparse."""
    numbers = [int(word) if word.isdecimal() else word for word in text.split("x")]
    try:
        height, width = height_and_width(numbers[0] if len(numbers) == 1 else numbers)
    except ModelError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return height if height == width else (height, width)


def takes_image_size(action: argparse.Action) -> bool:
    """Return True if a flag has one value of type :func:`image_size`."""
    return action.type is image_size and action.nargs is None


INPUT_SIZE: dict[str, Any] = {
    "type": image_size,
    "metavar": "H W",
    "help": f"{PIXELS}; default: that of the checkpoint or model",
}


def add_input_size(group: argparse._ActionsContainer, **options: Any) -> None:
    """Add ``--input-size``, a side or height and width, to a parser or a group of one."""
    group.add_argument("--input-size", "--img-size", **INPUT_SIZE | options)


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
