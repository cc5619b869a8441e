"""Lists of class names: text files with a name per line."""

import codecs
from pathlib import Path

from ..images import DataError

ENCODINGS = {  # by byte order mark; UTF-8 without one
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(file: Path, flag: str) -> str:
    """Return a text file's content: of UTF-8, or of UTF-16 with its byte order mark.

    Args:
        file: The file.
        flag: Flag that names it, for messages.

    Raises:
        DataError: It cannot be read.
    """
    try:
        data = file.read_bytes()
        mark = next((mark for mark in ENCODINGS if data.startswith(mark)), None)
        text = data.decode(ENCODINGS.get(mark, "utf-8"))
        if "\0" in text:
            raise ValueError("it has null characters")
        return text
    except OSError as error:
        raise DataError(f"cannot read {flag} {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(
            f"cannot read {flag} {file}: it must be UTF-8, or UTF-16 with its byte order mark"
            f" ({error})"
        ) from error


def read_class_names(file: Path, flag: str = "--classes") -> list[str]:
    """Read class names, one per line, of UTF-8, or of UTF-16 with its byte order mark.

    Lines end in ``\\n`` or ``\\r\\n``; empty ones at the end do not count.

    Args:
        file: The list.
        flag: Flag that names it, for messages.

    Raises:
        DataError: The file cannot be read, has no names, an empty line, or a name twice; names
            the lines.
    """
    text = read_text(file, flag)
    names = [line.removesuffix("\r") for line in text.split("\n")]
    while names and not names[-1].strip():
        names.pop()
    if not names:
        raise DataError(f"{flag} {file} has no class names, which are one per line")
    lines: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise DataError(f"{flag} {file}: line {number} is empty; it must be a class name")
        if name in lines:
            raise DataError(f"{flag} {file}: lines {lines[name]} and {number} are both {name!r}")
        lines[name] = number
    return names
