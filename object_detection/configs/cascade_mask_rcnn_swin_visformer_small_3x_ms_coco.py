"""Cascade Mask R-CNN with Swin-Visformer-S (V1), 36 epochs of COCO at many scales.

torchrun --nproc_per_node=8 -m object_detection.train \\
    object_detection/configs/cascade_mask_rcnn_swin_visformer_small_3x_ms_coco.py \\
    --launcher pytorch --cfg-options model.backbone.init_cfg.type=Pretrained \\
    model.backbone.init_cfg.checkpoint=FILE

FILE holds weights of a classifier swin_visformer_small.
No figures are published for it.
"""

_base_ = [
    "_base_/cascade_mask_rcnn.py",
    "_base_/coco_multiscale.py",
    "_base_/schedule_3x.py",
    "_base_/runtime.py",
]

model = dict(
    backbone=dict(model="swin_visformer_small", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
