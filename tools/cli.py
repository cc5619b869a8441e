"""Command lines of tools: flags shared with ``main.py``, messages and exit statuses."""

import argparse
import functools
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from training import launch
from training.files import OutputError
from training.flag_checks import check_values
from training.flags import get_args_parser
from utils import UserError

SURROGATES = re.compile("[\ud800-\udfff]")  # Python's code points for bytes that are not UTF-8
SOURCES = "file, URL, hf-hub:ORG/NAME, local-dir:FOLDER or name of published weights"
WEIGHTS = "use the weights, or their moving average (ema)"
DATA = "data"  # main.py's group of flags for datasets
# flags of that group which tools lack
TRAINING_ONLY = ("balanced_sampling", "sampling_ratio", "decode_on_device", "dist_eval")


def shown(value: object) -> str:
    """Return a text as one printable line: control characters as spaces, invalid bytes as �."""
    text = SURROGATES.sub("�", str(value))
    return "".join(char if char.isprintable() else " " for char in text)


def shortened(text: str, width: int) -> str:
    """Return ``text``, cut to ``width`` characters with an ellipsis if it is longer."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def warn(messages: Iterable[str], told: set[str]) -> None:
    """Print messages as warnings, except those in ``told``, and add them to it."""
    for message in messages:
        if message not in told:
            print(f"warning: {shown(message)}", file=sys.stderr, flush=True)
            told.add(message)


def program(command: Callable[[list[str]], int | None]) -> Callable[[list[str]], int]:
    """Decorate a function of the command line so that it prints errors and returns a status."""

    @functools.wraps(command)
    def main(argv: list[str]) -> int:
        return launch.run_program(lambda: command(argv))

    return main


def finish(files: Sequence[tuple[Path, Callable[[Path], None]]], failed: Sequence[str]) -> int:
    """Write every file that can be written, then print the errors and those that ``failed`` has.

    Returns the exit status, 1 if anything failed.
    """
    written, failed = [], list(failed)
    for path, write in files:
        try:
            write(path)
            written.append(path)
        except OutputError as error:
            failed.append(str(error))
    for path in written:
        print(shown(f"written to {path}"), flush=True)
    for message in failed:
        launch.fail(shown(message))
    return 1 if failed else 0


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add flags of ``main.py`` to ``parser``, by the names of their values."""
    group = parser.add_argument_group("as in main.py")
    for action in get_args_parser()._actions:
        if action.dest in names:
            group._add_action(action)


def data_flags() -> list[str]:
    """Return the names of ``main.py``'s flags that choose and read an evaluation set."""
    groups = get_args_parser()._action_groups
    found = next(group for group in groups if group.title == DATA)
    return [action.dest for action in found._group_actions if action.dest not in TRAINING_ONLY]


def parse(make_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str]) -> Namespace:
    """Parse the flags of a tool; those of ``main.py`` that it lacks have their defaults.

    Raises:
        UserError: Flags contradict each other, a number is out of range, or the backend of
            ``--compile`` is unknown.
    """
    args = vars(make_parser().parse_args(argv))
    full = Namespace(**vars(get_args_parser().parse_args([])) | args)
    check_values(full)
    if (full.eval_crop_ratio or 0) > 1:
        raise UserError(f"--eval-crop-ratio {full.eval_crop_ratio} must be at most 1")
    if full.amp_dtype is not None and not full.amp:
        raise UserError(f"--amp-dtype {full.amp_dtype} has no effect without --amp: give both")
    return full
