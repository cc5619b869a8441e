"""Programs that read hostile inputs, as functions of a command line that return a status."""

import sys
from collections.abc import Callable

import matplotlib.font_manager  # noqa: F401 starts a program to find the fonts

import hubconf
import main
import models
import tools.export.__main__ as export
import tools.validate.__main__ as validate
import tools.visualize.__main__ as visualize
from tools import convert_checkpoint, pack_dataset, predict
from utils import UserError, printable


def _library(call: Callable[[list[str]], object]) -> Callable[[list[str]], int]:
    """Return a program of a library call, whose documented errors are refusals."""

    def run(words: list[str]) -> int:
        try:
            call(words)
        except (models.ModelError, UserError) as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return 1
        return 0

    return run


def _load(words: list[str]) -> None:
    models.load_model(*words, pretrained=True)


def _hub(words: list[str]) -> None:
    hubconf.vit_b_32_224(checkpoint=words[0])


PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "main": main.main,
    "validate": validate.main,
    "predict": predict.main,
    "export": export.main,
    "visualize": visualize.main,
    "convert": convert_checkpoint.main,
    "pack": pack_dataset.main,
    "load_model": _library(_load),
    "torch.hub": _library(_hub),
}
FEW = ["--device", "cpu", "--num_workers", 0, "--batch-size", 4]
DATA = ["--data-path", "+images", *FEW]
TRAIN = [*DATA, "--epochs", 2, "--warmup-epochs", 0, "--cooldown-epochs", 0, "--unscale-lr"]
TRAIN += ["--no-repeated-aug", "--output_dir", "=run"]
VIT = ["--model", "vit_b_32_224", "--model-kwargs", "depth=2", "embed_dim=32", "num_heads=2"]
VIT += ["--input-size", 32]


def readers(path: str) -> list[tuple[str, list[object]]]:
    """Return the programs and command lines that read a model from ``path``."""
    return [
        ("main", ["--eval", "--resume", path, *DATA]),
        ("main", ["--resume", path, *TRAIN]),
        ("main", ["--finetune", path, *TRAIN]),
        ("validate", [path, *DATA]),
        ("predict", ["+photo.jpg", "--checkpoint", path, "--device", "cpu", "--csv", "=table.csv"]),
        (
            "export",
            ["--checkpoint", path, "--output", "=model.pt2", "--device", "cpu", "--no-check"],
        ),
        (
            "visualize",
            [
                "features",
                path,
                "--image",
                "+photo.jpg",
                "--device",
                "cpu",
                "--output",
                "=figure.png",
            ],
        ),
        ("convert", [path, "=model.safetensors"]),
        ("convert", [path, "=hub", "--to", "hub"]),
        ("torch.hub", [path]),
    ]
