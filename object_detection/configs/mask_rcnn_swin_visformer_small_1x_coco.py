"""Mask R-CNN with Swin-Visformer-S (V1), 12 epochs; published box AP 43.0, mask AP 39.6."""

_base_ = ["_base_/mask_rcnn.py", "mmdet::_base_/datasets/coco_instance.py", "_base_/schedule_1x.py"]

model = dict(
    backbone=dict(model="swin_visformer_small", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
