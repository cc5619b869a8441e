"""Data and scores of torchvision's detectors: targets, random flips, images as files have them."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import group

from datasets import DataError
from samplers import EvalBatchSampler, SampleIndex

pytest.importorskip("faster_coco_eval")

from object_detection import annotations
from object_detection.coco_evaluation import score, score_together, to_results
from object_detection.data import DetectionDataset, build_loader
from object_detection.masks import use_coco_api

TRAIN = "annotations/instances_train.json"


@pytest.fixture(scope="module")
def truth(few):
    return annotations.read(few / TRAIN)


def tampered(few, tmp_path, change, split="train"):
    """An annotation file of ``few`` after ``change(content)``."""
    content = json.loads((few / "annotations" / f"instances_{split}.json").read_text())
    change(content)
    path = tmp_path / "tampered.json"
    path.write_text(json.dumps(content))
    return path


def target_of(found, folder, index=0):
    return DetectionDataset(found, folder / "images", True)[index][1]


# --- targets --------------------------------------------------------------------------------


def test_polygons_and_both_forms_of_rle_are_the_same_masks(pennfudan, tmp_path):
    use_coco_api()
    from pycocotools import mask as masks

    folder = pennfudan / "annotations"
    content = json.loads((folder / "instances_val_rle.json").read_text())
    for entry in content["annotations"]:
        pixels = masks.decode(entry["segmentation"]).T.ravel()
        changes = np.flatnonzero(np.diff(pixels, prepend=0))
        entry["segmentation"]["counts"] = np.diff([0, *changes, pixels.size]).tolist()
    (tmp_path / "plain.json").write_text(json.dumps(content))
    files = [folder / "instances_val.json", folder / "instances_val_rle.json"]
    forms = [annotations.read(file) for file in (*files, tmp_path / "plain.json")]
    sets = [DetectionDataset(form, pennfudan / "images", True) for form in forms]
    for index in range(5):
        (image, one), *others = (dataset[index] for dataset in sets)
        entry = forms[0].images[index]
        assert (image.dtype, one["boxes"].dtype) == (torch.float32, torch.float32)
        assert image.shape == (3, entry["height"], entry["width"])
        assert 0 <= image.min() < image.max() <= 1
        for _, other in others:
            assert all(torch.equal(one[key], other[key]) for key in one)
        areas = [o["area"] for o in forms[0].objects[entry["id"]]]
        assert one["masks"].flatten(1).sum(1).tolist() == areas
        for box, mask in zip(one["boxes"], one["masks"], strict=True):
            rows, columns = mask.nonzero().unbind(1)  # boxes are tight in this data set
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_crowds_are_left_out_and_objects_without_a_mask_stay(few, tmp_path):
    def change(content):
        first, second = (image["id"] for image in content["images"][:2])
        one, other = (a for a in content["annotations"] if a["image_id"] == first)
        one["category_id"], one["segmentation"] = 7, []
        content["categories"] = [{"id": 7, "name": "b"}, {"id": 1, "name": "a"}]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != second]
        content["annotations"].append({**other, "id": 999, "iscrowd": 1})

    found = annotations.read(tampered(few, tmp_path, change), classes=["b", "a"])
    target = target_of(found, few)
    assert target["labels"].tolist() == [1, 2]
    assert target["masks"].flatten(1).any(1).tolist() == [False, True]
    empty = target_of(found, few, 1)
    assert [len(empty[key]) for key in ("boxes", "labels", "masks")] == [0, 0, 0]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].dtype == torch.int64
    assert (
        empty["masks"].shape[1:]
        == target_of(annotations.read(few / TRAIN), few, 1)["masks"].shape[1:]
    )
    image, ids = DetectionDataset(found, few / "images", False)[1]
    assert ids == {"image_id": found.images[1]["id"]} and image.dtype == torch.float32


def test_half_of_the_images_are_mirrored_the_same_in_every_run(few, truth):
    dataset = DetectionDataset(truth, few / "images", True, seed=1)
    plain, target = dataset[0]
    samples = [dataset[SampleIndex(0, epoch)] for epoch in range(20)]
    flips = [not torch.equal(image, plain) for image, _ in samples]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = [dataset[SampleIndex(0, epoch)] for epoch in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    assert 5 < sum(flips) < 15
    assert all(torch.equal(a[0], b[0]) for a, b in zip(samples, again, strict=True))
    image, flipped = samples[flips.index(True)]
    assert torch.equal(image, plain.flip(2))
    assert torch.equal(flipped["masks"], target["masks"].flip(2))
    for box, mask in zip(flipped["boxes"], flipped["masks"], strict=True):
        columns = mask.nonzero()[:, 1]
        assert box[[0, 2]].tolist() == [columns.min(), columns.max() + 1]
    others = DetectionDataset(truth, few / "images", True, seed=2)
    assert [not torch.equal(others[SampleIndex(0, e)][0], plain) for e in range(20)] != flips


def test_the_number_of_workers_does_not_change_a_run(few, truth):
    def batches(workers):
        dataset = DetectionDataset(truth, few / "images", True, seed=3)
        loader = build_loader(dataset, 2, workers, num_replicas=1, rank=0)
        loader.sampler.set_epoch(1)
        before = torch.get_rng_state()
        found = [sample for samples, *_ in loader for sample in samples]
        assert torch.equal(torch.get_rng_state(), before)
        return found

    one, other = batches(0), batches(2)
    assert len(one) == len(other) == len(truth.images)
    for (image, target), (same, also) in zip(one, other, strict=True):
        assert torch.equal(image, same) and all(torch.equal(target[k], also[k]) for k in target)


# --- image files ----------------------------------------------------------------------------


def one_image(tmp_path, image, width, height, **options):
    """A data set of one image file, whose annotations say ``width`` and ``height``."""
    image.save(tmp_path / "image.png", **options)
    entry = {"id": 3, "file_name": "image.png", "width": width, "height": height}
    box = {"id": 1, "image_id": 3, "category_id": 1, "bbox": [2, 3, 4, 5]}
    box["segmentation"] = [[2, 3, 6, 3, 6, 8, 2, 8]]
    content = {"images": [entry], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "file.json").write_text(json.dumps(content))
    return DetectionDataset(annotations.read(tmp_path / "file.json"), tmp_path, True)


@pytest.mark.parametrize(
    ("orientation", "turn"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)]
)
def test_images_are_upright_as_exif_says(tmp_path, orientation, turn):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    stored, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    upright = stored.transpose(turn)
    image, _ = one_image(tmp_path, stored, *upright.size, exif=exif)[0]
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, expected)
    if upright.size != stored.size:  # annotated as the file is stored
        with pytest.raises(DataError, match=r"20x30.*EXIF.*30x20"):
            one_image(tmp_path, stored, *stored.size, exif=exif)[0]


def test_grey_of_16_bits_is_scaled(tmp_path):
    values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    image, _ = one_image(tmp_path, Image.fromarray(values), 30, 20)[0]
    expected = torch.from_numpy(values / 65535).float().expand(3, -1, -1)
    torch.testing.assert_close(image, expected, atol=0.003, rtol=0)


def test_an_image_of_another_size_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"image\.png.*30x20.*file\.json.*30x21"):
        one_image(tmp_path, Image.new("RGB", (30, 20)), 30, 21)[0]


# --- evaluation -----------------------------------------------------------------------------


def truth_as_results(found, folder):
    """The objects of a file as if a detector had found them; without a mask, the filled box."""
    results = []
    for index, image in enumerate(found.images):
        target = target_of(found, folder, index)
        for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].tolist(), strict=True):
            if not mask.any():
                mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = 1
        detections = {**target, "scores": torch.linspace(1, 0.5, len(target["boxes"]))}
        detections["masks"] = target["masks"][:, None].float()
        results += to_results(image["id"], detections, list(found.categories))
    return results


def untidy(content):
    """Everything that a file may lack or have too much of."""
    first, second, *_ = content["images"]
    size = [first["height"], first["width"]]
    crowd = {"size": size, "counts": [0, 5000, size[0] * size[1] - 5000]}
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = number  # from 0 on, which pycocotools takes for unmatched
        entry["category_id"] = 7 if number % 2 else 90
        x, y, width, height = entry["bbox"]
        if number % 3 == 0:
            entry["segmentation"] = ([], None, [[x, y, x + width, y + height]])[number // 3 % 3]
            entry["bbox"] = [x + 0.3, y + 0.4, width - 0.6, height - 0.7]
        elif number % 3 == 1:
            entry["area"] = 0
        else:
            del entry["area"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != second["id"]]
    other = {"image_id": first["id"], "category_id": 7}
    content["annotations"] += [
        other | {"id": 901, "bbox": [0, 0, 20, 250], "iscrowd": 1, "segmentation": crowd},
        other | {"id": 902, "bbox": [30, 30, 0.4, 50]},
        other | {"id": 903, "bbox": [size[1] - 30, size[0] - 40, 300, 300]},
        other | {"id": 904, "bbox": [-20.5, 200.2, 40.25, 9.5]},
    ]
    content["categories"] = [{"id": 90, "name": "b"}, {"id": 7, "name": "a"}]


def test_the_truth_scores_one_whatever_a_file_lacks(few, tmp_path):
    found = annotations.read(tampered(few, tmp_path, untidy))
    assert list(found.categories) == [7, 90]
    assert sum(map(bool, found.objects.values())) == 4
    results = truth_as_results(found, few)
    stats = score(found, results)
    assert len(stats) == 12
    for kind in ("bbox", "segm"):
        assert stats[f"{kind}_AP"] == pytest.approx(1, abs=1e-9)
        assert stats[f"{kind}_AP75"] == pytest.approx(1, abs=1e-9)
    assert score(found, results[::-1]) == stats
    swapped = [{**result, "category_id": 97 - result["category_id"]} for result in results]
    assert score(found, swapped)["bbox_AP"] < 0.5
    moved = [
        {**result, "bbox": [result["bbox"][0] + 1000, *result["bbox"][1:]]} for result in results
    ]
    stats = score(found, moved)
    assert stats["bbox_AP"] == 0 and stats["segm_AP"] == pytest.approx(1)


def test_no_detections_score_zero(few, truth):
    assert set(score(truth, []).values()) == {0.0}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    none["masks"] = torch.zeros(0, 1, 20, 30)
    assert to_results(1, none, [1]) == []


@pytest.mark.parametrize("is_crowd", [True, False])
def test_a_detection_in_a_crowd_or_on_an_object_without_a_mask_is_no_error(
    few, truth, tmp_path, is_crowd
):
    image = truth.images[0]
    height, width = image["height"], image["width"]

    def change(content):
        entry = {"id": 10**6, "image_id": image["id"], "category_id": 1, "bbox": [0, 0, 60, height]}
        if is_crowd:
            counts = [0, height * 60, height * (width - 60)]
            entry |= {"iscrowd": 1, "segmentation": {"size": [height, width], "counts": counts}}
        content["annotations"].append(entry)

    found = annotations.read(tampered(few, tmp_path, change))
    results = truth_as_results(truth, few)
    mask = torch.zeros(1, 1, height, width)
    mask[..., 100:200, 10:40] = 1
    box = torch.tensor([[10.0, 100, 40, 200]])
    false = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([2.0])}
    results += to_results(image["id"], {**false, "masks": mask}, [1])
    assert score(found, results)["segm_AP"] == pytest.approx(1)
    assert (score(found, results)["bbox_AP"] == pytest.approx(1)) == is_crowd
    assert score(truth, results)["segm_AP"] < 0.95


def noisy(found, folder, seed):
    """Detections near to the objects, some of another class, and some anywhere."""
    rng = np.random.default_rng(seed)
    results = truth_as_results(found, folder)
    for result in results:
        result["score"] = float(rng.uniform())
        result["bbox"] = (np.array(result["bbox"]) * rng.uniform(0.8, 1.2, 4)).tolist()
        if rng.uniform() < 0.2:
            result["category_id"] = int(rng.choice(list(found.categories)))
    for result in rng.choice(results, 20):
        other = rng.choice([r for r in results if r["image_id"] == result["image_id"]])
        results.append({**result, "segmentation": other["segmentation"], "score": rng.uniform()})
    return results


def test_both_packages_give_the_same_figures(few, tmp_path, monkeypatch):
    found = annotations.read(tampered(few, tmp_path, untidy))
    results = noisy(found, few, seed=0)
    fast = score(found, results)
    assert 0.05 < fast["bbox_AP"] < 0.95 and 0.05 < fast["segm_AP"] < 0.95
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocotools"]:
        monkeypatch.delitem(sys.modules, name)
    pytest.importorskip("pycocotools")
    before = json.dumps(found.objects)
    assert score(found, results) == pytest.approx(fast, abs=1e-12)
    assert json.dumps(found.objects) == before  # the API writes into what it is given


def score_part(rank, world, found, results):
    """A rank's scores of all results, of which it has those of its images."""
    batches = EvalBatchSampler(len(found.images), 3, world, rank)
    mine = {found.images[index]["id"] for batch in batches for index in batch}
    mine = [result for result in results if result["image_id"] in mine]
    return score_together(found, mine, dist.group.WORLD)


def test_results_of_several_processes_are_one_evaluation(few, tmp_path):
    found = annotations.read(tampered(few, tmp_path, untidy))
    results = noisy(found, few, seed=1)
    expected = score(found, results)
    assert group(score_part, 3, found, results) == [expected] * 3  # the last has no images
    assert group(score_part, 2, found, []) == [score(found, [])] * 2
