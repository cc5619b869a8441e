"""Parts of a model that do not learn: the first stages, or all but the classifier."""

from timm.models._manipulate import group_with_matcher
from torch import nn

from models.errors import ModelError


def freeze_stages(model: nn.Module, stages: int) -> None:
    """Stop the learning of the first parts of a model; its classifier is none of them.

    Args:
        model: With timm's ``group_matcher``.
        stages: 0 for the stem alone, k for the first k stages as well (blocks, where the model
            has no stages; the final norm is of the last one, or a part of its own).

    Raises:
        ModelError: The model does not say what its stages are, or has fewer.
    """
    name = type(model).__name__
    if not hasattr(model, "group_matcher"):
        raise ModelError(f"{name} does not say what its stages are, so that none can be frozen")
    heads = set(map(id, _classifier_parameters(model)))
    body = [(key, value) for key, value in model.named_parameters() if id(value) not in heads]
    groups = group_with_matcher(iter(body), model.group_matcher(coarse=True), reverse=True)
    last = max(groups.values())
    if stages > last:
        raise ModelError(
            f"{stages} frozen stages are more than the {last} parts of {name} after its stem"
        )
    for key, parameter in body:
        if groups[key] <= stages:
            parameter.requires_grad_(False)


def freeze_all_but_classifier(model: nn.Module) -> None:
    """Let nothing learn but what ``model.get_classifier()`` gives.

    Raises:
        ModelError: There is no such thing.
    """
    parameters = _classifier_parameters(model)
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no classifier to train alone")
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def _classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the linear classifier, or of several; none where there is none."""
    heads = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return [parameter for head in heads for parameter in head.parameters()]


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, and none of them learns."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
