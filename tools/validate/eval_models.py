"""Models to evaluate: every model at every size with each of its weights."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import datasets
import engine
import models
from models import DataConfig, ModelSource, size_text
from tools.cli import shown
from tools.validate.classes import ClassMap, match_classes
from training.compilation import compiled
from training.network import check_exponent, choose_precision, of_channels
from utils import UserError


@dataclass(frozen=True)
class EvalModel:
    """A model ready to run."""

    source: ModelSource
    weights: str  # model or ema
    args: Namespace  # the flags
    images: DataConfig
    model: nn.Module  # with its weights on the device; the next EvalModel may overwrite them
    precision: engine.Precision

    @property
    def num_outputs(self) -> int:
        """Number of classes of the model."""
        return engine.unwrap(self.model).num_classes

    @property
    def label(self) -> str:
        """Name in messages."""
        return shown(f"{self.source.label} ({self.weights}, {size_text(self.images.size)} pixels)")

    @property
    def row(self) -> dict[str, Any]:
        """First columns of a row of results."""
        size = self.images.size
        size = size if isinstance(size, int) else size_text(size)
        return {"checkpoint": self.source.label, "weights": self.weights, "size": size}

    def complaints(self, nonfinite: int) -> list[str]:
        """Return the error message for a number of images with non-finite outputs, if any."""
        message = f"{self.label}: the outputs of {nonfinite} images are not finite"
        return [message] if nonfinite else []

    def match(self, names: Sequence[str], title: str) -> ClassMap:
        """Return the outputs for the classes of a test set, which messages call ``title``."""
        source, rule = self.source, self.args.classes
        return match_classes(names, self.num_outputs, source.classes, rule, title, source.label)


def check_sources(files: list[str], args: Namespace) -> None:
    """Raise UserError if the flags name no model, or contradict each other."""
    if args.pretrained and files:
        raise UserError("--pretrained uses timm's weights: leave the checkpoints out")
    if args.pretrained and not args.model:
        raise UserError("--pretrained needs --model NAME")
    if not args.pretrained and not files:
        raise UserError("give a checkpoint, or --model NAME --pretrained")


def eval_models(
    files: list[str], args: Namespace, device: torch.device, quiet: bool = False
) -> Iterator[EvalModel]:
    """Yield the models of the flags, one at a time: file by file, size by size, then the weights.

    Unless ``quiet``, flags that have no effect are warned about.

    Raises:
        CheckpointError, ModelError: A model cannot be loaded, or does not accept a size.
    """
    warn: Callable[[str], None] = (lambda message: None) if quiet else print
    engine.select_kernels(device, args.tf32)
    for where in files or [args.model]:
        name, exponent = args.model if files else None, args.qk_scale_factor
        source = models.find_model(where, name, pretrained=True, exponent=exponent)
        check_exponent(source, exponent, warn)
        source = of_channels(source, args.in_chans, warn)
        weights = source.weights(args.weights)
        for asked in args.input_size or [None]:
            at_size = Namespace(**vars(args) | {"input_size": asked})
            images = datasets.choose_images(at_size, source.data_config, source.label, warn)
            model = source.build(images.size)
            models.check_input_size(model, source.name, images.size, images.in_chans)
            precision = choose_precision(args, model, device)
            precision.place(model)
            for name in weights:
                source.load(model, name)
                net = models.fused(model, source.name) if args.fuse else model
                net = compiled(net, args.compile, args.compile_mode, args.compile_blocks)
                yield EvalModel(source, name, args, images, net, precision)
