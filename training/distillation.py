"""Knowledge distillation: DeiT (Touvron et al., arXiv 2012.12877), section 4."""

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn

import datasets
import engine
import models
from models.checkpoint.contents import num_classes_of, state_dict_of
from training.network import Network, renormalized
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


def build_teacher(
    args: Namespace,
    num_classes: int,
    precision: engine.Precision,
    normalization: models.Normalization,
) -> nn.Module:
    """Build the model of ``--teacher-path`` or timm's pretrained ``--teacher-model``.

    It is in evaluation mode without gradients, and maps images ``B 3 H W`` to logits ``B K``.

    Args:
        args: Flags.
        num_classes: Number of classes of the training set, which the teacher must have.
        precision: Device and memory format of the teacher.
        normalization: Mean and std of the training images. A file of this project was trained
            with the same; for any other, images are renormalized to the model's config in timm.

    Raises:
        UserError: The teacher has other classes, or no weights.
        ModelError: Unknown model, or it does not accept images of ``--input-size``.
        CheckpointError: The file cannot be read, or does not fit the model.
    """
    path = args.teacher_path
    checkpoint = models.read_checkpoint(path) if path else {}
    kwargs = dict(checkpoint.get("model_kwargs", {}))
    name = args.teacher_model or checkpoint.get("model_name")
    if not name:
        raise UserError(f"--teacher-path {path} does not name its model: give --teacher-model")
    if name != checkpoint.get("model_name"):
        kwargs = {}
    known = kwargs.get("num_classes")
    if not path:
        known = _pretrained_classes(name)
    elif known is None:
        known = num_classes_of(state_dict_of(checkpoint, path)[0], name)
    if known not in (None, num_classes):
        raise UserError(
            f"teacher {path or name} has {known} classes, the training set has {num_classes}"
        )
    required = {"num_classes": num_classes} | ({} if path else {"pretrained": True})
    optional = kwargs | {"img_size": args.input_size}
    try:
        model, _ = models.build_model(name, required, optional)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot get weights of teacher {name}: {reason}") from error
    if path:
        log(f"teacher {name}: {models.load_weights(model, checkpoint, path)}")
    models.check_input_size(model, name, args.input_size)
    own = models.normalization_of(checkpoint, model.pretrained_cfg)
    model = renormalized(model, normalization, own)
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
    teacher = build_teacher(args, network.kwargs["num_classes"], precision, datasets.NORMALIZATION)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    targets = TeacherTargets(engine.compiled(teacher, args.compile), mixup_fn, precision)
    settings = (args.distillation_type, args.distillation_alpha, args.distillation_tau)
    return targets, DistillationLoss(criterion, *settings)


def _pretrained_classes(name: str) -> int:
    """Return the number of classes of timm's weights of a model.

    Raises:
        UserError: timm has no weights of it.
        ModelError: Unknown model.
    """
    cfg = models.pretrained_config(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(f"timm has no weights of teacher {name}: give --teacher-path CHECKPOINT")
    return cfg.num_classes
