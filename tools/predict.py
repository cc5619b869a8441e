"""What a network sees in images: ``python -m tools.predict IMAGE ... --checkpoint CKPT``.

The likeliest classes of every image and their probabilities, printed, and on request as pictures
and as a CSV file. Images are prepared as for the evaluation of ``main.py``.
"""

import argparse
import difflib
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

import datasets
import models
import utils
from configs import ConfigError, LaunchError, Place
from configs.flags import Parser
from pipeline.images import CorruptImageError, DataError, load_image
from tools.validate import flags, pictures
from tools.validate.cases import Case, cases, check_sources
from tools.validate.classes import NUM_IMAGENET, imagenet_wnids, readable
from tools.validate.tables import aligned, write_csv
from training import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPECTED_ERRORS = (
    ConfigError,
    LaunchError,
    OutputError,
    DataError,
    models.CheckpointError,
    models.ModelError,
)
FLAGS = ("batch_size", "qk_scale_factor", "amp", "amp_dtype", "channels_last", "eval_crop_ratio")
SHOWN_PIXELS = 640  # longest side of an image in a picture
NAME_WIDTH = 28


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, in descending order.

    Attributes:
        path: Of the image.
        classes: Indices.
        probabilities: Of these classes, within 0..1.
        asked: Probability of the class that was asked for, if one was.
    """

    path: Path
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]
    asked: float | None = None


def find_images(places: Sequence[str]) -> list[Path]:
    """The files named, and those of folders by their names in order.

    Raises:
        DataError: A folder has no images.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.is_dir():
            found.append(place)
            continue
        inside = sorted(p for p in place.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
        if not inside:
            raise DataError(f"folder {place} has no images ({', '.join(IMG_EXTENSIONS)})")
        found += inside
    return found


def class_names(case: Case, file: Path | None) -> list[str]:
    """Names of the network's classes: of a file, the checkpoint, ImageNet, or their numbers.

    Raises:
        DataError: The file cannot be read, or has another number of names.
    """
    if file is not None:
        try:
            names = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read --classes {file}: {error}") from error
        if len(names) != case.num_outputs:
            raise DataError(
                f"--classes {file} has {len(names)} lines, {case.network.source} knows "
                f"{case.num_outputs} classes"
            )
        return names
    if case.network.classes is not None:
        return list(case.network.classes)
    if case.num_outputs == NUM_IMAGENET:
        return list(imagenet_wnids())
    return [f"class {index}" for index in range(case.num_outputs)]


def find_class(asked: str, names: Sequence[str]) -> int:
    """The class of a name, a wnid, one of the names of a wnid, or an index.

    Raises:
        DataError: There is none; names the range or the nearest names.
    """
    if asked in names:
        return names.index(asked)
    if asked.isascii() and asked.isdigit():
        if int(asked) >= len(names):
            raise DataError(f"--class {asked} is beyond the classes, 0 to {len(names) - 1}")
        return int(asked)
    places: dict[str, int] = {}
    for index, name in enumerate(names):
        for one in (name, readable(name), *readable(name).split(", ")):
            places.setdefault(one.lower(), index)
    if asked.lower() in places:
        return places[asked.lower()]
    near = difflib.get_close_matches(asked.lower(), places, n=3, cutoff=0.5) or list(places)[:3]
    raise DataError(
        f"there is no --class {asked!r}; such as {', '.join(near)}, or 0 to {len(names) - 1}"
    )


def read_batches(
    paths: Sequence[Path], args: Namespace, failed: list[str]
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Batches of files and of what the network is given, ``B 3 H W``.

    Args:
        paths: Of the images.
        args: The flags.
        failed: Receives what is said of images that cannot be decoded.
    """
    transform = datasets.build_transform(False, args)
    for start in range(0, len(paths), args.batch_size):
        good, inputs = [], []
        for path in paths[start : start + args.batch_size]:
            try:
                inputs.append(transform(load_image(path)))
                good.append(path)
            except CorruptImageError as error:
                failed.append(str(error))
        if good:
            yield good, torch.stack(inputs)


@torch.inference_mode()
def predict(
    case: Case, paths: Sequence[Path], topk: int, asked: int | None, failed: list[str]
) -> Iterator[Prediction]:
    """Predictions of all images that can be decoded.

    Args:
        case: The network.
        paths: Of the images.
        topk: Classes of each, at most.
        asked: A class whose probability is wanted, too.
        failed: Receives what is said of the other images.
    """
    case.model.eval()
    for good, images in read_batches(paths, case.args, failed):
        with case.precision.autocast():
            logits = case.model(case.precision.move(images))
        probabilities = logits.float().softmax(1).cpu()
        best = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
        for row, path in enumerate(good):
            classes, values = best.indices[row].tolist(), best.values[row].tolist()
            other = None if asked is None else probabilities[row, asked].item()
            yield Prediction(path, tuple(classes), tuple(values), other)


def text_of(found: Prediction, names: Sequence[str], asked: int | None) -> str:
    """What is printed of an image."""
    pairs = [*zip(found.classes, found.probabilities, strict=True)]
    if asked is not None:
        pairs.append((asked, found.asked))
    rows = [[f"{100 * value:.2f}%", str(index), readable(names[index])] for index, value in pairs]
    lines = aligned(["", "", ""], [[" " * 2 + row[0].rjust(7), *row[1:]] for row in rows])
    shown = lines.splitlines()[1:]
    if asked is not None:
        shown[-1] += "  (--class)"
    return "\n".join([f"{found.path}:", *shown])


def figure_of(found: Prediction, names: Sequence[str], image: Image.Image) -> "Figure":
    """The image beside bars of the likeliest classes."""
    height = max(3.0, 0.45 * len(found.classes) + 1)
    figure = pictures.new_figure(9, height, "--output")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    image = image.copy()
    image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    left.imshow(image)
    left.set_axis_off()
    left.set_title(pictures.plain_text(textwrap.shorten(found.path.name, 40, placeholder="…")))
    values = [100 * value for value in found.probabilities]
    places = range(len(values))
    bars = right.barh(places, values)
    right.bar_label(bars, fmt="%.1f%%", padding=3)
    labels = [pictures.short(names[index], NAME_WIDTH) for index in found.classes]
    right.set_yticks(places, labels)
    right.invert_yaxis()
    right.set_xlim(0, 118)  # room for the number at a full bar
    right.set_xticks(range(0, 101, 25))
    right.set_xlabel("probability (%)")
    right.spines[["top", "right"]].set_visible(False)
    return figure


def picture_paths(output: Path, images: Sequence[Path]) -> list[Path]:
    """Where the picture of each image goes: ``output`` itself, or a file of its own within.

    Raises:
        OutputError: One file is named for several images, or an image would be overwritten.
    """
    if output.suffix.lower() == ".png":
        if len(images) > 1:
            raise OutputError(f"--output {output} is one file for {len(images)} images: a folder")
        found = [output]
    else:
        found, seen = [], set()
        for image in images:
            stem, number = image.stem, 2
            while stem in seen:
                stem, number = f"{image.stem}-{number}", number + 1
            seen.add(stem)
            found.append(output / f"{stem}-prediction.png")
    clash = {path.resolve() for path in found} & {path.resolve() for path in images}
    if clash:
        raise OutputError(f"--output would overwrite the image {clash.pop()}")
    if output in found:
        flags.check_folder("--output", output)
    return found


def make_folder(folder: Path) -> None:
    """Make a folder for pictures, unless it is there.

    Raises:
        OutputError: That is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {folder}: {error.strerror}") from error


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser("tools.predict", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="files, or folders of them")
    add("--checkpoint", metavar="CKPT", help="file or address")
    add("--model", metavar="NAME", help="for a file that does not name its model")
    add("--pretrained", action="store_true", help="timm's weights of --model instead of a file")
    add("--weights", choices=["model", "ema"], default="model", help="ema: the moving average")
    add("--input-size", type=int, help="pixels; the checkpoint's, if not given")
    add("--topk", type=int, default=5, metavar="K", help="classes to tell")
    add("--classes", type=Path, metavar="FILE", help="names of the classes, one in a line")
    add("--class", dest="asked", metavar="NAME_OR_INDEX", help="tell its probability, too")
    add("--output", type=Path, metavar="PLACE", help="pictures: FILE.png for one image, or folder")
    add("--csv", type=Path, metavar="FILE")
    flags.add_flags(parser, (*FLAGS, "device"))
    return parser


def prepared(args: Namespace) -> Case:
    """The network of the flags, ready to run."""
    device = utils.select_device(args.device, Place())
    sizes = [args.input_size] if args.input_size else None
    others = {"input_size": sizes, "data_set": "IMNET", "fuse": False}
    files = [args.checkpoint] if args.checkpoint else []
    return next(cases(files, Namespace(**vars(args) | others), device))


def start(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    args = flags.with_defaults(get_parser().parse_args(argv))
    if args.topk < 1:
        raise ConfigError(f"--topk {args.topk} must be positive")
    check_sources([args.checkpoint] if args.checkpoint else [], args)
    paths = find_images(args.images)
    places = dict(zip(paths, picture_paths(args.output, paths), strict=True)) if args.output else {}
    flags.check_folder("--csv", args.csv)
    if args.output:
        pictures.new_figure(1, 1, "--output")  # so that its absence is told now
    case = prepared(args)
    names = class_names(case, args.classes)
    asked = None if args.asked is None else find_class(args.asked, names)
    failed: list[str] = []
    rows: list[tuple] = []
    for found in predict(case, paths, args.topk, asked, failed):
        print(text_of(found, names, asked))
        rows += csv_rows(found, names, asked)
        if args.output:
            place = places[found.path]
            make_folder(place.parent)
            pictures.save(figure_of(found, names, load_image(found.path)), place)
            print(f"written to {place}")
    if args.csv:
        write_csv(args.csv, ("image", "rank", "class", "name", "probability"), rows)
        print(f"written to {args.csv}")
    for message in failed:
        utils.fail(message)
    return 1 if failed else 0


def csv_rows(found: Prediction, names: Sequence[str], asked: int | None) -> list[tuple]:
    """The lines of an image; that of the class asked for has no rank."""
    pairs = [*enumerate(zip(found.classes, found.probabilities, strict=True), start=1)]
    if asked is not None:
        pairs.append(("", (asked, found.asked)))
    return [
        (found.path, rank, index, readable(names[index]), value) for rank, (index, value) in pairs
    ]


def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    return utils.exit_status(lambda: start(argv), EXPECTED_ERRORS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
