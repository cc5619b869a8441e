"""Datasets of the literature: iNaturalist, Flowers, Cars, Pets and Imagenette, as image files.

torchvision downloads and indexes those that it knows; its decoding is never used, and no image is
opened here.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchvision.datasets import Flowers102, INaturalist, OxfordIIITPet, StanfordCars
from torchvision.datasets.utils import download_and_extract_archive

from ..images import DataError
from .base import Files
from .folder import open_image_folder
from .listing import LeftOut, keep_images

# --inat-category, as in DeiT
INAT_CATEGORIES = (
    *("name", "kingdom", "phylum", "class"),
    *("order", "supercategory", "family", "genus"),
)
DOWNLOAD = "; --download fetches it"
# fastai's archives of full size: address without the name, and MD5 of each
FASTAI = "https://s3.amazonaws.com/fast-ai-imageclas"
IMAGENETTES = {
    "imagenette2": "fe2fc210e6bb7c5664d602c3cd71e612",
    "imagewoof2": "9aafe18bcdb1632c4249a76c458465ba",
}


def open_inat(
    root: Path, is_train: bool, download: bool, year: int = 2018, category: str = "name"
) -> Files:
    """Open iNaturalist 2018 or 2019 (Van Horn et al., https://github.com/visipedia/inat_comp).

    ``root`` has ``trainYEAR.json`` and ``valYEAR.json`` (COCO's format), ``categories.json``, and
    the images of the former: ``train_valYEAR/SUPERCATEGORY/NUMBER/*.jpg``. DeiT's layout without
    the folder of the supercategory is accepted as well. As in DeiT, classes are numbered in the
    order of their first training annotation.

    Args:
        root: Folder of the files.
        is_train: Open the training split (else validation).
        download: No effect: the files have to be downloaded by hand.
        year: 2018 or 2019.
        category: Level of the label, one of ``INAT_CATEGORIES``.

    Raises:
        DataError: A file is missing or damaged, or the files do not match each other.
    """
    listings = {split: root / f"{split}{year}.json" for split in ("train", "val")}
    train = _read_listing(listings["train"])
    chosen = train if is_train else _read_listing(listings["val"])
    labels = _read_labels(root / "categories.json", category)
    unknown = {number for _, number in train} - labels.keys()
    if unknown:
        raise DataError(f"{root / 'categories.json'} has no category {min(unknown)}")
    classes = list(dict.fromkeys(labels[number] for _, number in train))
    index = {name: target for target, name in enumerate(classes)}
    try:
        targets = [index[labels[number]] for _, number in chosen]
    except KeyError as error:
        raise DataError(
            f"category {error} of {listings['val']} is missing from {listings['train']}"
        ) from error
    return Files(_find_images(root, [name for name, _ in chosen]), targets, classes)


def _read_listing(path: Path) -> list[tuple[str, int]]:
    """Return file name and category number of each annotated image."""
    content = _read_json(path)
    try:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        listing = [(files[one["image_id"]], one["category_id"]) for one in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not in COCO's format: {error!r}") from error
    if not listing:
        raise DataError(f"{path} has no annotations")
    return listing


def _read_labels(path: Path, category: str) -> dict[int, str]:
    """Return the label of each category by its number."""
    try:
        return {entry["id"]: entry[category] for entry in _read_json(path)}
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a list of categories with id and {category}: {error!r}"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror} (https://github.com/visipedia/inat_comp has it)"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _find_images(root: Path, names: Sequence[str]) -> list[Path]:
    """Return the paths of the images in the published layout or in DeiT's."""
    folder = (root / names[0]).parent
    if not os.path.isdir(folder):
        rows = [name.split("/") for name in names]
        names = ["/".join([first, *rest[1:]]) for first, *rest in rows]  # no supercategory
        if not (root / names[0]).parent.is_dir():
            raise DataError(f"folder {folder} of images, named by the json files, does not exist")
    return [root / name for name in names]


def open_inat2021(
    root: Path, is_train: bool, download: bool, category: str = "name", mini: bool = False
) -> Files:
    """Open iNaturalist 2021 (Van Horn et al., CVPR 2021), 10,000 species, in torchvision's layout.

    ``root`` has the folders ``2021_train`` (2.7 million images; with ``mini``
    ``2021_train_mini``, 500,000) and ``2021_valid``, each with one folder per species. Files are
    sorted, so that all machines have the same order.

    Args:
        root: Folder of the splits.
        is_train: Open the training split (else validation).
        download: Download what is missing, up to 224 GB.
        category: Level of the label, one of ``INAT_CATEGORIES`` except ``supercategory``.
        mini: Train on the small training set.

    Raises:
        DataError: The split is missing or damaged, or does not have this level.
    """
    version = "2021_valid" if not is_train else "2021_train_mini" if mini else "2021_train"
    place = root / version
    if category not in INAT_CATEGORIES or category == "supercategory":
        raise DataError(f"iNaturalist 2021 in {root} has no level {category}")
    if not download and not os.path.isdir(place):
        raise DataError(f"folder {place} does not exist{DOWNLOAD}")

    level = "full" if category == "name" else category
    open_it = partial(INaturalist, root, version, level, download=download, loader=str)
    dataset, paths, targets = _list_images(open_it, place)
    if category == "name":  # of the folders: NUMBER_KINGDOM_..._GENUS_SPECIES
        classes = [" ".join(name.split("_")[-2:]) for name in dataset.all_categories]
    else:
        classes = list(dataset.categories_index[category])
    left_out = LeftOut(place)
    kept = {*keep_images(paths, left_out)}
    rows = sorted(row for row in zip(paths, targets, strict=True) if row[0] in kept)
    source = _files(place, [path for path, _ in rows], [target for _, target in rows], classes)
    source.left_out = left_out
    return source


def open_flowers(root: Path, is_train: bool, download: bool) -> Files:
    """Open Oxford 102 Flowers (Nilsback and Zisserman, ICVGIP 2008) in ``root/flowers-102``.

    As usual for transfer, the official training and validation splits together are the training
    set (2,040 images), and the test split is the validation set (6,149).

    Raises:
        DataError: A file is missing or damaged.
    """
    place, hint = root / "flowers-102", "" if download else DOWNLOAD
    paths, targets = [], []
    for split in ("train", "val") if is_train else ("test",):
        open_it = partial(Flowers102, root, split, download=download, loader=str)
        _, more_paths, more_targets = _list_images(open_it, place, hint)
        paths += more_paths
        targets += more_targets
    return _files(place, paths, targets, Flowers102.classes)


def open_cars(root: Path, is_train: bool, download: bool) -> Files:
    """Open Stanford Cars (Krause et al., 3dRR 2013), 8,144 and 8,041 images of 196 models.

    Its site is gone, so it cannot be downloaded. ``root/stanford_cars`` has ``devkit/`` with
    ``cars_meta.mat`` and ``cars_train_annos.mat``, ``cars_test_annos_withlabels.mat``,
    ``cars_train/`` and ``cars_test/``.

    Raises:
        DataError: A file is missing or damaged.
    """
    place, split = root / "stanford_cars", "train" if is_train else "test"
    annotations = "devkit/cars_train_annos.mat" if is_train else "cars_test_annos_withlabels.mat"
    for name in ("devkit/cars_meta.mat", annotations, f"cars_{split}"):
        if not (place / name).exists():
            raise DataError(
                f"no {place / name}; the site of Stanford Cars is gone, and --download cannot"
                f" fetch it: {place} needs devkit/cars_meta.mat, {annotations} and cars_{split}/"
            )
    open_it = partial(StanfordCars, root, split, loader=str)
    dataset, paths, targets = _list_images(open_it, place)
    return _files(place, paths, targets, dataset.classes)


def open_pets(root: Path, is_train: bool, download: bool) -> Files:
    """Open Oxford-IIIT Pet (Parkhi et al., CVPR 2012) in ``root/oxford-iiit-pet``.

    37 breeds; the split ``trainval`` is the training set (3,680 images), ``test`` the validation
    set (3,669).

    Raises:
        DataError: A file is missing or damaged.
    """
    place, split = root / "oxford-iiit-pet", "trainval" if is_train else "test"
    hint = "" if download else DOWNLOAD
    listing = place / "annotations" / f"{split}.txt"
    try:
        dataset = OxfordIIITPet(root, split, download=download)
        # its items are decoded images, so the listing has to be read again
        rows = [line.split() for line in listing.read_text().splitlines()]
        paths = [place / "images" / f"{image}.jpg" for image, _, _, _ in rows]
        targets = [int(number) - 1 for _, number, _, _ in rows]
    except (RuntimeError, OSError) as error:
        raise DataError(f"cannot read {listing}: {error}{hint}") from error
    except ValueError as error:
        raise DataError(f"{listing} is damaged: {error}") from error
    return _files(listing, paths, targets, dataset.classes)


def open_imagenette(root: Path, is_train: bool, download: bool, name: str) -> Files:
    """Open a subset of ImageNet by fastai (https://github.com/fastai/imagenette), 10 classes.

    ``imagenette2`` has classes that are easy to tell apart (9,469 and 3,925 images),
    ``imagewoof2`` breeds of dogs (9,025 and 3,929), both in ``root/NAME`` as an image folder.

    Args:
        root: Folder of the dataset's folder.
        is_train: Open the training split (else validation).
        download: Download the images of full size, 1.5 GB, if the folder does not exist.
        name: ``imagenette2`` or ``imagewoof2``.

    Raises:
        DataError: The folder is missing or no image folder, or the download failed.
    """
    place = root / name
    if not place.is_dir():
        if not download:
            raise DataError(f"folder {place} does not exist{DOWNLOAD}")
        try:
            archive = f"{FASTAI}/{name}.tgz"
            download_and_extract_archive(archive, root, md5=IMAGENETTES[name])
        except (OSError, RuntimeError) as error:
            raise DataError(f"cannot download {place}: {error}") from error
    return open_image_folder(place, is_train)


def _list_images(
    open_it: Callable[[], Dataset], place: Path, hint: str = ""
) -> tuple[Any, list[str], list[int]]:
    """Open a torchvision dataset with ``loader=str``; return it, and path and target of images."""
    try:
        dataset = open_it()
        pairs = [dataset[index] for index in range(len(dataset))]
    except Exception as error:  # on damaged files the readers raise errors of any kind
        raise DataError(f"cannot read {place}: {error}{hint}") from error
    return dataset, [path for path, _ in pairs], [int(target) for _, target in pairs]


def _files(
    place: Path, paths: Sequence[str | Path], targets: Sequence[int], classes: Sequence[str]
) -> Files:
    """Check that the targets are classes, and return the files."""
    if not len(paths):
        raise DataError(f"{place} lists no images")
    if min(targets) < 0 or max(targets) >= len(classes):
        raise DataError(
            f"{place} is damaged: targets {min(targets)}..{max(targets)} of {len(classes)} classes"
        )
    return Files(paths, targets, classes)
