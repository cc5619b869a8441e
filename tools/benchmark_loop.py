"""Compare the training speed of main.py with that of a plain loop of timm's parts.

``python -m tools.benchmark_loop --data-path FOLDER`` trains a model on the images of
``FOLDER/train`` by DeiT's recipe, in turn with ``main.py`` and with the loop below: timm's dataset,
transforms, loader, model, mixup, loss, AdamW and moving average. Each training is a process; its
first epoch warms up, and its second counts.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from tools import cli
from tools.benchmark.candidates import timm_entrypoint
from tools.benchmark.measure import in_fresh_process, in_turn, machine, medians, ratio
from tools.flops import size_options
from tools.tables import markdown
from training.output import LOG
from training.parser import Parser, positive
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 2


def plain_loop(args: Namespace) -> float:
    """Return the images per second of the last epoch of a loop of timm's parts."""
    dataset = create_dataset("", args.data_path, split="train", is_training=True)
    subset = torch.utils.data.Subset(dataset, chosen(len(dataset), args.images))
    loader = create_loader(
        subset,
        (3, args.input_size, args.input_size),
        args.batch_size,
        is_training=True,
        use_prefetcher=False,
        re_prob=0.25,
        auto_augment="rand-m9-inc1",  # DeiT's mstd0.5 asks for 0 bits, which Pillow 13 refuses
        color_jitter=0.4,
        interpolation="bicubic",
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
    )
    dataset.transform = subset.transform  # which create_loader has set
    classes = len(dataset.reader.class_to_idx)
    options = size_options(args.model, args.input_size)
    model = timm_entrypoint(args.model)(num_classes=classes, **options).train()
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=classes)
    criterion = SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(model, "adamw", lr=5e-4, weight_decay=0.05)
    average = ModelEmaV3(model, decay=0.99996)
    for _ in range(EPOCHS):
        started = time.perf_counter()
        for images, targets in loader:
            images, targets = mixup(images, targets)
            loss = criterion(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
        taken = time.perf_counter() - started
    return len(loader) * args.batch_size / taken


def chosen(found: int, wanted: int) -> range:
    """Return the positions of ``wanted`` images, spread evenly."""
    if found < wanted:
        raise UserError(f"--images {wanted}: there are {found} in the training set")
    return range(0, wanted * (found // wanted), found // wanted)


def by_main(args: Namespace, found: int) -> float:
    """Return the images per second of the last epoch of ``main.py``, as its log has them."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--data-path", args.data_path, "--output_dir", folder, "--model", args.model]
        words += ["--input-size", args.input_size, "--batch-size", args.batch_size]
        words += ["--num_workers", args.num_workers, "--sampling-ratio", args.images / found]
        words += ["--no-repeated-aug", "--epochs", EPOCHS, "--val-interval", EPOCHS]
        command = [sys.executable, str(ROOT / "main.py"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"main.py failed: {done.stderr.strip().splitlines()[-1]}")
        lines = Path(folder, LOG).read_text().splitlines()
        return json.loads(lines[-1])["train_images_per_second"]


def get_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser("python -m tools.benchmark_loop", description=__doc__.splitlines()[0])
    add = parser.add_argument
    folder = "image folder with train/CLASS/* and val/CLASS/*"
    add("--data-path", required=True, metavar="FOLDER", help=folder)
    model = "model of this repository that timm has as well"
    add("--model", default="visformer_tiny", metavar="NAME", help=model)
    images = "training images per epoch"
    add("--images", type=positive, default=2000, metavar="N", help=images)
    side = "side of the images"
    add("--input-size", type=positive, default=64, metavar="PIXELS", help=side)
    add("--batch-size", type=positive, default=50, metavar="N", help="images per step")
    add("--num_workers", type=int, default=1, metavar="N", help="loader workers")
    rounds = "trainings by each loop, in turn; the median counts"
    add("--rounds", type=positive, default=5, metavar="N", help=rounds)
    return parser


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``; print a table."""
    args = get_parser().parse_args(argv)
    found = len(create_dataset("", args.data_path, split="train"))
    chosen(found, args.images)
    sides = {
        "plain loop": partial(in_fresh_process, "plain loop", plain_loop, args),
        "main.py": partial(by_main, args, found),
    }
    rates = in_turn(sides, args.rounds)
    print(f"{args.model} at {args.input_size} pixels; {machine('cpu')}\n")
    gain = ratio(rates["plain loop"], rates["main.py"])
    cells = [f"{rate:.1f}" for rate in medians(rates).values()]
    print(markdown([*rates, "main.py over plain loop"], [[*cells, f"{gain:.2f}"]]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
