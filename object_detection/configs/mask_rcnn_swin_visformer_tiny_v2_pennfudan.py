"""Mask R-CNN with Visformer V2-T on people of Penn-Fudan, or any folder of one class like it.

python -m object_detection.train \\
    object_detection/configs/mask_rcnn_swin_visformer_tiny_v2_pennfudan.py \\
    --data-root FOLDER --cfg-options model.backbone.init_cfg.type=Pretrained \\
    model.backbone.init_cfg.checkpoint=FILE

FOLDER holds images/ and annotations/instances_train.json and instances_val.json of COCO's format,
FILE weights of a classifier swin_visformer_tiny_v2. For another class, change ``metainfo``.
"""

_base_ = [
    "_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "_base_/schedule_1x.py",
]

data_root = "data/pennfudan_coco/"
metainfo = dict(classes=("person",))

model = dict(
    backbone=dict(model="swin_visformer_tiny_v2", drop_path_rate=0.1),
    neck=dict(in_channels=[48, 96, 192, 384]),
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
)

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (512, 512)
# an endless sampler: a loader that starts again waits for two seconds, longer than an epoch takes
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True),
    batch_sampler=None,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=2,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="images/"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val.json")
test_evaluator = val_evaluator

# 35 times through 136 images
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=1200, val_interval=200)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=1200, milestones=[800, 1100], gamma=0.1),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=200),
)
log_processor = dict(window_size=20, by_epoch=False)
