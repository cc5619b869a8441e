"""The backbones in mmengine's registry, where mmdet, mmsegmentation and others find them."""

import contextlib

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS

import models
from models.checkpoint.apply import LoadReport
from object_detection.checkpoints import plain_classes


class _Reporting:
    """Reports in mmengine's log which weights a checkpoint gave to the backbone."""

    def init_weights(self) -> LoadReport | None:
        """Load the checkpoint of ``init_cfg``, which may be mmengine's."""
        with torch.serialization.safe_globals(plain_classes()):
            report = super().init_weights()
        if report is not None:
            print_log(str(report), logger="current")
        return report


@MODELS.register_module(force=True)
class VisionBackbone(_Reporting, models.VisionBackbone):
    __doc__ = models.VisionBackbone.__doc__


@MODELS.register_module(force=True)
class SwinVisformer(_Reporting, models.SwinVisformer):
    __doc__ = models.SwinVisformer.__doc__


with contextlib.suppress(ImportError, AssertionError):  # no mmdet, or one of another version
    from mmdet import registry as mmdet_registry

    # mmdet looks up its own scope, as in "mmdet.VisionBackbone", in its own registry alone
    for backbone in (VisionBackbone, SwinVisformer):
        mmdet_registry.MODELS.register_module(module=backbone, force=True)
