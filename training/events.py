"""TensorBoard event files, written without a thread: an error reaches whoever adds the event."""

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from training.files import append
from utils import printable

_numbers = itertools.count()


class EventFile:
    """A file of TensorBoard events, created by the first ones.

    Events that cannot be written are kept for the next attempt.

    Args:
        folder: Folder of the file, which must exist.
        purge_step: TensorBoard drops events of this step and later ones of older files.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        stamp = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path = folder / f"events.out.tfevents.{stamp}"
        self.pending = b""
        self._keep(Event(file_version="brain.Event:2", step=purge_step))
        if purge_step is not None:
            self._keep(Event(session_log=SessionLog(status=SessionLog.START), step=purge_step))

    def _keep(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.pending += record.getvalue()

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write values by tag; raise as :meth:`add_image` does."""
        for tag, value in values.items():
            self._keep(Event(summary=summary.scalar(printable(tag), value), step=step))
        self.flush()

    def add_image(self, tag: str, image: Any, step: int = 0, dataformats: str = "CHW") -> None:
        """Write an image of bytes, or of values in [0, 1].

        Control characters in the tag are escaped.

        Raises:
            OSError: The file cannot be written; it is as before.
            ValueError: The step has more than 64 bits.
        """
        image = summary.image(printable(tag), image, dataformats=dataformats)
        self._keep(Event(summary=image, step=step))
        self.flush()

    def flush(self) -> None:
        """Write what is kept, if anything; raise OSError if that is not possible."""
        if self.pending:
            append(self.path, self.pending)
            self.pending = b""
