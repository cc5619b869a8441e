"""Cascade Mask R-CNN with Visformer V2-S, 12 epochs; published box AP 49.3, mask AP 42.3."""

_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_multiscale.py", "_base_/schedule_1x.py"]

model = dict(
    backbone=dict(model="swin_visformer_small_v2", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
