"""Images as shards, and what tests of these share."""

import itertools
import multiprocessing
import os
import signal

from conftest import write_images
from PIL import Image

from tools import pack_dataset

FORK = multiprocessing.get_context("fork")
TRAIN = 41  # images; an odd number, in 6 shards of up to 8


def pack(folder, output, *flags):
    words = ["--data-path", folder, "--output", output, "--num_workers", 0, "--shard-images", 8]
    return pack_dataset.main([str(word) for word in (*words, *flags)])


def write_odd_names(root):
    """41 training and 15 validation images of 3 classes, some with names that need care."""
    root = write_images(root, 12, 5, ("cat", "dog", "__x__"), 16)
    picture = Image.open(root / "train" / "cat" / "0.jpg")
    for name in ("a.b.jpg", "a_b.jpg", "a_b.PNG", "é 1.webp", "n" * 150 + ".jpg"):
        picture.save(root / "train" / "dog" / name)
    return root


def content(shards):
    """Name within its shard, class and bytes of each image."""
    names = [shards.name(index).partition(".tar/")[2] for index in range(len(shards))]
    data = [shards.read(index) for index in range(len(shards))]
    return list(zip(names, shards.targets.tolist(), data, strict=True))


def files_of(output):
    """The bytes of each file of a folder, by its name."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def run_forked(function, *args):
    """Run ``function`` in a forked process; returns its exit code."""
    process = FORK.Process(target=function, args=args, daemon=True)
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode


def kill_at(monkeypatch, owner, name, number):
    """Let the process kill itself when it calls a function for the ``number``-th time."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
