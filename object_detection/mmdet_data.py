"""mmdet's data sets and metric of COCO's format on checked annotations, and images as read here.

:func:`install` changes mmdet's own classes, so that data sets derived from ``CocoDataset`` are
checked, too. Class names are the config's in its order; mmdet by itself takes the file's order.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.task_modules.samplers.sampling_result import SamplingResult
from mmengine import fileio
from torch import nn

from object_detection import annotations
from object_detection.data import check_size
from pipeline.images import CorruptImageError, decode_image
from utils import UserError, log

FIGURES = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


def install() -> None:
    """Replace the reading of annotations and images in mmdet's and mmcv's classes."""
    if not hasattr(CocoDataset.load_data_list, "__wrapped__"):
        CocoDataset.load_data_list = _of_checked(CocoDataset.load_data_list)
        CocoMetric.__init__ = _with_file(CocoMetric.__init__)
        CocoMetric.compute_metrics = _checked(CocoMetric.compute_metrics)
        LoadImageFromFile.transform = _upright(LoadImageFromFile.transform)


def _of_checked(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Let the data set take its data from checked annotations."""

    @functools.wraps(original)
    def load_data_list(self: CocoDataset) -> list[dict[str, Any]]:
        if self.COCOAPI is not COCO:  # panoptic annotations
            return original(self)
        steps = getattr(self.pipeline, "transforms", [])
        masks = not self.test_mode and any(getattr(step, "with_mask", False) for step in steps)
        found = annotations.read(
            self.ann_file,
            self.metainfo["classes"],
            is_training=not self.test_mode,
            masks=masks,
            is_empty=self.test_mode,
        )
        log(found.summary("test or validation" if self.test_mode else "training"))
        self.without_mask = _check_masks(found, steps) if masks else ""
        self.COCOAPI = lambda path: _to_coco(found.content())
        data = original(self)
        del self.COCOAPI  # the class has its own
        return data

    return load_data_list


def _check_masks(found: annotations.Annotations, steps: Sequence[Any]) -> str:
    """Return the name of an object without a mask, if there is one.

    Raises:
        UserError: An object has an RLE, and the pipeline takes polygons only.
    """
    names = {image["id"]: image["file_name"] for image in found.images}
    polygons = any(getattr(step, "poly2mask", None) is False for step in steps)
    without = ""
    for entry in found:
        where = f"annotation {entry['source_id']} of image {names[entry['image_id']]}"
        if entry["iscrowd"]:
            continue
        if entry["segmentation"] is None:
            without = without or f"{where} in {found.path}"
        elif polygons and isinstance(entry["segmentation"], dict):
            raise UserError(f"{where} in {found.path} has an RLE, which needs poly2mask=True")
    return without


def _with_file(original: Callable[..., None]) -> Callable[..., None]:
    """Let the metric read its file only when the classes are known."""

    @functools.wraps(original)
    def init(self: CocoMetric, ann_file: str | None = None, *args: Any, **options: Any) -> None:
        original(self, None, *args, **options)
        self.checked_file, self.truth = ann_file, None
        if ann_file is not None:
            self._coco_api = COCO()  # else it would collect the annotations from the samples

    return init


def truth_of(metric: CocoMetric) -> annotations.Annotations | None:
    """Return the checked annotations that a metric compares with, None if it collects them."""
    if metric.truth is None and metric.checked_file is not None:
        metric.truth = annotations.read(
            metric.checked_file,
            metric.dataset_meta["classes"],
            is_training=False,
            masks="segm" in metric.metrics,
            is_empty=metric.format_only,
        )
    return metric.truth


def _checked(original: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """Let the metric compare with checked annotations, and give figures also for no detections."""

    @functools.wraps(original)
    def compute(self: CocoMetric, results: list[Any]) -> dict[str, float]:
        found = truth_of(self)
        if found is None:
            return original(self, results)
        if not self.format_only and not any(len(result["labels"]) for _, result in results):
            names, kinds = self.metric_items or FIGURES, {"bbox", "segm"} & {*self.metrics}
            return {f"{kind}_{name}": 0.0 for kind in kinds for name in names}
        stats, metrics = {}, self.metrics
        try:
            for kind in metrics:
                self.metrics = [kind]
                self._coco_api = _to_coco(found.content(as_crowd=kind == "segm"))
                self.cat_ids = list(found.categories)
                self.img_ids = [result["img_id"] for _, result in results]  # indices may be given
                stats |= original(self, results)
        finally:
            self.metrics = metrics
        return stats

    return compute


def _to_coco(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    coco.cat_img_map = coco.catToImgs  # mmdet's names
    return coco


def _upright(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the loader of colour images decode them as this project does everywhere."""

    @functools.wraps(original)
    def transform(self: LoadImageFromFile, results: dict[str, Any]) -> dict[str, Any] | None:
        if self.color_type != "color":
            return original(self, results)
        path = results["img_path"]
        try:
            data = fileio.get(path, backend_args=self.backend_args)
            image = decode_image(data, path, is_upright=True)
        except (OSError, CorruptImageError):
            if self.ignore_empty:
                return None
            raise
        if "height" in results:  # a data set's, not a single image's
            check_size(image, path, results, "its annotation")
        pixels = np.ascontiguousarray(np.asarray(image)[..., ::-1])  # mmdet's images are BGR
        results["img"] = pixels.astype(np.float32) if self.to_float32 else pixels
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results

    return transform


def data_sets(dataset: Any) -> Iterator[Any]:
    """Yield a data set and those that it wraps."""
    yield dataset
    for part in (getattr(dataset, "dataset", None), *getattr(dataset, "datasets", ())):
        if part is not None:
            yield from data_sets(part)


def train_boxes_alone(model: nn.Module, dataset: Any) -> None:
    """Leave objects without a mask out of a detector's mask loss, if a data set has some.

    Raises:
        UserError: The detector does not compute its mask loss as Mask R-CNN does; names an object.
    """
    without = [getattr(part, "without_mask", "") for part in data_sets(dataset)]
    if not any(without):
        return
    head = getattr(model, "roi_head", None)
    known = (StandardRoIHead.mask_loss, CascadeRoIHead.mask_loss)
    if getattr(type(head), "mask_loss", None) not in known or getattr(
        head, "share_roi_extractor", False
    ):
        raise UserError(
            f"{next(filter(None, without))} has no mask, and {type(model).__name__} trains masks "
            f"and boxes of all objects together"
        )
    original = head.mask_loss

    def mask_loss(*inputs: Any) -> dict[str, Any]:
        truth = inputs[-1]
        return original(*(with_masks(x, truth) if _are_samples(x) else x for x in inputs))

    head.mask_loss = mask_loss


def _are_samples(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, SamplingResult) for part in value)


def with_masks(sampled: Sequence[SamplingResult], truth: Sequence[Any]) -> list[SamplingResult]:
    """Return the samples whose object has a mask."""
    kept = []
    for result, instances in zip(sampled, truth, strict=True):
        masks = instances.masks.to_ndarray().any((1, 2))
        chosen = torch.from_numpy(masks).to(result.pos_priors.device)[result.pos_assigned_gt_inds]
        result = copy.copy(result)
        for name in ("pos_priors", "pos_assigned_gt_inds", "pos_gt_labels", "pos_gt_bboxes"):
            setattr(result, name, getattr(result, name)[chosen])
        kept.append(result)
    return kept
