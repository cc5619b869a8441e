"""DistributedDataParallel: wrapping a model, and warming it up."""

import inspect
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import Precision, step_marker
from models import height_and_width
from utils import random_state, set_random_state

WARM_UP_STEPS = 3  # one more than PyTorch is seen to need


def distribute(
    model: nn.Module, device: torch.device, static: bool = True
) -> DistributedDataParallel:
    """Wrap a model so that its gradients are averaged over the ranks.

    BatchNorm statistics are not synchronized at every step: those of rank 0 count, and are
    broadcast before evaluation. Gradients are views of the communication buckets.

    Args:
        model: Model on its device.
        device: Device of this rank.
        static: Every step uses the same parameters in the same order. Not for accumulated
            batches or a compiled model.
    """
    # older versions of PyTorch have only the second name, newer ones deprecate it
    names = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_with_strides, parameter.stride()))
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, gradient_as_bucket_view=True, static_graph=static, **{name: False}
    )


def _with_strides(strides: tuple[int, ...], gradient: torch.Tensor) -> torch.Tensor | None:
    """Return a view of a gradient with the strides of its parameter, or None if it has others.

    Strides of dimensions of size 1 are free. A kernel takes them from its input, as of the 1x1
    convolution of a pooled map; DistributedDataParallel expects those of the parameter.
    """
    dims = zip(gradient.shape, gradient.stride(), strides, strict=True)
    if gradient.stride() != strides and all(size == 1 or a == b for size, a, b in dims):
        return gradient.as_strided(gradient.shape, strides)
    return None


def warm_up_ddp(
    model: nn.Module,
    precision: Precision,
    batch_size: int,
    input_size: int | tuple[int, int],
    in_chans: int = 3,
) -> None:
    """Run a few steps without an update, so that gradient buckets get their final order.

    DistributedDataParallel regroups gradients after its first backward passes, and buckets decide
    how sums over three and more ranks are rounded: without a warm-up, the first steps after
    resuming would differ from those of an uninterrupted run. Buffers and random state are
    restored.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = random_state(precision.device)
    model.train()
    size = (batch_size, in_chans, *height_and_width(input_size))
    images = precision.move(torch.zeros(size, dtype=precision.dtype or torch.float32))
    begin_step = step_marker(model, precision.device)
    for _ in range(WARM_UP_STEPS):
        begin_step()
        with precision.autocast():
            output = model(images)
        outputs = (
            output if isinstance(output, tuple) else (output,)
        )  # of a student with a distillation head
        sum(logits.float().sum() for logits in outputs).backward()
        model.zero_grad()
    set_random_state(state, precision.device)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
