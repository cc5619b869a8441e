"""Cascade Mask R-CNN (arXiv 1712.00726): three box heads, each trained on better boxes.

The heads are of four convolutions with synchronised BatchNorm, and learn boxes by the generalised
overlap (arXiv 1902.09630).
"""

_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "runtime.py"]

BOX_DEVIATIONS = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])

model = dict(
    # as in mask_rcnn.py
    backbone=dict(_delete_=True, type="VisionBackbone", model_kwargs=dict(qk_scale_factor=-0.5)),
    roi_head=dict(
        bbox_head=[
            dict(
                type="ConvFCBBoxHead",
                num_shared_convs=4,
                num_shared_fcs=1,
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=deviations),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg=dict(type="SyncBN", requires_grad=True),
                loss_cls=dict(type="CrossEntropyLoss"),
                loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
            )
            for deviations in BOX_DEVIATIONS
        ],
    ),
)
