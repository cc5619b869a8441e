"""Tiny models and test sets for tools.validate and tools.predict, and the expected scores."""

import csv
import re

import numpy as np
import pytest
import timm
import torch
from conftest import write_images

import datasets
from models import DataConfig
from pipeline.images import DataError, load_image
from tools.validate import __main__ as validate
from training.flags import get_args_parser

CLASSES = [f"kind{index:02}" for index in range(12)]
SIZE = 32


def random_vit(num_classes, seed=0, size=SIZE, finite=True):
    """Return a tiny model whose predictions differ from image to image, or are all NaN."""
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", num_classes=num_classes, img_size=size)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    if not finite:
        torch.nn.init.constant_(model.head.bias, float("nan"))
    return model.eval()


def save(path, model, ema=None, size=SIZE, **more):
    """Write the part of a training checkpoint that evaluation reads."""
    content = {"model": model.state_dict(), "model_ema": ema and ema.state_dict()}
    content |= {"model_name": "test_vit", "input_size": size, "epoch": 3}
    content |= {"model_kwargs": {"num_classes": model.num_classes, "img_size": size}, "args": {}}
    torch.save(content | more, path)
    return path


def plain(path, num_classes=1000):
    """Write a model's weights alone; return the flags that evaluate them, and the model."""
    model = random_vit(num_classes)
    torch.save(model.state_dict(), path)
    return [path, "--model", "test_vit", "--input-size", SIZE], model


def trained(folder, classes, images):
    """Return a checkpoint with EMA, an image folder, the model and the EMA model."""
    data = write_images(folder / "images", train=1, val=images, classes=classes)
    model, ema = random_vit(len(classes)), random_vit(len(classes), seed=1)
    checkpoint = save(folder / "checkpoint.pth", model, ema, classes=list(classes))
    return checkpoint, data, model, ema


def caller(capsys, program=validate, more=("--num_workers", "0")):
    """Return ``call(*flags) -> (status, output, errors)`` of tools.validate or ``program``."""

    def call(*flags):
        capsys.readouterr()
        status = program.main([*map(str, (*more, *flags))])
        return (status, *capsys.readouterr())

    torch.set_num_threads(1)  # tiny models are slower with more
    return call


def refuses(found, *values, output=""):
    """Assert that a call failed with one error that names ``values``, and printed nothing else.

    Apart from warnings, as flags may differ from what the weights expect, and what is listed.
    """
    status, printed, errors = found
    printed = re.sub(r"^(warning: .*|.*: [\d,]+ images in .*)\n", "", printed, flags=re.MULTILINE)
    assert (status, printed, errors.startswith("error: ")) == (1, output, True)
    for value in values:
        assert str(value) in errors


def fails_from(module, number, error, monkeypatch):
    """Make ``evaluate`` of a module of tools.validate fail from this call on."""
    evaluate, calls = module.evaluate, []

    def failing(*words):
        calls.append(words)
        if len(calls) >= number:
            raise error
        return evaluate(*words)

    monkeypatch.setattr(module, "evaluate", failing)


STOPS = pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (DataError("broken"), 1)]
)


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def no_access(path=None, *_, **__):
    raise PermissionError(13, "Permission denied", path and str(path))


def read(path, *keys):
    """Return the rows of a CSV file as dictionaries, or as tuples of the columns given."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [tuple(row[key] for key in keys) for row in rows] if keys else rows


def logits_of(model, folder, plain=False):
    """Return float64 logits of the images of ``folder/CLASS``, targets, and paths.

    Images of ``plain`` weights are normalised as timm states for test_vit.
    """
    args = get_args_parser().parse_args(["--input-size", str(SIZE)])
    own = DataConfig(mean=(0.5,) * 3, std=(0.5,) * 3) if plain else DataConfig()
    transform = datasets.build_transform(False, args, own.at_size(SIZE))
    paths = sorted(folder.glob("*/*"))
    names = sorted({path.parent.name for path in paths})
    images = torch.stack([transform(load_image(path)) for path in paths]).double()
    with torch.inference_mode():
        logits = model.double()(images).numpy()
    model.float()
    return logits, np.array([names.index(path.parent.name) for path in paths]), paths


def formulas(logits, targets):
    """Return the scores by their definitions, in float64 and in loops."""
    exps = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = exps / exps.sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    top1 = [order[i, 0] == t for i, t in enumerate(targets)]
    top5 = [t in order[i, :5] for i, t in enumerate(targets)]
    confidence = probabilities.max(1)
    ece = 0.0
    for m in range(1, 16):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / 15 < c <= m / 15]
        if inside:
            accuracy = np.mean([top1[i] for i in inside])
            ece += len(inside) / len(targets) * abs(accuracy - np.mean(confidence[inside]))
    nll = -np.mean([np.log(probabilities[i, t]) for i, t in enumerate(targets)])
    return {
        "top1": 100 * np.mean(top1),
        "top5": 100 * np.mean(top5),
        "nll": nll,
        "ece": 100 * ece,
        "confidence": 100 * np.mean(confidence),
    }


def agrees(row, expected):
    for key, value in expected.items():
        assert float(row[key]) == pytest.approx(value, abs=2e-3), key
