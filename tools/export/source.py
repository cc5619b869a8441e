"""What is exported: a model with its weights, and what a program must know beside them."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import models
from models.checkpoint.contents import num_classes_of, state_dict_of
from models.layers.fuse import Fusible
from utils import UserError

PROJECT = "visformer"
SMALL = 32  # up to this size, evaluation resizes whole images, without a crop
CROP_RATIO = 0.875


class Preprocessed(nn.Module):
    """A model for images as they are decoded: pixels to its scale and layout, then the model.

    Args:
        model: Takes ``B 3 H W``, normalised.
        mean, std: Of the normalisation, for values from 0 to 1.
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).mul(255))
        self.register_buffer("factor", torch.tensor(std).mul(255).reciprocal())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels ``B H W 3`` of uint8 to logits ``B num_classes``."""
        image = (pixels.to(self.mean.dtype) - self.mean) * self.factor
        return self.model(image.permute(0, 3, 1, 2))


@dataclass(frozen=True)
class Source:
    """A net to export, in evaluation mode.

    Attributes:
        eager: The model as it was trained, without gradients.
        net: What is exported, its inference net if there is one.
        name: Registered name of the model.
        size: Height and width of the images.
        classes: Names of the classes, empty if not known.
        mean, std: Of the normalisation, for values from 0 to 1.
        short_side: What evaluation resizes the short side of an image to, before it crops the
            centre; 0 where it resizes images whole.
        preprocessing: Whether ``eager`` and ``net`` take pixels.
        notes: What the user should know.
    """

    eager: nn.Module
    net: nn.Module
    name: str
    size: tuple[int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    short_side: int
    preprocessing: bool
    notes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where the nets are."""
        return next(self.eager.parameters()).device

    @property
    def input_name(self) -> str:
        """Name of the program's input: ``pixels``, or a normalised ``image``."""
        return "pixels" if self.preprocessing else "image"

    @property
    def metadata(self) -> dict[str, str]:
        """What a program must know to be used, as texts; lists are JSON."""
        return {
            "project": PROJECT,
            "model": self.name,
            "classes": json.dumps(self.classes),
            "input_size": json.dumps(self.size),
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "short_side": str(self.short_side),
            "preprocessing": "inside" if self.preprocessing else "outside",
        }

    def images(self, batch: int, seed: int = 0) -> torch.Tensor:
        """Random images: ``B 3 H W`` of unit variance, or pixels ``B H W 3``."""
        generator = torch.Generator().manual_seed(seed)
        if self.preprocessing:
            shape = (batch, *self.size, len(self.mean))
            images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        else:
            images = torch.randn(batch, len(self.mean), *self.size, generator=generator)
        return images.to(self.device)


def _check_flags(args: argparse.Namespace, checkpoint: Mapping[str, Any]) -> str:
    """The model's name, where the flags go together."""
    saved = checkpoint.get("model_name")
    name = args.model or saved
    if saved not in (None, name):
        raise UserError(f"--model {name}, but {args.checkpoint} is of {saved}: leave it out")
    if not args.checkpoint and args.weights == "ema":
        raise UserError("--weights ema needs --checkpoint")
    if name is None:
        what = f"{args.checkpoint} does not say which model it is: " if args.checkpoint else ""
        raise UserError(f"{what}give --model NAME")
    return name


def _kwargs(args: argparse.Namespace, checkpoint: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Keyword arguments that the model must be built with."""
    kwargs = dict(checkpoint.get("model_kwargs") or {})
    if checkpoint and "num_classes" not in kwargs:
        state, _ = state_dict_of(checkpoint, args.checkpoint, args.weights == "ema")
        kwargs["num_classes"] = num_classes_of(state, name)
    if args.num_classes is not None:
        if kwargs.get("num_classes") not in (None, args.num_classes):
            raise UserError(
                f"--num-classes {args.num_classes}, but {args.checkpoint} has "
                f"{kwargs['num_classes']}: leave it out"
            )
        kwargs["num_classes"] = args.num_classes
    return kwargs


def _short_side(size: tuple[int, int], flags: object) -> int:
    """The short side that evaluation resizes to, by the flags of the training."""
    if max(size) <= SMALL:
        return 0
    ratio = (flags if isinstance(flags, Mapping) else {}).get("eval_crop_ratio") or CROP_RATIO
    return int(max(size) / ratio)


def load_source(args: argparse.Namespace, device: torch.device) -> Source:
    """Build what the flags ask for, on a device.

    Raises:
        UserError, ModelError, CheckpointError: Flags contradict each other, the model is
            unknown or does not take the size, or the checkpoint is unreadable or of another model.
    """
    checkpoint = models.read_checkpoint(args.checkpoint) if args.checkpoint else {}
    name = _check_flags(args, checkpoint)
    required = _kwargs(args, checkpoint, name)
    saved = checkpoint.get("input_size")
    size = args.input_size or (saved and (saved, saved))
    config = models.pretrained_config(name)
    native = config and tuple(config.input_size[-2:])
    size = tuple(size) if size else native
    if args.input_size:
        required.pop("img_size", None)
    # programs are of one size: position embeddings are made for it, not resampled in every run
    optional = {"img_size": None if size == native else size, "dynamic_img_size": False}
    model, _ = models.build_model(name, required, optional)
    if args.checkpoint:
        report = models.load_weights(model, checkpoint, args.checkpoint, args.weights == "ema")
        notes = [str(report)]
    else:
        notes = [f"no --checkpoint: {name} has random weights"]
    model = model.to(device).eval().requires_grad_(False)
    _check_size(model, name, size)
    mean, std = models.normalization_of(checkpoint, model.pretrained_cfg)
    net = model
    if args.fuse and isinstance(model, Fusible):
        net = model.fuse()
    elif args.fuse:
        notes.append(f"{name} has no fuse(): exported as it is")
    if args.with_preprocessing:
        net, model = (Preprocessed(part, mean, std).to(device) for part in (net, model))
    return Source(
        eager=model,
        net=net,
        name=name,
        size=size,
        classes=tuple(models.class_names(checkpoint, str(args.checkpoint))),
        mean=mean,
        std=std,
        short_side=_short_side(size, models.flags_of_run(checkpoint) or {}),
        preprocessing=args.with_preprocessing,
        notes=tuple(notes),
    )


@torch.no_grad()
def _check_size(model: nn.Module, name: str, size: tuple[int, int]) -> None:
    channels = getattr(model, "in_chans", 3)
    if channels != 3:
        raise UserError(f"{name} takes images of {channels} channels; exported are those of 3")
    try:
        model(torch.zeros(1, channels, *size, device=next(model.parameters()).device))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = "x".join(map(str, size))
        raise models.ModelError(f"{name} cannot take --input-size {text}: {reason}") from error
