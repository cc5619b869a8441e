"""Knowledge distillation: DeiT (Touvron et al., arXiv 2012.12877), section 4."""

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn

import engine
import models
from models import DataConfig
from training.compilation import compiled
from training.network import Network
from utils import UserError, log


class DistillBatch(NamedTuple):
    """Targets of a batch and the teacher's logits ``B K``."""

    targets: torch.Tensor
    teacher: torch.Tensor


class TeacherTargets:
    """Mixes a batch and adds the teacher's logits; replaces timm's ``Mixup``.

    Args:
        teacher: Teacher model.
        mixup_fn: Mixes images and targets; None for no mixing.
        precision: Precision of the teacher's forward pass.
    """

    def __init__(
        self,
        teacher: nn.Module,
        mixup_fn: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None,
        precision: engine.Precision,
    ):
        self.teacher, self.mixup_fn, self.precision = teacher, mixup_fn, precision

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, DistillBatch]:
        """Map images ``B 3 H W`` and targets ``B`` to mixed images and their DistillBatch."""
        if self.mixup_fn is not None:
            images, targets = self.mixup_fn(images, targets)
        with self.precision.autocast():
            logits = self.teacher(images)
        return images, DistillBatch(targets, logits.float())


class DistillationLoss(nn.Module):
    """``(1 - alpha) base(z, y) + alpha distance(z_d, z_t)``.

    Soft (equation 2): ``tau^2 KL(softmax(z_t / tau) || softmax(z_d / tau))``, the mean over the
    batch. Unlike the paper, DeiT's code also divides it by the number of classes K: its
    ``alpha`` equals ours of ``alpha / (alpha + K (1 - alpha))``. Hard (equation 3): cross-entropy
    with ``argmax z_t``. A student with a distillation head returns the pair ``(z, z_d)``; for any
    other, ``z_d = z``.

    Args:
        base: Loss of (logits, targets).
        kind: ``soft`` or ``hard``.
        alpha: Weight of the distillation loss.
        tau: Temperature of the soft kind.
    """

    def __init__(self, base: nn.Module, kind: str, alpha: float, tau: float):
        super().__init__()
        self.base, self.kind, self.alpha, self.tau = base, kind, alpha, tau

    def forward(
        self, logits: torch.Tensor | tuple[torch.Tensor, torch.Tensor], lesson: DistillBatch
    ) -> torch.Tensor:
        """Map logits ``B K``, or a pair of them, to the loss."""
        own, taught = logits if isinstance(logits, tuple) else (logits, logits)
        base = self.base(own, lesson.targets)
        if self.kind == "hard":
            distance = F.cross_entropy(taught, lesson.teacher.argmax(1))
        else:
            student, teacher = (
                F.log_softmax(z.float() / self.tau, 1) for z in (taught, lesson.teacher)
            )
            distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
            distance = distance * self.tau**2
        return (1 - self.alpha) * base + self.alpha * distance


class Renormalized(nn.Module):
    """Adapts a model to images with another normalization than in its training.

    Args:
        model: Model of images ``B C H W``.
        given: Preprocessing of the images.
        own: Preprocessing that the model was trained with; mean and std are adapted.
    """

    def __init__(self, model: nn.Module, given: DataConfig, own: DataConfig):
        super().__init__()
        mean, std, own_mean, own_std = map(torch.tensor, (given.mean, given.std, own.mean, own.std))
        self.model, self.num_classes = model, model.num_classes
        self.register_buffer("scale", (std / own_std).view(-1, 1, 1))
        self.register_buffer("shift", ((mean - own_mean) / own_std).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``B C H W`` to the model's output."""
        return self.model(torch.addcmul(self.shift, images, self.scale))


def build_teacher(
    args: Namespace, num_classes: int, precision: engine.Precision, images: DataConfig
) -> nn.Module:
    """Build the model of ``--teacher-path``, or timm's pretrained ``--teacher-model``.

    It is in evaluation mode without gradients, and maps images ``B C H W`` to logits ``B K``.

    Args:
        args: Flags.
        num_classes: Number of classes of the training set, which the teacher must have.
        precision: Device and memory format of the teacher.
        images: Preprocessing of the training images. They are renormalized if the teacher was
            trained with another mean and std.

    Raises:
        UserError: The teacher has other classes, or no weights.
        ModelError: Unknown model, or it does not accept images of ``--input-size``.
        CheckpointError: The file cannot be read, or does not fit the model.
    """
    named = args.teacher_model or None
    where, name = (args.teacher_path, named) if args.teacher_path else (named, None)
    try:
        source = models.find_model(where, name, pretrained=True).with_channels(images.in_chans)
        if source.num_classes not in (None, num_classes):
            raise UserError(
                f"teacher {where} has {source.num_classes} classes, the training set has "
                f"{num_classes}"
            )
        model = source.build(images.size, num_classes=num_classes)
    except models.ModelError as error:
        raise type(error)(f"teacher: {error}") from error
    if report := source.load(model):
        log(f"teacher {source.name}: {report}")
    models.check_input_size(model, source.name, images.size, images.in_chans)
    for size in args.progressive_sizes or ():
        models.check_input_size(model, source.name, size, images.in_chans, "--progressive-sizes")
    own = source.data_config
    if (own.mean, own.std) != (images.mean, images.std):
        model = Renormalized(model, images, own)
    precision.place(model)
    return model.eval().requires_grad_(False)


def distill(
    args: Namespace, network: Network, mixup_fn: Mixup | None, criterion: nn.Module
) -> tuple[TeacherTargets, DistillationLoss]:
    """Build the teacher; return ``mixup_fn`` and ``criterion`` with its targets added.

    A student with a distillation head, such as timm's distilled DeiT, starts to use it.

    Raises:
        UserError, ModelError, CheckpointError: See :func:`build_teacher`.
    """
    precision, model = network.precision, network.model
    teacher = build_teacher(args, network.kwargs["num_classes"], precision, network.images)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    teacher = compiled(teacher, args.compile, args.compile_mode, args.compile_blocks)
    targets = TeacherTargets(teacher, mixup_fn, precision)
    settings = (args.distillation_type, args.distillation_alpha, args.distillation_tau)
    return targets, DistillationLoss(criterion, *settings)
