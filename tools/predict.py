"""Classify images: print the most likely classes of each and their probabilities.

``python -m tools.predict IMAGE ... --checkpoint CKPT`` also writes them as pictures or a CSV file.
Images are preprocessed as in the evaluation of ``main.py``.
"""

import argparse
import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image

import datasets
from models import DataConfig
from pipeline.images import CorruptImageError, DataError, load_image
from pipeline.sources.base import Files
from pipeline.sources.class_names import read_class_names
from pipeline.sources.listing import Listing, find_images, image_suffixes
from pipeline.sources.summary import orientation_lines
from tools import cli, files
from tools.cli import shortened, shown
from tools.plots import new_figure, plain_text, save
from tools.tables import aligned, csv_output
from tools.validate.classes import (
    NUM_IMAGENET,
    find_class,
    imagenet_wnids,
    labels,
    readable,
)
from tools.validate.eval_models import EvalModel, check_sources, eval_models
from training import launch
from training.files import OutputError, names_of_pictures
from training.parser import Parser, add_input_size, positive
from utils import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLAGS = ("batch_size", "qk_scale_factor", "amp", "amp_dtype", "channels_last", "eval_crop_ratio")
FLAGS += ("tf32", "exif", "in_chans")
HEADS = ("image", "rank", "class", "name", "probability")  # of the CSV file
ENDING = "-prediction.png"  # of the pictures in a folder
DOCUMENTS = (".gif", ".svg", ".pdf", ".ps", ".eps", ".csv", ".txt", ".html")
MARK = "  (--class)"
SHOWN_PIXELS = 640  # longest side of an image in a picture
BARS = 30  # in a picture, at most
NAME_WIDTH = 28
TITLE_WIDTH = 40


class Prediction(NamedTuple):
    """The most likely classes of an image, in descending order."""

    path: Path
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]  # within 0..1
    asked: float | None = None  # probability of --class, if given


def names_of(subject: EvalModel, file: Path | None) -> list[str]:
    """Return the class names: of a file, the checkpoint, ImageNet, or their numbers."""
    if file is not None:
        names = read_class_names(file)
        if len(names) != subject.num_outputs:
            raise DataError(
                f"--classes {file} has {len(names)} lines; {subject.source.label} has "
                f"{subject.num_outputs} classes"
            )
        return names
    if subject.source.classes is not None:
        return list(subject.source.classes)
    if subject.num_outputs == NUM_IMAGENET:
        return list(imagenet_wnids())
    return [f"class {index}" for index in range(subject.num_outputs)]


def read_batches(
    paths: Sequence[Path], args: Namespace, images: DataConfig, failed: list[str]
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Yield batches of files and of model inputs, ``B C H W``.

    ``failed`` receives the errors of images that cannot be decoded.
    """
    transform = datasets.build_transform(False, args, images)
    for start in range(0, len(paths), args.batch_size):
        good, inputs = [], []
        for path in paths[start : start + args.batch_size]:
            try:
                inputs.append(transform(load_image(path, images.exif, images.is_grey)))
                good.append(path)
            except CorruptImageError as error:
                failed.append(str(error))
        if good:
            yield good, torch.stack(inputs)


@torch.inference_mode()
def predict(
    subject: EvalModel, paths: Sequence[Path], topk: int, asked: int | None, failed: list[str]
) -> Iterator[Prediction]:
    """Yield the predictions of all images that can be decoded.

    Each has at most ``topk`` classes, and the probability of the class ``asked``. ``failed``
    receives the errors of the other images, and of non-finite outputs.
    """
    subject.model.eval()
    for good, batch in read_batches(paths, subject.args, subject.images, failed):
        with subject.precision.autocast():
            logits = subject.model(subject.precision.move(batch))
        probabilities = logits.float().softmax(1).cpu()
        best = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
        others = [None] * len(good) if asked is None else probabilities[:, asked].tolist()
        parts = (logits.isfinite().all(1).tolist(), best.indices.tolist(), best.values.tolist())
        for path, finite, classes, values, other in zip(good, *parts, others, strict=True):
            if finite:
                yield Prediction(path, tuple(classes), tuple(values), other)
            else:
                failed.append(f"the outputs for {path} are not finite: {subject.label}")


def csv_rows(found: Prediction, names: Sequence[str], asked: int | None) -> list[tuple]:
    """Return the CSV rows of an image; the row of ``--class`` has no rank."""
    pairs = [*enumerate(zip(found.classes, found.probabilities, strict=True), start=1)]
    if asked is not None:
        pairs.append(("", (asked, found.asked)))
    return [
        (found.path, rank, index, readable(names[index]), value) for rank, (index, value) in pairs
    ]


def text_of(found: Prediction, names: Sequence[str], asked: int | None) -> str:
    """Return the text printed for an image."""
    rows = [
        [f"  {100 * value:6.2f}%", str(index), name]
        for _, _, index, name, value in csv_rows(found, names, asked)
    ]
    table = aligned(["", "", ""], rows)
    lines = table.split("\n")[1:]
    if asked is not None:
        lines[-1] += MARK
    return "\n".join([f"{shown(found.path)}:", *lines])


def figure_of(
    found: Prediction, labels: Sequence[str], asked: int | None, image: Image.Image
) -> "Figure":
    """Draw the image next to bars of the most likely classes and of ``--class``."""
    bars = dict(zip(found.classes[:BARS], found.probabilities, strict=False))
    if asked is not None:
        bars.setdefault(asked, found.asked)
    figure = new_figure(9, max(3.0, 0.45 * len(bars) + 1))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    image = image.copy()
    image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    left.imshow(image)
    left.set_axis_off()
    left.set_title(plain_text(shortened(shown(found.path.name), TITLE_WIDTH)))
    colours = ["tab:orange" if index == asked else "tab:blue" for index in bars]
    drawn = right.barh(range(len(bars)), [100 * value for value in bars.values()], color=colours)
    right.bar_label(drawn, fmt="%.1f%%", padding=3)
    texts = [labels[index] + MARK * (index == asked) for index in bars]
    right.set_yticks(range(len(bars)), [plain_text(text) for text in texts])
    right.invert_yaxis()
    right.set(xlabel="probability (%)", xticks=range(0, 101, 25))
    right.set_xlim(0, 118)  # room for the number at a full bar
    right.spines[["top", "right"]].set_visible(False)
    return figure


def picture_paths(output: Path, images: Sequence[Path]) -> list[Path]:
    """Return the path of each image's picture: ``output`` itself, or a file in it."""
    suffix = output.suffix.lower()
    if suffix in (*image_suffixes(), *DOCUMENTS) and not os.path.isdir(output):
        if suffix != ".png":
            raise UserError(f"--output {output} must end in .png, or be a folder")
        if len(images) > 1:
            raise OutputError(
                f"--output {output} is one file for {len(images)} images: give a folder"
            )
        return [output]
    return [output / name for name in names_of_pictures(images, ENDING)]


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    description = __doc__.splitlines()[0]
    parser = Parser("python -m tools.predict", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add("--checkpoint", metavar="CKPT", help=f"weights: {cli.SOURCES}")
    name = "model name, for a file that does not contain it or for --pretrained"
    add("--model", metavar="NAME", help=name)
    published = "use the published weights of --model instead of --checkpoint"
    add("--pretrained", action="store_true", help=published)
    add("--weights", choices=["model", "ema"], default="model", help=cli.WEIGHTS)
    add_input_size(parser)
    add("--topk", type=positive, default=5, metavar="K", help="number of classes to print")
    names = "class names, one per line; default: those of the checkpoint, or ImageNet's"
    add("--classes", type=Path, metavar="FILE", help=names)
    asked = "also print the probability of this class"
    add("--class", dest="asked", metavar="NAME_OR_INDEX", help=asked)
    pictures = "write pictures with the predictions: FILE.png for one image, or a folder"
    add("--output", type=Path, metavar="PLACE", help=pictures)
    add("--csv", type=Path, metavar="FILE.csv", help="write the predictions as a table")
    cli.add_flags(parser, (*FLAGS, "device"))
    return parser


def run(
    args: Namespace,
    sources: list[str],
    pictures: Mapping[Path, Path | None],
    listing: Listing,
) -> int:
    """Predict images, print and write the results; return the exit status.

    Args:
        args: The flags.
        sources: The checkpoint, or none.
        pictures: Images, and the paths of their pictures, if any.
        listing: Images, and what the folders have besides.
    """
    sizes = [args.input_size] if args.input_size else None
    flags = vars(args) | {"input_size": sizes, "fuse": False}
    subject = next(eval_models(sources, Namespace(**flags), launch.select_device(args.device)))
    names = names_of(subject, args.classes)
    asked = None if args.asked is None else find_class(args.asked, names)
    short = labels(names, range(len(names)), NAME_WIDTH)
    failed: list[str] = []
    rows: list[tuple] = []
    head = [shown(listing)] if any(map(os.path.isdir, args.images)) else []
    files_given = Files(list(pictures), [0] * len(pictures), [""]).decoded_as(subject.images.exif)
    head += orientation_lines(files_given)
    try:
        for found in predict(subject, list(pictures), args.topk, asked, failed):
            rows += csv_rows(found, names, asked)
            print("\n".join([*head, text_of(found, names, asked)]), flush=True)
            head = []
            if place := pictures[found.path]:
                try:
                    image = load_image(found.path, subject.images.exif)
                    save(figure_of(found, short, asked, image), place)
                    print(shown(f"written to {place}"))
                except (CorruptImageError, OutputError) as error:
                    failed.append(str(error))
    finally:
        status = cli.finish(csv_output(args.csv, HEADS, rows), failed)
    return status


@cli.program
def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; return the exit status."""
    args = cli.parse(get_parser, argv)
    sources = [args.checkpoint] if args.checkpoint else []
    check_sources(sources, args)
    files.check_suffix("--csv", args.csv, ".csv")
    listing = find_images(args.images, ENDING)
    paths = [Path(path) for path in listing.paths]
    places = picture_paths(args.output, paths) if args.output else []
    outputs = [("--csv", args.csv)] if args.csv else []
    outputs += [("--output", place) for place in places]
    files.check_outputs(outputs, [*paths, *sources, *filter(None, [args.classes])])
    for flag, path in outputs:
        if path in (args.csv, args.output):  # other pictures are in a folder that may be missing
            files.check_writable(flag, path)
    folder = contextlib.nullcontext()
    if args.output and args.output not in places:
        folder = files.folder_for("--output", args.output)
    with folder:
        return run(args, sources, dict(zip_longest(paths, places)), listing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
