"""Registration with timm: our entrypoint wins where timm has the same name."""

import warnings
from collections.abc import Callable

from timm.models import build_model_with_cfg
from timm.models import register_model as timm_register_model
from torch import nn


def register_model(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register ``entrypoint`` under its own name, without timm's notice that it replaces one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in registry", category=UserWarning)
        return timm_register_model(entrypoint)


def build_registered(
    cls: type[nn.Module],
    name: str,
    pretrained: bool,
    filter_fn: Callable[..., dict],
    default_indices: int | tuple[int, ...],
    **kwargs,
) -> nn.Module:
    """Build ``cls`` under timm's conventions: pretrained weights, tags, ``features_only``.

    Args:
        cls: Class of the model; it takes ``kwargs`` but those of timm's own.
        name: Registered name.
        pretrained: Load the weights of the name's tag.
        filter_fn: ``checkpoint_filter_fn`` of the model's file.
        default_indices: Feature maps of ``features_only=True``, unless the caller chooses.
    """
    out_indices = kwargs.pop("out_indices", default_indices)
    return build_model_with_cfg(
        cls,
        name,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
