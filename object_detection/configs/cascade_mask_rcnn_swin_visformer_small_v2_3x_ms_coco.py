"""Cascade Mask R-CNN with Visformer V2-S, 36 epochs of COCO at many scales.

torchrun --nproc_per_node=8 -m object_detection.train \\
    object_detection/configs/cascade_mask_rcnn_swin_visformer_small_v2_3x_ms_coco.py \\
    --launcher pytorch --cfg-options model.backbone.init_cfg.type=Pretrained \\
    model.backbone.init_cfg.checkpoint=FILE

FILE holds weights of a classifier swin_visformer_small_v2.
Published: box AP 51.6, mask AP 44.1; 81 M parameters, 740 GFLOPs at 1280x800.
"""

_base_ = [
    "_base_/cascade_mask_rcnn.py",
    "_base_/coco_multiscale.py",
    "_base_/schedule_3x.py",
    "_base_/runtime.py",
]

model = dict(
    backbone=dict(model="swin_visformer_small_v2", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
