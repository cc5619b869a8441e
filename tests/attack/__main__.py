"""Give hostile inputs to the programs, and list those that are not survived.

``python -m tests.attack``, from the repository's folder, runs every case in a forked process with
limits of memory and time. A hostile input is refused with one line that names it, or used; never a
traceback, a hang, a file left behind, or a look beyond the case's folder. Needs Linux.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.attack import (
    environment,
    files,
    flags,
    hub,
    images,
    metadata,
    mutations,
    recipes,
    servers,
    shards,
)
from tests.attack.case import Case, run_case
from tests.attack.valid import write_world

CLASSES = {
    "metadata": metadata.cases,
    "hub": hub.cases,
    "files": files.cases,
    "images": images.cases,
    "shards": shards.cases,
    "servers": servers.cases,
    "recipes": recipes.cases,
    "environment": environment.cases,
    "flags": flags.cases,
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.attack", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("classes", nargs="*", metavar="CLASS", help=f"{', '.join(CLASSES)}; all if not given")
    add("--seed", type=int, default=0, help="of the cases' random choices (0)")
    add("--each", type=int, metavar="N", help="at most N cases of each class, sampled")
    add("--only", default="", metavar="TEXT", help="cases whose name contains this")
    add("--mutations", type=int, default=0, metavar="N", help="also read N mutated checkpoints")
    add("--keep", action="store_true", help="keep the folders of cases that were not survived")
    return parser


def chosen(args: argparse.Namespace) -> Iterator[list[Case]]:
    """Yield the cases of each class."""
    for name in args.classes or CLASSES:
        rng = random.Random(args.seed)
        cases = [case for case in CLASSES[name](rng) if args.only in str(case)]
        if args.each is not None and args.each < len(cases):
            cases = rng.sample(cases, args.each)
        yield cases


def table(rows: Sequence[Sequence[object]]) -> str:
    lines = [("class", "tried", "survived", "seconds"), ("---", "---:", "---:", "---:"), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(argv: list[str]) -> int:
    """Run the test with the flags ``argv``; return the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if unknown := set(args.classes) - CLASSES.keys():
        parser.error(f"unknown class {', '.join(unknown)}; choose from {', '.join(CLASSES)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    folder = Path(tempfile.mkdtemp(prefix="attack-")).resolve()
    rows, failures = [], []
    try:
        (folder / "valid").mkdir()
        world = write_world(folder / "valid")
        with servers.hostile_server() as world.base:
            for cases in chosen(args):
                since, survived = time.monotonic(), 0
                for number, case in enumerate(cases):
                    wrong = run_case(case, world, folder / case.kind / str(number))
                    survived += wrong is None
                    if wrong is not None:
                        failures.append(f"{case}: {wrong}")
                        print(f"failed: {failures[-1]}", flush=True)
                seconds = f"{time.monotonic() - since:.1f}"
                if cases:
                    rows.append((cases[0].kind, len(cases), survived, seconds))
        if args.mutations:
            since = time.monotonic()
            wrong = mutations.attack(world, folder, args.mutations, args.seed)
            failures += wrong
            print(*(f"failed: {line}" for line in wrong), sep="\n", end="\n" * bool(wrong))
            seconds = f"{time.monotonic() - since:.1f}"
            rows.append(("mutations", args.mutations, args.mutations - len(wrong), seconds))
    finally:
        if not (args.keep and failures):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"kept in {folder}")
    print(table(rows), f"attack test: {len(failures)} not survived", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
