"""The models and their preprocessing as a library, for programs of other projects.

``pip install`` puts this file, ``models/`` and the modules of ``pipeline/`` that a prediction
needs into one package: pyproject.toml names them. Importing it registers the models with timm.
"""

from . import models
from .models import CheckpointError, DataConfig, LoadedModel, ModelError, load_model
from .pipeline.augmentation import Augmentation
from .pipeline.images import CorruptImageError, decode_image, load_image

__version__ = "0.1.0"

__all__ = [
    "Augmentation",
    "CheckpointError",
    "CorruptImageError",
    "DataConfig",
    "LoadedModel",
    "ModelError",
    "decode_image",
    "load_image",
    "load_model",
    "models",
]
