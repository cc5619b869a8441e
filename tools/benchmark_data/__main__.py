"""Measure the speed of the input pipeline next to DeiT's, by stage and in total.

``python -m tools.benchmark_data --data-path FOLDER_OF_CLASSES`` reads real images, as they are and
packed into shards with a short side of ``--short-side`` pixels, with DeiT's pipeline (timm's
transforms on PIL images), with ours, and with the part of ours that is left with ``--augment-on
device``. Measurements alternate; medians count.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

import engine
from datasets import SMALL_SIZE
from models import height_and_width, size_text
from pipeline.images import DataError
from pipeline.sources.base import Encoded, Files
from pipeline.sources.folder import open_folder_of_classes
from pipeline.sources.shards import open_shards
from tools import cli, files, pack_dataset, plots
from tools.benchmark.measure import add_flags, in_turn, machine, medians
from tools.benchmark_data.pipelines import Training, in_memory, pipelines
from tools.tables import markdown, write_csv
from training.launch import select_device
from training.network import with_amp_dtype
from training.parser import PIXELS, Parser, add_input_size


def open_folder(path: Path, count: int) -> Files:
    """Return at most ``count`` images of a folder of classes, spread evenly."""
    found = open_folder_of_classes(path, is_train=True)
    chosen = range(0, len(found), max(1, len(found) // count))[:count]
    return Files([found.name(i) for i in chosen], found.targets[list(chosen)], found.classes)


@contextlib.contextmanager
def packed(source: Files, short_side: int, quality: int) -> Iterator[Encoded]:
    """Pack images into shards in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        images, shards = Path(folder, "images"), Path(folder, "shards")
        for index, target in enumerate(source.targets.tolist()):
            path = Path(source.name(index)).resolve()
            link = images / "train" / source.classes[target] / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        words = ["--data-path", images, "--output", shards, "--splits", "train"]
        words += ["--short-side", short_side, "--quality", quality]
        if pack_dataset.main([str(word) for word in words]):
            raise DataError(f"cannot pack {source.name(0)} and other images")
        yield open_shards(str(shards), True)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this process to one core, if the system supports it."""
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


def stage_rows(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict]:
    """Return rows of milliseconds per image by stage, of the complete pipelines."""
    rows = []
    for label, measured in found.items():
        if not label.startswith("host"):
            stages = medians({key: [1000 * one[key] for one in measured] for key in measured[0]})
            rows.append({"side": label} | stages)
    return rows


def rate_rows(found: Mapping[str, Sequence[float]], where: str) -> list[dict]:
    """Return rows of images per second, with ratios to the reference on raw and same images."""
    times = medians(found)
    return [
        {
            "side": label,
            "where": where,
            "images/s": 1 / seconds,
            "of reference raw": times["reference raw"] / seconds,
            "of reference, same images": times[f"reference {label.split()[1]}"] / seconds,
        }
        for label, seconds in times.items()
    ]


def show(title: str, rows: Sequence[dict]) -> None:
    """Print a title and a Markdown table with the columns of the first row."""

    def cell(value: str | float) -> str:
        return value if isinstance(value, str) else f"{value:.{3 if value < 10 else 0}f}"

    cells = [[cell(row[key]) for key in rows[0]] for row in rows]
    print("", title, "", markdown(list(rows[0]), cells), sep="\n", flush=True)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Save stacked bars of the stages."""
    figure = plots.new_figure(9, 1.2 + 0.5 * len(rows))
    axes = figure.add_subplot()
    sides, left = [row["side"] for row in rows], torch.zeros(len(rows))
    for stage in [key for key in rows[0] if key not in ("side", "total")]:
        widths = torch.tensor([row[stage] for row in rows])
        axes.barh(sides, widths, left=left, label=stage)
        left = left + widths
    axes.set_xlabel("milliseconds per image on one core")
    figure.legend(loc="outside right upper")
    axes.invert_yaxis()
    plots.save(figure, path, dpi=150)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser("python -m tools.benchmark_data", description=__doc__.splitlines()[0])
    add = parser.add_argument
    folder = "folder with a folder of images for each class"
    add("--data-path", type=Path, required=True, metavar="FOLDER", help=folder)
    most = "maximum number of images to use"
    add("--images", type=int, default=512, metavar="N", help=most)
    add_input_size(parser, default=224, help=PIXELS)
    short = "short side of packed images"
    add("--short-side", type=int, default=256, metavar="PIXELS", help=short)
    quality = "JPEG quality of packed images, from 1 to 100"
    add("--quality", type=int, default=90, metavar="Q", help=quality)
    add_flags(parser, batch_size=64, device="with --model: device to train on")
    workers = "loader workers; 0: do not measure with workers"
    add("--num_workers", type=int, default=os.cpu_count(), metavar="N", help=workers)
    model = "train this model instead, on the images and on one batch in memory"
    add("--model", metavar="NAME", help=model)
    steps = "with --model: training steps of a measurement"
    add("--steps", type=int, default=20, metavar="N", help=steps)
    amp = "with --model: train in automatic mixed precision"
    add("--amp", action="store_true", help=amp)
    add("--csv", type=Path, metavar="FILE.csv", help="write the times of the stages")
    add("--plot", type=Path, metavar="FILE.png", help="draw the times of the stages")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure the pipelines, print and write."""
    if max(height_and_width(args.input_size)) <= SMALL_SIZE:
        raise DataError(f"--input-size {size_text(args.input_size)} must be above {SMALL_SIZE}")
    raw = open_folder(args.data_path, args.images)
    print(f"{len(raw)} images of {args.data_path}; {machine('cpu')}", flush=True)
    with packed(raw, args.short_side, args.quality) as shards:
        candidates = pipelines({"raw": raw, "packed": shards}, args)
        with one_core():
            measures = {label: one.measure for label, one in candidates.items()}
            found = in_turn(measures, args.rounds, warm_up=1)
        stages = stage_rows(found)
        show("milliseconds per image, one core; the total is without mixup", stages)
        totals = {label: [one["total"] for one in measured] for label, measured in found.items()}
        rates = rate_rows(totals, "one core")
        share = {row["side"]: row["of reference raw"] for row in rates}
        memory = []
        if args.num_workers:
            measures = {label: one.seconds for label, one in candidates.items()}
            seconds = in_turn(measures, args.rounds, warm_up=1)
            rates += rate_rows(seconds, f"{args.num_workers} workers")
            memory = [{"side": k, "MiB per worker": v.memory()} for k, v in candidates.items()]
        show("images per second", rates)
        if memory:
            show("largest memory of a worker (PSS)", memory)
    if args.csv:
        write_csv(args.csv, list(stages[0]), stages)
    if args.plot:
        plot(stages, args.plot)
    print(
        f"\nfast/reference images/s per core: raw {share['fast raw']:.2f} packed "
        f"{share['fast packed']:.2f} host-raw {share['host raw']:.2f} host-packed "
        f"{share['host packed']:.2f}"
    )


def feed(args: argparse.Namespace) -> None:
    """Train from files, from memory, and on one batch in memory; print the rates."""
    device = select_device(args.device)
    args = with_amp_dtype(args, device)
    engine.select_kernels(device, args.tf32)
    source = open_folder(args.data_path, args.images)
    print(f"{len(source)} images of {args.data_path}; {machine(device.type)}", flush=True)
    kinds = {"files": source}
    if max(height_and_width(args.input_size)) <= SMALL_SIZE:
        kinds["memory"] = in_memory(source, args.input_size)
    rows = []
    for name, images in kinds.items():
        training = Training(args, images, device)
        measures = {"fed": training.fed, "at hand": training.at_hand}
        rates = medians(in_turn(measures, args.rounds, warm_up=1))
        rows.append({"from": name} | rates | {"fed / at hand": rates["fed"] / rates["at hand"]})
    show(f"{args.model}, images per second of training", rows)


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``."""
    args = cli.parse(get_parser, argv)
    files.check_files({"--csv": args.csv, "--plot": args.plot})
    args.data_set = "IMNET"
    (feed if args.model else run)(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
