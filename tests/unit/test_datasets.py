"""Datasets, augmentation, loaders, and images that cannot be decoded."""

import hashlib
import itertools
import os
import pickle
import random
import shutil
import struct
import traceback
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import eval_feed, flags, refused, seed_all, train_feed
from PIL import Image, ImageFile, ImageOps
from torch.utils.data._utils.pin_memory import pin_memory

import datasets
from pipeline.images import CorruptImageError, CropLongSide, DataError, EnlargeTiny, load_image
from pipeline.reference import Batch
from pipeline.sources.cifar import CIFAR10, CIFAR100, open_digits
from pipeline.sources.named import data_set_name, data_set_named
from samplers import SampleIndex

pytestmark = pytest.mark.usefixtures("one_thread")
ORANGE = (200, 100, 50)


def folder_args(folder, *words):
    return flags("--data-path", folder, "--input-size", 32, "--num_workers", 0, *words)


LOADERS = pytest.mark.parametrize("loader", ["fast", "timm"])


def test_digits_are_split_by_class_without_overlap():
    train, val = (open_digits(None, is_train, False) for is_train in (True, False))
    assert (len(train), len(val)) == (1442, 355)
    parts = Counter(val.targets.tolist())
    whole = parts + Counter(train.targets.tolist())
    assert all(abs(parts[c] / whole[c] - 0.2) < 0.01 for c in range(10))
    image = train.open(0)
    assert (image.size, image.mode, train.targets[0]) == ((8, 8), "RGB", 0)
    assert max(np.asarray(train.open(i)).max() for i in range(10)) == 255


def test_defaults_follow_the_dataset(image_folder):
    assert data_set_name(flags()) == "DIGITS"
    assert datasets.input_size_of(flags()) == 32
    assert datasets.input_size_of(flags("--data-path", image_folder)) == 224
    dataset, classes = datasets.build_dataset(True, flags())
    assert (len(dataset), classes) == (1442, 10)
    assert datasets.build_augmentation(True, flags()).hflip == 0  # a mirrored digit is another sign


@pytest.mark.parametrize(("name", "classes"), [("CIFAR10", 10), ("CIFAR100", 100), ("CIFAR", 100)])
def test_cifar(tmp_path, monkeypatch, name, classes):
    cls = {10: CIFAR10, 100: CIFAR100}[classes]
    label = "labels" if classes == 10 else "fine_labels"
    names = "label_names" if classes == 10 else "fine_label_names"
    folder = tmp_path / cls.base_folder
    folder.mkdir()

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    pixels = np.arange(6 * 3072, dtype=np.uint8).reshape(6, 3072)
    part = write("part", {"data": pixels, label: [0, 1, 2, 3, 4, 5]})
    meta = write("meta", {names: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(cls, "train_list", [part])
    monkeypatch.setattr(cls, "test_list", [part])
    monkeypatch.setattr(cls, "meta", {"filename": "meta", "key": names, "md5": meta[1]})
    for is_train, loader in itertools.product((True, False), ("fast", "timm")):
        words = ("--data-set", name, "--data-path", tmp_path, "--input-size", 32)
        args = flags(*words, "--loader", loader)
        dataset, count = datasets.build_dataset(is_train, args)
        assert (len(dataset), count, dataset.targets[3]) == (6, classes, 3)
        batch = next(iter(eval_feed(dataset)))
        assert (batch.images.shape, batch.targets.tolist()) == ((6, 3, 32, 32), [0, 1, 2, 3, 4, 5])


def test_image_folder(image_folder):
    for is_train, count in ((True, 16), (False, 6)):
        args = folder_args(image_folder, "--loader", "timm")
        dataset, classes = datasets.build_dataset(is_train, args)
        assert (len(dataset), classes) == (count, 2)
        assert dataset[0].image.shape == (3, 32, 32)
    (image_folder / "val").rename(image_folder / "validation")
    assert len(datasets.build_dataset(False, folder_args(image_folder))[0]) == 6


def test_missing_folders_are_named(image_folder, tmp_path):
    for is_train, args, named in (
        (True, folder_args(tmp_path / "none"), rf"{tmp_path}/none\b"),
        (True, flags("--data-set", "IMNET"), "--data-path"),
        (True, flags("--data-set", "WDS"), "--data-path"),
        (False, folder_args(image_folder), r"\bval/.*validation/"),
        (True, flags("--data-set", "CIFAR10", "--data-path", tmp_path), "CIFAR10.*--download"),
    ):
        shutil.rmtree(image_folder / "val", ignore_errors=True)
        with pytest.raises(DataError, match=named):
            datasets.build_dataset(is_train, args)


def test_unknown_names_are_named():
    for name in ("MNIST", "hfds/"):
        with pytest.raises(ValueError, match=f"{name}.*IMNET.*hfds/"):
            data_set_named(name)
    for policy in ("nonsense", "rand-m9-x3"):
        with pytest.raises(DataError, match=f"--aa {policy}"):
            datasets.build_dataset(True, flags("--aa", policy))


def test_evaluation_sees_the_whole_small_image_and_the_centre_of_a_large_one():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (1, 64, 3)))
    small = datasets.build_transform(False, flags("--input-size", 32))(ramp)
    words = ("--input-size", 56, "--eval-crop-ratio", 0.875)
    large = datasets.build_transform(False, flags(*words))(ramp)
    rows = datasets.denormalize(torch.stack([small]))[0, 0, :, 0] * 255 / 4
    torch.testing.assert_close(rows[[0, -1]], torch.tensor([0.5, 62.5]), atol=0.5, rtol=0)
    rows = datasets.denormalize(torch.stack([large]))[0, 0, :, 0] * 255 / 4
    torch.testing.assert_close(rows, torch.arange(4, 60.0), atol=0.01, rtol=0)


def names_of(transform):
    return [type(step).__name__ for step in transform.transforms]


def test_training_transforms():
    deit = names_of(datasets.build_transform(True, flags("--data-path", "x")))
    assert deit[:2] == ["EnlargeTiny", "RandomResizedCropAndInterpolation"]
    assert {"RandAugment", "RandomErasing", "RandomHorizontalFlip"} <= set(deit)
    plain = names_of(datasets.build_transform(True, flags("--data-path", "x", "--std-aug")))
    assert plain[1:3] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    assert len(plain) == 5  # to tensor, normalise
    small = datasets.build_transform(True, flags("--data-path", "x", "--input-size", 32))
    assert names_of(small)[:2] == ["Resize", "RandomCrop"]
    assert small.transforms[1].padding == 4
    three = datasets.build_transform(True, flags("--data-path", "x", "--ThreeAugment", "--src"))
    assert names_of(three)[:3] == ["CropLongSide", "Resize", "RandomCrop"]
    assert "ColorJitter" in names_of(three)


@pytest.mark.parametrize("size", [(30000, 10), (10, 30000), (1, 999), (1, 1)])
@pytest.mark.parametrize("words", [("eval",), ("train",), ("train", "--src")])
def test_extreme_shapes_need_little_memory(size, words):
    """No step makes an image of more than 8 times 256x256 pixels out of a smaller one."""
    is_train = words[0] == "train"
    transform = datasets.build_transform(is_train, flags("--data-path", "x", *words[1:]))
    image = Image.new("RGB", size, ORANGE)
    limit = max(8 * 256 * 256, size[0] * size[1])
    for step in transform.transforms:
        image = step(image)
        if isinstance(image, Image.Image):
            assert image.width * image.height <= limit
    assert image.shape == (3, 224, 224)


def test_long_images_lose_their_ends_and_others_nothing():
    ramp = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8)[:, None], (1, 5)))
    crop, enlarge = pickle.loads(pickle.dumps((CropLongSide(), EnlargeTiny())))
    high, wide = np.asarray(crop(ramp)), np.asarray(crop(ramp.transpose(Image.Transpose.ROTATE_90)))
    np.testing.assert_array_equal(high[:, 0], np.arange(30, 70))
    np.testing.assert_array_equal(wide[0], np.arange(30, 70))
    assert enlarge(Image.new("RGB", (1, 4))).size == (4, 16)
    for size in ((8, 1), (1, 8), (5, 1), (500, 400)):
        image = Image.new("RGB", size, ORANGE)
        assert crop(image) is image and enlarge(image) is image


def test_posterize_keeps_a_bit():
    with pytest.raises(ValueError):
        ImageOps.posterize(Image.new("RGB", (4, 4)), 0)  # what training must survive
    transform = datasets.build_transform(True, flags("--aa", "rand-m10-inc1", "--input-size", 64))
    (augment,) = (step for step in transform.transforms if hasattr(step, "ops"))
    (posterize,) = (op for op in augment.ops if op.name.startswith("Posterize"))
    posterize.prob = 1.0
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    assert set(np.unique(posterize(image))) == {0, 128}


@pytest.mark.parametrize(("words", "distinct"), [((), 6), (("--no-repeated-aug",), 16)])
def test_an_epoch_repeats_images_unless_told_not_to(image_folder, words, distinct):
    args = folder_args(image_folder, "--batch-size", 4, *words)
    dataset, _ = datasets.build_dataset(True, args)
    samples = list(train_feed(dataset, args).sampler)
    assert (len(samples), len(set(samples))) == (16, distinct)


@LOADERS
def test_loading_leaves_the_process_s_random_numbers_alone(image_folder, loader):
    dataset, _ = datasets.build_dataset(True, folder_args(image_folder, "--loader", loader))
    seed_all(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    seed_all(1)
    image = dataset.__getitems__([SampleIndex(3)])[0]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert torch.equal(dataset.__getitems__([SampleIndex(3)])[0], image)  # nor depends on them


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])
    return path


@pytest.mark.parametrize(("workers", "loader"), [(0, "fast"), (1, "fast"), (1, "timm")])
def test_corrupt_image_is_named(image_folder, workers, loader):
    words = ("--batch-size", 16, "--num_workers", workers, "--no-repeated-aug")
    args = folder_args(image_folder, *words, "--loader", loader)
    dataset, _ = datasets.build_dataset(True, args)
    path = truncate(image_folder / "train" / "dog" / "3.jpg")
    with pytest.raises(CorruptImageError, match=str(path)) as caught:
        list(datasets.build_train_loader(dataset, args, 1, 0))
    traceback.clear_frames(caught.tb)  # or they keep the workers until some garbage collection


@LOADERS
def test_skipping_replaces_in_training_and_reports_in_evaluation(image_folder, loader):
    words = ("--on-corrupt", "skip", "--batch-size", 4, "--no-repeated-aug", "--loader", loader)
    args = folder_args(image_folder, *words)
    train, _ = datasets.build_dataset(True, args)
    for name in ("3", "4"):
        truncate(image_folder / "train" / "dog" / f"{name}.jpg")
    batches = list(train_feed(train, args))
    assert [len(batch.images) for batch in batches] == [4] * 4
    assert sum(len(batch.corrupt) for batch in batches) == 3  # 3 -> 4 -> 5, and 4 -> 5

    val, _ = datasets.build_dataset(False, args)
    for name in ("cat/0", "cat/1", "cat/2", "dog/0"):
        truncate(image_folder / "val" / f"{name}.jpg")
    args.batch_size = 2  # three images per evaluation batch: the first batch has none left
    batches = list(datasets.build_prefetcher(datasets.build_eval_loader(val, args, 1, 0)))
    assert [(len(batch.images), len(batch.corrupt)) for batch in batches] == [(0, 3), (2, 1)]
    assert str(image_folder / "val" / "dog" / "0.jpg") in batches[1].corrupt[0]


def test_messages_survive_pinning(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # needs a GPU
    pinned = pin_memory(Batch(torch.ones(2, 3, 2, 2), torch.tensor([1, 1]), ["a", "b"]))
    assert isinstance(pinned, Batch)
    assert (pinned.targets.tolist(), pinned.corrupt) == ([1, 1], ["a", "b"])
    for words in ((), ("--augment-on", "device")):
        dataset, _ = datasets.build_dataset(True, flags(*words))
        raw = dataset.__getitems__([SampleIndex(0), SampleIndex(1)])
        pinned = pin_memory(raw)
        assert type(pinned) is type(raw) and type(pinned.pixels) is type(raw.pixels)
        assert pinned == raw  # field by field, the very tensors


def test_class_of_corrupt_images_only(image_folder):
    dataset, _ = datasets.build_dataset(True, folder_args(image_folder, "--on-corrupt", "skip"))
    for path in (image_folder / "train" / "dog").iterdir():
        truncate(path)
    with pytest.raises(DataError, match=r"\bdog\b"):
        dataset.__getitems__([15])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, os.strerror(2)),
        (lambda path: path.symlink_to(path.with_name("none.jpg")), os.strerror(2)),
        (Path.mkdir, ""),
        (os.mkfifo, ""),  # opening one would wait for a writer
        (lambda path: path.touch(0), os.strerror(13)),
    ],
    ids=["missing", "dangling link", "directory", "named pipe", "unreadable"],
)
def test_what_is_no_file_to_read(tmp_path, make, why):
    make(path := tmp_path / "x.jpg")
    if why == os.strerror(13) and os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    refused(partial(load_image, path), path, why, kind=CorruptImageError)


def test_link_to_an_image(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    (tmp_path / "x.jpg").symlink_to(tmp_path / "image.png")
    assert load_image(tmp_path / "x.jpg").size == (4, 4)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (struct.error("s"), "s"),
        (zlib.error("two\nlines"), "two lines"),
        (EOFError(), "EOFError"),
        (IndexError(" "), "IndexError"),
        (TypeError("t"), "t"),
        (MemoryError(), None),  # not the file's fault
    ],
)
def test_decoders_may_raise_anything(tmp_path, monkeypatch, error, why):
    def load(self):
        raise error

    Image.new("RGB", (4, 4)).save(path := tmp_path / "x.jpg")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(CorruptImageError if why else MemoryError) as caught:
        load_image(path)
    if why:
        assert str(caught.value).endswith(f"x.jpg: {why}") and caught.value.__cause__ is error


def test_batch_larger_than_the_training_set(image_folder):
    args = folder_args(image_folder, "--batch-size", 9)
    dataset, _ = datasets.build_dataset(True, args)
    assert len(datasets.build_train_loader(dataset, args, 1, 0)) == 1
    with pytest.raises(DataError, match=r"--batch-size 9\b.*\b16\b.*\b8\b"):
        datasets.build_train_loader(dataset, args, 2, 0)
