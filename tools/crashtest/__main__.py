"""Kill a training run again and again, resume it, and compare it with an undisturbed one, bitwise.

``python -m tools.crashtest`` trains on the digits, alone and under torchrun, and interrupts it at
random moments, saving included; ``--resume auto`` or torchrun's ``--max-restarts`` goes on. What
is killed are processes, not the machine: what a disk keeps of a power cut is not tested. To find
processes that outlive their run, and single ranks, it needs Linux's /proc.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from models import CheckpointError
from tools.crashtest.job import HAS_PROC, CrashError
from tools.crashtest.run import Counts, Part, Reference, Run, parts_of, train_undisturbed
from training.flags import positive

Row = tuple[Part, Counts]


def get_parser() -> argparse.ArgumentParser:
    """The parser of the flags."""
    parser = argparse.ArgumentParser(
        "python -m tools.crashtest",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--kills", type=positive, default=50, help="interruptions in all")
    add("--ranks", type=positive, nargs="+", default=[1, 2], help="processes of a run")
    add("--signal", choices=["KILL", "TERM", "mixed"], default="mixed", help="what to send")
    add("--workers", type=int, nargs="+", default=[1, 2, 0], help="drawn from at every start")
    add("--model", default="visformer_tiny", help="any name that timm knows")
    add("--epochs", type=positive, default=3, help="of a run")
    add("--batch-size", type=positive, default=64, help="images per process and step")
    add("--seed", type=int, help="of the random moments; another every time, if not given")
    add("--limit", type=float, default=600.0, help="seconds after which a start hangs")
    add(
        "--output_dir",
        type=Path,
        help="for the runs, which are kept if they fail; a temporary folder, if not given",
    )
    add("flags", nargs="*", help="further ones of main.py, after --")
    return parser


def table(rows: Sequence[Row]) -> str:
    """The results as a Markdown table."""
    names = [name.name for name in fields(Counts)]
    lines = [["ranks", "interrupted by", *(name.replace("_", " ") for name in names)]]
    lines.append(["---:", "---", *("---:" for _ in names)])
    for part, counts in rows:
        numbers = asdict(counts) | ({} if HAS_PROC else {"orphans": "?"})
        lines.append([str(part.ranks), str(part), *(str(numbers[name]) for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(rows: Sequence[Row], failures: Sequence[str]) -> str:
    """The results in one line."""

    def total(name: str) -> int:
        return sum(getattr(counts, name) for _, counts in rows)

    orphans = f"{total('orphans')} orphans" if HAS_PROC else "orphans not counted"
    failed = f", {len(failures)} failed" if failures else ""
    return (
        f"crashtest: {total('kills')} kills, {total('bits_of_difference')} bits of difference, "
        f"{total('lost_checkpoints')} lost checkpoints, {orphans}{failed}"
    )


def run_part(
    args: argparse.Namespace,
    part: Part,
    kills: int,
    reference: Reference,
    folder: Path,
    draws: random.Random,
    counts: Counts,
) -> None:
    """Run after run, until there have been so many interruptions; good ones are removed.

    Raises:
        CrashError, CheckpointError, OSError: See :meth:`Run.train`.
    """
    folder.mkdir(parents=True)
    while counts.kills < kills:
        before, output = counts.kills, folder / str(counts.runs)
        Run(args, part, kills, reference, output, draws, counts).train()
        if counts.kills == before:
            raise CrashError("a run ended before it could be interrupted: give it more --epochs")
        if counts.is_good:
            shutil.rmtree(output)


def run_all(args: argparse.Namespace, folder: Path, seed: int) -> tuple[list[Row], list[str]]:
    """All parts: their results, and what failed."""
    draws, rows, failures = random.Random(seed), [], []
    parts = [part for ranks in args.ranks for part in parts_of(ranks, args.signal)]
    references: dict[int, Reference] = {}
    for index, part in enumerate(parts):
        kills = args.kills // len(parts) + (index < args.kills % len(parts))
        if not kills:
            continue
        counts = Counts()
        rows.append((part, counts))
        try:
            if part.ranks not in references:
                path = folder / f"reference-{part.ranks}"
                references[part.ranks] = train_undisturbed(args, path, part.ranks)
            reference = references[part.ranks]
            run_part(args, part, kills, reference, folder / f"part-{index}", draws, counts)
        except (CrashError, CheckpointError, OSError) as error:
            failures.append(f"failed: {part.ranks} rank(s), {part}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
        print(f"{part.ranks} rank(s), {part}: {counts}", file=sys.stderr, flush=True)
    return rows, failures


def main(argv: list[str]) -> int:
    """Test with the flags ``argv``; returns the exit status."""
    args = get_parser().parse_args(argv)
    seed = random.SystemRandom().randrange(2**16) if args.seed is None else args.seed
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="crashtest-", dir=args.output_dir)).resolve()
    print(f"seed {seed}, {folder}", flush=True)
    rows, failures = run_all(args, folder, seed)
    good = not failures and all(counts.is_good for _, counts in rows)
    if good:
        shutil.rmtree(folder)
    else:
        print(f"what failed is kept in {folder}")
    print(table(rows))
    print(verdict(rows, failures))
    return 0 if good and sum(counts.kills for _, counts in rows) >= args.kills else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
