"""Runs that an output folder holds already: continued, refused or, by ``--overwrite``, removed."""

import contextlib
import json
import os
import re
from argparse import Namespace
from collections.abc import Container
from pathlib import Path

from training.files import OutputError

LOG = "log.txt"
ARGS = "args.yaml"
CORRUPT = "corrupt.txt"
DATA = "data.json"
TRACKING = "tracking.json"  # of every tracker: the id of the run and the last epoch
# names of all files of a run, except its lock
WEIGHTS = re.compile(r"(checkpoint|previous|best|(checkpoint|best)-\d{4,})\.pth(\.damaged\d*)?")
OTHERS = re.compile(
    r"(log|corrupt)\.txt|args\.yaml|(data|tracking)\.json|events\.out\.tfevents\..+"
)
CONTINUE, REFUSE, OVERWRITE = "continue", "refuse", "overwrite"
READ = ("resume", "finetune", "teacher_path")  # flags of files that --overwrite might remove
MAX_ARGS = 1 << 15  # characters


def treatment(args: Namespace, overwrite: bool, restarted: bool) -> str:
    """Return what the flags ask to do with a run that ``--output_dir`` holds.

    Args:
        args: Flags.
        overwrite: ``--overwrite`` was given.
        restarted: The launcher has restarted this run, which continues in any case.

    Returns:
        ``CONTINUE``, ``REFUSE`` or ``OVERWRITE``.
    """
    restarted = restarted and not _refused_before()
    if restarted or args.resume == "auto" or _is_within(args.resume, Path(args.output_dir)):
        return CONTINUE
    return OVERWRITE if overwrite else REFUSE


def _is_within(name: str, folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # an address, or a name without a file
        return bool(name) and Path(name).is_file() and os.path.samefile(Path(name).parent, folder)
    return False


def check_overwrite(args: Namespace) -> None:
    """Check the flags next to ``--overwrite``.

    Raises:
        OutputError: Another flag needs the run that it would remove, or there is none to remove.
    """
    if args.eval:
        raise OutputError("--overwrite has no effect with --eval, which trains nothing")
    if not args.output_dir:
        raise OutputError("--overwrite needs --output_dir FOLDER")
    if args.resume == "auto":
        raise OutputError("--resume auto and --overwrite exclude each other")
    for name in READ:
        file = getattr(args, name, None) or ""
        if _is_within(file, Path(args.output_dir)):
            flag = f"--{name.replace('_', '-')} {file}"
            raise OutputError(f"--overwrite would remove {flag}: choose another --output_dir")


def check_resumed(args: Namespace, checkpoint: Container[str]) -> None:
    """Refuse to start from a file of ``--output_dir`` that does not continue the run there.

    Args:
        args: Flags.
        checkpoint: Contents of ``--resume``.

    Raises:
        OutputError: It has weights alone, with which another run would begin.
    """
    if _is_within(args.resume, Path(args.output_dir)) and "optimizer" not in checkpoint:
        refuse(Path(args.output_dir))


def _mark() -> Path | None:
    """Return the file by which a process tells torchrun's next ones of a refusal, if any."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # LAUNCH/attempt_0/0/error.json
    return Path(file).parents[2] / "refused" if file and len(Path(file).parents) > 2 else None


def _refused_before() -> bool:
    mark = _mark()
    return mark is not None and mark.exists()


def _files(folder: Path) -> list[Path]:
    """Return the files of a run in ``folder``."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = (name for name in sorted(names) if WEIGHTS.fullmatch(name) or OTHERS.fullmatch(name))
    return [folder / name for name in found]


def describe(folder: Path) -> str:
    """Return what ``folder`` holds of a run, such as ``2 of 20 epochs``; empty for no run.

    A run has checkpoints, an ``args.yaml`` or lines in ``log.txt``.
    """
    files = {path.name: path for path in _files(folder)}
    lines: list[str] = []
    settings = ""
    if LOG in files:
        lines = files[LOG].read_text("utf-8", errors="replace").splitlines()
    if ARGS in files:
        with files[ARGS].open(errors="replace") as file:
            settings = file.read(MAX_ARGS)
    weights = [name for name in files if WEIGHTS.fullmatch(name)]
    done = max((epoch_of(line) + 1 for line in lines if epoch_of(line) < float("inf")), default=0)
    wanted = re.search(r"^epochs: (\d+)$", settings, re.M)
    if wanted:
        return f"{done} of {wanted[1]} epochs"
    if done:
        return f"{done} epochs"
    return ", ".join([*weights[:1], *([LOG] if lines else []), *([ARGS] if settings else [])])


def epoch_of(line: str) -> float:
    """Return the epoch of a line of ``log.txt``; infinity for a line cut short."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return epoch if isinstance(epoch, int | float) else float("inf")


def refuse(folder: Path) -> None:
    """Raise OutputError if ``folder`` holds a run."""
    held = describe(folder)
    if held:
        with contextlib.suppress(OSError):
            if mark := _mark():  # restarted, a process would continue that run
                mark.touch()
        raise OutputError(
            f"{folder} holds {held}: --resume auto continues, --overwrite starts anew"
        )


def remove(folder: Path) -> None:
    """Remove the files of a run, and no others.

    Raises:
        OutputError: One cannot be removed.
    """
    for path in _files(folder):
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(f"cannot remove {path}: {error.strerror}") from error
