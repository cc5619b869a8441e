"""Models of this repository, registered with timm.

After ``import models``, ``timm.create_model("visformer_small")`` builds the model of this
repository, also where timm has one of that name.
"""

from . import convit, fastvit, mobileclip, visformer, vit
from .checkpoint.apply import LoadReport, load_checkpoint, load_weights
from .checkpoint.read import read_checkpoint
from .data_config import DataConfig, height_and_width, size_text
from .detection_backbone import Backbone, SwinVisformer, VisionBackbone, load_backbone
from .errors import CheckpointError, ModelError, UnreadableFileError, UnsafeFileError
from .factory import build_model, check_input_size, is_own_model, pretrained_config
from .freezing import freeze_all_but_attention, freeze_all_but_classifier, freeze_stages
from .layers.fuse import fused, is_fusible
from .load import LoadedModel, find_model, from_checkpoint, load_model, read_weights
from .source import ModelSource

__all__ = [
    "Backbone",
    "CheckpointError",
    "DataConfig",
    "LoadReport",
    "LoadedModel",
    "ModelError",
    "ModelSource",
    "SwinVisformer",
    "UnreadableFileError",
    "UnsafeFileError",
    "VisionBackbone",
    "build_model",
    "check_input_size",
    "convit",
    "fastvit",
    "find_model",
    "freeze_all_but_attention",
    "freeze_all_but_classifier",
    "freeze_stages",
    "from_checkpoint",
    "fused",
    "height_and_width",
    "is_fusible",
    "is_own_model",
    "load_backbone",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "mobileclip",
    "pretrained_config",
    "read_checkpoint",
    "read_weights",
    "size_text",
    "visformer",
    "vit",
]
