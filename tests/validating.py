"""Tiny networks and sets, and what tools.validate should say of them."""

import csv

import numpy as np
import pytest
import timm
import torch
from conftest import THREADS, write_images

import datasets
from pipeline.images import load_image
from tools.validate import __main__ as validate
from training.flags import get_args_parser

CLASSES = [f"kind{index:02}" for index in range(12)]
SIZE = 32


def random_vit(num_classes, seed=0):
    """A tiny network whose predictions differ from image to image."""
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", num_classes=num_classes, img_size=SIZE)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


def save(path, model, ema=None, **more):
    """A checkpoint as training writes it, as far as evaluation reads it."""
    num_classes = model.num_classes
    content = {"model": model.state_dict(), "model_ema": ema and ema.state_dict()}
    content |= {"model_name": "test_vit", "input_size": SIZE, "epoch": 3}
    content |= {"model_kwargs": {"num_classes": num_classes, "img_size": SIZE}, "args": {}}
    torch.save(content | more, path)
    return path


def trained(folder, classes, images):
    """(checkpoint with a moving average, image folder, network, average) of so many a class."""
    data = write_images(folder / "images", train=1, val=images, classes=classes)
    model, ema = random_vit(len(classes)), random_vit(len(classes), seed=1)
    checkpoint = save(folder / "checkpoint.pth", model, ema, classes=list(classes))
    return checkpoint, data, model, ema


def with_one_thread():
    """Networks as small as these are slower with several."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


def caller(capsys):
    """``call(*flags) -> (status, output, errors)`` of tools.validate."""

    def call(*flags):
        capsys.readouterr()
        status = validate.main(["--num_workers", "0", *map(str, flags)])
        return (status, *capsys.readouterr())

    return call


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def logits_of(model, folder, plain=False):
    """Float64 logits of the images of ``folder/CLASS``, targets in the order of names, paths.

    ``plain`` weights, which say nothing of their training, get images as timm says of test_vit.
    """
    args = get_args_parser().parse_args(["--input-size", str(SIZE)])
    transform = datasets.build_transform(False, args)
    paths = sorted(folder.glob("*/*"))
    names = sorted({path.parent.name for path in paths})
    images = torch.stack([transform(load_image(path)) for path in paths]).double()
    if plain:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in datasets.NORMALIZATION)
        images = (images * std + mean - 0.5) / 0.5
    with torch.inference_mode():
        logits = model.double()(images).numpy()
    model.float()
    return logits, np.array([names.index(path.parent.name) for path in paths]), paths


def formulas(logits, targets):
    """The scores by their definitions, in float64 and in loops."""
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
