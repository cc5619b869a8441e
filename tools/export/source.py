"""A model to export: its weights, size and preprocessing."""

import argparse
import copy
import json
from dataclasses import dataclass

import torch
from torch import nn

import datasets
import models
from models import DataConfig
from utils import UserError

PROJECT = "visformer"


class Preprocessed(nn.Module):
    """A model that normalizes decoded images itself.

    Args:
        model: Takes normalized images ``B C H W``.
        mean, std: Normalization of values in 0..1.
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).mul(255))
        self.register_buffer("factor", torch.tensor(std).mul(255).reciprocal())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels ``B H W C`` of uint8 to logits ``B num_classes``."""
        image = (pixels.to(self.mean.dtype) - self.mean) * self.factor
        return self.model(image.permute(0, 3, 1, 2))


class Half(nn.Module):
    """A model in float16, from float32 images to float32 logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``B C H W`` to logits ``B num_classes``."""
        return self.model(image.half()).float()


def in_half(model: nn.Module) -> nn.Module:
    """Return a copy that computes in float16; pixels are normalized in float32."""
    if not isinstance(model, Preprocessed):
        return Half(model)
    half = copy.deepcopy(model)
    half.model = Half(half.model)
    return half


@dataclass(frozen=True)
class ExportSource:
    """A model to export, in evaluation mode.

    Attributes:
        eager: Model as trained, without gradients.
        exported: Model to export; the fused one if there is one.
        name: Registered name of the model.
        images: Preprocessing of the images.
        classes: Class names, empty if unknown.
        preprocessing: ``eager`` and ``exported`` take pixels.
        notes: Lines to print.
    """

    eager: nn.Module
    exported: nn.Module
    name: str
    images: DataConfig
    classes: tuple[str, ...]
    preprocessing: bool
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.input_size

    @property
    def short_side(self) -> int:
        """Size of an image's short side before the centre crop; 0 if both sides are resized, or to
        cover an input that is not square."""
        is_cropped = self.images.crop_mode == "center" and self.size[0] == self.size[1]
        return int(max(self.size) / self.images.crop_pct) if is_cropped else 0

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        is_wrapped = isinstance(self.eager, Preprocessed)
        return (self.eager.model if is_wrapped else self.eager).num_classes

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
            "mean": json.dumps(self.images.mean),
            "std": json.dumps(self.images.std),
            "interpolation": self.images.interpolation,
            "crop_mode": self.images.crop_mode,
            "crop_pct": str(self.images.crop_pct),
            "short_side": str(self.short_side),
            "exif": json.dumps(self.images.exif),
            "preprocessing": "inside" if self.preprocessing else "outside",
        }

    def random_images(self, batch: int, seed: int = 0) -> torch.Tensor:
        """Random images: ``B C H W`` of unit variance, or pixels ``B H W C``."""
        generator = torch.Generator().manual_seed(seed)
        if self.preprocessing:
            shape = (batch, *self.size, len(self.images.mean))
            images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        else:
            images = torch.randn(batch, len(self.images.mean), *self.size, generator=generator)
        return images.to(self.device)


def _model_source(args: argparse.Namespace) -> models.ModelSource:
    """Return the model that the flags name, if they agree."""
    if not args.checkpoint:
        if args.model is None:
            raise UserError("give --model NAME or --checkpoint FILE")
        source = models.find_model(args.model, pretrained=args.pretrained)
        source.weights(args.weights)
    elif args.pretrained:
        raise UserError(
            f"--pretrained uses published weights: leave --checkpoint {args.checkpoint}"
        )
    else:
        source = models.find_model(args.checkpoint, args.model, pretrained=True)
    number = source.num_classes if source.has_weights else None
    if args.num_classes is not None and number not in (None, args.num_classes):
        raise UserError(
            f"--num-classes {args.num_classes}, but {source.label} has {number}: leave it out"
        )
    return source


def load_source(
    args: argparse.Namespace, device: torch.device, takes_pixels: bool = False
) -> ExportSource:
    """Build the model that the flags name, on a device.

    With ``takes_pixels`` it normalizes them itself, as by ``--with-preprocessing``.

    Raises:
        UserError, ModelError, CheckpointError: Flags contradict each other, the model is
            unknown or does not take the size, or the checkpoint is unreadable or of another model.
    """
    source = _model_source(args)
    notes: list[str] = []
    asked = dict.fromkeys(("eval_crop_ratio", "interpolation", "exif", "in_chans"))
    flags = argparse.Namespace(input_size=args.input_size, **asked)
    images = datasets.choose_images(flags, source.data_config, source.label, notes.append)
    size = images.input_size
    classes = {} if args.num_classes is None else {"num_classes": args.num_classes}
    # a program has one size: position embeddings are resampled once, not in every run
    model, _ = source.build_with_kwargs(size, classes, {"dynamic_img_size": False})
    report = source.load(model, args.weights)
    label = source.label if source.has_weights else f"no --checkpoint: {source.label}"
    notes.append(str(report or label))
    model = model.to(device).eval().requires_grad_(False)
    channels = getattr(model, "in_chans", images.in_chans)
    if channels != images.in_chans:
        raise UserError(
            f"{source.name} takes images of {channels} channels, not of {images.in_chans}"
        )
    models.check_input_size(model, source.name, size, images.in_chans)
    exported = model
    if args.fuse and models.is_fusible(model):
        exported = models.fused(model, source.name)
    elif args.fuse:
        notes.append(f"{source.name} has nothing to fuse: exported as it is")
    takes_pixels = takes_pixels or args.with_preprocessing
    if takes_pixels:
        exported, model = (
            Preprocessed(m, images.mean, images.std).to(device) for m in (exported, model)
        )
    return ExportSource(
        eager=model,
        exported=exported,
        name=source.name,
        images=images,
        classes=source.classes or (),
        preprocessing=takes_pixels,
        notes=tuple(notes),
    )
