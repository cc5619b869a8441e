"""COCO's format: what is read, left out or refused, and the scores of detections."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import group

from datasets import DataError
from samplers import EvalBatchSampler, SampleIndex

masks = pytest.importorskip("pycocotools.mask")

from object_detection.coco import CocoDataset, mirrored, read_annotations  # noqa: E402
from object_detection.coco_evaluation import score, score_together, to_results  # noqa: E402


@pytest.fixture(scope="module")
def truth(few):
    return read_annotations(few / "annotations" / "instances_train.json")


def tampered(few, tmp_path, change):
    """A training file of ``few`` after ``change(content)``."""
    content = json.loads((few / "annotations" / "instances_train.json").read_text())
    change(content)
    path = tmp_path / "tampered.json"
    path.write_text(json.dumps(content))
    return path


def test_polygons_and_both_forms_of_rle_are_the_same_masks(pennfudan):
    files = [pennfudan / "annotations" / f"instances_val{form}.json" for form in ("", "_rle")]
    polygons, compressed = map(read_annotations, files)

    def uncompressed(entry):
        rle = entry["segmentation"]
        runs = np.flatnonzero(np.diff(masks.decode(rle).T.ravel(), prepend=0))
        counts = np.diff([0, *runs, np.prod(rle["size"])]).tolist()
        return entry | {"segmentation": rle | {"counts": counts}}

    plain = {key: list(map(uncompressed, found)) for key, found in compressed.objects.items()}
    forms = [polygons, compressed, replace(compressed, objects=plain)]
    datasets = [CocoDataset(form, pennfudan / "images", {1: 1}, True) for form in forms]
    for index in range(5):
        (image, one), *others = (dataset[index] for dataset in datasets)
        entry = polygons.images[index]
        assert image.dtype == torch.uint8
        assert image.shape == (3, entry["height"], entry["width"])
        for _, other in others:
            assert all(torch.equal(one[key], other[key]) for key in one)
        areas = [o["area"] for o in polygons.objects[entry["id"]]]
        assert one["masks"].flatten(1).sum(1).tolist() == areas
        for box, mask in zip(one["boxes"], one["masks"], strict=True):
            rows, columns = mask.nonzero().unbind(1)  # boxes are tight in this data set
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_what_is_left_out_of_training(few, tmp_path):
    def change(content):
        first, second = (image["id"] for image in content["images"][:2])
        one, other = (a for a in content["annotations"] if a["image_id"] == first)
        size = [content["images"][0][key] for key in ("height", "width")]
        pixels = size[0] * size[1]
        del one["area"], one["iscrowd"]  # optional
        content["annotations"] += [
            other | change
            for change in (
                {"iscrowd": 1, "segmentation": {"size": size, "counts": [0, 5, pixels - 5]}},
                {"bbox": [10, 10, 0, 30]},
                {"bbox": [10, 10, -5, 30]},
                {"bbox": [size[1] + 3, 10, 20, 30]},
                {"segmentation": []},
                {"segmentation": None},
                {"segmentation": [[1, 1, 2, 2]]},
                {"segmentation": {"size": size, "counts": ""}},
                {"segmentation": [[3, 3, 3, 3, 3, 3]]},
            )
        ]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != second]

    annotations = read_annotations(tampered(few, tmp_path, change))
    dataset = CocoDataset(annotations, few / "images", {1: 1}, True)
    assert len(dataset[0][1]["boxes"]) == len(dataset[0][1]["masks"]) == 2
    assert [len(dataset[1][1][key]) for key in ("boxes", "labels", "masks")] == [0, 0, 0]
    # all of them stay in the evaluation, boxes also where the mask is empty
    results = truth_as_results(annotations, few)
    stats = score(annotations, results)
    assert stats["bbox_AP50"] < 1 and stats["segm_AP50"] < 1
    no_crowd = annotations.objects[annotations.images[0]["id"]][:2]
    objects = annotations.objects | {annotations.images[0]["id"]: no_crowd}
    assert score(replace(annotations, objects=objects), results)["segm_AP"] == pytest.approx(1)


def test_half_of_the_images_are_mirrored_the_same_in_every_run(few, truth):
    dataset = CocoDataset(truth, few / "images", {1: 1}, True, seed=1)
    plain, target = dataset[0]
    flips, again = (
        [not torch.equal(dataset[SampleIndex(0, epoch)][0], plain) for epoch in range(20)]
        for _ in range(2)
    )
    assert 5 < sum(flips) < 15 and flips == again
    image, flipped = mirrored(plain, target)
    assert torch.equal(image, plain.flip(2))
    for box, mask in zip(flipped["boxes"], flipped["masks"], strict=True):
        columns = mask.nonzero()[:, 1]
        assert box[[0, 2]].tolist() == [columns.min(), columns.max() + 1]


# --- evaluation -----------------------------------------------------------------------------


def truth_as_results(annotations, folder):
    """The objects of a file as if a detector had found them."""
    labels = {key: label for label, key in enumerate(annotations.categories, start=1)}
    dataset = CocoDataset(annotations, folder / "images", labels, True)
    results = []
    for index, image in enumerate(annotations.images):
        target = dataset[index][1]
        found = {**target, "scores": torch.linspace(1, 0.5, len(target["boxes"]))}
        found["masks"] = target["masks"][:, None].float()
        results += to_results(image["id"], found, list(annotations.categories))
    return results


def test_the_truth_scores_one_and_nothing_scores_zero(few, tmp_path):
    def change(content):  # ids from 0 on, which pycocotools alone takes for unmatched
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = number
            annotation["category_id"] = 7 if number % 2 else 90
        content["categories"] = [{"id": 90, "name": "b"}, {"id": 7, "name": "a"}]

    annotations = read_annotations(tampered(few, tmp_path, change))
    assert list(annotations.categories) == [7, 90]
    results = truth_as_results(annotations, few)
    stats = score(annotations, results)
    assert len(stats) == 12
    for kind in ("bbox", "segm"):
        assert stats[f"{kind}_AP"] == pytest.approx(1)
        assert stats[f"{kind}_AP_small"] == -1  # there are none
    swapped = [{**result, "category_id": 97 - result["category_id"]} for result in results]
    assert score(annotations, swapped)["bbox_AP"] < 0.5
    moved = [
        result | {"bbox": [result["bbox"][0] + 1000, *result["bbox"][1:]]} for result in results
    ]
    stats = score(annotations, moved)
    assert stats["bbox_AP"] == 0 and stats["segm_AP"] == pytest.approx(1)
    nothing = score(annotations, [])
    assert nothing["bbox_AP"] == nothing["segm_AP"] == 0
    assert score(annotations, results) == score(annotations, results[::-1])


def test_a_detection_in_a_crowd_is_no_error(few, truth, tmp_path):
    image = truth.images[0]
    height, width = image["height"], image["width"]

    def change(content):
        crowd = {"size": [height, width], "counts": [0, height * 60, height * (width - 60)]}
        entry = {"id": 10**6, "image_id": image["id"], "category_id": 1, "iscrowd": 1}
        entry |= {"area": 60 * height, "bbox": [0, 0, 60, height], "segmentation": crowd}
        content["annotations"].append(entry)

    crowded = read_annotations(tampered(few, tmp_path, change))
    results = truth_as_results(truth, few)
    pixels = np.zeros((height, width), np.uint8, "F")
    pixels[100:200, 10:40] = 1
    false = {"image_id": image["id"], "category_id": 1, "score": 2.0}
    false |= {"bbox": [10, 100, 30, 100], "segmentation": masks.encode(pixels)}
    for kind in ("bbox", "segm"):
        assert score(crowded, [false, *results])[f"{kind}_AP"] == pytest.approx(1)
        assert score(truth, [false, *results])[f"{kind}_AP"] < 0.95


def score_part(rank, world, truth, results):
    """A rank's scores of all results, of which it has those of its images."""
    batches = EvalBatchSampler(len(truth.images), 3, world, rank)
    mine = {truth.images[index]["id"] for batch in batches for index in batch}
    return score_together(truth, [result for result in results if result["image_id"] in mine])


def test_results_of_several_processes_are_one_evaluation(few, truth):
    results = truth_as_results(truth, few)
    for number, result in enumerate(results):
        result["bbox"][2] *= 1 + 0.1 * (number % 4)
    del results[3]
    expected = score(truth, results)
    assert 0.1 < expected["bbox_AP"] < 0.9
    assert group(score_part, 3, truth, results) == [expected] * 3  # of 5 images, the last has none


# --- bad input ---


MASK = {"segmentation": {"size": [5, 5], "counts": "a"}}
RLE = {"segmentation": {"size": [536, 559], "counts": [5, 6]}}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda c: c.pop("categories"), "images, annotations, categories"),
        (lambda c: c.update(images=[]), "0 images .* 1 categories"),
        (lambda c: c["images"][0].pop("height"), "image .*'height'"),
        (lambda c: c["categories"][0].pop("name"), "category .*'name'"),
        (lambda c: c["annotations"][0].update(image_id=999), "annotation 1 .*image_id 999"),
        (lambda c: c["annotations"][0].update(category_id=2), "annotation 1 .*category_id 2"),
        (lambda c: c["annotations"][0].pop("bbox"), "annotation 1 .*bbox None"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]"),
        (lambda c: c["annotations"][0].update(segmentation=[1.5]), "annotation 1 .*segmentation"),
        (lambda c: c["annotations"][0].update(MASK), r"\[5, 5\].*\[536, 559\]"),
        (lambda c: c["annotations"][0].update(RLE), r"RLE .*\b11\b.*\[536, 559\]"),
    ],
)
def test_bad_annotations_are_named(few, tmp_path, change, names):
    with pytest.raises(DataError, match=rf"tampered\.json.*{names}"):
        read_annotations(tampered(few, tmp_path, change))
