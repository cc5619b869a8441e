"""Training and evaluation of one epoch, and what they are built from."""

import contextlib
import inspect
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import sum_over_processes

REFERENCE_BATCH = 512  # the batch that --lr is meant for
# PyTorch's own; fused, they also take the gradient scaler's verdict without a device sync
FUSED_OPTIMIZERS = ("adamw", "adam", "sgd", "momentum")


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number."""


class NoImagesError(RuntimeError):
    """An evaluation set has not a single image that can be decoded."""


class SettingError(ValueError):
    """Flags of the training do not go together."""


@dataclass
class Precision:
    """How a run computes: mixed precision, with loss scaling for float16 alone, and layout.

    Args:
        device: Device of the model.
        dtype: ``torch.float16``, ``torch.bfloat16``, or ``None`` for full precision.
        memory_format: Of images and of the model's convolutions.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def autocast(self) -> torch.autocast:
        """Context of the forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def place(self, model: nn.Module) -> None:
        """Move a model to the device and its weights to the run's layout."""
        model.to(self.device, memory_format=self.memory_format)
        for parameter in model.parameters():
            if parameter.ndim == 4 and len(parameter) == 1 == parameter[0, 0].numel():
                # a position embedding of one pixel: its strides are free, and the plain ones are
                # those of its gradient, which DistributedDataParallel would otherwise copy
                parameter.data = parameter.data.flatten().view_as(parameter)

    def move(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``B 3 H W`` on the device in the run's layout, without waiting for the copy."""
        return images.to(self.device, non_blocking=True, memory_format=self.memory_format)

    def __str__(self) -> str:
        return "float32" if self.dtype is None else str(self.dtype).removeprefix("torch.")


def scaled_lr(args: Namespace, world_size: int) -> float:
    """``--lr`` in proportion to the global batch, 512 being the reference (DeiT).

    The global batch counts all processes and accumulated batches; ``--unscale-lr`` takes
    ``--lr`` as it is.
    """
    if args.unscale_lr:
        return args.lr
    return args.lr * args.batch_size * args.accum_iter * world_size / REFERENCE_BATCH


def build_optimizer(args: Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer named ``--opt``; norms, biases and ``no_weight_decay`` do not decay."""
    options = {"eps": args.opt_eps, "betas": args.opt_betas}
    if args.opt.lower() in FUSED_OPTIMIZERS:
        options["fused"] = True
    return create_optimizer_v2(
        model,
        opt=args.opt,
        lr=lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        **{key: value for key, value in options.items() if value is not None},
    )


def build_scheduler(
    args: Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> Scheduler:
    """timm's schedule named ``--sched`` over ``--epochs``."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        decay_epochs=args.decay_epochs,
        cooldown_epochs=args.cooldown_epochs,
        patience_epochs=args.patience_epochs,
        decay_rate=args.decay_rate,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        noise=args.lr_noise,
        noise_pct=args.lr_noise_pct,
        noise_std=args.lr_noise_std,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def build_mixup(args: Namespace, num_classes: int) -> Mixup | None:
    """Mixup and cutmix as flagged, or None where both are off.

    Raises:
        SettingError: The batch size is odd, so that images cannot be paired.
    """
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    if args.batch_size % 2:
        raise SettingError(
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


def build_criterion(args: Namespace, mixup_fn: Mixup | None, num_classes: int) -> nn.Module:
    """The training loss: soft targets wherever mixup *or* cutmix makes them."""
    if args.bce_loss:
        if mixup_fn is None:
            return BinaryCrossEntropy(smoothing=args.smoothing)
        # every class that is in the mixture is a full target, as in DeiT; what is smoothed is not
        off_value = args.smoothing / num_classes
        return BinaryCrossEntropy(smoothing=0.0, target_threshold=off_value * 1.001)
    if mixup_fn is not None:
        return SoftTargetCrossEntropy()
    if args.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    return nn.CrossEntropyLoss()


class LossMeter:
    """Mean loss, and the first step at which it was not finite, without waiting for the device."""

    def __init__(self, device: torch.device):
        self.total = torch.zeros((), device=device)
        self.steps = 0
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, loss: torch.Tensor, step: int) -> None:
        """Count the loss of ``step``."""
        self.total += loss
        self.steps += 1
        bad = ~torch.isfinite(loss) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, step, self.bad_step)

    def mean(self) -> float:
        """Mean so far on this process. Waits for the device."""
        return self.total.item() / self.steps

    def first_bad_step(self) -> int | None:
        """First step of a non-finite loss on this process. Waits for the device."""
        step = self.bad_step.item()
        return None if step < 0 else step


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    precision: Precision,
    max_norm: float | None = None,
    model_ema: ModelEmaV3 | None = None,
    mixup_fn: Mixup | None = None,
    lr_scheduler: Scheduler | None = None,
    accum_iter: int = 1,
    set_training_mode: bool = True,
    log_interval: int = 50,
    report: Callable[[int, float, float, float], None] = lambda step, loss, lr, rate: None,
) -> dict[str, float]:
    """Train for one epoch.

    Args:
        model: Model, possibly wrapped in DistributedDataParallel.
        criterion: Loss of (logits, targets).
        data_loader: Yields batches of (images ``B 3 H W``, targets ``B``, corrupt files met).
        optimizer: Stepped every ``accum_iter`` batches and after the last one.
        device: Where the model is.
        epoch: Number of the epoch, from 0.
        precision: Autocast and loss scaling.
        max_norm: Largest norm of the gradient; it is clipped after unscaling.
        model_ema: Moving average, updated after every optimizer step.
        mixup_fn: Mixes a batch on the device.
        lr_scheduler: For schedules that step per update.
        accum_iter: Batches per optimizer step.
        set_training_mode: Off leaves the model as in evaluation (DeiT's ``--no-train-mode``).
        log_interval: Steps between calls of ``report``, the only ones that wait for the device.
        report: Receives (steps done, mean loss so far, learning rate, images per second), the
            latter two of this process.

    Returns:
        ``loss``, the mean over all processes, ``lr`` of the last step, ``images_per_second`` over
        all processes, and ``corrupt``, the number of corrupt files met, if any.

    Raises:
        NonFiniteLossError: The loss was infinite or not a number, noticed at the next reading.
    """
    model.train(set_training_mode)
    meter = LossMeter(device)
    steps = len(data_loader)
    updates = epoch * -(-steps // accum_iter)
    second_order = getattr(optimizer, "is_second_order", False)
    images_seen = corrupt_seen = 0
    lr = max(group["lr"] for group in optimizer.param_groups)
    started = time.perf_counter()
    optimizer.zero_grad()
    for step, (images, targets, corrupt) in enumerate(data_loader):
        images_seen += len(images)
        corrupt_seen += corrupt
        images = precision.move(images)
        targets = targets.to(device, non_blocking=True)
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        first_of_update = step - step % accum_iter
        batches_of_update = min(accum_iter, steps - first_of_update)
        is_update = step + 1 == first_of_update + batches_of_update
        with gradient_sync(model, is_update):
            with precision.autocast():
                loss = criterion(model(images), targets)
            scaled = precision.scaler.scale(loss / batches_of_update)
            scaled.backward(create_graph=second_order)
        meter.add(loss.detach(), step)
        if is_update:
            if max_norm is not None:
                precision.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            precision.scaler.step(optimizer)
            precision.scaler.update()
            optimizer.zero_grad()
            updates += 1
            if model_ema is not None:
                model_ema.update(unwrap(model), step=updates)
            lr = max(group["lr"] for group in optimizer.param_groups)
            if lr_scheduler is not None:
                lr_scheduler.step_update(updates)
        if (step + 1) % log_interval == 0 and step + 1 < steps:
            check_finite(meter.first_bad_step(), epoch, lr, precision, model)
            report(step + 1, meter.mean(), lr, images_seen / (time.perf_counter() - started))

    bad_step = meter.first_bad_step()
    rate = images_seen / (time.perf_counter() - started)
    sums = torch.tensor(
        [meter.mean(), 1, rate, corrupt_seen, bad_step is not None],
        dtype=torch.float64,
    )
    loss, processes, rate, corrupt_seen, bad_processes = sum_over_processes(sums, device).tolist()
    if bad_processes and bad_step is None:
        bad_step = steps - 1  # on another process; that one names the very step
    check_finite(bad_step, epoch, lr, precision, model)
    report(steps, loss / processes, lr, rate / processes)
    stats = {"loss": loss / processes, "lr": lr, "images_per_second": round(rate, 1)}
    return stats | ({"corrupt": int(corrupt_seen)} if corrupt_seen else {})


def check_finite(
    bad_step: int | None, epoch: int, lr: float, precision: Precision, model: nn.Module
) -> None:
    """Raise NonFiniteLossError, naming all that bears on it, unless ``bad_step`` is None."""
    if bad_step is None:
        return
    exponent = getattr(unwrap(model), "qk_scale_factor", None)
    raise NonFiniteLossError(
        f"the loss is not finite at epoch {epoch}, step {bad_step} (learning rate "
        f"{lr:.3g}, computed in {precision}, query/key pre-scale "
        f"exponent {exponent}); the last checkpoint is kept. A lower --lr, --clip-grad 1, "
        f"--amp-dtype bfloat16 or --qk-scale-factor -0.5 may help"
    )


def distribute(
    model: nn.Module, device: torch.device, static: bool = True
) -> DistributedDataParallel:
    """Wrap a model so that its gradients are averaged over the processes.

    BatchNorm's statistics are not exchanged at every step: those of the first process count,
    and are shared before evaluation. Gradients are views of the buffers that are exchanged.

    Args:
        model: On its device.
        device: Of this process.
        static: Every step uses the same parameters in the same order. Not for accumulated
            batches or a compiled model.
    """
    # older versions of PyTorch know the second name only, newer ones deprecate it
    names = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, gradient_as_bucket_view=True, static_graph=static, **{name: False}
    )


def compiled(model: nn.Module, backend: str | None) -> nn.Module:
    """``model`` compiled for batches of one size, which runs as the model's own; None for as is."""
    return model if backend is None else torch.compile(model, backend=backend, dynamic=False)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of what :func:`compiled` and :func:`distribute` made of it."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, sync: bool) -> contextlib.AbstractContextManager:
    """Context of a backward pass that averages gradients over processes only if ``sync``."""
    model = getattr(model, "_orig_mod", model)
    if sync or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def _fill_up(images: torch.Tensor, size: int) -> torch.Tensor:
    """A batch of ``size`` images at least, the added ones blank."""
    return F.pad(images, (0,) * 7 + (max(size - len(images), 0),))


@torch.inference_mode()
def evaluate(
    data_loader: Iterable,
    model: nn.Module,
    device: torch.device,
    precision: Precision | None = None,
    shared: bool = True,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy and cross-entropy.

    Args:
        data_loader: Yields batches of (images ``B 3 H W``, targets ``B``, corrupt files left out).
        model: Model, not distributed: processes may have different numbers of batches. For a
            compiled one, smaller batches are filled up with blank images, which do not count.
        device: Where the model is.
        precision: Autocast, if any.
        shared: The processes have different parts of the set, whose counts are added up.

    Returns:
        ``acc1`` and ``acc5`` in percent, ``loss``, and the numbers of ``images`` and of
        ``corrupt`` files left out.

    Raises:
        NoImagesError: There was not a single sound image.
    """
    precision = precision or Precision(device)
    model.eval()
    is_compiled = unwrap(model) is not model
    full = corrupt_seen = images_seen = 0
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    losses = []
    for images, targets, corrupt in data_loader:
        corrupt_seen += corrupt
        images_seen += len(images)
        if not len(images):
            continue
        images = precision.move(images)
        targets = targets.to(device, non_blocking=True)
        full = max(full, len(images)) if is_compiled else 0
        with precision.autocast():
            logits = model(_fill_up(images, full))
        logits = logits[: len(images)].float()
        losses.append(F.cross_entropy(logits, targets, reduction="sum"))
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == targets[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum()])
    # float64 makes the sum independent, in practice, of how batches were dealt to processes
    loss_sum = torch.stack(losses).cpu().double().sum().item() if losses else 0.0
    totals = torch.tensor(
        [*counts.tolist(), images_seen, corrupt_seen, loss_sum], dtype=torch.float64
    )
    if shared:
        totals = sum_over_processes(totals, device)
    hits1, hits5, images_seen, corrupt_seen, loss_sum = totals.tolist()
    if not images_seen:
        raise NoImagesError(f"nothing to evaluate: {corrupt_seen:.0f} corrupt images, no sound one")
    return {
        "acc1": 100 * hits1 / images_seen,
        "acc5": 100 * hits5 / images_seen,
        "loss": loss_sum / images_seen,
        "images": int(images_seen),
        "corrupt": int(corrupt_seen),
    }
