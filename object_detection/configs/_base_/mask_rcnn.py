"""Mask R-CNN (arXiv 1703.06870) of mmdet with a backbone of this repository.

The backbone's name, its stochastic depth and the pyramid's input channels are left to the config
that builds on this.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "runtime.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionBackbone",
        # Visformer's: the exponent of the pre-scale keeps attention within float16's range
        model_kwargs=dict(qk_scale_factor=-0.5),
    ),
)
