"""Recomputation in the backward pass: of whole blocks, or of norms and activations only."""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by the batch's statistics without updating the running ones again."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    saved = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches in saved:
            norm.momentum, norm.num_batches_tracked = momentum, batches


_in_block = contextvars.ContextVar("in_block", default=False)  # a whole block is recomputed


@contextlib.contextmanager
def _whole_block() -> Iterator[None]:
    token = _in_block.set(True)
    try:
        yield
    finally:
        _in_block.reset(token)


@contextlib.contextmanager
def _second_pass(module: nn.Module) -> Iterator[None]:
    with _whole_block(), _frozen_statistics(module):
        yield


@contextlib.contextmanager
def _restored_statistics(module: nn.Module) -> Iterator[None]:
    """Undo the updates of running statistics: a compiled pass then is the first one again."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)


def _contexts(module: nn.Module) -> tuple:
    if module._compiled_call_impl is not None:  # other attributes would compile another graph
        return contextlib.nullcontext(), _restored_statistics(module)
    return _whole_block(), _second_pass(module)


def _without_trace(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function that recomputes a layer's output without side effects, if there is one."""
    if isinstance(layer, _BatchNorm) and layer.training:
        if type(layer) is not nn.BatchNorm2d:
            return None  # SyncBatchNorm: the statistics of other processes take part
        return partial(
            F.batch_norm,
            running_mean=None,
            running_var=None,
            weight=layer.weight,
            bias=layer.bias,
            training=True,
            eps=layer.eps,
        )
    return layer


@contextlib.contextmanager
def recomputed(layer: nn.Module, x: torch.Tensor, enabled: bool = True) -> Iterator[torch.Tensor]:
    """Yield ``layer(x)``, which operations within the context do not save for the backward pass.

    The backward pass recomputes it from ``x``, which ``layer`` saves for its own gradient anyway.
    That pays for norms and activations: their outputs need much memory and little time. Within a
    block that is recomputed as a whole, or where saved tensors cannot be replaced, the output is
    saved as usual.

    Args:
        layer: Norm or activation.
        x: Input of ``layer``.
        enabled: Recompute; otherwise save the output as usual.
    """
    y = layer(x)
    compute = _without_trace(layer)
    usual = (
        torch.compiler.is_compiling()
        or not enabled
        or not y.requires_grad
        or compute is None
        or _in_block.get()
        or torch._C._are_functorch_transforms_active()
    )
    if usual:
        yield y
        return
    source, place = x.detach(), (y.data_ptr(), y.shape, y.stride())

    def pack(tensor: torch.Tensor) -> torch.Tensor | None:
        same = (tensor.data_ptr(), tensor.shape, tensor.stride()) == place
        return None if same else tensor.detach()

    def unpack(kept: torch.Tensor | None) -> torch.Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return compute(source)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield y


def set_recompute_activations(model: nn.Module, enable: bool) -> None:
    """Recompute norms and activations in the blocks of ``model`` that support it (Visformer's).

    Their outputs are about a third of the memory of a training step, and little of its time.
    """
    for module in model.modules():
        if hasattr(module, "recompute_activations"):
            module.recompute_activations = enable


def checkpoint_blocks(blocks: Iterable[nn.Module], x: torch.Tensor, *others: Any) -> torch.Tensor:
    """Apply ``blocks`` in turn, with ``others`` as given, recomputing each in the backward pass.

    Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174. The second forward pass does
    not update running statistics again, except under torch.compile, which cannot trace that.
    """
    for block in blocks:
        if torch.compiler.is_compiling():
            x = checkpoint(block, x, *others, use_reentrant=False)
        else:
            contexts = partial(_contexts, block)
            x = checkpoint(block, x, *others, use_reentrant=False, context_fn=contexts)
    return x
