"""Registration of models with timm, and building by name with helpful errors."""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models import register_model as timm_register_model
from torch import nn

from .data_config import height_and_width
from .errors import ModelError, nearest


def register_model(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register ``entrypoint`` under its name, also where timm has a model of that name.

    timm's warning about the replacement is suppressed.
    """
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
        cls: Class of the model; accepts ``kwargs`` except those of timm.
        name: Registered name.
        pretrained: Load the pretrained weights of the name's tag.
        filter_fn: ``checkpoint_filter_fn`` of the model's file.
        default_indices: Default feature maps of ``features_only=True``.
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


def check_name(name: str) -> None:
    """Raise ModelError, with the nearest names, if timm has no model of this name."""
    if not timm.is_model(name):
        near = nearest(name, timm.list_models(), count=5, cutoff=0.5)
        hint = f"the nearest are {', '.join(near)}" if near else "timm.list_models() lists them"
        raise ModelError(f"there is no model {name!r}; {hint}")


def is_own_model(name: str) -> bool:
    """Return True if a registered model, with or without a tag, is of this repository."""
    return is_own(timm.models.model_entrypoint(name))


def is_own(item: type | Callable) -> bool:
    """Return True for a class or function of this package, whatever name it is imported by."""
    return item.__module__.startswith(f"{__package__}.")


def pretrained_config(name: str) -> PretrainedCfg | None:
    """Return timm's description of the weights of ``name``, with or without a tag, if any.

    Raises:
        ModelError: The model (the nearest names are given) or the tag is unknown.
    """
    check_name(name)
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ModelError(f"there is no model {name!r}: {error}") from error


def build_model(
    name: str, required: Mapping[str, Any], optional: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model registered with timm.

    Args:
        name: Any name of ``timm.list_models()``.
        required: Keyword arguments that the model must accept.
        optional: Keyword arguments that are left out if the model does not accept them.

    Returns:
        The model, and the keyword arguments that it was built with.

    Raises:
        ModelError: The name is unknown (the nearest are given), or an argument is not accepted.
    """
    check_name(name)
    optional = dict(optional)
    while True:
        kwargs = {key: value for key, value in (optional | required).items() if value is not None}
        try:
            return timm.create_model(name, **kwargs), kwargs
        except ModelError:
            raise
        except TypeError as error:
            said = re.search(r"unexpected keyword argument\S* ('\w+'|\[.*?\])", str(error))
            refused = set(re.findall(r"'(\w+)'", said[1]) if said else ()) & kwargs.keys()
            if not refused:
                raise ModelError(f"cannot build {name} with {kwargs}: {error}") from error
            if wanted := sorted(refused & required.keys()):
                raise ModelError(f"model {name} does not accept {', '.join(wanted)}") from error
            optional = {key: value for key, value in optional.items() if key not in refused}
        except (ValueError, AssertionError, ArithmeticError) as error:
            raise ModelError(f"cannot build {name} with {kwargs}: {error}") from error
        except RuntimeError as error:
            if "pretrained tag" not in str(error):
                raise
            raise ModelError(f"cannot build {name} with {kwargs}: {error}") from error


@torch.no_grad()
def check_input_size(
    model: nn.Module,
    name: str,
    size: int | tuple[int, int],
    in_chans: int = 3,
    flag: str = "--input-size",
) -> None:
    """Raise ModelError if ``model`` does not accept images of ``size`` (side, or height, width)."""
    training = model.training
    height, width = height_and_width(size)
    device = next(model.parameters()).device
    try:
        model.eval()(torch.zeros(1, in_chans, height, width, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = size if isinstance(size, int) else f"{height}x{width}"
        if not hasattr(model, "check_size"):  # whose messages say it
            reason += f" (such as {_right_size(model, height, width)})"
        raise ModelError(f"{name} does not accept {flag} {text}: {reason}") from error
    finally:
        model.train(training)


def _right_size(model: nn.Module, height: int, width: int) -> str:
    """Return a size that timm's model accepts: the nearest multiple of its patches, or its own."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    config = getattr(model, "pretrained_cfg", None) or {}
    own = height_and_width((config.get("input_size") or (224, 224))[-2:])
    if patch is None or getattr(model.patch_embed, "strict_img_size", False):
        return "x".join(map(str, own))
    sides = zip((height, width), to_2tuple(patch), strict=True)
    near = tuple(max(round(side / step), 1) * step for side, step in sides)
    return "x".join(map(str, own if near == (height, width) else near))
