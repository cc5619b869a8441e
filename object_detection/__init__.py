"""Detection and instance segmentation with this repository's models as backbones.

For mmdet, a config needs only ``custom_imports = dict(imports=["object_detection"])``: it registers
the backbones ``VisionBackbone`` (any model by name) and ``SwinVisformer`` (the original's keyword
names), and lets mmcv run without compiled operators. Without mmdet, nothing happens.
"""

import contextlib
import importlib.util


def _register() -> None:
    """Prepare mmcv and register the backbones, if mmdet 3 can be imported."""
    if any(importlib.util.find_spec(name) is None for name in ("mmengine", "mmcv", "mmdet")):
        return
    from object_detection import mmcv_ops

    mmcv_ops.install()
    with contextlib.suppress(ImportError, AssertionError):  # the commands say what is needed
        from object_detection import mmdet_backbones  # noqa: F401


_register()
