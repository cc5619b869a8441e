"""Detectors and backbones for images of one size, as ONNX, and their comparison with torch."""

import io
import logging
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks
from torchvision.models.detection.transform import resize_boxes

import models
from utils import UserError, log

OUTPUTS = ("boxes", "labels", "scores", "masks")
OPSET = 18
TOLERANCE, ROUNDING = 1e-3, 4.0
MAY_DIFFER = 20  # one of so many detections: rounding decides, too, what NMS keeps


class Maps(nn.Module):
    """The first part of a detector: pixels ``H W 3`` of uint8 to the maps of its pyramid.

    Args:
        detector: In evaluation mode.
        images: Its transform of an image of the size.
    """

    def __init__(self, detector: MaskRCNN, images: ImageList):
        super().__init__()
        self.detector = detector
        self.size, self.padded = images.image_sizes[0], images.tensors.shape[-2:]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the maps, ``1 C h w`` each."""
        image = self.detector.transform.normalize(pixels.permute(2, 0, 1) / 255)[None]
        image = F.interpolate(image, self.size, mode="bilinear", align_corners=False)
        (height, width), (below, right) = self.size, self.padded
        image = F.pad(image, (0, right - width, 0, below - height))
        return tuple(self.detector.backbone(image).values())


class Heads(nn.Module):
    """The second part: the maps to ``OUTPUTS``.

    Masks are pasted by two products for all detections. In ONNX, torchvision's loop over them takes
    seven times as long (100 masks of 800x1333 pixels).

    Args:
        detector: In evaluation mode.
        images: Its transform of an image of the size.
        size: Height and width of the image.
    """

    def __init__(self, detector: MaskRCNN, images: ImageList, size: Sequence[int]):
        super().__init__()
        self.detector, self.images, self.size = detector, images, tuple(size)

    def forward(self, *maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return ``OUTPUTS``."""
        levels = OrderedDict((str(i), level) for i, level in enumerate(maps))
        proposals, _ = self.detector.rpn(self.images, levels)
        (found,), _ = self.detector.roi_heads(levels, proposals, self.images.image_sizes)
        boxes = resize_boxes(found["boxes"], self.images.image_sizes[0], self.size)
        masks, scale = expand_masks(found["masks"], 1)
        left, top, right, bottom = expand_boxes(boxes, scale).long().unbind(1)
        rows = interpolation(top, bottom, masks.shape[-1], self.size[0])
        columns = interpolation(left, right, masks.shape[-1], self.size[1])
        masks = rows @ masks[:, 0] @ columns.transpose(1, 2)
        return boxes, found["labels"], found["scores"], masks[:, None]


def interpolation(low: torch.Tensor, high: torch.Tensor, count: int, side: int) -> torch.Tensor:
    """Return linear weights ``N side count`` of values that are stretched over ``low..high``."""
    length = (high - low + 1).clamp(min=1)[:, None]
    place = torch.arange(side) - low[:, None]
    value = ((place + 0.5) * count / length - 0.5).clamp(0, count - 1)[..., None]
    weights = (1 - (value - torch.arange(count)).abs()).clamp(min=0)
    return weights * ((place >= 0) & (place < length))[..., None]


def to_onnx(
    model: nn.Module, inputs: Sequence[torch.Tensor], names: Sequence[str], **options: Any
) -> Any:
    """Return a model as ONNX, with the names of its inputs and outputs."""
    import onnx

    content, count = io.BytesIO(), len(inputs)
    logging.disable()  # the exporters tell of operators and of constants that are no concern
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                *(model, tuple(inputs), content),
                input_names=names[:count],
                output_names=names[count:],
                opset_version=OPSET,
                **options,
            )
    except Exception as error:  # the exporters raise errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"PyTorch cannot export this model to ONNX: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load_from_string(content.getvalue())


def backbone_to_onnx(backbone: models.Backbone, image: torch.Tensor) -> Any:
    """Return a backbone as ONNX, for images of the size of ``image``, ``1 3 H W``."""
    names = ["image", *(f"stride{stride}" for stride in backbone.strides)]
    return to_onnx(fused(backbone), [image], names, dynamo=True, verbose=False)


def detector_to_onnx(detector: MaskRCNN, pixels: torch.Tensor) -> Any:
    """Return a detector as ONNX, for images of the size of ``pixels``, ``H W 3``.

    PyTorch's newer exporter knows all backbones, its older one torchvision's heads.
    """
    from onnx import compose

    size = pixels.shape[:2]
    images, _ = detector.transform([torch.zeros(3, *size)])
    detector.backbone.body = fused(detector.backbone.body)
    first = Maps(detector, images).eval()
    maps = first(pixels)
    names = [f"level{i}" for i in range(len(maps))]
    axes = {name: {0: "detections"} for name in OUTPUTS}
    heads = Heads(detector, images, size).eval()
    second = to_onnx(heads, maps, [*names, *OUTPUTS], dynamo=False, dynamic_axes=axes)
    first = to_onnx(first, [pixels], ["pixels", *names], dynamo=True, verbose=False)
    second.ir_version = first.ir_version
    second = compose.add_prefix(second, "heads/", rename_inputs=False, rename_outputs=False)
    return compose.merge_models(first, second, [(name, name) for name in names])


def fused(backbone: models.Backbone) -> models.Backbone:
    """Return the fused backbone if it can be fused."""
    return backbone.fuse() if hasattr(backbone.net, "fuse") else backbone


def margin(expected: torch.Tensor, exact: torch.Tensor) -> float:
    """Return by how much a feature map may differ: random weights amplify rounding.

    Args:
        expected: Computed in float32.
        exact: Computed in float64.
    """
    rounding = (expected - exact).abs().max().item()
    return max(TOLERANCE * expected.abs().max().item(), ROUNDING * rounding)


def lost(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> int:
    """Return the number of detections that only one of two ``OUTPUTS`` contains."""
    boxes, labels, scores, masks = zip(found, expected, strict=True)
    longest = max(masks[1].shape[-2:])
    near = torch.cdist(*boxes, p=math.inf) < TOLERANCE * max(1, longest / 10)  # pixels
    near &= (labels[0][:, None] == labels[1]) & ((scores[0][:, None] - scores[1]).abs() < TOLERANCE)
    one, other = near.nonzero().unbind(1)
    same = ((masks[0][one] - masks[1][other]).abs() < TOLERANCE).flatten(1).all(1)
    return max(map(len, boxes)) - len(one[same].unique())


def check(
    path: Path, example: torch.Tensor, expected: Sequence[torch.Tensor], margins: Sequence[float]
) -> None:
    """Raise UserError unless onnxruntime computes detections, or feature maps within margins."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    found = [torch.from_numpy(output) for output in found]
    if margins:
        triples = zip(found, expected, margins, strict=True)
        wrong = sum(not (a - b).abs().max() < margin for a, b, margin in triples)
        count, what = len(expected), "feature maps"
    else:
        wrong, what = lost(found, expected), "detections"
        count = max(len(found[0]), len(expected[0]))
    if wrong > count // MAY_DIFFER:
        raise UserError(f"the program is wrong: onnxruntime differs in {wrong} of {count} {what}")
    log(f"onnxruntime agrees with torch in {count - wrong} of {count} {what}")
