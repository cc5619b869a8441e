"""COCO's average precision by pycocotools, on one process or several."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from torchvision.ops import box_convert

from engine import Precision
from object_detection.coco import Annotations, to_input, to_rle
from training.progress import shown
from utils import is_main_process

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def to_results(
    image_id: int, detections: Mapping[str, torch.Tensor], categories: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the detections in an image in COCO's results format.

    Args:
        image_id: Id of the image.
        detections: ``boxes`` ``N 4`` (x1, y1, x2, y2), ``labels`` ``N`` from 1, ``scores`` ``N``
            and ``masks`` ``N 1 H W`` in 0..1, all in pixels of the image.
        categories: Id of each class, without the background.
    """
    from pycocotools import mask as rle

    masks = (detections["masks"][:, 0] >= 0.5).permute(1, 2, 0)  # H W N
    encoded = rle.encode(np.asfortranarray(masks.byte().cpu().numpy()))
    boxes = box_convert(detections["boxes"], "xyxy", "xywh").tolist()
    columns = (detections["labels"].tolist(), detections["scores"].tolist(), boxes, encoded)
    return [
        {
            "image_id": image_id,
            "category_id": categories[label - 1],
            "score": score,
            "bbox": box,
            "segmentation": mask,
        }
        for label, score, box, mask in zip(*columns, strict=True)
    ]


def score(truth: Annotations, results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return COCO's average precision of boxes and masks.

    Crowds count as in COCO: a detection within one is neither right nor wrong. Objects without a
    mask count for boxes only.

    Returns:
        ``bbox_AP``, ``bbox_AP50``, ... and ``segm_AP``, ..., in 0..1; -1 where there is no object
        (COCO's convention).
    """
    from pycocotools import mask as rle
    from pycocotools.cocoeval import COCOeval

    objects = [
        (entry, image) for image in truth.images for entry in truth.objects.get(image["id"], ())
    ]
    known = {
        "bbox": [dict(entry) for entry, _ in objects],
        "segm": [
            {**entry, "segmentation": to_rle(entry, image)}
            for entry, image in objects
            if entry["segmentation"] is not None
        ],
    }
    areas = {
        "bbox": lambda result: result["bbox"][2] * result["bbox"][3],
        "segm": lambda result: float(rle.area(result["segmentation"])),
    }
    stats = {}
    for kind, area in areas.items():
        detected = [
            {**result, "id": number, "area": area(result), "iscrowd": 0}
            for number, result in enumerate(results, start=1)
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(_to_coco(truth, known[kind]), _to_coco(truth, detected), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        figures = evaluation.stats[: len(FIGURES)].tolist()
        stats |= {f"{kind}_{name}": x for name, x in zip(FIGURES, figures, strict=True)}
    return stats


def _to_coco(truth: Annotations, entries: list[dict[str, Any]]) -> Any:
    """Return pycocotools' object of some entries; its own reader fails on an empty list."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": truth.images,
        "categories": [{"id": key, "name": name} for key, name in truth.categories.items()],
        "annotations": entries,
    }
    coco.createIndex()
    return coco


def score_together(truth: Annotations, results: list[dict[str, Any]]) -> dict[str, float]:
    """Return :func:`score` of the results of all processes, on all of them."""
    if not dist.is_initialized():
        return score(truth, results)
    parts = [None] * dist.get_world_size() if is_main_process() else None
    dist.gather_object(results, parts)
    stats = [None]
    if is_main_process():
        stats = [score(truth, [result for part in parts for result in part])]
    dist.broadcast_object_list(stats)
    return stats[0]


@torch.inference_mode()
def evaluate(
    loader: DataLoader, model: nn.Module, precision: Precision, categories: Sequence[int]
) -> dict[str, float]:
    """Return the average precision of a detector, see :func:`score`.

    Args:
        loader: This process's part of a :class:`CocoDataset` for evaluation.
        model: Detector of torchvision's interface, not distributed.
        precision: Device and autocast.
        categories: Id of each class, without the background.
    """
    model.eval()
    results = []
    for images, targets in shown(loader, "evaluation", len(loader)):
        with precision.autocast():
            detections = model([to_input(image, precision.device) for image in images])
        for target, found in zip(targets, detections, strict=True):
            results += to_results(target["image_id"], found, categories)
    return score_together(loader.dataset.annotations, results)
