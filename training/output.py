"""Output folder of a run: lock, log, TensorBoard events, checkpoints."""

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from training import existing_run
from training.checkpoints import BEST, Saver, plain, snapshot
from training.events import EventFile
from training.existing_run import ARGS, CORRUPT, DATA, LOG, epoch_of
from training.files import OutputError, append, write_atomically
from utils import is_main_process, log, printable

LOCK = "run.lock"


def _check_regular(path: Path) -> None:
    """Raise OutputError where a file cannot be appended to: a pipe would be waited for."""
    if os.path.lexists(path) and not path.is_file():
        raise OutputError(f"{path} is not a regular file: move it away, or use another folder")


def _locked(folder: Path, flags: int = 0) -> int:
    """Return a descriptor of the lock of ``folder``, locked, opened with additional ``flags``."""
    file = os.open(folder / LOCK, os.O_RDWR | flags, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
        os.close(file)
        raise OutputError(
            f"--output_dir {folder} is in use by {holder or 'another process'}: stop that run, "
            f"or choose another folder"
        ) from error
    except OSError as error:
        log(f"warning: {folder} cannot be locked against a second run: {error.strerror}")
    return file


def _refuse_run(folder: Path) -> None:
    """Raise OutputError if ``folder`` holds a run, or one is using it; write nothing."""
    for name in (LOG, ARGS, LOCK):
        _check_regular(folder / name)
    with contextlib.suppress(OSError):  # there is no lock, or it is read-only
        os.close(_locked(folder))
    existing_run.refuse(folder)


class RunLock:
    """Exclusive lock on an output folder; the system releases it when the process ends.

    Args:
        folder: Output folder.

    Raises:
        OutputError: Another process holds it; names the host and the process.
    """

    def __init__(self, folder: Path):
        self._file = _locked(folder, os.O_CREAT)
        left = os.pread(self._file, 1000, 0).decode(errors="replace").strip()
        if left:
            log(f"{folder} was last used by {left}, which did not exit normally")
        self._write(
            f"process {os.getpid()} on {socket.gethostname()} since "
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )

    def _write(self, text: str) -> None:
        # a full disk must not stop a run here: the lock counts, not its text
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text.encode(), 0)

    def release(self) -> None:
        """Release the folder."""
        self._write("")
        os.close(self._file)


class Output:
    """Output folder of a run: checkpoints, ``log.txt``, ``args.yaml``, TensorBoard events.

    Only rank 0 writes; without a folder, nothing is written. The constructor locks the folder
    against other runs, :meth:`begin` starts the log.

    Args:
        folder: ``--output_dir``, or an empty string.
        keep: Number of last and of best checkpoints to keep.
        existing: What to do with a run that the folder holds: continue it, refuse to start, or
            remove it once this one begins; see :func:`training.existing_run.treatment`.

    Raises:
        OutputError: The folder cannot be created or written, another run uses it, or it holds a
            run.
    """

    def __init__(self, folder: str, keep: int = 1, existing: str = existing_run.CONTINUE):
        self.folder = Path(folder) if folder else None
        self.keep, self.existing = keep, existing
        self._events: EventFile | None = None
        self._events_fail = False
        self._saver: Saver | None = None
        self._lines: list[str] = []  # log lines not yet written
        if not self.folder or not is_main_process():
            return
        try:
            if existing == existing_run.REFUSE:
                _refuse_run(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (LOG, LOCK, CORRUPT):
                _check_regular(self.folder / name)
            self._lock = RunLock(self.folder)
            for left in self.folder.glob(".*.tmp"):  # by a process that was killed
                left.unlink()
        except (OSError, ValueError) as error:  # the latter for a null character
            reason = getattr(error, "strerror", None) or error
            if isinstance(error, FileExistsError):
                reason = "it is not a folder"
            raise OutputError(f"cannot create --output_dir {folder}: {reason}") from error
        self._saver = Saver(self.folder)

    def begin(
        self, args: Namespace, start_epoch: int, data: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``args.yaml`` and ``data.json``; remove log lines from ``start_epoch`` on.

        By now, nothing but training can fail: this is when ``--overwrite`` removes a run.

        Args:
            args: Flags.
            start_epoch: First epoch to train.
            data: What the dataset has; None writes no ``data.json``.
        """
        if not self.folder:
            log("warning: nothing will be saved: no --output_dir FOLDER")
        if self._saver is None:
            return
        if self.existing == existing_run.OVERWRITE:
            existing_run.remove(self.folder)
        content = yaml.safe_dump(plain(vars(args)), sort_keys=False)
        write_atomically(self.folder / ARGS, lambda file: file.write(content.encode()))
        if data is not None:
            text = json.dumps(data, indent=1) + "\n"
            write_atomically(self.folder / DATA, lambda file: file.write(text.encode()))
        self._drop_lines_from(start_epoch)
        self._events = EventFile(self.folder, start_epoch)
        self._to_tensorboard(self._events.flush)

    def _drop_lines_from(self, epoch: int) -> None:
        path = self.folder / LOG
        if not path.exists():
            return
        lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if epoch_of(line) < epoch]
        if kept != lines:
            write_atomically(path, lambda file: file.write("".join(kept).encode()))

    def log_epoch(self, stats: Mapping[str, float], epoch: int) -> None:
        """Append a line to ``log.txt`` and the scalars to TensorBoard."""
        if self._saver is None:
            return
        self._lines.append(json.dumps(stats) + "\n")
        try:
            self._write_lines()
        except OSError as error:
            log(
                f"warning: cannot write {self.folder / LOG}: {error.strerror}; "
                f"its lines are kept for the next attempt"
            )

        values = {
            name.replace("_", "/", 1): value
            for name, value in stats.items()
            if name not in ("epoch", "n_parameters")
        }
        self._to_tensorboard(lambda: self._events.add_scalars(values, epoch))

    def _write_lines(self) -> None:
        append(self.folder / LOG, "".join(self._lines).encode())
        self._lines.clear()

    def _to_tensorboard(self, add: Callable[[], None]) -> None:
        if self._events is None:
            return
        try:
            add()
            self._events_fail = False
        except OSError as error:
            if not self._events_fail:  # every later event would say the same
                log(
                    f"warning: cannot write TensorBoard events to {self._events.path}: "
                    f"{error.strerror}; they are kept for the next attempt"
                )
            self._events_fail = True

    def add_images(self, name: str, images: torch.Tensor) -> None:
        """Write an image ``3 H W`` with values in [0, 1] to TensorBoard."""
        self._to_tensorboard(lambda: self._events.add_image(name, images))

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._saver is not None and self._saver.busy

    def save(
        self,
        state: Mapping[str, Any],
        is_best: bool = False,
        epoch: int | None = None,
        best_epochs: Sequence[int] = (),
    ) -> None:
        """Write ``checkpoint.pth`` in the background; the current one becomes ``previous.pth``.

        Args:
            state: Contents, copied at once.
            is_best: Write ``best.pth`` as well.
            epoch: Epoch that has ended, if any; numbered files are kept if ``keep`` is above 1.
            best_epochs: Epochs with the best checkpoints, whose numbered files are kept as well.
        """
        if self._saver is None:
            return
        names = [BEST] if is_best else []
        if epoch is not None and self.keep > 1:
            names.append(f"checkpoint-{epoch:04d}.pth")
            names += [f"best-{epoch:04d}.pth"] if epoch in best_epochs else []
        prune = partial(self._prune, epoch, tuple(best_epochs))
        self._saver.submit(snapshot(plain(state)), names, prune)

    def _prune(self, epoch: int | None, best_epochs: Sequence[int]) -> None:
        """Remove numbered checkpoints that are neither among the last nor among the best."""
        if epoch is None or self.keep == 1:
            return
        last = range(epoch + 1 - self.keep, epoch + 1)
        for path in self.folder.glob("*-*.pth"):
            match = re.fullmatch(r"(checkpoint|best)-(\d+)\.pth", path.name)
            if match and int(match[2]) not in (last if match[1] == "checkpoint" else best_epochs):
                with contextlib.suppress(OSError):  # tried again after the next epoch
                    path.unlink()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._saver is not None:
            self._saver.wait()

    def finish_saving(self) -> None:
        """Wait for the last checkpoint, and retry if it failed.

        Raises:
            OutputError: It cannot be written.
        """
        if self._saver is not None:
            self._saver.finish()

    def list_corrupt(self, messages: Sequence[str]) -> None:
        """Append corrupt images to ``corrupt.txt``, each once."""
        if self.folder:
            list_corrupt(self.folder, messages)

    def close(self) -> None:
        """Close the log and release the folder.

        Raises:
            OutputError: The last checkpoint or log lines cannot be written.
        """
        if self._saver is None:
            return
        self._to_tensorboard(lambda: self._events.flush())
        with contextlib.ExitStack() as last:  # each runs even if another one fails
            last.callback(self._lock.release)
            last.callback(self._saver.finish)
            try:
                if self._lines:
                    self._write_lines()
            except OSError as error:
                raise OutputError(f"cannot write {self.folder / LOG}: {error.strerror}") from error


def list_corrupt(folder: Path, messages: Sequence[str]) -> None:
    """Append corrupt images to ``corrupt.txt`` on rank 0, each once."""
    if not is_main_process():
        return
    path = folder / CORRUPT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_regular(path)
        text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        known = set(text.splitlines())
        with path.open("a", encoding="utf-8") as file:
            lines = dict.fromkeys(map(printable, messages))
            file.writelines(f"{line}\n" for line in lines if line not in known)
    except (OSError, OutputError) as error:
        log(f"warning: cannot write {path}: {getattr(error, 'strerror', None) or error}")
