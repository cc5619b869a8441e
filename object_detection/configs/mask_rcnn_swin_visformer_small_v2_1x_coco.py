"""Mask R-CNN with Visformer V2-S, 12 epochs; published box AP 44.8, mask AP 40.7."""

_base_ = ["_base_/mask_rcnn.py", "mmdet::_base_/datasets/coco_instance.py", "_base_/schedule_1x.py"]

model = dict(
    backbone=dict(model="swin_visformer_small_v2", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
