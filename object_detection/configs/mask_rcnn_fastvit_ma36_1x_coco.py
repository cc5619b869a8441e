"""Mask R-CNN with FastViT-MA36, 12 epochs; published, not trained here: box AP 45.1, mask 40.5."""

_base_ = "mask_rcnn_fastvit_sa12_1x_coco.py"

model = dict(
    backbone=dict(model="fastvit_ma36"),
    neck=dict(in_channels=[76, 152, 304, 608]),
)
