"""Cascade Mask R-CNN with Swin-Visformer-S (V1), 12 epochs."""

_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_multiscale.py", "_base_/schedule_1x.py"]

model = dict(
    backbone=dict(model="swin_visformer_small", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
