"""COCO 2017 at many scales: DETR's augmentation (arXiv 2005.12872, section 4).

Half of the images are resized, their shorter side to 480 ... 800 pixels; the other half are
resized, cropped, and resized so.
"""

_base_ = "mmdet::_base_/datasets/coco_instance.py"

SCALES = [(size, 1333) for size in range(480, 801, 32)]
SCALES_BEFORE_CROP = [(size, 1333) for size in (400, 500, 600)]

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomChoiceResize", scales=SCALES, keep_ratio=True)],
            [
                dict(type="RandomChoiceResize", scales=SCALES_BEFORE_CROP, keep_ratio=True),
                dict(
                    type="RandomCrop",
                    crop_type="absolute_range",
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                dict(type="RandomChoiceResize", scales=SCALES, keep_ratio=True),
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
