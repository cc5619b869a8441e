"""The network of a run: which model the flags and a checkpoint ask for, and how it computes."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import engine
import models
from pipeline.images import DataError
from training.flags import get_args_parser, keyword_arguments
from utils import log


def choose_model(
    args: Namespace,
    given: set[str],
    checkpoint: Mapping[str, Any],
    source: str,
    num_classes: int,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, required and optional keyword arguments of the model.

    What a checkpoint of ours says about the model's function goes before the flags, with a
    warning where a given flag says otherwise. Another ``--model``, though, is taken at its word.
    """
    optional = {"img_size": args.input_size, "drop_rate": args.drop}
    optional |= {"drop_path_rate": args.drop_path}
    required = keyword_arguments(args.model_kwargs)
    required |= {"num_classes": num_classes, "qk_scale_factor": args.qk_scale_factor}
    for key in ("locality_strength", "local_up_to_layer"):
        if getattr(args, key) is not None:
            required[key] = getattr(args, key)
    defaults = get_args_parser()
    for flag, key in (("drop", "drop_rate"), ("drop_path", "drop_path_rate")):
        # a recipe may hold every flag, as args.yaml does
        if flag in given and getattr(args, flag) != defaults.get_default(flag):
            required[key] = optional.pop(key)
    saved = dict(checkpoint.get("model_kwargs", {}))
    if not saved or ("model" in given and args.model != checkpoint["model_name"]):
        return args.model, required, optional
    if saved["num_classes"] != num_classes:
        raise DataError(
            f"{source} knows {saved['num_classes']} classes, the dataset has {num_classes}"
        )
    exponent = saved.get("qk_scale_factor")
    if args.qk_scale_factor not in (None, exponent):
        log(
            f"warning: --qk-scale-factor {args.qk_scale_factor} is ignored: {source} was "
            f"trained with {exponent}, and another would change what the model computes"
        )
    return checkpoint["model_name"], required | {"qk_scale_factor": exponent}, saved | optional


def choose_precision(args: Namespace, model: nn.Module, device: torch.device) -> engine.Precision:
    """Mixed precision as flagged; the layout as flagged, else the one that suits the model."""
    dtype = getattr(torch, args.amp_dtype) if args.amp else None
    last = args.channels_last
    if last is None:
        last = getattr(model, "channels_last", False)
    return engine.Precision(device, dtype, torch.channels_last if last else torch.contiguous_format)


class Renormalized(nn.Module):
    """A model for images that are normalised otherwise than those that it was trained on.

    Args:
        model: Takes images ``B C H W``.
        given: Mean and deviation of the images, ``C`` each, for values from 0 to 1.
        own: Those of the model's training.
    """

    def __init__(self, model: nn.Module, given: models.Normalization, own: models.Normalization):
        super().__init__()
        (mean, std), (own_mean, own_std) = (map(torch.tensor, pair) for pair in (given, own))
        self.model, self.num_classes = model, model.num_classes
        self.register_buffer("scale", (std / own_std).view(-1, 1, 1))
        self.register_buffer("shift", ((mean - own_mean) / own_std).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``B C H W`` to what the model makes of them."""
        return self.model(torch.addcmul(self.shift, images, self.scale))


def renormalized(
    model: nn.Module, given: models.Normalization, own: models.Normalization
) -> nn.Module:
    """The model for images that are normalised as given; itself, if that is its own way."""
    if given == own:
        return model
    return Renormalized(model, given, own).to(next(model.parameters()).device)


def fused(model: nn.Module, name: str) -> nn.Module:
    """The model's inference net.

    Raises:
        ModelError: It has none.
    """
    if not hasattr(model, "fuse"):
        raise models.ModelError(f"{name} has no inference net of its own: leave --fuse out")
    return model.fuse()


def recompute_blocks(model: nn.Module, name: str) -> None:
    """Let a model compute its blocks again in the backward pass."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        message = f"{name} cannot recompute blocks: leave --grad-checkpointing out"
        raise models.ModelError(message) from error


@dataclass
class Network:
    """The model of a run, on its device, and how it was built."""

    model: nn.Module
    name: str
    kwargs: dict[str, Any]
    precision: engine.Precision


def build_network(
    args: Namespace,
    given: set[str],
    checkpoint: Mapping[str, Any],
    source: str,
    num_classes: int,
    device: torch.device,
) -> Network:
    """The model that the flags and the checkpoint ask for, frozen as flagged."""
    name, required, optional = choose_model(args, given, checkpoint, source, num_classes)
    model, kwargs = models.build_model(name, required, optional)
    if hasattr(model, "qk_scale_factor"):
        kwargs["qk_scale_factor"] = model.qk_scale_factor
    models.check_input_size(model, name, args.input_size)
    precision = choose_precision(args, model, device)
    precision.place(model)
    if args.grad_checkpointing:
        recompute_blocks(model, name)
    freeze(args, model)
    learning = count_parameters(model)
    whole = sum(p.numel() for p in model.parameters())
    part = "" if learning == whole else f" ({learning / 1e6:.3f} M learn)"
    log(f"model {name} {kwargs}: {whole / 1e6:.2f} M parameters{part}, {precision}")
    return Network(model, name, kwargs, precision)


def freeze(args: Namespace, model: nn.Module) -> None:
    """Stop the learning of what ``--linear-probe`` or ``--freeze-stages`` keeps."""
    if args.linear_probe:
        models.freeze_all_but_classifier(model)
    elif args.freeze_stages is not None:
        models.freeze_stages(model, args.freeze_stages)


def count_parameters(model: nn.Module) -> int:
    """Parameters that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
