"""Cascade Mask R-CNN with Visformer V2-T, 36 epochs of COCO at many scales.

torchrun --nproc_per_node=8 -m object_detection.train \\
    object_detection/configs/cascade_mask_rcnn_swin_visformer_tiny_v2_3x_ms_coco.py \\
    --launcher pytorch --cfg-options model.backbone.init_cfg.type=Pretrained \\
    model.backbone.init_cfg.checkpoint=FILE

FILE holds weights of a classifier swin_visformer_tiny_v2.
No figures are published for it.
"""

_base_ = [
    "_base_/cascade_mask_rcnn.py",
    "_base_/coco_multiscale.py",
    "_base_/schedule_3x.py",
    "_base_/runtime.py",
]

model = dict(
    backbone=dict(model="swin_visformer_tiny_v2", drop_path_rate=0.2),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
