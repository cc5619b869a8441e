"""Detection and instance segmentation with this repository's models as backbones.

A config of mmdet, mmsegmentation or another library on mmengine needs only ``custom_imports =
dict(imports=["object_detection"])``: it registers the backbones ``VisionBackbone`` (any model by
name) and ``SwinVisformer`` (the original's keyword names), and lets mmcv run without compiled
operators. Without mmengine, nothing happens.
"""

import contextlib
import importlib.util


def _register() -> None:
    """Prepare mmcv and register the backbones, if mmengine can be imported."""
    if importlib.util.find_spec("mmengine") is None:
        return
    from object_detection import mmcv_ops

    mmcv_ops.install()
    with contextlib.suppress(ImportError):  # the commands say what is needed
        from object_detection import mmdet_backbones  # noqa: F401


_register()
