"""A model to export: its weights, size and preprocessing."""

import argparse
import json
from dataclasses import dataclass, replace

import torch
from torch import nn

import models
from datasets import SMALL_SIZE
from models.layers.fuse import Fusible
from tools import networks
from utils import UserError

PROJECT = "visformer"


class Preprocessed(nn.Module):
    """A model that normalizes decoded images itself.

    Args:
        model: Takes normalized images ``B 3 H W``.
        mean, std: Normalization of values in 0..1.
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
class ExportSource:
    """A model to export, in evaluation mode.

    Attributes:
        eager: Model as trained, without gradients.
        exported: Model to export; the fused one if there is one.
        name: Registered name of the model.
        size: Height and width of the images.
        classes: Class names, empty if unknown.
        mean, std: Normalization of values in 0..1.
        short_side: Size of an image's short side before the centre crop of evaluation; 0 if images
            are resized whole.
        preprocessing: ``eager`` and ``exported`` take pixels.
        notes: Lines to print.
    """

    eager: nn.Module
    exported: nn.Module
    name: str
    size: tuple[int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    short_side: int
    preprocessing: bool
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return next(self.eager.parameters()).device

    @property
    def input_name(self) -> str:
        """Name of the program's input: ``pixels``, or a normalized ``image``."""
        return "pixels" if self.preprocessing else "image"

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the program as strings; lists are JSON."""
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


def _model_source(args: argparse.Namespace) -> networks.ModelSource:
    """Return the model that the flags name, if they agree."""
    if not args.checkpoint:
        if args.weights == "ema":
            raise UserError("--weights ema needs --checkpoint")
        if args.model is None:
            raise UserError("give --model NAME or --checkpoint FILE")
        return networks.from_name(args.model)
    source = networks.from_checkpoint(args.checkpoint, args.model)
    saved, number = source.checkpoint.get("model_name"), source.required["num_classes"]
    if saved not in (None, source.name):
        raise UserError(f"--model {args.model}, but {args.checkpoint} is of {saved}: leave it out")
    if args.num_classes is not None and number not in (None, args.num_classes):
        raise UserError(
            f"--num-classes {args.num_classes}, but {args.checkpoint} has {number}: leave it out"
        )
    return source


def load_source(args: argparse.Namespace, device: torch.device) -> ExportSource:
    """Build the model that the flags name, on a device.

    Raises:
        UserError, ModelError, CheckpointError: Flags contradict each other, the model is
            unknown or does not take the size, or the checkpoint is unreadable or of another model.
    """
    source = _model_source(args)
    size = source.image_size(args.input_size)
    # a program has one size: position embeddings are resampled once, not in every run
    source = replace(source, optional={**source.optional, "dynamic_img_size": False})
    classes = {} if args.num_classes is None else {"num_classes": args.num_classes}
    model = source.build(size, **classes)
    report = source.load(model, args.weights)
    notes = [str(report) if report else f"no --checkpoint: {source.label}"]
    model = model.to(device).eval().requires_grad_(False)
    channels = getattr(model, "in_chans", 3)
    if channels != 3:
        raise UserError(f"{source.name} takes images of {channels} channels, not of 3")
    models.check_input_size(model, source.name, size)
    mean, std = source.normalization(model)
    exported = model
    if args.fuse and isinstance(model, Fusible):
        exported = model.fuse()
    elif args.fuse:
        notes.append(f"{source.name} has no fuse(): exported as it is")
    if args.with_preprocessing:
        exported, model = (Preprocessed(m, mean, std).to(device) for m in (exported, model))
    return ExportSource(
        eager=model,
        exported=exported,
        name=source.name,
        size=size,
        classes=source.classes or (),
        mean=mean,
        std=std,
        short_side=0 if max(size) <= SMALL_SIZE else int(max(size) / source.crop_ratio),
        preprocessing=args.with_preprocessing,
        notes=tuple(notes),
    )
