"""mmdet on checked annotations: its metric, its mask loss, and its images."""

import copy

import numpy as np
import pytest
import torch
from annotation_files import BOXES, CASES, CLASSES, HEIGHT, WIDTH, content, polygon, rle, write
from PIL import Image

from datasets import DataError
from object_detection import annotations, mmdet_data, runtime
from object_detection.masks import to_rle
from utils import UserError

try:
    runtime.load_mmdet()
except UserError as error:
    pytest.skip(f"{error}", allow_module_level=True)

from mmdet.evaluation import CocoMetric
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.models.task_modules.samplers.sampling_result import SamplingResult
from mmdet.registry import MODELS
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from pycocotools import mask as coding


def own_targets(found):
    """The objects of a file as if a detector had found them; the box where there is no mask."""
    samples = []
    for image in found.images:
        objects = found.objects[image["id"]]
        masks = []
        for entry in objects:
            form = entry["segmentation"] or [polygon(*entry["bbox"])]
            masks.append(coding.decode(to_rle(form, image)).astype(bool))
        boxes = torch.tensor([entry["bbox"] for entry in objects]).reshape(-1, 4).float()
        boxes[:, 2:] += boxes[:, :2]
        pred = {
            "bboxes": boxes,
            "scores": torch.linspace(0.9, 0.5, len(objects)),
            "labels": torch.tensor([found.labels[entry["category_id"]] for entry in objects]),
            "masks": torch.from_numpy(np.array(masks).reshape(-1, HEIGHT, WIDTH)),
        }
        samples.append(
            {"img_id": image["id"], "ori_shape": (HEIGHT, WIDTH), "pred_instances": pred}
        )
    return samples


def scores(file, samples, classes=CLASSES):
    metric = CocoMetric(ann_file=str(file), metric=["bbox", "segm"])
    metric.dataset_meta = {"classes": classes}
    metric.process({}, samples)
    return metric.evaluate(len(samples))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.objects])
def test_own_targets_are_all_right(tmp_path, name):
    made = content()
    CASES[name].change(made)
    file = write(tmp_path, made)
    stats = scores(file, own_targets(annotations.read(file, CLASSES)))
    for kind in ("bbox", "segm"):
        assert stats[f"coco/{kind}_mAP"] == 1.0


def test_classes_follow_the_config_in_evaluation(tmp_path):
    made = content()
    made["categories"].reverse()
    file = write(tmp_path, made)
    samples = own_targets(annotations.read(file, CLASSES[::-1]))
    assert scores(file, samples, CLASSES[::-1])["coco/bbox_mAP"] == 1.0
    assert scores(file, samples, CLASSES)["coco/bbox_mAP"] == 0.0  # cats taken for dogs


def test_a_part_of_the_images_is_compared_with_their_objects(tmp_path):
    file = write(tmp_path)
    samples = own_targets(annotations.read(file, CLASSES))
    stats = scores(file, samples[1:3])  # as a data set's ``indices`` leaves
    assert stats["coco/bbox_mAP"] == stats["coco/segm_mAP"] == 1.0


def test_no_detection_has_figures(tmp_path):
    file = write(tmp_path)
    samples = own_targets(annotations.read(file, CLASSES))
    for sample in samples:
        sample["pred_instances"] = {k: v[:0] for k, v in sample["pred_instances"].items()}
    stats = scores(file, samples)
    assert stats["coco/bbox_mAP"] == stats["coco/segm_mAP_50"] == 0.0


# --- objects without a mask


def sampled(owners, count):
    """Samples of which the positive ones belong to these objects."""
    number = len(owners)
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in BOXES]).float()[:count]
    priors = torch.cat([boxes[owners] + torch.arange(number)[:, None], torch.zeros(2, 4)])
    assigned = torch.tensor([*(owner + 1 for owner in owners), 0, 0])
    labels = torch.tensor([*owners, -1, -1])
    result = AssignResult(count, assigned, torch.ones(number + 2), labels)
    return SamplingResult(
        torch.arange(number),
        torch.arange(number, number + 2),
        priors,
        boxes,
        result,
        torch.zeros(number + 2, dtype=torch.uint8),
    )


def roi_head(kind):
    head = {
        "type": "FCNMaskHead",
        "num_convs": 1,
        "in_channels": 4,
        "conv_out_channels": 4,
        "num_classes": 2,
        "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True},
    }
    extractor = {
        "type": "SingleRoIExtractor",
        "out_channels": 4,
        "featmap_strides": [4],
        "roi_layer": {"type": "RoIAlign", "output_size": 14, "sampling_ratio": 0},
    }
    options = {"mask_roi_extractor": extractor, "mask_head": head}
    config = ConfigDict(mask_size=28)
    if kind == "CascadeRoIHead":
        boxes = {"type": "ConvFCBBoxHead", "num_shared_fcs": 1, "in_channels": 4, "num_classes": 2}
        options |= {"num_stages": 1, "stage_loss_weights": [1]}
        options |= {"bbox_roi_extractor": extractor, "bbox_head": boxes}
        config = [config]
    torch.manual_seed(0)
    head = MODELS.build({"type": kind, **options})
    head.train_cfg = config
    return head


class Detector(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.roi_head = head


class Data:
    """A data set with an object without a mask."""

    without_mask = "annotation 7"


@pytest.mark.parametrize("kind", ["StandardRoIHead", "CascadeRoIHead"])
def test_objects_without_a_mask_stay_out_of_the_mask_loss(kind):
    head = roi_head(kind)
    maps = (torch.randn(1, 4, HEIGHT // 4, WIDTH // 4),)
    masks = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    masks[0, 15:35, 12:38] = 1
    truth = [InstanceData(masks=BitmapMasks(masks, HEIGHT, WIDTH), labels=torch.tensor([0, 1]))]

    def loss(owners):
        samples = [sampled(owners, 2)]
        words = (maps, samples, None) if kind == "StandardRoIHead" else (0, maps, samples)
        return head.mask_loss(*words, truth)["loss_mask"]["loss_mask"]

    alone, both = loss([0, 0]), loss([0, 1, 0, 1])
    mmdet_data.train_boxes_alone(Detector(head), Data())
    torch.testing.assert_close(loss([0, 0]), alone, rtol=0, atol=0)
    assert not torch.equal(both, alone)
    moved = sampled([0, 1, 0, 1], 2)
    kept = mmdet_data.with_masks([moved], truth)[0]
    assert torch.equal(kept.pos_priors, moved.pos_priors[::2])
    loss([1]).backward()  # none is left
    assert all(not p.grad.any() for p in head.mask_head.parameters() if p.grad is not None)


def test_other_detectors_refuse_objects_without_a_mask():
    with pytest.raises(UserError, match="annotation 7"):
        mmdet_data.train_boxes_alone(Detector(torch.nn.Identity()), Data())


# --- images


def load(path, **sizes):
    from mmdet.registry import TRANSFORMS

    loader = TRANSFORMS.build({"type": "LoadImageFromFile"})
    return loader({"img_path": str(path), **sizes})


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_are_upright(tmp_path, orientation):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:5, :5] = 255  # top left
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]  # quarters, counterclockwise
    assert np.array_equal(load(path)["img"], np.rot90(pixels, turns))
    height, width = np.rot90(pixels, turns).shape[:2]
    assert load(path, height=height, width=width)["img_shape"] == (height, width)
    with pytest.raises(DataError, match=f"{path}.*{width}x{height}"):
        load(path, height=height + 1, width=width)


def test_images_of_16_bits_and_of_floats(tmp_path):
    values = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = load(tmp_path / "deep.png")["img"]
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - values[..., None] / 257).max() <= 0.5
    Image.fromarray(np.ones((20, 30), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float\.tiff"):
        load(tmp_path / "float.tiff")


def test_polygon_masks_refuse_run_lengths(tmp_path):
    from mmdet.datasets import CocoDataset

    made = content()
    made["annotations"][2]["segmentation"] = rle(*BOXES[0])
    file = write(tmp_path, made)
    steps = [{"type": "LoadAnnotations", "with_mask": True, "poly2mask": False}]
    with pytest.raises(UserError, match=r"annotation 3 .*2\.png"):
        CocoDataset(
            ann_file=str(file), metainfo={"classes": CLASSES}, pipeline=copy.deepcopy(steps)
        )
