"""Freezing: the first stages of a model, or everything but its attention or its classifier."""

from timm.models._manipulate import group_with_matcher
from torch import nn

from .errors import ModelError


def freeze_stages(model: nn.Module, stages: int) -> None:
    """Freeze the parameters of the first stages of a model, never its classifier.

    Args:
        model: Model with timm's ``group_matcher``.
        stages: 0 for the stem alone, k for the stem and the first k stages (blocks, if the model
            does not have stages; the final norm belongs to the last, or is a part of its own).

    Raises:
        ModelError: The model does not have ``group_matcher``, or has fewer stages.
    """
    name = type(model).__name__
    if not hasattr(model, "group_matcher"):
        raise ModelError(f"cannot freeze stages of {name}: it does not have a group_matcher")
    heads = set(map(id, _classifier_parameters(model)))
    body = [(key, value) for key, value in model.named_parameters() if id(value) not in heads]
    groups = group_with_matcher(iter(body), model.group_matcher(coarse=True), reverse=True)
    last = max(groups.values())
    if stages > last:
        raise ModelError(
            f"cannot freeze {stages} stages of {name}: it has {last} parts after its stem"
        )
    for key, parameter in body:
        if groups[key] <= stages:
            parameter.requires_grad_(False)


def freeze_all_but_classifier(model: nn.Module) -> None:
    """Freeze all parameters except those of ``model.get_classifier()``.

    Raises:
        ModelError: The model does not have a classifier with parameters.
    """
    parameters = _classifier_parameters(model)
    if not parameters:
        raise ModelError(f"{type(model).__name__} does not have a classifier to train")
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def freeze_all_but_attention(model: nn.Module) -> None:
    """Freeze all parameters except attention, position embeddings and classifier, as DeiT does.

    Attention is what is registered as ``attn`` (Touvron et al., arXiv 2203.09795, section 4).

    Raises:
        ModelError: The model does not have attention of this name.
    """
    attention = [p for name, p in model.named_parameters() if "attn" in name.split(".")]
    if not attention:
        raise ModelError(f"{type(model).__name__} does not have attention (attn) to train")
    positions = [
        p for name, p in model.named_parameters() if name.split(".")[-1].startswith("pos_embed")
    ]
    model.requires_grad_(False)
    for parameter in [*attention, *positions, *_classifier_parameters(model)]:
        parameter.requires_grad_(True)


def _classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the linear classifiers; empty if there are none."""
    heads = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return [parameter for head in heads for parameter in head.parameters()]


def is_frozen(module: nn.Module) -> bool:
    """Return True if a module has parameters and all of them are frozen."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
