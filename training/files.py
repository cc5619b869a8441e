"""Files that are whole or not there: written atomically."""

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models import CheckpointError
from utils import UserError

TEMPORARY = ".tmp"


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


UMASK = _umask()  # read once: it can only be read by setting it, for all threads


class OutputError(UserError):
    """The output folder, or a file in it, cannot be written."""


def write_atomically(
    path: Path,
    write: Callable[[Any], None],
    verify: Callable[[Path], object] = lambda path: None,
    also: Sequence[Path] = (),
    keep: Path | None = None,
) -> None:
    """Write a temporary file next to ``path``, sync it, and rename it to ``path``.

    Until the rename, the previous file stays whole.

    Args:
        path: Target file.
        write: Fills a binary file that is open for reading and writing.
        verify: Called with the temporary file once it is on the disk; raises if it is damaged.
        also: Additional names of the new file, created before ``path`` itself.
        keep: New name of the previous file at ``path``.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    temporary = None
    try:
        options = {"prefix": f".{path.name}-", "suffix": TEMPORARY, "delete": False}
        with tempfile.NamedTemporaryFile(dir=path.parent, **options) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        verify(temporary)
        temporary.chmod(0o666 & ~UMASK)
        for name in also:
            _link(temporary, name)
        if keep is not None and path.exists():
            _link(path, keep)
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, CheckpointError) as error:
        name = getattr(error, "filename2", None) or path  # of two, the one to be replaced
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {name}: {reason}; the previous file is kept") from error
    finally:
        if temporary is not None:
            _remove(temporary)


def append(path: Path, content: bytes) -> None:
    """Append to a file, and sync it.

    Raises:
        OSError: The disk is full, or the file cannot be written; it is as before.
    """
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def names_of_pictures(images: Sequence[Path], ending: str) -> list[str]:
    """Return a name for each image's picture: its stem, a number if others have it, ``ending``."""
    found: dict[str, None] = {}
    for image in images:
        stems = itertools.chain([image.stem], (f"{image.stem}-{n}" for n in itertools.count(2)))
        found[next(f"{stem}{ending}" for stem in stems if f"{stem}{ending}" not in found)] = None
    return list(found)


def _remove(temporary: Path) -> None:
    # in a folder that has become read-only, the first error must not be replaced by this one
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _link(file: Path, name: Path) -> None:
    """Make ``name`` another name of ``file``, replacing what was there."""
    temporary = file.with_name(f".{name.name}-{os.getpid()}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(file, temporary)
        except OSError:  # a file system without links
            with file.open("rb") as source, temporary.open("wb") as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                os.fsync(copy.fileno())
        temporary.replace(name)
    finally:
        _remove(temporary)  # renaming leaves it where both names already are of the same file


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)
