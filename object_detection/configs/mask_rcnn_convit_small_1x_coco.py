"""Mask R-CNN with ConViT-S and ViTDet's simple pyramid (arXiv 2203.16527), 12 epochs."""

_base_ = ["_base_/mask_rcnn.py", "mmdet::_base_/datasets/coco_instance.py", "_base_/schedule_1x.py"]

model = dict(
    # with_cp: attention by position holds the weights of all pairs of patches
    backbone=dict(model="convit_small", model_kwargs=None, drop_path_rate=0.1, with_cp=True),
    neck=dict(in_channels=[108, 216, 432, 432]),
)
