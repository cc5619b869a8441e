"""Images per second of the input pipeline beside DeiT's, by stage and together.

``python -m tools.benchmark_data --data-path FOLDER_OF_CLASSES`` reads real images, as they are and
packed into shards with a short side of ``--short-side`` pixels, through DeiT's pipeline (timm's
transforms on PIL images), through ours, and through ours with all that follows the crop left to
the device. Everything alternates in one run; medians count.
"""

import argparse
import contextlib
import csv
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder

from datasets import SMALL_SIZE
from models import ModelError
from pipeline.images import DataError
from pipeline.sources.base import Encoded, Files
from pipeline.sources.shards import open_shards
from samplers import SampleIndex
from tools import pack_dataset
from tools.benchmark.measure import machine
from tools.benchmark_data.feeding import Training, in_memory
from tools.benchmark_data.sides import Side, fast_stages, reference_stages, seconds_of, sides
from tools.benchmark_data.workers import Workers
from training.flags import parse_args
from utils import UserError

NAMES = ("raw", "packed")


def open_folder(path: Path, count: int) -> Files:
    """At most ``count`` images of a folder of classes, spread evenly.

    Raises:
        DataError: There is no such folder, or it has no images.
    """
    try:
        found = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise DataError(f"--data-path {path}: {error}") from error
    step = max(1, len(found.samples) // count)
    paths, targets = zip(*found.samples[::step][:count], strict=True)
    return Files(paths, targets, found.classes)


@contextlib.contextmanager
def packed(source: Files, short_side: int, quality: int) -> Iterator[Encoded]:
    """The images in shards of a temporary folder.

    Raises:
        DataError: They could not be packed.
    """
    with tempfile.TemporaryDirectory() as folder:
        images, shards = Path(folder, "images"), Path(folder, "shards")
        for index, target in enumerate(source.targets.tolist()):
            path = Path(source.name(index)).resolve()
            link = images / "train" / source.classes[target] / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        words = ["--data-path", str(images), "--output", str(shards), "--splits", "train"]
        words += ["--short-side", str(short_side), "--quality", str(quality)]
        if pack_dataset.main(words):
            raise DataError(f"the images of {source.name(0)} and others could not be packed")
        yield open_shards(str(shards), True)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this process to one core, where the system can."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def alternate(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What every measure gives, in turn, in another order in every round; the first is dropped."""
    found: dict[str, list[float]] = {label: [] for label in measures}
    labels = list(measures)
    for index in range(rounds + 1):
        for label in labels[index % len(labels) :] + labels[: index % len(labels)]:
            seconds = measures[label]()
            if index:
                found[label].append(seconds)
    return found


class Together:
    """Times a whole pipeline in this process, batch by batch.

    Args:
        side: The pipeline.
        batch_size: Images per batch.
    """

    def __init__(self, side: Side, batch_size: int):
        self.side, self.batch_size, self.epoch = side, batch_size, 0

    def __call__(self) -> float:
        """Seconds per image."""
        self.epoch += 1
        draws = [SampleIndex(index, self.epoch) for index in range(len(self.side.dataset))]
        started = time.perf_counter()
        for start in range(0, len(draws), self.batch_size):
            batch = self.side.dataset.__getitems__(draws[start : start + self.batch_size])
            self.side.finish(batch)
        return (time.perf_counter() - started) / len(draws)


def stage_table(
    sources: dict[str, Encoded], args: argparse.Namespace, flags: argparse.Namespace
) -> list[dict]:
    """Rows of milliseconds per image, by stage."""
    rows = []
    for name, source in sources.items():
        made = {"reference": reference_stages(source, flags), "fast": fast_stages(source, flags)}
        indices = range(len(source))
        found: dict[str, list[dict[str, float]]] = {side: [] for side in made}
        for index in range(args.rounds + 1):
            for side in list(made)[:: 1 if index % 2 else -1]:
                seconds = seconds_of(made[side], indices)
                if index:
                    found[side].append(seconds)
        for side, times in found.items():
            row = {"side": f"{side} {name}"}
            for stage in times[0]:
                row[stage] = 1000 * statistics.median(time[stage] for time in times)
            rows.append(row | {"sum": sum(value for key, value in row.items() if key != "side")})
    return rows


def rate_rows(found: dict[str, list[float]], batches: str) -> list[dict]:
    """Rows of images per second, with the ratio to the reference on raw and on the same images."""
    medians = {label: statistics.median(times) for label, times in found.items()}
    rows = []
    for label, seconds in medians.items():
        same = medians[f"reference {label.split()[1]}"]
        row = {"side": label, "where": batches, "images/s": 1 / seconds}
        row |= {"of reference raw": medians["reference raw"] / seconds}
        rows.append(row | {"of reference, same images": same / seconds})
    return rows


def markdown(rows: Sequence[dict]) -> str:
    """A table; the columns are those of the first row."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [cell(row[key]) for key in rows[0]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(value: str | float) -> str:
    """A value as a table shows it."""
    return value if isinstance(value, str) else f"{value:.{3 if value < 10 else 0}f}"


def plot(rows: Sequence[dict], path: str) -> None:
    """Stacked bars of the stages.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    for stage in [key for key in rows[0] if key not in ("side", "sum")]:
        widths = [row[stage] for row in rows]
        axes.barh([row["side"] for row in rows], widths, left=left, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel("milliseconds per image on one core")
    figure.legend(loc="outside right upper")
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def write(rows: Sequence[dict], path: str) -> None:
    """A CSV file."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser("tools.benchmark_data", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="folder with a folder of images per class")
    add("--images", type=int, default=512, help="at most so many of them")
    add("--input-size", type=int, default=224)
    add("--short-side", type=int, default=256, help="of packed images, in pixels")
    add("--quality", type=int, default=90, help="of packed images")
    add("--batch-size", type=int, default=64)
    add("--num_workers", type=int, default=os.cpu_count(), help="0 leaves this part out")
    add("--rounds", type=int, default=7, help="measurements of each; the median counts")
    add("--model", help="instead, train this model on the images, and on a batch at hand")
    add("--steps", type=int, default=20, help="of a measurement with --model")
    add("--device", choices=["cpu", "cuda"], help="for --model; cuda if present")
    add("--amp", action="store_true", help="for --model: float16 on cuda")
    add("--csv", metavar="FILE", help="of the stages")
    add("--plot", metavar="FILE.png", help="of the stages")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print and write.

    Raises:
        DataError: Images, or a package, are missing.
    """
    flags, _ = parse_args(["--data-path", str(args.data_path), "--data-set", "IMNET"])
    flags.input_size, flags.batch_size = args.input_size, args.batch_size
    if args.input_size <= SMALL_SIZE:
        raise DataError(f"--input-size {args.input_size} must be above {SMALL_SIZE}")
    raw = open_folder(args.data_path, args.images)
    print(f"{len(raw)} images of {args.data_path}; {machine('cpu')}", flush=True)
    with packed(raw, args.short_side, args.quality) as shards:
        sources = {"raw": raw, "packed": shards}
        with one_core():
            stages = stage_table(sources, args, flags)
            print(
                "", "milliseconds per image, one core", "", markdown(stages), sep="\n", flush=True
            )
            pipelines = sides(sources, flags)
            measures = {side.label: Together(side, args.batch_size) for side in pipelines}
            found = alternate(measures, args.rounds)
        rates = rate_rows(found, "one core")
        if args.num_workers:
            loaders = {
                side.label: Workers(side, args.num_workers, args.batch_size, repeats=4)
                for side in pipelines
            }
            seconds = alternate({k: v.seconds for k, v in loaders.items()}, args.rounds)
            rates += rate_rows(seconds, f"{args.num_workers} workers")
            memory = [{"side": k, "MiB per worker": v.memory()} for k, v in loaders.items()]
        print("", "images per second", "", markdown(rates), sep="\n")
        if args.num_workers:
            print("", "most memory of a worker (PSS)", "", markdown(memory), sep="\n")
    if args.csv:
        write(stages, args.csv)
    if args.plot:
        plot(stages, args.plot)
    ratio = {row["side"]: row["of reference raw"] for row in rates if row["where"] == "one core"}
    print(
        f"\nfast/reference images/s per core: raw {ratio['fast raw']:.2f} packed "
        f"{ratio['fast packed']:.2f} host-raw {ratio['host raw']:.2f} host-packed "
        f"{ratio['host packed']:.2f}"
    )


def feed(args: argparse.Namespace) -> None:
    """Train on the images, from files and from memory, and on a batch at hand; print the rates.

    Raises:
        DataError: Images are missing.
    """
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    words = ["--data-path", str(args.data_path), "--data-set", "IMNET", "--model", args.model]
    flags, _ = parse_args(words + (["--amp"] if args.amp else []))
    flags.input_size, flags.batch_size = args.input_size, args.batch_size
    flags.num_workers = args.num_workers
    source = open_folder(args.data_path, args.images)
    print(f"{len(source)} images of {args.data_path}; {machine(device.type)}", flush=True)
    kinds = {"files": (source, False)}
    if args.input_size <= SMALL_SIZE:
        kinds["memory"] = (in_memory(source, args.input_size), device.type == "cuda")
    rows = []
    for name, (images, resident) in kinds.items():
        training = Training(flags, images, resident, device)
        measures = {
            label: functools.partial(training.rate, label == "fed", args.steps)
            for label in ("fed", "at hand")
        }
        times = alternate(measures, args.rounds)
        medians = {label: statistics.median(seconds) for label, seconds in times.items()}
        row = {"from": name} | {label: 1 / seconds for label, seconds in medians.items()}
        rows.append(row | {"fed / at hand": medians["at hand"] / medians["fed"]})
    print(f"\n{args.model}, images per second of training\n", markdown(rows), sep="\n")


def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    args = get_parser().parse_args(argv)
    try:
        feed(args) if args.model else run(args)
    except (DataError, ModelError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
