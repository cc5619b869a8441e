"""Checkpoints of a run: saving in the background, and finding the one to resume from."""

import contextlib
import itertools
import os
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from models import CheckpointError, UnreadableFileError, read_checkpoint, read_weights
from models.checkpoint.checksum import verify_checksum, write_with_checksum
from training.files import OutputError, write_atomically
from training.launch import DistInfo
from utils import all_or_none, broadcast_value, gather, log

CHECKPOINT = "checkpoint.pth"
PREVIOUS = "previous.pth"
BEST = "best.pth"
DAMAGED = ".damaged"
SHOWN = 4  # names in a message
PLAIN = (str, bytes, bool, int, float, torch.Tensor, torch.dtype)
WEIGHTS = ("model", "model_ema", "state_dict")  # stored contiguous


def plain(value: Any) -> Any:
    """Return ``value`` as tensors and plain Python types, which load with ``weights_only=True``."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, PLAIN):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def snapshot(value: Any) -> Any:
    """Return a copy of plain values and tensors on the CPU, which training does not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value


def size_of(value: Any) -> int:
    """Return the bytes of the tensors within plain values."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(size_of, value))


def save_checkpoint(
    state: Mapping[str, Any], path: Path, also: Sequence[Path] = (), keep: Path | None = None
) -> None:
    """Write a checkpoint of plain types and tensors with a checksum, atomically.

    Args:
        state: Contents.
        path: Target file.
        also, keep: Names of the new and of the previous file, see
            :func:`training.files.write_atomically`.

    Raises:
        OutputError: It cannot be written; names the bytes needed and those that are free.
    """
    contents = plain(state)
    for key in WEIGHTS:
        if isinstance(weights := contents.get(key), Mapping):  # other tools refuse channels last
            contents[key] = {name: value.contiguous() for name, value in weights.items()}
    try:
        write_atomically(
            path, lambda file: write_with_checksum(contents, file), _verify, also, keep
        )
    except OutputError as error:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            error.args = (f"{error} ({size_of(contents):,} bytes needed, {free:,} free)",)
        raise


def _verify(path: Path) -> None:
    if not verify_checksum(path):
        raise CheckpointError(f"{path} is damaged: it has no checksum")


class Saver:
    """Writes checkpoints in a thread, one at a time.

    A checkpoint that cannot be written (full disk) causes a warning and stays in memory until
    the next attempt: the newest state, and the best one where that is another.

    Args:
        folder: Output folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._thread: threading.Thread | None = None
        # to be written, the newest first: contents, names, callback
        self._jobs: list[tuple[Any, list[str], Callable[[], None]]] = []

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, contents: Any, names: Sequence[str], then: Callable[[], None]) -> None:
        """Write ``contents`` as the newest checkpoint; the current one becomes the previous one.

        Waits for the checkpoint that is being written.

        Args:
            contents: Plain values and CPU tensors.
            names: Additional file names.
            then: Called once it is written.
        """
        self.wait()
        missed = [
            (old, [name for name in theirs if name not in (CHECKPOINT, *names)], lambda: None)
            for old, theirs, _ in self._jobs
            if BEST in theirs and BEST not in names  # of older states no other is worth its memory
        ]
        self._jobs = [(contents, [CHECKPOINT, *names], then), *missed]
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait, and retry what could not be written.

        Raises:
            OutputError: It still cannot be.
        """
        self.wait()
        for error in self._attempt():
            raise error

    def _write(self) -> None:
        for error in self._attempt():
            log(f"warning: {error}; training continues, and the next save tries again")

    def _attempt(self) -> list[OutputError]:
        """Write all jobs; return the errors of those that failed, which stay."""
        errors, left = [], []
        for job in self._jobs:
            contents, (first, *others), then = job
            keep = self.folder / PREVIOUS if first == CHECKPOINT else None
            also = [self.folder / name for name in others]
            try:
                save_checkpoint(contents, self.folder / first, also=also, keep=keep)
            except OutputError as error:
                errors.append(error)
                left.append(job)
            else:
                then()
        self._jobs = left
        return errors


def find_checkpoint(folder: Path, set_aside: bool) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest undamaged checkpoint of an output folder.

    Args:
        folder: Output folder; it may not exist.
        set_aside: Rename damaged checkpoints to ``*.damaged``, so that no later save replaces an
            undamaged one by them.

    Returns:
        Its path and contents, or None for a folder that never had one.

    Raises:
        UnreadableFileError: A checkpoint cannot be read now, and may be undamaged.
        CheckpointError: All checkpoints are damaged.
    """
    damaged: list[Path] = []
    numbered = sorted(folder.glob("checkpoint-*.pth"), key=_number, reverse=True)
    for path in (folder / CHECKPOINT, folder / PREVIOUS, *numbered, folder / BEST):
        if not _is_there(path):
            continue
        try:
            return path, read_checkpoint(path)
        except UnreadableFileError:
            raise
        except CheckpointError as error:
            log(f"warning: {error}; looking for the one before")
            if set_aside:
                _set_aside(path)
            else:
                damaged.append(path)
    if damaged := sorted({*damaged, *folder.glob(f"*{DAMAGED}*")}):
        raise CheckpointError(
            f"no checkpoint of {folder} can be used: {', '.join(p.name for p in damaged[:SHOWN])} "
            f"are damaged; give another --output_dir, or move them away to start afresh"
        )
    return None


def _is_there(path: Path) -> bool:
    """Return True if ``path`` exists; raise UnreadableFileError if that cannot be told."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UnreadableFileError(f"cannot read checkpoint {path}: {error.strerror}") from error
    return True


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, never onto one that was set aside before."""
    names = (f"{path.name}{DAMAGED}{number or ''}" for number in itertools.count())
    name = next(name for name in names if not os.path.lexists(path.with_name(name)))
    try:
        path.rename(path.with_name(name))
    except OSError as error:
        raise OutputError(f"cannot rename damaged {path}: {error.strerror}") from error


def was_restarted(info: DistInfo, group: dist.ProcessGroup | None) -> bool:
    """Return True if torchrun or Slurm restarted any rank; all ranks must call it."""
    # on several machines, torchrun counts a restart only where a process died
    return any(gather(info.restarts, group))


def read_resume(
    args: Namespace, info: DistInfo, group: dist.ProcessGroup | None
) -> tuple[str, dict[str, Any]]:
    """Read the checkpoint to resume from: any source of :func:`models.load_model`.

    ``--resume auto`` is the newest undamaged one of ``--output_dir``, if there is any. After a
    restart by torchrun or Slurm, a run looks there without the flag.

    Returns:
        Its name and contents; both empty without a checkpoint.
    """
    source = args.resume
    if source == "auto" or (was_restarted(info, group) and args.output_dir and not args.eval):
        folder = Path(args.output_dir) if info.rank == 0 else None
        found = all_or_none(lambda: folder and find_checkpoint(folder, not args.eval), group)
        path = broadcast_value(found and str(found[0]), group)
        if path:
            log(f"reading {path}")
            read = (lambda: found[1]) if found else (lambda: read_checkpoint(path))
            return path, all_or_none(read, group)
        if args.eval:
            raise CheckpointError(f"no checkpoint in --output_dir {args.output_dir}")
        log(f"no checkpoint in {args.output_dir} yet: starting from the beginning")
        source = "" if source == "auto" else source
    if not source:
        return "", {}
    log(f"reading {source}")
    return source, all_or_none(lambda: read_weights(source), group)
