"""Annotation files: what is trained on, left out, or refused by name, on either engine."""

import copy
import json

import numpy as np
import pytest
import torch
from annotation_files import BOXES, CASES, CLASSES, HEIGHT, WIDTH, compressed, content, rle, write

from datasets import DataError
from object_detection import annotations, masks
from object_detection.data import DetectionDataset

pytest.importorskip("pycocotools")
RIGHT = [name for name, case in CASES.items() if case.objects is not None]
WRONG = [name for name, case in CASES.items() if case.objects is None]


def changed(name):
    made = content()
    CASES[name].change(made)
    return made


def expected(name):
    """The numbers of objects and of masks."""
    case = CASES[name]
    return case.objects, case.objects if case.masks is None else case.masks


@pytest.fixture(scope="module")
def mmdet_set():
    """``mmdet_set(file, classes) -> CocoDataset`` with masks."""
    from object_detection import runtime
    from utils import UserError

    try:
        runtime.load_mmdet()
    except UserError as error:
        pytest.skip(f"{error}")
    from mmdet.datasets import CocoDataset

    steps = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
    steps[1]["with_mask"] = True
    steps += [{"type": "Resize", "scale": (WIDTH, HEIGHT)}, {"type": "PackDetInputs"}]

    def make(file, classes, **options):
        return CocoDataset(
            ann_file=str(file),
            metainfo={"classes": classes},
            data_prefix={"img": str(file.parent)},
            pipeline=copy.deepcopy(steps),
            serialize_data=False,
            **options,
        )

    return make


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_used(tmp_path, mmdet_set, name):
    file = write(tmp_path, changed(name))
    found = annotations.read(file, CASES[name].classes)
    used = [entry for entry in found if not entry["iscrowd"]]
    masks = [entry for entry in used if entry["segmentation"] is not None]
    assert (len(used), len(masks)) == expected(name)

    targets = [target for _, target in DetectionDataset(found, tmp_path, is_training=True)]
    masks = sum(int(target["masks"].flatten(1).any(1).sum()) for target in targets)
    assert (sum(len(target["boxes"]) for target in targets), masks) == expected(name)

    samples = [sample["data_samples"].gt_instances for sample in mmdet_set(file, CLASSES)]
    masks = sum(int(each.masks.to_ndarray().any((1, 2)).sum()) for each in samples if len(each))
    assert (sum(map(len, samples)), masks) == expected(name)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(tmp_path, mmdet_set, name):
    file = write(tmp_path, changed(name))
    for read in (annotations.read, mmdet_set):
        with pytest.raises(DataError) as error:
            read(file, CASES[name].classes)
        (line,) = str(error.value).splitlines()
        for text in (str(file), *CASES[name].names):
            assert text in line


@pytest.mark.parametrize("name", RIGHT)
def test_classes_have_the_detectors_order(tmp_path, mmdet_set, name):
    made = changed(name)
    names = {entry["id"]: entry["name"] for entry in made["categories"]}
    classes = CLASSES[::-1]
    file = write(tmp_path, made)
    found = annotations.read(file, classes)
    for entry in found:
        source = made["annotations"][entry["id"] - 1]
        assert classes[found.labels[entry["category_id"]]] == names[source["category_id"]]
    for sample in mmdet_set(file, classes):
        instances = sample["data_samples"].gt_instances
        for box, label in zip(instances.bboxes.tensor, instances.labels, strict=True):
            inside = [
                names[e["category_id"]]
                for e in made["annotations"]
                if e.get("bbox") and torch.allclose(box[:2], torch.tensor(e["bbox"][:2]).float())
            ]
            assert not inside or classes[label] in inside


def test_a_file_that_is_none(tmp_path):
    for text in (b"", b"[", b"[]", b"{", b"null", b"\xff\xfe", b"[" * 100_000):
        file = tmp_path / "file.json"
        file.write_bytes(text)
        with pytest.raises(DataError, match=r"file\.json"):
            annotations.read(file)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match=str(missing)):
            annotations.read(missing)


def test_validation_may_lack_a_class_but_not_misspell_one(tmp_path):
    made = content()
    made["categories"] = made["categories"][:1]
    made["annotations"] = [e for e in made["annotations"] if e["category_id"] == 1]
    found = annotations.read(write(tmp_path, made), ("dog", "cat"), is_training=False)
    assert [found.categories[key] for key in found.categories] == ["dog", "cat"]
    assert found.per_class() == {"dog": 0, "cat": 4}
    with pytest.raises(DataError, match="'dog'"):
        annotations.read(write(tmp_path, made), ("dog", "cat"))
    made["categories"].append({"id": 9, "name": "Dog"})
    with pytest.raises(DataError, match="'Dog'"):
        annotations.read(write(tmp_path, made), ("dog", "cat"), is_training=False)


def test_the_summary_counts(tmp_path):
    made = content()
    made["annotations"][0]["iscrowd"] = 1
    del made["annotations"][1]["segmentation"]
    made["annotations"] = made["annotations"][:6]
    line = annotations.read(write(tmp_path, made)).summary("train")
    for text in ("train", "4 images", "5 objects", "2 classes", "1 crowd", "1 without a mask"):
        assert text in line
    assert "1 images without objects" in line


def test_only_the_images_of_a_limit_are_used_and_counted(tmp_path):
    made = content()
    made["annotations"][2]["iscrowd"] = 1  # of the second image
    made["annotations"][4]["iscrowd"] = 1  # of the third
    del made["annotations"][7]["segmentation"]
    found = annotations.read(write(tmp_path, made), limit=2)
    assert [image["id"] for image in found.images] == list(found.objects) == [1, 2]
    assert found.per_class() == {"cat": 1, "dog": 2} and found.counts == {"crowd": 1}
    line = found.summary("train")
    for text in ("2 images", "3 objects", "1 crowd"):
        assert text in line
    made["annotations"][0]["iscrowd"] = made["annotations"][1]["iscrowd"] = 1
    with pytest.raises(DataError, match="2 crowd"):
        annotations.read(write(tmp_path, made), limit=1)


def test_run_lengths_are_decoded_as_pycocotools_does():
    from pycocotools import mask

    numbers = np.random.default_rng(0)
    for _ in range(200):
        height, width = numbers.integers(1, 300, 2)
        bits = (numbers.random((height, width)) < numbers.choice([0.01, 0.5, 0.99])).astype(
            np.uint8
        )
        encoded = mask.encode(np.asfortranarray(bits))
        runs = masks.decode_runs(encoded["counts"].decode())
        changes = np.flatnonzero(np.diff(bits.T.ravel(), prepend=0))
        assert runs == np.diff([0, *changes, bits.size]).tolist()
    runs = rle(*BOXES[0])["counts"]
    assert masks.decode_runs(compressed(runs)) == runs


def test_damaged_files_are_read_or_refused(tmp_path):
    """Values of a file replaced at random: no error but DataError, and no warning."""
    made = content()
    for entry in made["annotations"][::2]:
        runs = rle(*entry["bbox"])
        runs["counts"] = compressed(runs["counts"])
        entry["segmentation"] = runs
    numbers = np.random.default_rng(0)
    values = [None, 0, -1, 10**400, 1e308, float("nan"), "", "x", [], [[]], {}, True, [0, None]]
    outcomes = {True: 0, False: 0}
    for _ in range(1500):
        damaged = copy.deepcopy(made)
        for _ in range(numbers.integers(1, 3)):
            place, key = damaged, None
            while isinstance(place, dict | list) and len(place):
                keys = list(place) if isinstance(place, dict) else range(len(place))
                parent, key = place, keys[numbers.integers(len(keys))]
                place = parent[key]
                if numbers.random() < 0.1:
                    break
            parent[key] = values[numbers.integers(len(values))]
        file = tmp_path / "damaged.json"
        file.write_text(json.dumps(damaged))
        try:
            annotations.read(file, CLASSES).content(as_crowd=True)
            outcomes[True] += 1
        except DataError as error:
            assert str(file) in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 20
