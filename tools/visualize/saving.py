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

from tools.files import check_outputs, check_suffix, check_writable
from tools.plots import as_png
from training.files import OutputError, write_atomically
from utils import UserError

DPI = 110
INPUTS = ("image", "subject", "checkpoint", "checkpoints", "runs")  # flags of files to be read


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
        UserError: There is nothing to write.
        UserError: A name is of another kind of file.
        OutputError: A file cannot be written, or would take the place of one that is read.
    """
    if not (args.output or args.csv or args.tensorboard):
        raise UserError("give --output FILE.png, --tensorboard DIR or --csv FILE")
    check_suffix("--output", args.output, ".png")
    check_suffix("--csv", args.csv, ".csv")
    files = [(f"--{name}", getattr(args, name)) for name in ("output", "csv")]
    files = [(flag, path) for flag, path in files if path is not None]
    check_outputs(files, _inputs(args))
    for flag, path in files:
        check_writable(flag, path)
    folder = args.tensorboard
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"--tensorboard {folder} is no folder")


def _inputs(args: Namespace) -> list[str]:
    """Files that the flags of any kind name to be read."""
    found: list[str] = []
    for name in INPUTS:
        value = getattr(args, name, None) or []
        found += [value] if isinstance(value, str) else value
    return found


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
        UserError: There are no numbers for ``--csv``.
        OutputError: A file cannot be written. What was there before is unchanged.
    """
    if args.csv and not picture.rows:
        raise UserError(f"--csv: {kind} has no numbers to write")
    png = as_png(picture.figure, DPI, 0.08) if args.output or args.tensorboard else b""
    files = [(args.output, png)] if args.output else []
    files += [(args.csv, as_csv(picture.rows))] if args.csv else []
    for path, content in files:
        write_atomically(path, lambda file, content=content: file.write(content))
    lines = [f"written to {path}" for path, _ in files]
    if args.tensorboard:
        _to_tensorboard(png, f"visualize/{kind}", picture.step, args.tensorboard)
        lines.append(f"visualize/{kind} at step {picture.step} in {args.tensorboard}")
    return lines


def _to_tensorboard(png: bytes, tag: str, step: int, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    try:
        with SummaryWriter(str(folder)) as writer:
            writer.add_image(tag, image, step, dataformats="HWC")
    except (OSError, ValueError) as error:  # ValueError: a step that is too large
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write to {folder}: {reason}") from error
