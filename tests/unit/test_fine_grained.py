"""iNaturalist, Flowers, Cars, Pets and Imagenette, in small but complete layouts of their files."""

import hashlib
import json
import os
import tarfile
from functools import partial

import numpy as np
import pytest
import torchvision.datasets as tv
from loading import flags, refused
from PIL import Image
from sources import web_server

from pipeline.images import CorruptImageError
from pipeline.sources import fine_grained, named

savemat = pytest.importorskip("scipy.io", reason="writing .mat files needs scipy").savemat


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def check(source, expected, classes):
    """``expected`` has path and target of each image."""
    assert [source.name(i) for i in range(len(source))] == [str(path) for path, _ in expected]
    assert source.targets.dtype == np.int64
    assert source.targets.tolist() == [target for _, target in expected]
    assert list(source.classes) == classes
    for i, (path, _) in enumerate(expected):
        assert source.read(i) == path.read_bytes()
        assert source.open(i).size == (8, 8)


# Ids as published: of images with gaps, of categories from 0. Both species of Animalia are Aves,
# so the levels differ in their numbers of classes.
SUPER = ("Aves", "Aves", "Plantae")
LEVELS = ("name", "kingdom", "phylum", "class", "order", "supercategory", "family", "genus")
CATEGORIES = [
    {"id": number, **dict(zip(LEVELS, levels.split("/"), strict=True))}
    for number, levels in enumerate(
        (
            "Alca torda/Animalia/Chordata/c/o/Aves/f0/Alca",
            "Uria aalge/Animalia/Chordata/c/o/Aves/f1/Uria",
            "Acer rubrum/Plantae/Tracheophyta/c/o/Plantae/f0/Acer",
        )
    )
]


def write_inat(root, year, supercategories=True):
    """Three images for training, two for validation; returns their paths and categories."""
    root.mkdir()
    (root / "categories.json").write_text(json.dumps(CATEGORIES))
    listings = {}
    for split, numbers in (("train", [2, 0, 1]), ("val", [0, 2])):
        images, annotations, listings[split] = [], [], []
        for i, number in enumerate(numbers):
            name = f"train_val{year}/{SUPER[number]}/{number}/{split}{i}.jpg"
            images.append({"id": 10 * i + 7, "file_name": name, "height": 8, "width": 8})
            annotations.append({"id": i, "image_id": 10 * i + 7, "category_id": number})
            folders = [f"train_val{year}", SUPER[number], str(number)]
            path = root.joinpath(*(folders if supercategories else folders[::2]), f"{split}{i}.jpg")
            write_image(path, 50 * number)
            listings[split].append((path, number))
        content = {"images": images[::-1], "annotations": annotations, "categories": CATEGORIES}
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return listings


@pytest.mark.parametrize("year", [2018, 2019])
@pytest.mark.parametrize("supercategories", [True, False])
def test_inat(tmp_path, year, supercategories):
    listings = write_inat(tmp_path / "inat", year, supercategories)
    target = {2: 0, 0: 1, 1: 2}  # as the training annotations bring them
    for is_train, split in ((True, "train"), (False, "val")):
        source = fine_grained.open_inat(tmp_path / "inat", is_train, False, year)
        expected = [(path, target[number]) for path, number in listings[split]]
        check(source, expected, ["Acer rubrum", "Alca torda", "Uria aalge"])


@pytest.mark.parametrize("category", LEVELS)
def test_levels_of_inat(tmp_path, category):
    names = [CATEGORIES[number][category] for number in (2, 0, 1)]  # of the training images
    classes = list(dict.fromkeys(names))
    write_inat(tmp_path / "inat", 2018)
    assert category in fine_grained.INAT_CATEGORIES
    source = fine_grained.open_inat(tmp_path / "inat", True, False, category=category)
    assert (source.classes, source.targets.tolist()) == (classes, [*map(classes.index, names)])


def test_inat_that_is_missing_or_damaged(tmp_path):
    root = tmp_path / "inat"
    write_inat(root, 2018)
    open_val = partial(fine_grained.open_inat, root, False, False)

    def broken(name, content, *values):
        sound = (root / name).read_bytes()
        (root / name).write_bytes(content) if content is not None else (root / name).unlink()
        refused(open_val, root / name, *values)
        (root / name).write_bytes(sound)

    for name in ("train2018.json", "val2018.json", "categories.json"):
        broken(name, None, os.strerror(2), "github.com/visipedia/inat_comp")
        broken(name, b'{"images": [', "line 1")
        broken(name, b"\xff\xfe\x00")
    for name in ("train2018.json", "val2018.json"):
        broken(name, b"[]", "COCO")
        broken(name, b'{"images": []}', "COCO", "annotations")
        broken(name, b'{"images": [], "annotations": []}', "annotations")
        lost = b'{"images": [], "annotations": [{"image_id": 3, "category_id": 0}]}'
        broken(name, lost, "COCO", "3")
    broken("categories.json", b'[{"id": 0}]', "id", "name")
    broken("categories.json", b'{"0": "x"}', "id", "name")
    broken("categories.json", json.dumps(CATEGORIES[:2]).encode(), " 2")
    one = json.loads((root / "val2018.json").read_text())
    other = one | {"annotations": [one["annotations"][0] | {"category_id": 9}]}
    broken("val2018.json", json.dumps(other).encode(), " 9", root / "train2018.json")
    refused(partial(open_val, year=2019), root / "train2019.json")
    (root / "train_val2018").rename(root / "images")
    folder = root / "train_val2018" / "Plantae" / "2"
    refused(partial(fine_grained.open_inat, root, True, False), folder)


SPECIES = (
    "00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris",
    "00001_Animalia_Chordata_Aves_Charadriiformes_Alcidae_Alca_torda",
    "00002_Plantae_Tracheophyta_Magnoliopsida_Sapindales_Sapindaceae_Acer_rubrum",
)


def write_inat2021(root):
    expected = {}
    for version, count in (("2021_train", 2), ("2021_train_mini", 1), ("2021_valid", 2)):
        expected[version] = []
        for target, name in enumerate(SPECIES):
            paths = [root / version / name / f"{i}.jpg" for i in reversed(range(count))]
            for path in paths:
                write_image(path, 20 * target)
            expected[version] += [(path, target) for path in sorted(paths)]
    return expected


def test_inat2021(tmp_path):
    expected = write_inat2021(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / "2021_train" / SPECIES[0] / name).write_text("x")
    names = ["Lumbricus terrestris", "Alca torda", "Acer rubrum"]
    for version, is_train, mini in (
        ("2021_train", True, False),
        ("2021_train_mini", True, True),
        ("2021_valid", False, False),
        ("2021_valid", False, True),
    ):
        source = fine_grained.open_inat2021(tmp_path, is_train, False, mini=mini)
        check(source, expected[version], names)


@pytest.mark.parametrize("category", ["kingdom", "phylum", "class", "order", "family", "genus"])
def test_levels_of_inat2021(tmp_path, category):
    place = 1 + ["kingdom", "phylum", "class", "order", "family", "genus"].index(category)
    names = [species.split("_")[place] for species in SPECIES for _ in range(2)]
    classes = list(dict.fromkeys(names))
    write_inat2021(tmp_path)
    source = fine_grained.open_inat2021(tmp_path, False, False, category)
    assert (source.classes, source.targets.tolist()) == (classes, [*map(classes.index, names)])


def test_inat2021_that_is_missing_or_damaged(tmp_path):
    open_val, folder = partial(fine_grained.open_inat2021, tmp_path, False), tmp_path / "2021_valid"
    refused(partial(open_val, False), folder, "--download")
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    refused(partial(open_val, False), folder)
    (folder / SPECIES[0]).mkdir()
    refused(partial(open_val, False), folder)
    (folder / SPECIES[2]).mkdir()
    refused(partial(open_val, False), folder, "00002")
    for level in ("supercategory", "species"):
        refused(partial(open_val, False, category=level), level, tmp_path)


def write_flowers(root):
    """Images 1 to 6; of the splits each has two."""
    labels, splits = [102, 1, 2, 3, 77, 1], {"trnid": [6, 1], "valid": [4, 2], "tstid": [3, 5]}
    folder = root / "flowers-102"
    for i in range(1, 7):
        write_image(folder / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(folder / "setid.mat", {key: np.array([ids]) for key, ids in splits.items()})

    def expected(*names):
        ids = [i for name in names for i in splits[name]]
        return [(folder / "jpg" / f"image_{i:05d}.jpg", labels[i - 1] - 1) for i in ids]

    return expected


def test_flowers(tmp_path, monkeypatch):
    expected = write_flowers(tmp_path)
    # the sums are those of the published files
    monkeypatch.setattr(tv.flowers102, "check_integrity", lambda path, md5: True)
    names = list(tv.Flowers102.classes)
    assert len(names) == 102
    check(fine_grained.open_flowers(tmp_path, True, False), expected("trnid", "valid"), names)
    check(fine_grained.open_flowers(tmp_path, False, False), expected("tstid"), names)
    (tmp_path / "flowers-102" / "jpg" / "image_00003.jpg").unlink()
    source = fine_grained.open_flowers(tmp_path, False, False)
    refused(partial(source.read, 0), "image_00003.jpg: ", kind=CorruptImageError)


def test_flowers_that_are_missing_or_damaged(tmp_path, monkeypatch):
    place = tmp_path / "flowers-102"

    def broken(*values):
        for is_train in (True, False):
            refused(partial(fine_grained.open_flowers, tmp_path, is_train, False), place, *values)

    broken("--download")
    write_flowers(tmp_path)
    broken("--download")  # the sums differ
    monkeypatch.setattr(tv.flowers102, "check_integrity", lambda path, md5: True)
    savemat(place / "imagelabels.mat", {"labels": np.full((1, 6), 103)})
    broken("102..102", "102 classes")
    (place / "imagelabels.mat").write_bytes(b"no matrix" * 99)
    broken()


def write_cars(root):
    """Two training and three test images of three models."""
    place, names = root / "stanford_cars", ["AM General Hummer", "Acura RL", "Zenvo ST1"]
    (place / "devkit").mkdir(parents=True)
    savemat(place / "devkit" / "cars_meta.mat", {"class_names": np.array([names], object)})
    expected = {}
    for split, numbers, annotations in (
        ("train", [3, 1], "devkit/cars_train_annos.mat"),
        ("test", [2, 3, 2], "cars_test_annos_withlabels.mat"),
    ):
        kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
        rows = np.zeros((1, len(numbers)), kind)
        expected[split] = []
        for i, number in enumerate(numbers):
            rows[0, i] = (7, np.array([[number]], np.uint8), f"{i:05d}.jpg")
            write_image(place / f"cars_{split}" / f"{i:05d}.jpg", i)
            expected[split].append((place / f"cars_{split}" / f"{i:05d}.jpg", number - 1))
        savemat(place / annotations, {"annotations": rows})
    return expected, names


def test_cars(tmp_path):
    expected, names = write_cars(tmp_path)
    for download in (False, True):
        check(fine_grained.open_cars(tmp_path, True, download), expected["train"], names)
        check(fine_grained.open_cars(tmp_path, False, download), expected["test"], names)


def test_cars_that_are_missing_or_damaged(tmp_path):
    place, open_test = tmp_path / "stanford_cars", partial(fine_grained.open_cars, tmp_path, False)
    refused(partial(open_test, True), place, "--download", "cars_test/")
    write_cars(tmp_path)
    for name in ("cars_test_annos_withlabels.mat", "devkit/cars_meta.mat"):
        sound = (place / name).read_bytes()
        for damaged in (b"", b"no matrix" * 99, sound[:200]):
            (place / name).write_bytes(damaged)
            refused(partial(open_test, True), place)
        (place / name).unlink()
        refused(partial(open_test, True), place / name)
        (place / name).write_bytes(sound)
    meta = {"class_names": np.array([["A", "B"]], object)}
    savemat(place / "devkit" / "cars_meta.mat", meta)
    refused(partial(open_test, True), place, "1..2", "2 classes")
    (place / "cars_test").rename(place / "elsewhere")
    refused(partial(open_test, True), place / "cars_test")


def write_pets(root):
    """Names of cats have capitals; the numbers of the breeds are those of all 37."""
    place = root / "oxford-iiit-pet"
    rows = {
        "trainval": ["Abyssinian_100 1 1 1", "great_pyrenees_7 2 2 1", "Bengal_1 3 1 2"],
        "test": ["Bengal_9 3 1 2", "Abyssinian_2 1 1 1", "great_pyrenees_70 2 2 1"],
    }
    (place / "annotations").mkdir(parents=True)
    expected = {}
    for split, lines in rows.items():
        (place / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        expected[split] = []
        for line in lines:
            name, number, *_ = line.split()
            write_image(path := place / "images" / f"{name}.jpg", int(number))
            expected[split].append((path, int(number) - 1))
    return expected, ["Abyssinian", "Great Pyrenees", "Bengal"]


def test_pets(tmp_path):
    expected, names = write_pets(tmp_path)
    check(fine_grained.open_pets(tmp_path, True, False), expected["trainval"], names)
    check(fine_grained.open_pets(tmp_path, False, False), expected["test"], names)


def test_pets_that_are_missing_or_damaged(tmp_path):
    listing = tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt"
    open_test = partial(fine_grained.open_pets, tmp_path, False, False)
    refused(open_test, listing, "--download")
    write_pets(tmp_path)
    for content in (b"Bengal_9 3\n", b"Bengal_9 three 1 2\n", b"\xff\xfe\n", b""):
        listing.write_bytes(content)
        refused(open_test, listing)
    listing.write_text("Bengal_9 3 1 2\n")
    refused(open_test, listing, "2..2", "1 classes")
    listing.unlink()
    refused(open_test, listing, os.strerror(2))


@pytest.mark.parametrize(
    ("open_it", "cls"),
    [
        (fine_grained.open_inat2021, "INaturalist"),
        (fine_grained.open_flowers, "Flowers102"),
        (fine_grained.open_pets, "OxfordIIITPet"),
    ],
)
def test_download_is_asked_for_and_may_fail(tmp_path, monkeypatch, open_it, cls):
    def fetch(*words, download, **options):
        asked.append(download)
        raise OSError("no network")

    asked = []
    monkeypatch.setattr(fine_grained, cls, fetch)
    message = refused(partial(open_it, tmp_path, True, True), "no network")
    assert asked == [True] and "--download" not in message


# --- Imagenette


@pytest.mark.parametrize("name", ["IMAGENETTE", "IMAGEWOOF"])
def test_imagenette_is_downloaded(tmp_path, monkeypatch, name):
    folder = {"IMAGENETTE": "imagenette2", "IMAGEWOOF": "imagewoof2"}[name]
    names = [f"{split}/{wnid}/1.JPEG" for split in ("train", "val") for wnid in ("n01", "n02")]
    for index, image in enumerate(names):
        write_image(tmp_path / "made" / folder / image, index)
    served = tmp_path / "served"
    served.mkdir()
    archive = served / f"{folder}.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / folder, folder)
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(fine_grained.IMAGENETTES, folder, digest)

    words = ("--data-set", name, "--data-path", tmp_path / "data")
    opener = named.data_set_named(name).open
    assert "--download" in refused(partial(opener, flags(*words), True), folder)
    with web_server(served) as address:
        monkeypatch.setattr(fine_grained, "FASTAI", address)
        for is_train, expected in ((True, names[:2]), (False, names[2:])):
            source = opener(flags(*words, "--download"), is_train)
            paths = [(tmp_path / "data" / folder / image, i) for i, image in enumerate(expected)]
            check(source, paths, ["n01", "n02"])
        monkeypatch.setitem(fine_grained.IMAGENETTES, folder, "0" * 32)
        other = flags("--data-set", name, "--data-path", tmp_path / "other", "--download")
        refused(partial(opener, other, True), str(tmp_path / "other" / folder))
