"""Registration with timm: our entrypoint wins where timm has the same name."""

import warnings
from collections.abc import Callable

from timm.models import register_model as timm_register_model
from torch import nn


def register_model(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register ``entrypoint`` under its own name, without timm's notice that it replaces one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in registry", category=UserWarning)
        return timm_register_model(entrypoint)
