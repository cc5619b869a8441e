"""Reading the ``log.txt`` of training runs."""

import json
import math
from pathlib import Path

from training.output import LOG
from utils import UserError

NEEDED = ("epoch", "train_loss", "test_loss", "test_acc1", "test_acc5", "train_lr")
OPTIONAL = ("ema_loss", "ema_acc1", "ema_acc5")


def log_file(path: str) -> Path:
    """The log that ``path`` is, or that a run's folder of this name holds.

    Raises:
        UserError: There is none.
    """
    file = Path(path) / LOG if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"there is no log {file}: give a run's folder or its {LOG}")
    return file


def run_name(file: Path) -> str:
    """What a legend calls the run of a log: its folder, or the file where it has another name."""
    return file.resolve().parent.name if file.name == LOG else file.name


def read_log(file: Path) -> list[dict[str, float]]:
    """The lines of a log, by epoch. Of several lines of an epoch, as of a resumed run, the last.

    Raises:
        UserError: It cannot be read, is empty, or a line is broken or lacks a number; the
            message names the line.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {file}: {reason}") from error
    epochs: dict[int, dict[str, float]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            row = _parse(line, f"{file} line {number}")
            epochs[int(row["epoch"])] = row
    if not epochs:
        raise UserError(f"{file} is empty: training writes a line after every epoch")
    return [epochs[epoch] for epoch in sorted(epochs)]


def _parse(line: str, where: str) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is broken: {error}; delete the line to go on") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} holds a {type(row).__name__}, not an object of numbers")
    missing = [key for key in NEEDED if key not in row]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    for key in (*NEEDED, *OPTIONAL):
        value = row.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: {key} is {value!r}, not a number")
    if not (math.isfinite(row["epoch"]) and row["epoch"] == int(row["epoch"])):
        raise UserError(f"{where}: epoch is {row['epoch']}, not a whole number")
    return row
