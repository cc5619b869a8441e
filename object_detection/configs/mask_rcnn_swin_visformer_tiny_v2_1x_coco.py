"""Mask R-CNN with Visformer V2-T, 12 epochs of COCO at one scale.

torchrun --nproc_per_node=8 -m object_detection.train \\
    object_detection/configs/mask_rcnn_swin_visformer_tiny_v2_1x_coco.py \\
    --launcher pytorch --cfg-options model.backbone.init_cfg.type=Pretrained \\
    model.backbone.init_cfg.checkpoint=FILE

FILE holds weights of a classifier swin_visformer_tiny_v2.
No figures are published for it.
"""

_base_ = [
    "_base_/mask_rcnn.py",
    "_base_/coco.py",
    "_base_/schedule_1x.py",
    "_base_/runtime.py",
]

model = dict(
    backbone=dict(model="swin_visformer_tiny_v2", drop_path_rate=0.1),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
