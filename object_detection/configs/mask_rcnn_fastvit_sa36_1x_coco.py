"""Mask R-CNN with FastViT-SA36, 12 epochs; published, not trained here: box AP 43.8, mask 39.4."""

_base_ = "mask_rcnn_fastvit_sa12_1x_coco.py"

model = dict(backbone=dict(model="fastvit_sa36"))
