"""Files that are whole or not there: checkpoints with a checksum, written atomically."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import CheckpointError
from models.checkpoint.checksum import verify_checksum, write_with_checksum
from utils import UserError

TEMPORARY = ".tmp"


class OutputError(UserError):
    """The output folder cannot be written."""


def plain(value: Any) -> Any:
    """``value`` as tensors and plain Python types, which load with ``weights_only=True``."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | bytes | bool | int | float | torch.Tensor):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def write_atomically(
    path: Path,
    write: Callable[[Any], None],
    prove: Callable[[Path], object] = lambda path: None,
    also: Sequence[Path] = (),
    keep: Path | None = None,
) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, and rename it to ``path``.

    Until the rename the previous file stays whole.

    Args:
        path: The file.
        write: Fills a binary file, open for writing and reading.
        prove: Called with the temporary file once it is on the disk; raises unless it is good.
        also: Further names that the new file gets, before ``path`` itself.
        keep: Name that the file which was at ``path`` before gets.

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
        prove(temporary)
        temporary.chmod(0o644)
        for name in also:
            _give_name(temporary, name)
        if keep is not None and path.exists():
            _give_name(path, keep)
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, CheckpointError) as error:
        name = getattr(error, "filename2", None) or path  # of two, the one to be replaced
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {name}: {reason}; what was there is unchanged") from error
    finally:
        if temporary is not None:
            _remove(temporary)


def _remove(temporary: Path) -> None:
    # a folder that cannot be written any more has a first error, which this one must not replace
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _give_name(file: Path, name: Path) -> None:
    """Let ``name`` stand for ``file`` as well, in place of what it stood for."""
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


def size_of(value: Any) -> int:
    """Bytes of the tensors within plain values."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(size_of(item) for item in value.values())
    return sum(size_of(item) for item in value) if isinstance(value, list | tuple) else 0


def _verify(path: Path) -> None:
    if not verify_checksum(path):
        raise CheckpointError(f"{path} is damaged: it has no checksum")


def save_checkpoint(
    state: Mapping[str, Any], path: Path, also: Sequence[Path] = (), keep: Path | None = None
) -> None:
    """Write a checkpoint of plain types and tensors with a checksum, whole or not at all.

    Args:
        state, path: Content and file.
        also, keep: Names of the new and of the previous file, see :func:`write_atomically`.

    Raises:
        OutputError: It cannot be written; names the bytes needed and those that are free.
    """
    content = plain(state)
    try:
        write_atomically(path, lambda file: write_with_checksum(content, file), _verify, also, keep)
    except OutputError as error:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            error.args = (f"{error} ({size_of(content):,} bytes needed, {free:,} free)",)
        raise
