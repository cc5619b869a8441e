"""torchvision's Mask R-CNN on the models of this repository, and on any other of timm."""

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

import models

ANCHOR_SCALE = 8  # side of an anchor in strides of its level
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width
MIN_SIZE, MAX_SIZE = 800, 1333
CHANNELS, BOX_FEATURES = 256, 1024


class PyramidBackbone(nn.Module):
    """A backbone and a feature pyramid network, with the interface of torchvision's detectors.

    Args:
        body: Backbone; the strides of its levels double.
        out_channels: Channels of every level.
    """

    def __init__(self, body: models.Backbone, out_channels: int):
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(body.num_features, out_channels, LastLevelMaxPool())

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """``B 3 H W`` to feature maps ``B C H/s W/s``: ``"0"``, ``"1"``, ... and ``"pool"``."""
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(x))))


class LevelAnchors(AnchorGenerator):
    """Anchors on grids of the levels' own strides, in float32.

    torchvision's class estimates the strides from the rounded sizes of the feature maps, and places
    anchors in their precision: in bfloat16 to 8 pixels at the right of a large image.

    Args:
        strides: Strides of all levels.
    """

    def __init__(self, strides: Sequence[int]):
        sizes = tuple((ANCHOR_SCALE * stride,) for stride in strides)
        super().__init__(sizes, (ANCHOR_RATIOS,) * len(strides))
        self.strides = tuple(strides)

    def forward(self, images: ImageList, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the anchors ``N 4`` of all levels, for every image of the batch."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        strides = [(stride, stride) for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([x.shape[-2:] for x in maps], strides))
        return [anchors] * len(images.image_sizes)


class MaskHeads(RoIHeads):
    """Heads whose mask loss leaves out objects with an empty mask: those train the box part alone.

    The rest is torchvision's, whose ``forward`` computes no masks in training.
    """

    def has_mask(self) -> bool:
        """Return True if torchvision's ``forward`` is to compute masks."""
        return not self.training

    def select_training_samples(self, proposals: list, targets: list) -> tuple[list, ...]:
        """Return torchvision's selection, and keep it for the mask loss."""
        self.selected = super().select_training_samples(proposals, targets)
        return self.selected

    def forward(
        self, features: dict, proposals: list, image_shapes: list, targets: list | None = None
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Return the detections, in training none, and the losses."""
        result, losses = super().forward(features, proposals, image_shapes, targets)
        if self.training:
            boxes, matched = [], []
            for chosen, index, labels, target in zip(*self.selected[:3], targets, strict=True):
                positive = torch.where(labels > 0)[0]
                has_mask = target["masks"].flatten(1).any(1).bool()[index[positive]]
                boxes.append(chosen[positive[has_mask]])
                matched.append(index[positive[has_mask]])
            self.selected = None
            pooled = self.mask_roi_pool(features, boxes, image_shapes)
            logits = self.mask_predictor(self.mask_head(pooled))
            masks, labels = ([target[key] for target in targets] for key in ("masks", "labels"))
            losses["loss_mask"] = maskrcnn_loss(logits, boxes, masks, labels, matched)
        return result, losses


def _pooler(strides: Sequence[int], output_size: int) -> MultiScaleRoIAlign:
    """Return RoIAlign on levels ``"0"``, ``"1"``, ..., with the scales that torchvision infers."""
    pooler = MultiScaleRoIAlign(
        [str(i) for i in range(len(strides))], output_size, sampling_ratio=2
    )
    pooler.scales = [1 / stride for stride in strides]
    pooler.map_levels = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pooler


def _in_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Forward hook: convert half precision to float32, mainly for the boxes."""
    if torch.is_tensor(outputs):
        half = outputs.dtype in (torch.float16, torch.bfloat16)
        return outputs.float() if half else outputs
    return type(outputs)(_in_float32(module, inputs, output) for output in outputs)


def build_mask_rcnn(
    model_name: str,
    num_classes: int,
    min_size: int | Sequence[int] = MIN_SIZE,
    max_size: int = MAX_SIZE,
    channels: int = CHANNELS,
    **backbone_options: Any,
) -> MaskRCNN:
    """Return torchvision's Mask R-CNN (arXiv 1703.06870) on a feature pyramid of any model.

    In training it takes images ``3 H W`` in 0..1 of any sizes and targets, and returns a dict of
    losses; in evaluation it returns a dict of boxes, labels, scores and masks per image. Boxes
    are in pixels of the input image. It resizes images, and normalises them with the mean and std
    of the model's pretraining. Under autocast, boxes stay in float32.

    Args:
        model_name: Any timm model name.
        num_classes: Number of classes, without the background: labels are 1..num_classes.
        min_size: Length of the shorter side; of several, training samples one per image, and
            evaluation takes the last.
        max_size: Maximum length of the longer side.
        channels: Channels of the pyramid and of the convolutions of the heads.
        backbone_options: Of :class:`models.VisionBackbone`: ``out_indices``, ``frozen_stages``,
            ``norm_eval``, ``with_cp``, ``drop_path_rate``, ``level_norm``, ``model_kwargs`` and
            ``init_cfg``, whose checkpoint is loaded.

    Raises:
        models.ModelError: The name is unknown, or an argument is out of range.
        models.CheckpointError: The checkpoint of ``init_cfg`` does not fit.
    """
    sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
    if num_classes < 1 or min(*sizes, max_size, channels) < 1:
        raise models.ModelError(
            f"num_classes {num_classes}, min_size {min_size}, max_size {max_size} and channels "
            f"{channels} must be positive"
        )
    body = models.VisionBackbone(model_name, **backbone_options)
    body.init_weights()
    strides = body.strides
    if any(fine * 2 != coarse for fine, coarse in itertools.pairwise(strides)):
        raise models.ModelError(
            f"{model_name} has levels of strides {strides}, which do not double; out_indices "
            f"chooses others"
        )
    detector = MaskRCNN(
        PyramidBackbone(body, channels),
        min_size=sizes,
        max_size=max_size,
        image_mean=list(body.net.pretrained_cfg["mean"]),
        image_std=list(body.net.pretrained_cfg["std"]),
        rpn_anchor_generator=LevelAnchors([*strides, 2 * strides[-1]]),
        box_roi_pool=_pooler(strides, 7),
        box_head=TwoMLPHead(channels * 7**2, BOX_FEATURES),
        box_predictor=FastRCNNPredictor(BOX_FEATURES, num_classes + 1),
        mask_roi_pool=_pooler(strides, 14),
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
        size_divisible=math.lcm(strides[-1], body.patch),
    )
    heads = detector.roi_heads
    heads.__class__ = MaskHeads  # torchvision's detector builds no other heads than its own
    for module in (detector.rpn.head, heads.box_predictor, heads.mask_predictor):
        module.register_forward_hook(_in_float32)
    return detector
