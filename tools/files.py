"""Output files of tools: what may be written where."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from training.files import TEMPORARY, OutputError
from utils import UserError


def check_suffix(flag: str, path: Path | None, suffix: str) -> None:
    """Raise UserError if ``path`` does not end in ``suffix``."""
    if path is not None and path.suffix.lower() != suffix:
        raise UserError(f"{flag} {path} must end in {suffix}")


def check_outputs(outputs: Iterable[tuple[str, Path]], inputs: Iterable[str | Path] = ()) -> None:
    """Check that output files, given with their flags, overwrite neither inputs nor each other.

    Raises:
        OutputError: A file is read, or is the output of another flag, or is not a regular file.
    """
    read = {os.path.realpath(path) for path in inputs}
    flags: dict[str, str] = {}
    for flag, path in outputs:
        place = os.path.realpath(path)
        if place in read:
            raise OutputError(f"{flag} {path} would overwrite what is read: give another name")
        if place in flags:
            raise OutputError(f"{flags[place]} and {flag} would both be written to {path}")
        flags[place] = flag
        if os.path.exists(path) and not os.path.isfile(path):
            kind = "a folder" if os.path.isdir(path) else "not a regular file"
            raise OutputError(f"{flag} {path} is {kind}: give the name of a file")


def check_writable(flag: str, path: Path) -> None:
    """Raise OutputError if a file cannot be written, before anything is computed."""
    if not os.path.isdir(path.parent):
        raise OutputError(f"{flag} {path}: there is no folder {path.parent}")
    try:
        # as long a name as that of the temporary file of an atomic write
        prefix = f".{path.name}-"
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, suffix=TEMPORARY):
            pass
    except OSError as error:
        raise OutputError(f"{flag} {path} cannot be written: {error.strerror}") from error


def check_files(
    outputs: Mapping[str, Path | None], inputs: Iterable[str | Path | None] = ()
) -> None:
    """Check that files can be written, by flag; those that are None are not given.

    Raises:
        OutputError: As by :func:`check_outputs` and :func:`check_writable`.
    """
    given = [(flag, path) for flag, path in outputs.items() if path is not None]
    check_outputs(given, filter(None, inputs))
    for flag, path in given:
        check_writable(flag, path)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Create a hidden folder next to ``path`` for the block; SIGTERM removes it, too."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def move_into_place(written: Sequence[Path], folder: Path) -> None:
    """Sync the content of a hidden folder and move it to ``folder``, replacing what is there.

    A single file replaces another atomically. Before folders, or several files, the previous ones
    move to the hidden folder; they come back if a new one cannot be moved.

    Raises:
        OSError: The disk is full, or ``folder`` cannot be written.
    """
    for path in written:
        for file in [path, *path.rglob("*")]:
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
    if len(written) == 1 and written[0].is_file():
        written[0].replace(folder / written[0].name)
        return
    before = Path(tempfile.mkdtemp(dir=written[0].parent))
    renamed: list[tuple[Path, Path]] = []

    def rename(path: Path, new: Path) -> None:
        renamed.append((path, new))
        path.rename(new)

    try:
        for path in written:
            if os.path.lexists(folder / path.name):
                rename(folder / path.name, before / path.name)
        for path in written:
            rename(path, folder / path.name)
    except BaseException:
        for path, new in reversed(renamed):
            with contextlib.suppress(FileNotFoundError):  # the one that failed
                new.rename(path)
        raise


@contextlib.contextmanager
def folder_for(flag: str, folder: Path) -> Iterator[None]:
    """Create an output folder for the block if it is missing; remove it if it stays empty.

    Raises:
        OutputError: The folder cannot be created or written.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{flag}: cannot create folder {folder}: {error.strerror}") from error
        check_writable(flag, folder / "file")
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # not empty, or not created
                path.rmdir()
