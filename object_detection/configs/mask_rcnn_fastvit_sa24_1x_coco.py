"""Mask R-CNN with FastViT-SA24, 12 epochs; published, not trained here: box AP 42.0, mask 38.0."""

_base_ = "mask_rcnn_fastvit_sa12_1x_coco.py"

model = dict(backbone=dict(model="fastvit_sa24"))
