"""Models of this repository, registered with timm.

After ``import models``, ``timm.create_model("visformer_small")`` builds the model of this
repository, also where timm has one of that name.
"""

from models import convit, fastvit, visformer, vit
from models.checkpoint.apply import LoadReport, load_checkpoint, load_weights
from models.checkpoint.contents import Normalization, class_names, flags_of_run, normalization_of
from models.checkpoint.read import read_checkpoint
from models.detection_backbone import Backbone, SwinVisformer, VisionBackbone, load_backbone
from models.errors import CheckpointError, ModelError, UnsafeFileError
from models.factory import build_model, check_input_size, pretrained_config
from models.freezing import freeze_all_but_classifier, freeze_stages

__all__ = [
    "Backbone",
    "CheckpointError",
    "LoadReport",
    "ModelError",
    "Normalization",
    "SwinVisformer",
    "UnsafeFileError",
    "VisionBackbone",
    "build_model",
    "check_input_size",
    "class_names",
    "convit",
    "fastvit",
    "flags_of_run",
    "freeze_all_but_classifier",
    "freeze_stages",
    "load_backbone",
    "load_checkpoint",
    "load_weights",
    "normalization_of",
    "pretrained_config",
    "read_checkpoint",
    "visformer",
    "vit",
]
