"""How tools that print and write results begin and end."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from training import launch
from training.files import OutputError
from training.flags import positive

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
SURROGATES = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are not UTF-8


def shown(value: object) -> str:
    """A text in one line that can be printed: control characters as spaces, odd bytes as �."""
    return SURROGATES.sub("�", CONTROLS.sub(" ", str(value)))


def warn(messages: Iterable[str], told: set[str]) -> None:
    """Print messages as warnings, but for those that are in ``told``, and add them to it."""
    for message in messages:
        if message not in told:
            print(f"warning: {shown(message)}", file=sys.stderr, flush=True)
            told.add(message)


def finish(files: Sequence[tuple[Path, Callable[[Path], None]]], failed: Sequence[str]) -> int:
    """Write every file that can be written, then say what could not be done.

    Args:
        files: And what writes each.
        failed: What is said of all else that failed.

    Returns:
        The exit status, 1 if anything failed.
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


class _ImageSize(argparse.Action):
    """Store one or two numbers as height and width."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} takes one or two numbers, not {len(values)}")
        setattr(namespace, self.dest, (values[0], values[-1]))


def add_input_size(parser: argparse.ArgumentParser) -> None:
    """Add ``--input-size``: a side, or height and width; a tuple or None."""
    parser.add_argument(
        "--input-size",
        type=positive,
        nargs="+",
        action=_ImageSize,
        metavar=("H", "W"),
        help="height and width in pixels, or the side; the checkpoint's or model's if not given",
    )
