"""Building a model by name, with errors that say what would be right."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from models.errors import ModelError


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        hint = f"the nearest are {', '.join(near)}" if near else "timm.list_models() lists them"
        raise ModelError(f"there is no model {name!r}; {hint}")


def pretrained_config(name: str) -> PretrainedCfg | None:
    """What timm says of the weights of a model's name, with a tag or without, if anything.

    Raises:
        ModelError: There is no such model (the nearest are named), or it has no such tag.
    """
    _check_name(name)
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ModelError(f"there is no model {name!r}: {error}") from error


def build_model(
    name: str, required: Mapping[str, Any], optional: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model that timm has under ``name``.

    Args:
        name: Any name of ``timm.list_models()``.
        required: Keyword arguments that the model must take.
        optional: Keyword arguments that are left out if the model does not know them.

    Returns:
        The model, and the keyword arguments that it was built with.

    Raises:
        ModelError: The name is unknown (the nearest are named), or an argument is refused.
    """
    _check_name(name)
    optional = dict(optional)
    while True:
        kwargs = {key: value for key, value in (optional | required).items() if value is not None}
        try:
            return timm.create_model(name, **kwargs), kwargs
        except TypeError as error:
            said = re.search(r"unexpected keyword argument\S* ('\w+'|\[.*?\])", str(error))
            refused = set(re.findall(r"'(\w+)'", said[1]) if said else ()) & kwargs.keys()
            if not refused:
                raise ModelError(f"cannot build {name} with {kwargs}: {error}") from error
            if wanted := sorted(refused & required.keys()):
                raise ModelError(f"model {name} takes no {', '.join(wanted)}") from error
            optional = {key: value for key, value in optional.items() if key not in refused}
        except (ValueError, AssertionError, ArithmeticError) as error:
            raise ModelError(f"cannot build {name} with {kwargs}: {error}") from error
        except RuntimeError as error:
            if "pretrained tag" not in str(error):
                raise
            raise ModelError(f"cannot build {name} with {kwargs}: {error}") from error


@torch.no_grad()
def check_input_size(
    model: nn.Module, name: str, size: int | tuple[int, int], in_chans: int = 3
) -> None:
    """Raise ModelError if ``model`` cannot take images of ``size``, a side or height and width."""
    training = model.training
    height, width = (size, size) if isinstance(size, int) else size
    device = next(model.parameters()).device
    try:
        model.eval()(torch.zeros(1, in_chans, height, width, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = size if isinstance(size, int) else f"{height}x{width}"
        raise ModelError(f"{name} cannot take --input-size {text}: {reason}") from error
    finally:
        model.train(training)
