"""Test claims of the papers by trainings on a small dataset.

``python -m tools.results [CLAIM ...]``: every arm is a run of ``main.py`` with the recipe of its
suite. A finished run leaves one line of JSON in the folder of results, and is not repeated;
interrupted ones resume. The page of results is made from these files: pairs of runs with the same
seed, the mean of their differences and its standard error.
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tools.files import folder_for
from tools.pages import write_between
from tools.results import pictures
from tools.results.claims import SUITES, Arm, Board, Pair
from tools.tables import markdown
from training.files import write_atomically
from training.flags import parse_args
from training.launch import run_program
from training.output import LOG
from training.parser import Parser, usable_cpus
from utils import UserError

GOALS = (94, 95)  # top-1 in %
ROOT = Path(__file__).resolve().parent.parent.parent
# Student's t of 95 % by the number of pairs: standard errors by which a difference is resolved
T95 = (math.inf, math.inf, 12.71, 4.303, 3.182, 2.776, 2.571)


def folder_of(args: Namespace, arm: Arm, seed: int | str) -> Path:
    """Return the output folder of a run."""
    return Path(args.output_dir) / f"{arm.name}-{seed}"


def result_of(args: Namespace, arm: Arm, seed: int) -> Path:
    """Return the file of a run's results."""
    return Path(args.results) / args.suite / f"{arm.name}-{seed}.json"


def arms_of(args: Namespace) -> dict[str, Arm]:
    """Return the arms of the suite by name."""
    return {arm.name: arm for part in SUITES[args.suite].parts.values() for arm in part.arms}


def flags_of(args: Namespace, arm: Arm, seed: int | str) -> list[str]:
    """Return the command line of a run of ``main.py``; ``seed`` may be a placeholder."""
    suite = SUITES[args.suite]
    config = arm.config or suite.config
    common = () if arm.config else suite.flags
    flags = ["-c", config, "--data-path", args.data_path, *common, *arm.flags]
    recipe, _ = parse_args(["-c", str(ROOT / config), *common])
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
    result, folder = result_of(args, arm, seed), folder_of(args, arm, seed)
    flags, arms = flags_of(args, arm, seed), arms_of(args)
    needed = {each.teacher.name for each in arms.values() if each.teacher}
    if result.is_file() and (arm.name not in needed or (folder / "checkpoint.pth").is_file()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, usable_cpus() // args.jobs))
    print("$ python main.py", shlex.join(flags), file=sys.stderr, flush=True)
    started = time.monotonic()
    with (folder / "stdout.txt").open("a") as output:
        status = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), *flags, "--resume", "auto"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        ).returncode
    epochs = read_epochs(folder)
    if status or len(epochs) < parse_args(flags)[0].epochs:
        raise UserError(f"{arm.name} with seed {seed} failed: see {folder / 'stdout.txt'}")
    accuracies = [epoch["test_acc1"] for epoch in epochs]
    reached = {  # epochs to an accuracy
        f"epochs_to_{goal}": next(i for i, value in enumerate(accuracies, 1) if value >= goal)
        for goal in GOALS
        if max(accuracies) >= goal
    }
    line = {
        "run": arm.name,
        "seed": seed,
        **{key: value for key, value in epochs[-1].items() if isinstance(value, int | float)},
        **reached,
        "test_acc1_by_epoch": [round(accuracy, 4) for accuracy in accuracies],
        "seconds": round(time.monotonic() - started),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": int(threads),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": shlex.join(["python", "main.py", *flags]),
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(result, lambda file: file.write(json.dumps(line).encode() + b"\n"))


def train_all(
    args: Namespace, arms: Sequence[Arm], run: Callable[[Namespace, Arm, int], None] = train
) -> None:
    """Train arms with all seeds, ``--jobs`` at a time, seed by seed, teachers before students."""
    unique = {arm.name: arm for arm in arms}  # one of several figures of a run
    students = {name: arm for name, arm in unique.items() if arm.teacher}
    others = {arm.teacher.name: arm.teacher for arm in students.values()}
    others |= {name: arm for name, arm in unique.items() if not arm.teacher}
    for seed in args.seeds:
        for chosen in (others, students):
            with ThreadPoolExecutor(args.jobs) as pool:
                jobs = [pool.submit(run, args, arm, seed) for arm in chosen.values()]
                try:
                    for job in jobs:
                        job.result()
                finally:
                    for job in jobs:
                        job.cancel()


def read_results(args: Namespace, arm: Arm) -> dict[int, dict[str, Any]]:
    """Return the results of an arm by seed."""
    pattern = f"{arm.name}-*.json"
    found = (Path(args.results) / args.suite).glob(pattern)
    lines = [json.loads(path.read_text()) for path in found]
    return {line["seed"]: line for line in lines if line["run"] == arm.name}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, infinite for a single value."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def verdict(differences: Sequence[float], is_better: bool) -> str:
    """Say what paired differences (claimed better minus base) tell about a claim."""
    if len(differences) < 2:
        return "not tried" if not differences else "one pair"
    mean, error = mean_and_error(differences)
    if abs(mean) <= T95[min(len(differences), len(T95) - 1)] * error:
        return "not resolved" if is_better else "holds: no loss resolved"
    if mean > 0:
        return "holds"
    return "fails"


def row(args: Namespace, pair: Pair, is_better: bool) -> list[str]:
    """Return one line of a claim's table."""
    cells = []
    for arm in (pair.base, pair.other):
        figures = [line[arm.figure] for line in read_results(args, arm).values()]
        mean = f"{statistics.mean(figures):.2f}" if figures else "not run"
        name = arm.name + ("" if arm.figure == "test_acc1" else ", averaged")
        cells.append(f"{name}: {mean}")
    differences = paired(args, pair)
    mean, error = mean_and_error(differences) if differences else (math.nan, math.inf)
    shown = f"{mean:+.2f}" if differences else ""
    shown += f" ± {error:.2f}" if len(differences) > 1 else ""
    single = ", ".join(f"{difference:+.2f}" for difference in differences)
    return [*cells, shown, single, pair.published, verdict(differences, is_better)]


def tables(args: Namespace, names: Sequence[str]) -> Iterator[str]:
    """Yield a heading and a table in Markdown for each claim."""
    suite = SUITES[args.suite]
    for name in names:
        if name in suite.boards:
            yield from board_table(args, suite.boards[name])
            continue
        claim = suite.claims[name]
        yield f"### {claim.title}\n\n{claim.paper}.\n"
        heads = ["base", "claimed", "difference", "by seed", "published", "verdict"]
        rows = [row(args, pair, claim.is_better) for pair in claim.pairs]
        yield markdown(heads, rows) + "\n"


def board_table(args: Namespace, board: Board) -> Iterator[str]:
    """Yield a heading and a table in Markdown: mean accuracies beside the public ones."""
    yield f"### {board.title}\n\n{board.rules}.\n"
    rows = []
    for arm, public in board.public.items():
        lines = read_results(args, arm).values()
        values = [line[arm.figure] for line in lines]
        mean = f"{statistics.mean(values):.2f}" if values else "not run"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        times = [
            f"{goal} %: {line['seconds'] * line[f'epochs_to_{goal}'] / (line['epoch'] + 1):.0f} s"
            for line in lines
            for goal in GOALS
            if f"epochs_to_{goal}" in line
        ]
        rows.append([arm.name, f"{mean}{spread}", str(len(values)), public, ", ".join(times)])
    heads = ["run", "top-1 (%)", "seeds", "best public", "time to"]
    yield markdown(heads, rows) + "\n"


def paired(args: Namespace, pair: Pair) -> list[float]:
    """Return the differences of a pair, claimed better minus base, by seed."""
    base, other = (read_results(args, arm) for arm in (pair.base, pair.other))
    seeds = sorted(base.keys() & other.keys())
    return [other[seed][pair.other.figure] - base[seed][pair.base.figure] for seed in seeds]


def draw(args: Namespace, names: Sequence[str], folder: Path) -> None:
    """Write ``curves.png`` and ``differences.png`` of the finished runs into a folder."""
    suite = SUITES[args.suite]
    claims = [suite.claims[name] for name in names if name in suite.claims]
    by_epoch, bars = {}, []
    for claim in claims:
        found = {arm.name: read_results(args, arm).values() for arm in claim.arms}
        lines = {
            name: [line["test_acc1_by_epoch"] for line in results]
            for name, results in found.items()
            if results
        }
        if lines:
            by_epoch[claim.title] = lines
        for pair in claim.pairs:
            values = paired(args, pair)
            if len(values) > 1:
                label = f"{pair.other.name} - {pair.base.name}"
                bars.append((label, *mean_and_error(values)))
    for draw_one, found, name in (
        (pictures.curves, by_epoch, "curves.png"),
        (pictures.differences, bars, "differences.png"),
    ):
        if found:
            draw_one(found, folder / name)


def commands(args: Namespace) -> Iterator[str]:
    """Yield a table of the runs: images seen, seconds, command, versions."""
    rows = []
    for arm in arms_of(args).values():
        for seed, line in sorted(read_results(args, arm).items()):
            versions = f"torch {line['torch']}, {line['threads']} threads of {line['device']}"
            accuracy = f"{line['test_acc1']:.2f}"
            cells = [arm.name, str(seed), accuracy, str(line["seconds"]), versions]
            rows.append([*cells, f"`{line['command']}`"])
    yield "### Runs\n"
    yield markdown(["run", "seed", "top-1 (%)", "seconds", "versions", "command"], rows) + "\n"


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser("python -m tools.results", description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = ", ".join(dict.fromkeys(name for suite in SUITES.values() for name in suite.parts))
    add("claims", nargs="*", metavar="CLAIM", help=f"claims to test; default: all of {names}")
    add("--suite", choices=SUITES, default="cpu", help="models and recipe of the runs")
    data = "image folder with train/CLASS/* and val/CLASS/*"
    add("--data-path", default="data/cifar10", metavar="FOLDER", help=data)
    output = "folder with a folder for each run"
    add("--output_dir", default="output/results", metavar="FOLDER", help=output)
    results = "folder with a file of results for each finished run"
    add("--results", default="docs/results", metavar="FOLDER", help=results)
    epochs = "epochs of a run on the whole dataset; default: the recipe's"
    add("--epochs", type=int, metavar="N", help=epochs)
    seeds = "seeds; every training runs once with each"
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help=seeds)
    jobs = "runs at a time, which share the CPU cores"
    add("--jobs", type=int, default=1, metavar="N", help=jobs)
    add("--no-train", action="store_true", help="only print tables of finished runs")
    page = "write the tables into this page instead of printing them"
    add("--page", metavar="FILE.md", help=page)
    plot = "write curves.png and differences.png of the finished runs into this folder"
    add("--plot", metavar="FOLDER", help=plot)
    add("--flags", default="", help="further flags of main.py, quoted as one argument")
    return parser


def start(argv: list[str]) -> int:
    """Train what is missing and print the tables."""
    args = get_parser().parse_args(argv)
    claims = SUITES[args.suite].parts
    unknown = [name for name in args.claims if name not in claims]
    if unknown:
        raise UserError(f"unknown claim {unknown[0]}; choose one of {', '.join(claims)}")
    if args.jobs < 1 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--jobs {args.jobs} must be positive and --seeds {args.seeds} distinct")
    names = args.claims or list(claims)
    if not args.no_train:
        with folder_for("--output_dir", Path(args.output_dir)):
            train_all(args, [arm for name in names for arm in claims[name].arms])
    if args.plot:
        draw(args, names, Path(args.plot))
    text = "\n".join([f"{SUITES[args.suite].about}.\n", *tables(args, names), *commands(args)])
    if args.page:
        write_between(Path(args.page), "results", text)
    else:
        print(text)
    return 0


def main(argv: list[str]) -> int:
    """Run the command line ``argv``; return the exit status."""
    interrupted = "interrupted; the same command resumes from the last checkpoints"
    return run_program(lambda: start(argv), interrupted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
