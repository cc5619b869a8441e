"""Mask R-CNN with FastViT-SA12, 12 epochs; published, not trained here: box AP 38.9, mask 35.9."""

_base_ = ["_base_/mask_rcnn.py", "mmdet::_base_/datasets/coco_instance.py", "_base_/schedule_1x.py"]

model = dict(
    backbone=dict(model="fastvit_sa12", model_kwargs=None, drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
