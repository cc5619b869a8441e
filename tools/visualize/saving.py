"""Writing pictures and numbers: whole, or not at all."""

import csv
import io
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.visualize.loading import VisualizeError
from training.files import OutputError, write_atomically

DPI = 110


@dataclass(frozen=True)
class Picture:
    """A figure and what it shows.

    Attributes:
        figure: A ``matplotlib.figure.Figure``.
        rows: Its numbers, for the CSV file; empty where there are none.
        step: TensorBoard's step, the epoch of the last weights shown; 0 if not known.
        notes: Lines to print.
    """

    figure: Any
    rows: Sequence[dict[str, Any]] = ()
    step: int = 0
    notes: Sequence[str] = field(default_factory=tuple)


def check_targets(args: Namespace) -> None:
    """Find out what cannot be written before anything is computed.

    Raises:
        VisualizeError: There is nothing to write, or no such folder, or the name is of another
            kind of file.
    """
    if not (args.output or args.csv or args.tensorboard):
        raise VisualizeError("give --output FILE.png, --tensorboard DIR or --csv FILE")
    for flag, path, ending in (("--output", args.output, ".png"), ("--csv", args.csv, ".csv")):
        if path is None:
            continue
        if path.suffix.lower() != ending:
            raise VisualizeError(f"{flag} {path} must end in {ending}")
        if not path.parent.is_dir():
            raise VisualizeError(f"{flag} {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise VisualizeError(f"{flag} {path} is a folder")
    folder = args.tensorboard
    if folder is not None and folder.exists() and not folder.is_dir():
        raise VisualizeError(f"--tensorboard {folder} is no folder")


def as_png(figure: Any) -> bytes:
    """A figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def as_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    """Rows, which all have the keys of the first, as the content of a CSV file."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def save(picture: Picture, kind: str, args: Namespace) -> list[str]:
    """Write what the flags ask for; returns what was written, one line each.

    TensorBoard gets the picture under ``visualize/KIND``.

    Raises:
        VisualizeError: There are no numbers for ``--csv``.
        OutputError: A file cannot be written; none that was written here stays.
    """
    if args.csv and not picture.rows:
        raise VisualizeError(f"--csv: {kind} has no numbers to write")
    png = as_png(picture.figure) if args.output or args.tensorboard else b""
    files = [(args.output, png)] if args.output else []
    files += [(args.csv, as_csv(picture.rows))] if args.csv else []
    written: list[Path] = []
    try:
        for path, content in files:
            write_atomically(path, lambda file, content=content: file.write(content))
            written.append(path)
        if args.tensorboard:
            _to_tensorboard(png, f"visualize/{kind}", picture.step, args.tensorboard)
    except OutputError:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    lines = [f"written to {path}" for path in written]
    if args.tensorboard:
        lines.append(f"visualize/{kind} at step {picture.step} in {args.tensorboard}")
    return lines


def _to_tensorboard(png: bytes, tag: str, step: int, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    try:
        with SummaryWriter(str(folder)) as writer:
            writer.add_image(tag, image, step, dataformats="HWC")
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
