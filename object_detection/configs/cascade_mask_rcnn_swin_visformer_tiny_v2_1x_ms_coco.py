"""Cascade Mask R-CNN with Visformer V2-T, 12 epochs."""

_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_multiscale.py", "_base_/schedule_1x.py"]

model = dict(
    backbone=dict(model="swin_visformer_tiny_v2", drop_path_rate=0.1),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
