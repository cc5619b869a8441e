"""Gradient checkpointing that leaves BatchNorm's statistics as they would be without it."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial

import torch
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


def _contexts(module: nn.Module) -> tuple:
    return contextlib.nullcontext(), _frozen_statistics(module)


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
