"""What is there is listed or counted, the same by all programs."""

import json
import os
import shutil
import tarfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, error_of, succeed, write_images
from loading import flags, refused
from PIL import Image
from torchvision.datasets import ImageFolder
from validating import random_vit, read, save

import datasets
import main
from object_detection import infer
from pipeline.images import IMAGE_FORMATS
from pipeline.sources.cifar import open_digits
from pipeline.sources.folder import open_folder_of_classes, open_image_folder
from pipeline.sources.listing import find_images, image_suffixes, list_images
from pipeline.sources.shards import open_shards
from pipeline.sources.summary import lines_of
from tools import pack_dataset, predict
from tools.validate import __main__ as validate
from tools.visualize import loading
from training.data import data_line

FORMATS = {  # suffix, and the format that Pillow writes
    ".JPG": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".gif": "GIF",
    ".WebP": "WEBP",
    ".bmp": "BMP",
    ".tiff": "TIFF",
    ".pnm": "PPM",
    ".jp2": "JPEG2000",
    ".avif": "AVIF",
    ".ico": "ICO",
    "": "JPEG",
    ".photo": "PNG",
    ".5mm": "PPM",
    " 2024.01.02": "BMP",
}
TEXTS = {"notes.txt": "x", "Python": "P3 is what Python", "BMW": "BM and BMW", "x.svg": "<svg/>"}
HIDDEN = (".DS_Store", "._x.jpg", ".ipynb_checkpoints/a.jpg", ".hidden.png")
SYSTEM = ("Thumbs.db", "desktop.ini", "__MACOSX/a.jpg", "@eaDir/a.jpg", "$RECYCLE.BIN/a.jpg")
SYSTEM += ("System Volume Information/a.jpg", "lost+found/a.jpg", "#recycle/a.jpg")
PLACES = ("train", "val")
FEW = ("--num_workers", 0, "--batch-size", 4, "--input-size", 32)
ONCE = (*FEW, "--model", "visformer_tiny", "--epochs", 1, "--no-repeated-aug")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "x.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def mixed(image, tmp_path_factory):
    """Two classes of every kind of file and folder in two splits, one of them of all kinds."""
    root = tmp_path_factory.mktemp("mixed")
    for split in PLACES:
        for name in ("ant", "bee"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number, (suffix, kind) in enumerate(FORMATS.items()):
                Image.open(image).convert("RGB").save(folder / f"i{number}{suffix}", kind)
        folder = root / split / "ant"
        for file, text in TEXTS.items():
            (folder / file).write_text(text)
        for place in (root / split, folder):
            for file in (*HIDDEN, *SYSTEM):
                (place / file).parent.mkdir(exist_ok=True)
                shutil.copy(image, place / file)
    return root


IN_CLASS = {"hidden": len(HIDDEN), "left by the system": len(SYSTEM), "not images": len(TEXTS)}
COUNTS = IN_CLASS | {key: 2 * IN_CLASS[key] for key in ("hidden", "left by the system")}


def files_of(folder):
    return sorted(str(folder / f"i{n}{suffix}") for n, suffix in enumerate(FORMATS))


def test_suffixes_are_those_of_the_decoder():
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in image_suffixes()} == set(IMAGE_FORMATS)


@pytest.fixture(scope="module")
def trained(mixed, tmp_path_factory):
    """Output folder and output of a run on the images."""
    folder = tmp_path_factory.mktemp("run")
    return folder, succeed("--data-path", mixed, *ONCE, "--output_dir", folder)


@pytest.mark.parametrize("is_train", [True, False])
def test_sources(mixed, is_train):
    source = open_image_folder(mixed, is_train)
    split = mixed / ("train" if is_train else "val")
    names = [source.name(index) for index in range(len(source))]
    assert names == files_of(split / "ant") + files_of(split / "bee")
    assert (source.classes, source.left_out.counts) == (["ant", "bee"], COUNTS)
    assert source.targets.tolist() == [0] * len(FORMATS) + [1] * len(FORMATS)
    for index in range(len(source)):
        assert source.open(index).size == (16, 16)


def test_training_and_validation(mixed, trained):
    folder, output = trained
    count = 2 * len(FORMATS)
    for split in ("train", "validation"):
        (line,) = (line for line in output.splitlines() if line.startswith(f"{split}: "))
        assert f" {count} images in 2 classes" in line and "4 not images" in line
    assert f" on {count} images" in output  # of the evaluation
    content = json.loads((folder / "data.json").read_text())
    assert (content["data_set"], content["data_path"]) == ("IMNET", str(mixed))
    for split in content["splits"].values():
        assert (split["images"], split["classes"]) == (count, 2)
        assert split["images_per_class"] == {"ant": count // 2, "bee": count // 2}
        assert {key: value["count"] for key, value in split["left_out"].items()} == COUNTS
        assert set(split["left_out"]["not images"]["first"]) == {f"ant/{name}" for name in TEXTS}
    umask = os.umask(0o022)
    os.umask(umask)
    assert (folder / "data.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_packing(mixed, tmp_path):
    words = ("--data-path", mixed, "--output", tmp_path / "out", "--num_workers", 0)
    status, output, errors = call(pack_dataset.main, *words)
    assert (status, errors) == (0, "")
    for split in PLACES:
        shards = open_shards(tmp_path / "out", split == "train")
        source = open_image_folder(mixed, split == "train")
        found = sorted(shards.read(index) for index in range(len(shards)))
        assert found == sorted(source.read(index) for index in range(len(source)))
        assert np.bincount(shards.targets).tolist() == [len(FORMATS)] * 2
        index = json.loads((tmp_path / "out" / f"{split}.json").read_text())
        assert {key: value["count"] for key, value in index["passed_over"].items()} == COUNTS
        assert f"{split}: {2 * len(FORMATS)} images in 2 classes" in output
        for shard in (tmp_path / "out").glob(f"{split}*.tar"):
            with tarfile.open(shard) as archive:
                assert {name.count(".") for name in archive.getnames()} == {1}
    status, output, errors = call(pack_dataset.main, *words)  # complete: the plan is the same
    assert (status, errors) == (0, "")


def test_predicting_and_detecting(mixed, tmp_path, monkeypatch):
    folder = mixed / "val" / "ant"
    for program, ending in ((predict, predict.ENDING), (infer, infer.ENDING)):
        listing = program.find_images([folder], ending)
        assert (listing.paths, listing.left_out.counts) == (files_of(folder), IN_CLASS)
    listing, pictures = infer.plan(Namespace(images=[str(folder)], out=str(tmp_path)))
    assert listing.paths == files_of(folder)
    assert len({*pictures}) == len(FORMATS) and {p.parent for p in pictures} == {tmp_path}
    checkpoint = save(tmp_path / "two.pth", random_vit(2), classes=["ant", "bee"])
    table = tmp_path / "p.csv"
    status, output, _ = call(predict.main, folder, "--checkpoint", checkpoint, "--csv", table)
    found = read(table, "image", "rank")
    assert status == 0
    assert [name for name, rank in found if rank == "1"] == files_of(folder)
    first = output.splitlines()[0]
    assert f"{len(FORMATS)} images" in first and "4 not images" in first


def test_validating_and_drawing(mixed, tmp_path):
    checkpoint = save(tmp_path / "two.pth", random_vit(2), classes=["ant", "bee"])
    for data in (mixed, mixed / "val"):
        words = (checkpoint, "--data-path", data, "--num_workers", 0, "--csv", tmp_path / "t.csv")
        status, output, _ = call(validate.main, *words)
        assert status == 0
        assert read(tmp_path / "t.csv", "images") == [(str(2 * len(FORMATS)),)]
        assert f"{2 * len(FORMATS)} images in 2 classes" in output and "4 not images" in output
    found = loading.find_images(mixed / "val", 2 * len(FORMATS))
    assert sorted(map(str, found)) == sorted(list_images(mixed / "val").paths)


def test_pictures_of_an_earlier_run_are_counted(image, tmp_path):
    for name in ("a.png", "a-prediction.png"):
        shutil.copy(image, tmp_path / name)
    listing = find_images([tmp_path], "-prediction.png")
    assert listing.paths == [str(tmp_path / "a.png")]
    assert sum(listing.left_out.counts.values()) == 1
    (tmp_path / "a.png").unlink()
    refused(partial(find_images, [tmp_path], "-prediction.png"), tmp_path)


def test_imagenets_layout_is_listed_as_by_torchvision(image, tmp_path):
    for split, names in (("train", ("n02", "n01", "n10")), ("val", ("n10", "n01", "n02"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for number in (10, 9, 1):
                shutil.copy(image, tmp_path / split / name / f"{name}_{number}.JPEG")
    (tmp_path / "test").mkdir()  # ImageNet's has no labels
    shutil.copy(image, tmp_path / "test" / "ILSVRC2012_test_1.JPEG")
    for split in PLACES:
        source, theirs = (
            open_image_folder(tmp_path, split == "train"),
            ImageFolder(tmp_path / split),
        )
        paths = [source.name(index) for index in range(len(source))]
        assert list(zip(paths, source.targets.tolist(), strict=True)) == theirs.samples
        assert (source.classes, source.notices) == (theirs.classes, ())
        assert not source.left_out.counts


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../bee"])
def test_links_to_folders_above_are_refused(mixed, image, tmp_path, target):
    for name in ("ant", "bee"):
        (tmp_path / name / "more").mkdir(parents=True)
        shutil.copy(image, tmp_path / name)
    link = tmp_path / "ant" / "more" / "link"
    link.symlink_to(target)
    if target.endswith("bee"):  # it leads back
        (tmp_path / "bee" / "back").symlink_to(tmp_path / "ant")
        link = tmp_path
    refused(partial(open_folder_of_classes, tmp_path), link, tmp_path)
    refused(partial(list_images, tmp_path), link)


def test_a_link_among_the_classes_and_one_that_is_a_class(image, tmp_path):
    data = write_images(tmp_path / "data", 2, 2)
    shutil.copytree(data / "val" / "cat", tmp_path / "elsewhere")
    (data / "train" / "emu").symlink_to(tmp_path / "elsewhere")
    assert np.bincount(open_image_folder(data, True).targets).tolist() == [2, 2, 2]
    (data / "train" / "all").symlink_to("..")
    refused(partial(open_image_folder, data, True), data / "train" / "all", data)


def test_images_beside_the_classes_are_counted(image, tmp_path):
    data = write_images(tmp_path / "data", 2, 1)
    shutil.copy(image, data / "train" / "stray.png")
    source = open_image_folder(data, True)
    assert (len(source), sum(source.left_out.counts.values())) == (4, 1)


def test_a_damaged_file_is_not_passed_over(image, tmp_path):
    """It begins as an image: the decoder says what is wrong with it."""
    data = write_images(tmp_path / "data", 2, 1)
    whole = (data / "train" / "cat" / "0.jpg").read_bytes()
    (data / "train" / "cat" / "cut").write_bytes(whole[:20])
    source = open_image_folder(data, True)
    assert len(source) == 5
    index = [source.name(i) for i in range(5)].index(str(data / "train" / "cat" / "cut"))
    refused(partial(source.open, index), "cut")


# classes of the splits


class Known(torch.nn.Module):
    """Outputs class 0 for dark images, 1 for grey ones, 2 for bright ones."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        level = images.mean((1, 2, 3), keepdim=True)[:, 0, 0]
        return -(level - torch.tensor([[-2.0, 0.0, 2.0]])).abs()


def write_levels(root, **counts):
    """``train`` of three classes, dark, grey and bright, and ``val`` of ``counts``."""
    levels = {"ant": 0, "bee": 120, "cat": 255}
    for split, number in (("train", dict.fromkeys(levels, 2)), ("val", counts)):
        for name, count in number.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((32, 32, 3), levels.get(name, 0), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def accuracy(root, classes=None):
    """Top-1 accuracy of the known model on the evaluation set, and the number of images."""
    args = flags("--data-path", root, *FEW)
    known = (classes, "the model") if classes else None
    dataset, number = datasets.build_dataset(False, args, classes=known)
    feed = datasets.build_prefetcher(datasets.build_eval_loader(dataset, args, 1, 0))
    hits = [(Known()(b.images).argmax(1) == b.targets).tolist() for b in feed]
    return number, sum(map(sum, hits)), sum(map(len, hits)), dataset.source


def test_a_validation_set_of_fewer_classes_is_numbered_by_name(tmp_path):
    root = write_levels(tmp_path, bee=3, cat=4)
    number, right, images, source = accuracy(root)
    assert (number, right, images) == (3, 7, 7)
    assert source.classes == ["ant", "bee", "cat"] and "ant" in source.notices[0]
    assert np.bincount(source.targets).tolist() == [0, 3, 4]
    (root / "val" / "ant").mkdir()  # without images: as if it were not there
    assert accuracy(root)[:3] == (3, 7, 7)
    shutil.rmtree(root / "train")  # the checkpoint knows the classes
    assert accuracy(root, ["ant", "bee", "cat"])[:3] == (3, 7, 7)
    assert accuracy(root, ["cat", "bee", "ant"])[1:3] == (3, 7)  # only bee is where it was
    refused(partial(accuracy, root, ["ant", "bee", "dog"]), "cat", "the model")


def test_other_classes_are_named(tmp_path):
    root = write_levels(tmp_path, ant=1, dog=2, emu=1)
    refused(partial(open_image_folder, root, False), root / "val", "dog", "emu")
    error = error_of(main.main, "--data-path", root, *ONCE)
    assert "dog" in error and "emu" in error
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").mkdir()
    refused(partial(open_image_folder, root, True), root / "train", "bee")


def test_a_checkpoint_counts_by_its_class_names(tmp_path):
    """Metrics of main.py --eval are those of the images numbered as in training."""
    root = write_levels(tmp_path / "images", ant=3, bee=3, cat=4)
    shutil.rmtree(root / "train")
    results = {}
    for order in (["ant", "bee", "cat"], ["cat", "ant", "bee"]):
        net = random_vit(3)
        with torch.no_grad():  # the outputs of one checkpoint in the order of the other
            rows = [["ant", "bee", "cat"].index(name) for name in order]
            net.head.weight.copy_(net.head.weight[rows])
            net.head.bias.copy_(net.head.bias[rows])
        path = save(tmp_path / "c.pth", net, classes=order)
        output = succeed("--resume", path, "--eval", "--data-path", root, *FEW[:4])
        (results[order[0]],) = (line for line in output.splitlines() if "* Acc@1" in line)
    assert results["ant"] == results["cat"]
    shutil.rmtree(root / "val" / "bee")
    assert "7 images" in succeed("--resume", path, "--eval", "--data-path", root, *FEW[:4])


def test_packed_splits_of_different_classes(tmp_path):
    root = write_levels(tmp_path / "images", bee=3, cat=4)
    words = ("--data-path", root, "--output", tmp_path / "out", "--num_workers", 0)
    assert call(pack_dataset.main, *words)[0] == 0
    shards = open_shards(tmp_path / "out", False)
    assert np.bincount(shards.targets).tolist() == [0, 3, 4]
    index = json.loads((tmp_path / "out" / "train.json").read_text())
    index["classes"] = ["cat", "bee", "ant"]
    (tmp_path / "out" / "train.json").write_text(json.dumps(index))
    assert np.bincount(open_shards(tmp_path / "out", False).targets).tolist() == [4, 3]


def test_folders_of_the_validation_set(tmp_path):
    data = write_images(tmp_path / "data", 2, 1)
    assert open_image_folder(data, False).notices == ()
    shutil.copytree(data / "val", data / "test")
    (notice,) = open_image_folder(data, False).notices
    assert "test/" in notice
    (data / "val").rename(data / "valid")
    source = open_image_folder(data, False)
    assert Path(source.name(0)).parts[-3] == "valid" and "test/" in source.notices[0]
    shutil.rmtree(data / "valid")
    assert Path(open_image_folder(data, False).name(0)).parts[-3] == "test"
    assert len(open_image_folder(data, False).notices) == 1


def test_every_run_says_what_it_uses(trained, mixed, tmp_path):
    assert any(str(mixed) in line and "ant, bee" in line for line in trained[1].splitlines())
    source = open_digits(None, True, False)
    demo, chosen = (data_line(flags(*words), source) for words in ((), ("--data-set", "DIGITS")))
    assert "DIGITS" in demo and "--data-path" in demo and "10 classes" in demo
    assert "DIGITS" in chosen and "--data-path" not in chosen
    data = write_images(tmp_path / "data", 4, 1)
    assert len(lines_of("train", open_image_folder(data, True))) == 1
    for number in range(5):
        shutil.copy(data / "val" / "cat" / "0.jpg", data / "train" / "cat" / f"new{number}.jpg")
    line = lines_of("train", open_image_folder(data, True))[1]
    assert all(word in line for word in ("cat", " 9 ", "dog", " 4 "))


# other tasks


def test_several_labels_and_numbers_are_refused(tmp_path, image):
    (tmp_path / "labels.csv").write_text("a.jpg,0.5\n")
    refused(partial(open_image_folder, tmp_path / "labels.csv", True), "labels.csv", "one class")
    for name in ("train2017", "annotations"):
        (tmp_path / "coco" / name).mkdir(parents=True)
    refused(partial(open_image_folder, tmp_path / "coco", True), "coco", "one class", "annotations")
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    shutil.copy(image, flat)
    refused(partial(open_image_folder, flat.parent, True), flat, "one class", image.name)
    (tmp_path / "member").write_bytes(b"1 0 2")
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for name in ("a.jpg", "a.cls"):
            archive.add(tmp_path / "member", name)
    refused(partial(open_shards, tmp_path / "train-0.tar", True), "'1 0 2'", "one class")
