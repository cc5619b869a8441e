"""Model of a run: built from the flags and a checkpoint, with its precision."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import datasets
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
    """Return name, required and optional keyword arguments of the model.

    The settings of a checkpoint of ours take precedence over the flags, with a warning where a
    given flag differs; a given ``--model`` of another name takes precedence over the checkpoint.
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
            f"{source} has {saved['num_classes']} classes, the dataset has {num_classes}"
        )
    exponent = saved.get("qk_scale_factor")
    if args.qk_scale_factor not in (None, exponent):
        log(
            f"warning: --qk-scale-factor {args.qk_scale_factor} is ignored: {source} was "
            f"trained with {exponent}, and another would change what the model computes"
        )
    return checkpoint["model_name"], required | {"qk_scale_factor": exponent}, saved | optional


def choose_precision(args: Namespace, model: nn.Module, device: torch.device) -> engine.Precision:
    """Return the precision of the flags; the memory format defaults to the model's."""
    dtype = getattr(torch, args.amp_dtype) if args.amp else None
    last = args.channels_last
    if last is None:
        last = getattr(model, "channels_last", False)
    return engine.Precision(device, dtype, torch.channels_last if last else torch.contiguous_format)


class Renormalized(nn.Module):
    """Adapts a model to images with another normalization than in its training.

    Args:
        model: Model of images ``B C H W``.
        given: Mean and std of the images, ``C`` each, for values in [0, 1].
        own: Mean and std of the model's training.
    """

    def __init__(self, model: nn.Module, given: models.Normalization, own: models.Normalization):
        super().__init__()
        (mean, std), (own_mean, own_std) = (map(torch.tensor, pair) for pair in (given, own))
        self.model, self.num_classes = model, model.num_classes
        self.register_buffer("scale", (std / own_std).view(-1, 1, 1))
        self.register_buffer("shift", ((mean - own_mean) / own_std).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``B C H W`` to the model's output."""
        return self.model(torch.addcmul(self.shift, images, self.scale))


def renormalized(
    model: nn.Module, given: models.Normalization, own: models.Normalization
) -> nn.Module:
    """Return the model for images normalized as given; the model itself if that is its own."""
    if given == own:
        return model
    return Renormalized(model, given, own).to(next(model.parameters()).device)


def fused(model: nn.Module, name: str) -> nn.Module:
    """Return the fused model for inference.

    Raises:
        ModelError: The model cannot be fused.
    """
    if not hasattr(model, "fuse"):
        raise models.ModelError(f"{name} cannot be fused: leave --fuse out")
    return model.fuse()


def recompute_blocks(model: nn.Module, name: str) -> None:
    """Recompute the blocks of a model in the backward pass."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        message = f"{name} cannot recompute blocks: leave --grad-checkpointing out"
        raise models.ModelError(message) from error


def choose_input_size(args: Namespace, checkpoint: Mapping[str, Any], source: str) -> int:
    """Return ``--input-size`` if given, else the checkpoint's, else the dataset's default."""
    saved = checkpoint.get("input_size")
    if args.input_size and saved and args.input_size != saved:
        log(f"warning: --input-size {args.input_size}, but {source} was trained at {saved}")
    return args.input_size or saved or datasets.input_size_of(args)


def compare_classes(checkpoint: Mapping[str, Any], source: str, names: Sequence[str]) -> None:
    """Warn if a checkpoint has other class names than the dataset."""
    saved = models.class_names(checkpoint, source) or list(names)
    if len(saved) == len(names) and saved != list(names):
        number = next(
            i for i, pair in enumerate(zip(saved, names, strict=True)) if len({*pair}) > 1
        )
        log(
            f"warning: class {number} is {saved[number]!r} in {source}, and {names[number]!r} in "
            f"the dataset"
        )


@dataclass
class Network:
    """Model of a run on its device, with the arguments that built it."""

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
    """Build the model of the flags and the checkpoint, and freeze the parts flagged."""
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
    part = "" if learning == whole else f" ({learning / 1e6:.3f} M trainable)"
    log(f"model {name} {kwargs}: {whole / 1e6:.2f} M parameters{part}, {precision}")
    return Network(model, name, kwargs, precision)


def freeze(args: Namespace, model: nn.Module) -> None:
    """Freeze the parts that ``--linear-probe`` or ``--freeze-stages`` names."""
    if args.linear_probe:
        models.freeze_all_but_classifier(model)
    elif args.freeze_stages is not None:
        models.freeze_stages(model, args.freeze_stages)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
