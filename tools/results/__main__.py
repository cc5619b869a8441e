"""Claims of the papers on a small dataset: ``python -m tools.results [CLAIM ...]``.

Every arm is a run of ``main.py`` with the recipe of ``--config``. Finished runs are not repeated,
and interrupted ones resume. The output is a table in Markdown with the top-1 accuracy after the
last epoch, not the best one: mean and standard deviation over the seeds.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tools.files import folder_for
from tools.results.claims import CLAIMS, Arm
from tools.tables import markdown
from training.flags import parse_args
from training.launch import run_program
from training.output import LOG
from training.parser import Parser, usable_cpus
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


def folder_of(args: Namespace, arm: Arm, seed: int | str) -> Path:
    """Return the output folder of a run."""
    return Path(args.output_dir) / f"{arm.name}-{seed}"


def flags_of(args: Namespace, arm: Arm, seed: int | str) -> list[str]:
    """Return the command line of a run of ``main.py``; ``seed`` may be a placeholder."""
    flags = ["-c", args.config, *arm.flags, "--data-path", args.data_path]
    recipe, _ = parse_args(["-c", args.config])
    if args.epochs or arm.share < 1:
        flags += ["--epochs", str(round((args.epochs or recipe.epochs) / arm.share))]
    if arm.share < 1:
        flags += ["--warmup-epochs", str(round(recipe.warmup_epochs / arm.share))]
        flags += ["--sampling-ratio", f"{arm.share:g}"]
    if arm.teacher:
        flags += ["--teacher-path", str(folder_of(args, arm.teacher, seed) / "checkpoint.pth")]
    flags += shlex.split(args.flags)
    return [*flags, "--seed", str(seed), "--output_dir", str(folder_of(args, arm, seed))]


def read_epochs(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's ``log.txt``, one per finished epoch."""
    path = folder / LOG
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def train(args: Namespace, arm: Arm, seed: int) -> None:
    """Train an arm in its own process, from its last checkpoint if there is one."""
    folder, flags = folder_of(args, arm, seed), flags_of(args, arm, seed)
    wanted = parse_args(flags)[0].epochs
    if len(read_epochs(folder)) >= wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, usable_cpus() // args.jobs))
    print("$ python main.py", shlex.join(flags), file=sys.stderr, flush=True)
    with (folder / "stdout.txt").open("a") as output:
        status = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), *flags, "--resume", "auto"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        ).returncode
    if status or len(read_epochs(folder)) < wanted:
        raise UserError(f"{arm.name} with seed {seed} failed: see {folder / 'stdout.txt'}")


def train_all(
    args: Namespace, arms: Sequence[Arm], run: Callable[[Namespace, Arm, int], None] = train
) -> None:
    """Train arms with all seeds, ``--jobs`` at a time, teachers before students."""
    students = dict.fromkeys(arm for arm in arms if arm.teacher)
    others = [*(arm.teacher for arm in students), *(arm for arm in arms if not arm.teacher)]
    for chosen in (dict.fromkeys(others), students):
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(run, args, arm, seed) for seed in args.seeds for arm in chosen]
            try:
                for job in jobs:
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()


def row(args: Namespace, arm: Arm) -> list[str]:
    """Return one line of the table, over the seeds whose run is finished."""
    accuracies = {}
    for seed in args.seeds:
        log = read_epochs(folder_of(args, arm, seed))
        if len(log) >= parse_args(flags_of(args, arm, seed))[0].epochs:
            accuracies[seed] = log[-1]["test_acc1"]
    command = shlex.join(flags_of(args, arm, "N"))
    values = list(accuracies.values())
    mean = f"{statistics.mean(values):.1f}" if values else "not run"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    single = ", ".join(f"{seed}: {accuracy:.1f}" for seed, accuracy in accuracies.items())
    return [arm.name, f"{mean}{spread}", single, f"`python main.py {command}`"]


def tables(args: Namespace, names: Sequence[str]) -> Iterator[str]:
    """Yield a heading and a table in Markdown for each claim."""
    for name in names:
        claim = CLAIMS[name]
        yield f"## {claim.title}\n\n{claim.paper}.\n"
        heads = ["run", "top-1 (%)", "by seed", "command"]
        yield markdown(heads, [row(args, arm) for arm in claim.arms]) + "\n"


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("claims", nargs="*", metavar="CLAIM", help=f"one of {', '.join(CLAIMS)}; all if none")
    add("--data-path", required=True, help="image folder with train and val")
    add("--output_dir", default="output/results", help="one folder per run")
    add("--config", default="configs/cifar10_claims.yaml", help="recipe of all runs")
    add("--epochs", type=int, help="epochs of the whole dataset, instead of the recipe's")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    add("--no-train", action="store_true", help="only tabulate finished runs")
    add("--flags", default="", help="further flags of main.py, as one argument")
    return parser


def start(argv: list[str]) -> int:
    """Train what is missing and print the tables."""
    args = get_parser().parse_args(argv)
    unknown = [name for name in args.claims if name not in CLAIMS]
    if unknown:
        raise UserError(f"unknown claim {unknown[0]}; choose one of {', '.join(CLAIMS)}")
    if args.jobs < 1 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--jobs {args.jobs} must be positive and --seeds {args.seeds} distinct")
    names = args.claims or list(CLAIMS)
    if not args.no_train:
        with folder_for("--output_dir", Path(args.output_dir)):
            train_all(args, [arm for name in names for arm in CLAIMS[name].arms])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {device}, {usable_cpus()} cores\n")
    for part in tables(args, names):
        print(part)
    return 0


def main(argv: list[str]) -> int:
    """Run the command line ``argv``; return the exit status."""
    interrupted = "interrupted; the same command resumes from the last checkpoints"
    return run_program(lambda: start(argv), interrupted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
