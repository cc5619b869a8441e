"""Mask R-CNN with ViT-B/16, simple pyramid and optimiser of ViTDet (arXiv 2203.16527), 12 epochs.

Unlike there, attention is global in all blocks, the neck is an FPN, heads have no LayerNorm, and
images have one scale.
"""

_base_ = ["_base_/mask_rcnn.py", "mmdet::_base_/datasets/coco_instance.py", "_base_/schedule_1x.py"]

model = dict(
    backbone=dict(model="vit_base_patch16_224", model_kwargs=None, drop_path_rate=0.1),
    neck=dict(in_channels=[192, 384, 768, 768]),
)

# mmdet's constructor of layer-wise decay knows ConvNeXt only: the same by name, 0.7 per block
RATES = {f"net.blocks.{block}.": 0.7 ** (12 - block) for block in range(12)}
RATES |= dict.fromkeys(("net.patch_embed.", "net.cls_token", "net.pos_embed"), 0.7**13)
KEYS = {name: dict(lr_mult=rate) for name, rate in RATES.items()}
KEYS |= {f"{name}norm": dict(lr_mult=rate, decay_mult=0.0) for name, rate in RATES.items()}
KEYS["net.pos_embed"]["decay_mult"] = 0.0
optim_wrapper = dict(optimizer=dict(weight_decay=0.1), paramwise_cfg=dict(custom_keys=KEYS))
