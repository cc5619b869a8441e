"""Kill a training run repeatedly, resume it, and compare it bitwise with an undisturbed one.

``python -m tests.crash``, from the repository's folder, trains on the digits, with one process and
under torchrun, and interrupts it at random moments, saving included; ``--resume auto`` or
torchrun's ``--max-restarts`` resumes it. Processes are killed, not the machine: a power cut is not
tested. Needs Linux's /proc, to find processes that outlive their run, and single ranks.
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
from tests.crash.job import CrashError, Job
from tests.crash.run import Counts, Part, Run, parts_of, train_undisturbed

Row = tuple[Part, Counts]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.crash",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--kills", type=int, default=50, help="kills in total")
    add("--ranks", type=int, nargs="+", default=[1, 2], help="processes of a run")
    add("--signal", choices=["KILL", "TERM", "mixed"], default="mixed", help="signal to send")
    add("--workers", type=int, nargs="+", default=[1, 2, 0], help="sampled at every start")
    add("--model", default="visformer_tiny", help="any timm model name")
    add("--epochs", type=int, default=3, help="epochs of a run")
    add("--batch-size", type=int, default=64, help="images per process and step")
    add("--seed", type=int, help="seed of the random moments; random if not given")
    add("--limit", type=float, default=600.0, help="seconds after which a start hangs")
    add("--output_dir", type=Path, help="folder of the runs, which are kept if they fail")
    add("flags", nargs="*", help="further flags of main.py, after --")
    return parser


def table(rows: Sequence[Row]) -> str:
    names = [name.name for name in fields(Counts)]
    lines = [["ranks", "interrupted by", *(name.replace("_", " ") for name in names)]]
    lines.append(["---:", "---", *("---:" for _ in names)])
    lines += [[part.ranks, part, *asdict(counts).values()] for part, counts in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def summary(rows: Sequence[Row], failures: Sequence[str]) -> str:
    names = ("kills", "bits_of_difference", "lost_checkpoints", "orphans")
    totals = [
        f"{sum(getattr(counts, name) for _, counts in rows)} {name.replace('_', ' ')}"
        for name in names
    ]
    return "crash test: " + ", ".join([*totals, *[f"{len(failures)} failed"] * bool(failures)])


def run_all(args: argparse.Namespace, folder: Path, seed: int) -> tuple[list[Row], list[str]]:
    """Run every part until it has its share of the kills; return results and failures."""
    rng, rows, failures = random.Random(seed), [], []
    parts = [part for ranks in args.ranks for part in parts_of(ranks, args.signal)]
    references: dict[int, Job] = {}
    for index, part in enumerate(parts):
        kills = args.kills // len(parts) + (index < args.kills % len(parts))
        if not kills:
            continue
        counts, place = Counts(), folder / f"part-{index}"
        rows.append((part, counts))
        try:
            if part.ranks not in references:
                path = folder / f"reference-{part.ranks}"
                references[part.ranks] = train_undisturbed(args, path, part.ranks)
            place.mkdir()
            while counts.kills < kills:
                before, output = counts.kills, place / str(counts.runs)
                Run(args, part, kills, references[part.ranks], output, rng, counts).train()
                if counts.kills == before:
                    raise CrashError("a run ended before it was interrupted: raise --epochs")
                if counts.is_good:
                    shutil.rmtree(output)
        except (CrashError, CheckpointError, OSError) as error:
            failures.append(f"failed: {part.ranks} rank(s), {part}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
        print(f"{part.ranks} rank(s), {part}: {counts}", file=sys.stderr, flush=True)
    return rows, failures


def main(argv: list[str]) -> int:
    """Run the test with the flags ``argv``; return the exit status."""
    args = get_parser().parse_args(argv)
    seed = random.SystemRandom().randrange(2**16) if args.seed is None else args.seed
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="crash-", dir=args.output_dir)).resolve()
    print(f"seed {seed}, {folder}", flush=True)
    rows, failures = run_all(args, folder, seed)
    good = not failures and all(counts.is_good for _, counts in rows)
    if good:
        shutil.rmtree(folder)
    else:
        print(f"the failed runs are kept in {folder}")
    print(table(rows), summary(rows, failures), sep="\n")
    return 0 if good and sum(counts.kills for _, counts in rows) >= args.kills else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
