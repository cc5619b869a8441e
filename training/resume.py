"""The checkpoint that a run goes on from."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from models import CheckpointError, read_checkpoint
from training.files import OutputError
from training.launch import DistInfo
from training.output import BEST, CHECKPOINT, PREVIOUS
from utils import all_or_none, from_first, log

DAMAGED = ".damaged"


def find_checkpoint(folder: Path, set_aside: bool) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of an output folder that is whole, and its content.

    Args:
        folder: The folder, which need not exist.
        set_aside: Rename damaged ones to ``*.damaged``, so that no later save is made to push
            out a whole one in their favour.
    """
    numbered = sorted(folder.glob("checkpoint-*.pth"), key=_number, reverse=True)
    for path in (folder / CHECKPOINT, folder / PREVIOUS, *numbered, folder / BEST):
        if not path.exists():
            continue
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            log(f"warning: {error}; looking for the one before")
            if set_aside:
                _set_aside(path)
    return None


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _set_aside(path: Path) -> None:
    try:
        path.rename(path.with_name(path.name + DAMAGED))
    except OSError as error:
        raise OutputError(f"cannot rename {path}, which is damaged: {error.strerror}") from error


def read_resume(
    args: Namespace, place: DistInfo, group: dist.ProcessGroup | None
) -> tuple[str, dict[str, Any]]:
    """The checkpoint that the run goes on from and its content, or two empty ones.

    It is what ``--resume`` names. ``auto`` is the newest whole one of ``--output_dir``, if there
    is any; to look there goes without saying after a restart by torchrun or Slurm.
    """
    source = args.resume
    if source == "auto" or (place.restarts and args.output_dir and not args.eval):
        folder = Path(args.output_dir) if place.rank == 0 else None
        found = all_or_none(lambda: folder and find_checkpoint(folder, not args.eval), group)
        path = from_first(found and str(found[0]), group)
        if path:
            log(f"reading {path}")
            read = (lambda: found[1]) if found else (lambda: read_checkpoint(path))
            return path, all_or_none(read, group)
        if args.eval:
            raise CheckpointError(f"no checkpoint in --output_dir {args.output_dir}")
        log(f"no checkpoint in {args.output_dir} yet, starting afresh")
        source = "" if source == "auto" else source
    if not source:
        return "", {}
    log(f"reading {source}")
    return source, read_checkpoint(source)
