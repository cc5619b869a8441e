"""Less memory in training: whole blocks, or only norms and activations, made a second time."""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by the batch's statistics without counting them a second time."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    saved = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches in saved:
            norm.momentum, norm.num_batches_tracked = momentum, batches


_in_block = contextvars.ContextVar("in_block", default=False)  # that is made again as a whole


@contextlib.contextmanager
def _as_a_whole() -> Iterator[None]:
    token = _in_block.set(True)
    try:
        yield
    finally:
        _in_block.reset(token)


@contextlib.contextmanager
def _second_time(module: nn.Module) -> Iterator[None]:
    with _as_a_whole(), _frozen_statistics(module):
        yield


def _contexts(module: nn.Module) -> tuple:
    return _as_a_whole(), _second_time(module)


def _again(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What computes a layer's output once more, without a trace; None if nothing does."""
    if isinstance(layer, _BatchNorm) and layer.training:
        if type(layer) is not nn.BatchNorm2d:
            return None  # its statistics are those of other processes, too
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
def made_again(layer: nn.Module, x: torch.Tensor, enabled: bool = True) -> Iterator[torch.Tensor]:
    """Yields ``layer(x)``; what uses it within the block does not keep it for the backward pass.

    There it is made again from ``x``, which ``layer`` keeps for its own gradient anyway: for norms
    and activations, whose outputs take memory and hardly time. Within a block that is made again as
    a whole, or where tensors are not to be replaced, it is kept as usual.

    Args:
        layer: A norm or an activation.
        x: Its input.
        enabled: Keep it as usual if not.
    """
    y = layer(x)
    again = _again(layer)
    usual = (
        torch.compiler.is_compiling()
        or not enabled
        or not y.requires_grad
        or again is None
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
            return again(source)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield y


def set_recompute_activations(model: nn.Module, enable: bool) -> None:
    """Let the blocks of ``model`` that can (Visformer's) make norms and activations again.

    Their outputs are about a third of what a training step keeps, and take hardly any of its time.
    """
    for module in model.modules():
        if hasattr(module, "recompute_activations"):
            module.recompute_activations = enable


def checkpoint_blocks(blocks: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Apply ``blocks`` in turn, recomputing each in the backward pass.

    Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174. The second forward pass
    does not update running statistics again (under torch.compile, which cannot trace that, it
    does).
    """
    for block in blocks:
        if torch.compiler.is_compiling():
            x = checkpoint(block, x, use_reentrant=False)
        else:
            contexts = partial(_contexts, block)
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return x
