"""One epoch of training, the evaluation loop, and the precision of both."""

import contextlib
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from utils import UserError, all_or_none, sum_over_processes


@dataclass
class Precision:
    """Mixed precision, with loss scaling for float16 only, and memory format.

    Args:
        device: Device of the model.
        dtype: ``torch.float16``, ``torch.bfloat16``, or ``None`` for full precision.
        memory_format: Memory format of images and convolution weights.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def autocast(self) -> torch.autocast:
        """Return the context of the forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def place(self, model: nn.Module) -> None:
        """Move a model to the device and convert its weights to the memory format."""
        model.to(self.device, memory_format=self.memory_format)

    def move(self, images: torch.Tensor) -> torch.Tensor:
        """Return images ``B 3 H W`` on the device in the memory format (asynchronous copy)."""
        return images.to(self.device, non_blocking=True, memory_format=self.memory_format)

    def update_scale(self) -> torch.Tensor | None:
        """Update the loss scale after a step; return a device tensor: was the step skipped?"""
        if not self.scaler.is_enabled():
            return None
        before = self.scaler._scale.clone()  # get_scale() would synchronize
        self.scaler.update()
        return self.scaler._scale < before

    def __str__(self) -> str:
        if self.dtype is not None:
            return str(self.dtype).removeprefix("torch.")
        return "float32, products in TF32" if uses_tf32(self.device) else "float32"


def uses_tf32(device: torch.device) -> bool:
    """Return True if a device multiplies float32 in TF32, as :func:`select_kernels` has set."""
    # from compute capability 8.0 on; a ROCm device has no TF32 of that name
    return (
        device.type == "cuda"
        and torch.get_float32_matmul_precision() != "highest"
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def select_kernels(
    device: torch.device, tf32: bool = True, deterministic: bool = False, search: bool = True
) -> None:
    """Select kernels by speed, or only deterministic ones; set how float32 is multiplied.

    To be called before a model computes.

    Args:
        device: Device of the models.
        tf32: On CUDA, matrix products and convolutions round their float32 factors to TF32
            (10 bits of mantissa). Other devices keep PyTorch's setting.
        deterministic: Only deterministic kernels; an operator without one raises RuntimeError.
        search: cuDNN times its kernels for every new shape; only for images of few sizes.
    """
    if device.type == "cuda":
        # both by the older interface: PyTorch raises an error where it is mixed with the newer one
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    else:
        # oneDNN's convolutions in bfloat16 by AMX are wrong for some shapes (PyTorch issue 169688);
        # it reads the variable when it is first used
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    torch.backends.cudnn.benchmark = search and not deterministic
    if deterministic:
        # cuBLAS reads it at its start
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def train_size(args: Namespace, epoch: int) -> int:
    """Return the side of an epoch's training images: each size has an equal span of epochs."""
    sizes = args.progressive_sizes or [args.input_size]
    return sizes[min(epoch * len(sizes) // args.epochs, len(sizes) - 1)]


def is_evaluated(args: Namespace, epoch: int) -> bool:
    """Return True if an epoch, counted from 0, ends with an evaluation (``--val-interval``)."""
    return (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs


class Meter:
    """Statistics of an epoch on this rank.

    Losses stay on the device until they are read.

    Attributes:
        steps: Batches done.
        images: Images seen.
        corrupt: Messages about corrupt image files.
        lr: Learning rate of the last update.
        seconds: Time spent.
        bad_in_row: Largest number of consecutive steps with a nonfinite loss, as of the last
            :meth:`read`.
        bad_step: First step of the epoch with a nonfinite loss, likewise; else -1.
    """

    SUMS = ("total", "bad", "skipped", "in_row", "worst", "first_bad")

    def __init__(self) -> None:
        self._in_row = 0
        self.restart()

    def restart(self) -> None:
        """Start an epoch; a row of nonfinite losses continues."""
        self._losses: list[torch.Tensor] = []
        self._skips: list[torch.Tensor] = []
        self._total = 0.0
        self._bad = self._skipped = self._worst = 0
        self._first_bad = -1
        self.bad_in_row, self.bad_step = 0, -1
        self.steps = self.images = 0
        self.corrupt: list[str] = []
        self.lr = self.seconds = 0.0

    def add(self, loss: torch.Tensor) -> None:
        """Count the loss of a step; nonfinite losses do not enter the mean."""
        self._losses.append(loss)
        self.steps += 1

    def add_skipped(self, skipped: torch.Tensor | None) -> None:
        """Count an update if the loss scaler skipped it."""
        if skipped is not None:
            self._skips.append(skipped)

    def read(self) -> None:
        """Count what was added since the last reading. Waits for the device."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        for step, loss in enumerate(losses, start=self.steps - len(losses)):
            if math.isfinite(loss):
                self._total += loss
                self._in_row = 0
                continue
            self._bad += 1
            self._in_row += 1
            self._worst = max(self._worst, self._in_row)
            self._first_bad = step if self._first_bad < 0 else self._first_bad
        if self._skips:
            self._skipped += int(torch.stack(self._skips).sum())
        self._losses, self._skips = [], []
        self.bad_in_row, self.bad_step = self._worst, self._first_bad

    def mean(self) -> float:
        """Return the mean of the finite losses on this rank. Waits for the device."""
        self.read()
        good = self.steps - self._bad
        return self._total / good if good else math.nan

    def counts(self) -> dict[str, int]:
        """Return the counts of nonfinite losses and skipped updates. Waits for the device."""
        self.read()
        return {"nonfinite": self._bad, "skipped": self._skipped}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values. Waits for the device."""
        self.read()
        numbers = {key: getattr(self, key) for key in ("steps", "images", "lr", "seconds")}
        sums = {key: getattr(self, f"_{key}") for key in self.SUMS}
        return numbers | sums | {"corrupt": list(self.corrupt)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a ``state_dict``."""
        self.restart()
        for key in ("steps", "images", "lr", "seconds"):
            setattr(self, key, state[key])
        self.corrupt = list(state["corrupt"])
        for key in self.SUMS:
            setattr(self, f"_{key}", state[key])
        self.read()


def merge_meters(
    states: Sequence[Mapping[str, Any]], steps: int, world_size: int, rank: int
) -> dict[str, Any]:
    """Merge meter states of other ranks into one for this rank, after ``steps`` steps.

    Counts over all ranks go to rank 0, means to every rank.
    """
    sums = {key: sum(state[key] for state in states) for key in ("images", "bad", "skipped")}
    good = sum(state["steps"] - state["bad"] for state in states)
    mean = sum(state["total"] for state in states) / max(good, 1)
    bad = min(sums["bad"], steps) if rank == 0 else 0
    return {
        "steps": steps,
        "images": sums["images"] / world_size,
        "lr": max(state["lr"] for state in states),
        "seconds": max(state["seconds"] for state in states),
        "total": mean * (steps - bad),
        "bad": bad,
        "skipped": sums["skipped"] if rank == 0 else 0,
        **{key: max(state[key] for state in states) for key in ("in_row", "worst", "first_bad")},
        "corrupt": [line for state in states for line in state["corrupt"]] if rank == 0 else [],
    }


def eval_frozen(model: nn.Module) -> None:
    """Put modules without trainable parameters into evaluation mode.

    They compute without dropout, and their BatchNorm statistics stay as they are.
    """
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


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
    mixup_fn: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    lr_scheduler: Scheduler | None = None,
    accum_iter: int = 1,
    set_training_mode: bool = True,
    log_interval: int = 50,
    report: Callable[[int, float, float, float], None] = lambda step, loss, lr, rate: None,
    max_nonfinite: int = 10,
    meter: Meter | None = None,
    after_update: Callable[[Meter], bool] = lambda meter: False,
) -> dict[str, float] | None:
    """Train for one epoch, or for what is left of it.

    Args:
        model: Model, possibly wrapped in DistributedDataParallel.
        criterion: Loss of (logits, targets).
        data_loader: Yields batches of (images ``B 3 H W``, targets ``B``, messages about corrupt
            files), the tensors on ``device``.
        optimizer: Stepped every ``accum_iter`` batches, and after the last one.
        device: Device of the model.
        epoch: Epoch number, from 0.
        precision: Autocast and loss scaling.
        max_norm: Maximum gradient norm; gradients are clipped after unscaling.
        model_ema: Moving average, updated after every optimizer step.
        mixup_fn: Mixes a batch on the device.
        lr_scheduler: Schedule to step per update.
        accum_iter: Batches per optimizer step.
        set_training_mode: False keeps evaluation mode (DeiT's ``--no-train-mode``).
        log_interval: Steps between calls of ``report``, the only ones that wait for the device.
        report: Called with (steps done, mean loss so far, learning rate, images per second), the
            latter two of this rank.
        max_nonfinite: Consecutive steps with a nonfinite loss that end the training. In float16,
            the loss scaler skips the updates of such steps.
        meter: Statistics of the steps already done; the loader yields the others.
        after_update: Called after every update; True ends the epoch early.

    Returns:
        ``loss``, the mean over all ranks, ``lr`` of the last step, ``images_per_second`` over all
        ranks, and, if not 0, the counts ``corrupt`` (files), ``nonfinite`` (losses) and
        ``skipped`` (updates). None if ``after_update`` ended the epoch.

    Raises:
        UserError: Too many nonfinite losses, noticed at the next reading, or, except in float16,
            a single one, noticed at the end of the epoch.
    """
    model.train(set_training_mode)
    eval_frozen(model)
    meter = Meter() if meter is None else meter
    done = meter.steps  # not a multiple of accum_iter if the epoch began with another one
    steps = done + len(data_loader)
    updates = epoch * -(-steps // accum_iter) + -(-done // accum_iter)
    second_order = getattr(optimizer, "is_second_order", False)
    before, started = meter.seconds, time.perf_counter()
    alone = not dist.is_initialized()
    begin_update = step_marker(model, device)
    optimizer.zero_grad()
    for step, (images, targets, corrupt) in enumerate(data_loader, start=done):
        meter.images += len(images)
        meter.corrupt += corrupt
        first_of_update = step - (step - done) % accum_iter
        if step == first_of_update:
            begin_update()
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        batches_of_update = min(accum_iter, steps - first_of_update)
        is_update = step + 1 == first_of_update + batches_of_update
        with gradient_sync(model, is_update):
            with precision.autocast(), differentiable_attention(second_order):
                loss = criterion(model(images), targets)
            part = loss / batches_of_update if batches_of_update > 1 else loss
            precision.scaler.scale(part).backward(create_graph=second_order)
        meter.add(loss.detach())
        if is_update:
            if max_norm is not None:
                precision.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            precision.scaler.step(optimizer)
            meter.add_skipped(precision.update_scale())
            optimizer.zero_grad()
            updates += 1
            if model_ema is not None:
                model_ema.update(unwrap(model), step=updates)
            meter.lr = max(group["lr"] for group in optimizer.param_groups)
            if lr_scheduler is not None:
                lr_scheduler.step_update(updates)
        meter.seconds = before + time.perf_counter() - started
        shown = (step + 1) % log_interval == 0 and step + 1 < steps
        if shown:
            meter.read()
            if alone:
                check_finite(meter, max_nonfinite, epoch, precision, model)
            report(step + 1, meter.mean(), meter.lr, meter.images / meter.seconds)
        if is_update and after_update(meter):
            return None

    meter.read()
    # except in float16, one nonfinite loss has corrupted the weights
    failed = meter.bad_in_row >= (max_nonfinite if precision.scaler.is_enabled() else 1)
    numbers = [meter.mean(), 1, meter.images / max(meter.seconds, 1e-9), len(meter.corrupt)]
    counts = meter.counts()
    sums = torch.tensor([*numbers, failed, *counts.values()], dtype=torch.float64)
    loss, processes, rate, corrupt_seen, failed, *totals = sum_over_processes(sums, device).tolist()
    if failed:
        check_finite(meter, 0, epoch, precision, model)
    report(steps, loss / processes, meter.lr, rate / processes)
    stats = {"loss": loss / processes, "lr": meter.lr, "images_per_second": round(rate, 1)}
    totals = {"corrupt": corrupt_seen} | dict(zip(counts, totals, strict=True))
    return stats | {key: int(value) for key, value in totals.items() if value}


def check_finite(
    meter: Meter, limit: int, epoch: int, precision: Precision, model: nn.Module
) -> None:
    """Raise UserError after ``limit`` consecutive nonfinite losses, as last read by the meter."""
    if meter.bad_in_row < limit:
        return
    exponent = getattr(unwrap(model), "qk_scale_factor", None)
    step = meter.steps - 1 if meter.bad_step < 0 else meter.bad_step
    row = f"in {meter.bad_in_row} steps in a row" if meter.bad_in_row else "on another process"
    raise UserError(
        f"the loss is not finite at epoch {epoch}, step {step}, {row} (learning rate "
        f"{meter.lr:.3g}, computed in {precision}, query/key pre-scale exponent {exponent}); the "
        f"last checkpoint is kept. A lower --lr, --clip-grad 1, --amp-dtype bfloat16 or "
        f"--qk-scale-factor -0.5 may help"
    )


def step_marker(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Return a function to call before a step; without a compiled model, it does nothing.

    CUDA graphs may overwrite the outputs of the steps before: activations, gradients, logits.

    Args:
        model: Model of the step. Others that take part in it, such as a teacher, are compiled if
            it is.
        device: Device of the model.
    """
    if device.type == "cuda" and is_compiled(model):
        return torch.compiler.cudagraph_mark_step_begin
    return lambda: None


def is_compiled(model: nn.Module) -> bool:
    """Return True if torch.compile compiles a model or parts of it, for fixed sizes."""
    parts = list(model.modules())
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl for part in parts)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of torch.compile and DistributedDataParallel."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, sync: bool) -> contextlib.AbstractContextManager:
    """Return the context of a backward pass that averages gradients over ranks only if ``sync``."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
    if sync or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def differentiable_attention(twice: bool) -> contextlib.AbstractContextManager:
    """Return the context of a forward pass whose gradients are differentiated, if ``twice``."""
    return sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext()


def _fill_up(images: torch.Tensor, size: int) -> torch.Tensor:
    """A batch of ``size`` images at least, the added ones blank."""
    return F.pad(images, (0,) * 7 + (max(size - len(images), 0),))


def _as_is(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits, targets


def _count(
    data_loader: Iterable,
    model: nn.Module,
    device: torch.device,
    precision: Precision,
    after_batch: Callable[[], bool],
    observe: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    timer: Callable[[int], contextlib.AbstractContextManager],
) -> tuple[list[float], list[str]]:
    """Return this rank's sums for :func:`evaluate`, and its messages about corrupt files."""
    model.eval()
    fixed, begin_step = is_compiled(model), step_marker(model, device)
    full = images_seen = 0
    messages: list[str] = []
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    losses = []
    stopped = False
    for images, targets, corrupt in data_loader:
        messages += corrupt
        images_seen += len(images)
        if not len(images):
            continue
        full = max(full, len(images)) if fixed else 0
        padded = _fill_up(images, full)
        begin_step()
        with timer(len(images)), precision.autocast():
            logits = model(padded)
        logits = logits[: len(images)].to(torch.float32, copy=True)  # observers may keep it
        logits, targets = observe(logits, targets)
        losses.append(F.cross_entropy(logits, targets, reduction="sum"))
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == targets[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum()])
        if after_batch():
            stopped = True
            break
    # in float64 the sum does not depend, in practice, on how batches are assigned to ranks
    loss_sum = torch.stack(losses).cpu().double().sum().item() if losses else 0.0
    numbers = [*counts.tolist(), images_seen, len(messages), loss_sum, stopped]
    return numbers, messages


@torch.inference_mode()
def evaluate(
    data_loader: Iterable,
    model: nn.Module,
    device: torch.device,
    precision: Precision | None = None,
    shared: bool = True,
    after_batch: Callable[[], bool] = lambda: False,
    observe: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = _as_is,
    timer: Callable[[int], contextlib.AbstractContextManager] = contextlib.nullcontext,
    size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Measure top-1 and top-5 accuracy and cross-entropy.

    Args:
        data_loader: Yields batches of (images ``B 3 H W``, targets ``B``, messages about corrupt
            files left out), the tensors on ``device``.
        model: Model, not distributed: ranks may have different numbers of batches. For a
            compiled model, smaller batches are padded with blank images, which do not count.
        device: Device of the model.
        precision: Autocast, if any.
        shared: Ranks have different parts of the dataset; their counts are summed.
        after_batch: Called after every batch; True stops, and the result is meaningless.
        observe: Receives the logits ``B K`` in float32 and the targets ``B`` of every batch, on the
            device; returns those to count.
        timer: Context of the forward pass of so many images.
        size: Number of images of the dataset, over all ranks if ``shared``; None if unknown.
        group: CPU process group, by which an error of one rank ends all; None for a single process.

    Returns:
        ``acc1`` and ``acc5`` in percent, ``loss``, the numbers of ``images`` and of ``corrupt``
        files left out, and the ``messages`` about those read by this rank.

    Raises:
        UserError: No image can be decoded, or the images and those left out are not ``size``.
        PeerError: Another rank failed.
    """
    numbers, messages = all_or_none(
        lambda: _count(
            *(data_loader, model, device, precision or Precision(device)),
            *(after_batch, observe, timer),
        ),
        group,
    )
    totals = torch.tensor(numbers, dtype=torch.float64)
    if shared:
        totals = sum_over_processes(totals, device)
    hits1, hits5, images_seen, corrupt_seen, loss_sum, stopped = totals.tolist()
    if not images_seen and not stopped:
        first = f"; the first: {messages[0]}" if messages else ""
        raise UserError(f"nothing to evaluate: {corrupt_seen:.0f} corrupt images{first}")
    if size not in (None, images_seen + corrupt_seen) and not stopped:
        raise UserError(
            f"the evaluation counts {images_seen:.0f} images and {corrupt_seen:.0f} corrupt ones; "
            f"the dataset has {size}: its loader must yield each of them once"
        )
    images_seen = max(images_seen, 1)
    return {
        "acc1": 100 * hits1 / images_seen,
        "acc5": 100 * hits5 / images_seen,
        "loss": loss_sum / images_seen,
        "images": int(images_seen),
        "corrupt": int(corrupt_seen),
        "messages": messages,
    }
