"""COCO's average precision by faster-coco-eval or pycocotools, on one process or several."""

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
from object_detection.annotations import Annotations
from object_detection.masks import use_coco_api
from training.progress import shown
from utils import all_or_none, broadcast_value, is_main_process

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
KINDS = {"bbox": "bbox", "segm": "segmentation"}  # evaluations, and the keys of their results


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
    ids = [categories[label - 1] for label in detections["labels"].tolist()]
    columns = zip(ids, detections["scores"].tolist(), boxes, encoded, strict=True)
    keys = ("category_id", "score", "bbox", "segmentation")
    return [{"image_id": image_id, **dict(zip(keys, row, strict=True))} for row in columns]


def score(truth: Annotations, results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return COCO's average precision of boxes and masks.

    A detection within a crowd counts neither as right nor as wrong (COCO's rule). For masks, the
    same holds for one within the box of an object without a mask.

    Returns:
        ``bbox_AP``, ``bbox_AP50``, ... and ``segm_AP``, ..., in 0..1: 0 without any detection, -1
        where there is no object (COCO's convention).
    """
    if not results:
        return {f"{kind}_{name}": 0.0 for kind in KINDS for name in FIGURES}
    use_coco_api()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    stats = {}
    for kind, key in KINDS.items():
        keys = ("image_id", "category_id", "score", key)
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth.content(as_crowd=kind == "segm")
            coco.createIndex()
            found = coco.loadRes([{name: result[name] for name in keys} for result in results])
            evaluation = COCOeval(coco, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        figures = zip(FIGURES, evaluation.stats, strict=False)  # recalls follow
        stats |= {f"{kind}_{name}": float(figure) for name, figure in figures}
    return stats


def score_together(
    truth: Annotations, results: list[dict[str, Any]], group: dist.ProcessGroup | None
) -> dict[str, float]:
    """Return :func:`score` of the results of all ranks of a CPU process group, on all of them."""
    if group is None:
        return score(truth, results)
    parts = [None] * dist.get_world_size() if is_main_process() else None
    dist.gather_object(results, parts, group=group)
    everything = [result for part in parts or () for result in part]
    stats = all_or_none(lambda: score(truth, everything) if parts else None, group)
    return broadcast_value(stats, group)


@torch.inference_mode()
def evaluate(
    loader: DataLoader, model: nn.Module, precision: Precision, group: dist.ProcessGroup | None
) -> dict[str, float]:
    """Return the average precision of a detector, see :func:`score`.

    Args:
        loader: This process's part of a :class:`DetectionDataset` for evaluation.
        model: Detector of torchvision's interface, not distributed.
        precision: Device and autocast.
        group: CPU process group, by which an error of one rank ends all; None for a single process.

    Raises:
        PeerError: Another rank failed.
    """
    truth = loader.dataset.found

    def detect() -> list[dict[str, Any]]:
        model.eval()
        results = []
        for samples, *_ in shown(loader, "evaluation", len(loader)):
            images = [image.to(precision.device, non_blocking=True) for image, _ in samples]
            with precision.autocast():
                found = model(images)
            for (_, target), detections in zip(samples, found, strict=True):
                results += to_results(target["image_id"], detections, list(truth.categories))
        return results

    return score_together(truth, all_or_none(detect, group), group)
