"""Image folders: what is listed, in which order, and what is refused."""

import os
import shutil
from functools import partial

import pytest
from conftest import write_images
from loading import refused
from torchvision.datasets import ImageFolder

from pipeline.sources.folder import list_classes, open_folder_of_classes, open_image_folder
from pipeline.sources.listing import list_folders, list_images

NAMES = ("b.jpg", "a.PNG", ".hidden.jpg", "notes.txt", "d-e/f.jpg", "d/e/g.webp", "d/x.jpg")
NAMES += (".copies/h.jpg", "d/.copies/i.jpg", "d/e-f/j.jpg", "d/e/k/l.jpg")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "root" / "d" / "e")
    return tmp_path / "root"


def test_images_of_a_folder(folder):
    def names(**options):
        listing = list_images(folder, **options)
        return [os.path.relpath(path, folder) for path in listing.paths], listing.left_out.counts

    visible = ["a.PNG", "b.jpg", "d/x.jpg", "d/e/g.webp", "d/e/k/l.jpg", "d/e-f/j.jpg"]
    visible += ["d-e/f.jpg", "link/g.webp", "link/k/l.jpg"]
    found, counts = names()
    assert sorted(found) == sorted(visible)
    assert counts == {"hidden": 3, "not images": 1}  # a hidden folder counts once
    assert names(recursive=False) == (["a.PNG", "b.jpg"], {"hidden": 2, "not images": 1})
    assert list_folders(folder) == list_classes(folder) == ["d", "d-e", "link"]


def test_classes_are_those_of_torchvision(folder):
    """In the same order: runs depend on it."""
    shutil.rmtree(folder / ".copies")
    shutil.rmtree(folder / "d" / ".copies")
    source, theirs = open_folder_of_classes(folder), ImageFolder(folder)
    paths = [source.name(index) for index in range(len(source))]
    assert list(zip(paths, source.targets, strict=True)) == theirs.samples
    assert source.classes == theirs.classes


def test_folders_that_cannot_be_used_are_named(folder):
    for place in (folder / "none", folder / "b.jpg"):
        for call in (list_images, list_folders, open_folder_of_classes):
            refused(partial(call, place), place)
    refused(partial(open_folder_of_classes, folder / "d-e"), folder / "d-e")
    (folder / "lynx").mkdir()
    refused(partial(open_folder_of_classes, folder, is_train=True), folder, "lynx", ".jpg")
    assert "lynx" in open_folder_of_classes(folder).notices[0]


def test_the_two_splits_of_an_image_folder(tmp_path):
    root = write_images(tmp_path / "images", 2, 1)
    assert [len(open_image_folder(root, is_train)) for is_train in (True, False)] == [4, 2]
    (root / "val" / "emu").mkdir()
    assert "emu" in open_image_folder(root, False).notices[0]
    (root / "val" / "cat" / "0.jpg").rename(root / "val" / "emu" / "0.jpg")
    refused(partial(open_image_folder, root, False), root / "val", "emu")
    (root / "val").rename(root / "else")
    refused(partial(open_image_folder, root, False), root, "val/", "--data-path")
    (root / "train").rename(root / "other")
    refused(partial(open_image_folder, root, True), root, "train/", "--data-path")
    refused(partial(open_image_folder, root / "none", True), root / "none", "--data-path")
