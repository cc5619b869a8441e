"""Mixup and the loss of a run."""

from argparse import Namespace
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from utils import UserError


def build_mixup(args: Namespace, num_classes: int) -> Mixup | None:
    """Return mixup and cutmix as flagged, or None if both are off.

    Raises:
        UserError: The batch size is odd, so that images cannot be paired.
    """
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    if args.batch_size % 2:
        raise UserError(
            f"--batch-size {args.batch_size} must be even with mixup or cutmix, which pair images; "
            f"--mixup 0 --cutmix 0 turns them off"
        )
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def switch_mixup(mixup_fn: Any, args: Namespace, epoch: int) -> None:
    """Turn mixup and cutmix off from ``--mixup-off-epoch`` on; smoothed labels remain, as in timm.

    Args:
        mixup_fn: timm's ``Mixup``, something that has it as ``mixup_fn``, or None.
        args: Flags.
        epoch: Epoch number, from 0.
    """
    mixup_fn = getattr(mixup_fn, "mixup_fn", mixup_fn)
    if mixup_fn is not None:
        mixup_fn.mixup_enabled = not 0 < args.mixup_off_epoch <= epoch


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with a weight per class, the mean over the batch.

    ``-sum_k w_k t_k log softmax(z)_k``, where ``t`` are the targets after label smoothing.

    Args:
        weight: Weights of the classes, ``K``.
        smoothing: Label smoothing of targets that are classes.
    """

    def __init__(self, weight: torch.Tensor, smoothing: float = 0.0):
        super().__init__()
        self.register_buffer("weight", weight)
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Map logits ``B K`` and targets, classes ``B`` or probabilities ``B K``, to the loss."""
        if targets.ndim == 1:
            count = logits.shape[-1]
            hot = nn.functional.one_hot(targets, count).float()
            targets = hot * (1 - self.smoothing) + self.smoothing / count
        return nn.functional.cross_entropy(logits.float(), targets.float(), self.weight)


def build_criterion(
    args: Namespace,
    mixup_fn: Mixup | None,
    num_classes: int,
    weights: torch.Tensor | None = None,
) -> nn.Module:
    """Return the training loss: for soft targets wherever mixup *or* cutmix is on.

    ``--cosub`` compares probabilities per class, too; its full targets need ``--bce-loss``.

    Args:
        args: The flags.
        mixup_fn: Mixes batches, None for none.
        num_classes: Number of classes K.
        weights: Weights of the classes, ``K``.
    """
    if args.bce_loss or args.cosub:
        if mixup_fn is None:
            return BinaryCrossEntropy(smoothing=args.smoothing, weight=weights)
        # every class in the mixture is a full target, as in DeiT; smoothing mass is not
        off_value = args.smoothing / num_classes
        threshold = off_value * 1.001 if args.bce_loss else None
        return BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold, weight=weights)
    if weights is not None:
        return WeightedCrossEntropy(weights, args.smoothing)
    if mixup_fn is not None:
        return SoftTargetCrossEntropy()
    if args.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    return nn.CrossEntropyLoss()
