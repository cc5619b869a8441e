"""Logs every 50 steps, a checkpoint every epoch."""

_base_ = "mmdet::_base_/default_runtime.py"

custom_imports = dict(imports=["object_detection"])
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
