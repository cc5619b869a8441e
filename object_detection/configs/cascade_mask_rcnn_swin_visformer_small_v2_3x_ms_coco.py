"""Cascade Mask R-CNN with Visformer V2-S, 36 epochs; published box AP 51.6, mask AP 44.1."""

_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/coco_multiscale.py", "_base_/schedule_3x.py"]

model = dict(
    backbone=dict(model="swin_visformer_small_v2", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
