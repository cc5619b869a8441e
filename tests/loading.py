"""Flags, images and loaders of the tests of the input pipeline."""

import io
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from pipeline.images import DataError
from pipeline.sources.base import Files
from training.flags import parse_args


def refused(call, *values, kind=DataError):
    """The message of the error of ``call``, which names all ``values``."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert [value for value in map(str, values) if value not in message] == [], message
    return message


def flags(*words):
    return parse_args([str(word) for word in words])[0]


def eval_feed(dataset):
    """A dataset's batches in order, ready for the model."""
    args = flags("--num_workers", 0)
    return datasets.build_prefetcher(datasets.build_eval_loader(dataset, args, 1, 0))


def train_feed(dataset, args, num_replicas=1, rank=0):
    """A rank's training batches, ready for the model."""
    return datasets.build_prefetcher(datasets.build_train_loader(dataset, args, num_replicas, rank))


def photograph(width, height, seed=0):
    """Smooth shapes under some noise, as photographs have them."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(a * x + b * y + c) for a, b, c in generator.normal(size=(9, 3)) * 2]
    pixels = 128 + 40 * np.stack([sum(waves[i::3]) for i in range(3)], -1)
    pixels += generator.normal(size=pixels.shape) * 6
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def files(folder, named):
    """A source of these files, ``{name: bytes}``, each a class of its own."""
    for name, data in named.items():
        (folder / name).write_bytes(data)
    return Files([folder / name for name in named], range(len(named)), list(named))


def real_photographs(shared, count):
    """The first images of the sample of ImageNet, encoded."""
    found = []
    with tarfile.open(shared / "data" / "imagenet_sample.tar") as archive:
        for member in archive:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg")):
                found.append(archive.extractfile(member).read())
            if len(found) == count:
                break
    assert len(found) == count
    return found


def decoded(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Trap:
    """Pickled, it asks to call a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced
