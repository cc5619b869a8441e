"""Errors of models and checkpoints that the user can fix."""

from collections.abc import Iterable
from difflib import get_close_matches

BRIEF = 60  # characters of a value
SHOWN = 2000  # characters of a checkpoint's message, enough for a path and a few names


class ModelError(ValueError):
    """A model does not exist, or cannot be built or run as requested."""


class CheckpointError(ModelError):
    """A checkpoint cannot be read, or does not fit the model.

    The message is one line that a terminal can show, whatever names the file holds.
    """

    def __init__(self, message: str):
        super().__init__(printable(message if len(message) <= SHOWN else message[:SHOWN] + "..."))


class UnreadableFileError(CheckpointError):
    """A checkpoint cannot be read now, which says nothing about what it holds."""


class UnsafeFileError(CheckpointError):
    """A checkpoint asks for more than tensors and plain values, or hides what it holds."""


def brief(value: object) -> str:
    """Return a value of a file in a few characters: containers may be of any size and depth."""
    if isinstance(value, str | float | bool | None) or (
        isinstance(value, int) and value.bit_length() < 64
    ):
        return repr(value)[:BRIEF]
    return f"a {type(value).__name__}"


def printable(text: str) -> str:
    """Return ``text`` with line ends and control characters escaped as in Python literals."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def nearest(name: str, names: Iterable[str], count: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return up to ``count`` of ``names`` that resemble ``name``, whatever their case, best first.

    Args:
        name: A name that is unknown.
        names: Those that are known.
        count: Maximum number.
        cutoff: Least similarity, from 0 to 1; see :func:`difflib.get_close_matches`.
    """
    known = {one.casefold(): one for one in names}
    return [known[one] for one in get_close_matches(name.casefold(), known, count, cutoff)]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: its nearest ones, else nothing."""
    near = nearest(name, names)
    return f"; did you mean {' or '.join(near)}?" if near else ""
