"""What is to be evaluated: every network at every size with all of its weights."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import datasets
import engine
import models
from tools.networks import ModelSource, from_checkpoint, from_name
from tools.validate.classes import ClassMap, match_classes
from tools.validate.text import shown
from training.network import choose_precision, fused, renormalized
from utils import UserError


@dataclass(frozen=True)
class Case:
    """A network that is ready to run.

    Attributes:
        network: Where it is from.
        weights: ``model`` or ``ema``.
        args: The flags, with its own ``input_size``.
        model: On the device, its weights loaded; the next case may give it others.
        precision: How it computes.
    """

    network: ModelSource
    weights: str
    args: Namespace
    model: nn.Module
    precision: engine.Precision

    @property
    def num_outputs(self) -> int:
        """Classes that the network knows."""
        return engine.unwrap(self.model).num_classes

    @property
    def label(self) -> str:
        """What messages call it."""
        return shown(f"{self.network.label} ({self.weights}, {self.args.input_size} pixels)")

    def complaints(self, nonfinite: int) -> list[str]:
        """What is said of so many images whose outputs are not finite; nothing of none."""
        if not nonfinite:
            return []
        return [f"{self.label}: {nonfinite} images have outputs that are not finite"]

    def match(self, names: Sequence[str], title: str) -> ClassMap:
        """The outputs of the classes of a set, which messages call ``title``.

        Raises:
            DataError: There is none for a class.
        """
        known, source = self.network.classes, self.network.label
        return match_classes(names, self.num_outputs, known, self.args.classes, title, source)


def check_sources(files: list[str], args: Namespace) -> None:
    """Refuse flags that do not say which networks, or say it twice.

    Raises:
        UserError: They do.
    """
    if args.pretrained and files:
        raise UserError("--pretrained takes timm's weights: leave the checkpoints out")
    if args.pretrained and not args.model:
        raise UserError("--pretrained needs --model NAME")
    if not args.pretrained and not files:
        raise UserError("give a checkpoint, or --model NAME --pretrained")


def cases(
    files: list[str], args: Namespace, device: torch.device, say: Callable[[str], None] = print
) -> Iterator[Case]:
    """Every case of the flags, one at a time: file by file, size by size, then the weights.

    Args:
        files: Checkpoints.
        args: The flags.
        device: Of the models.
        say: Told of warnings.

    Raises:
        CheckpointError, ModelError: A network cannot be had, or run at a size.
    """
    for network in _networks(files, args, say):
        weights = network.weights(args.weights)
        for asked in args.input_size or [None]:
            size = asked or network.input_size or datasets.input_size_of(args)
            yield from _cases_at(network, size, weights, args, device)


def again(args: Namespace, device: torch.device) -> Iterator[Case]:
    """The cases once more, after their warnings have been said."""
    return cases(args.checkpoints, args, device, say=lambda message: None)


def _networks(
    files: list[str], args: Namespace, say: Callable[[str], None]
) -> Iterator[ModelSource]:
    if args.pretrained:
        yield from_name(args.model, pretrained=True)
    for path in files:
        network = from_checkpoint(path, args.model, args.qk_scale_factor)
        exponent = network.required["qk_scale_factor"]
        if args.qk_scale_factor not in (None, exponent):
            say(
                f"warning: --qk-scale-factor {args.qk_scale_factor} is ignored: {path} was trained "
                f"with {exponent}"
            )
        yield network


def _cases_at(
    network: ModelSource,
    size: int,
    weights: tuple[str, ...],
    args: Namespace,
    device: torch.device,
) -> Iterator[Case]:
    model = network.build(size)
    models.check_input_size(model, network.name, size)
    precision = choose_precision(args, model, device)
    precision.place(model)
    at_size = Namespace(**vars(args) | {"input_size": size})
    for name in weights:
        network.load(model, name)
        net = fused(model, network.name) if args.fuse else model
        net = renormalized(net, datasets.NORMALIZATION, network.normalization(model))
        yield Case(network, name, at_size, engine.compiled(net, args.compile), precision)
