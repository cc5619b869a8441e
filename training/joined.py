"""Small kernels of a training step that PyTorch's foreach operators join into one.

A GPU computes most layers of these networks faster than PyTorch can ask for them one by one. Under
autocast, every weight is cast by a kernel of its own, and so is its gradient; every BatchNorm
counts its batches; every drop path draws. None of it changes a result but the order in which
stochastic depth draws. For torch.compile and sharded models, PyTorch does such things itself.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from models.layers import DropPath
from training.blocks import find_blocks


class Cast(torch.autograd.Function):
    """Cast tensors, and the gradients back, by one kernel each."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the ``tensors``, all of one dtype, as ``dtype``."""
        ctx.dtype = tensors[0].dtype
        found = _cast(tensors, dtype)
        frozen = zip(found, ctx.needs_input_grad[1:], strict=True)
        ctx.mark_non_differentiable(*(tensor for tensor, needed in frozen if not needed))
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients in the dtype of the tensors; they may be differentiated again."""
        there = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled():
            found = iter([grad.to(ctx.dtype) for grad in there])
        else:
            found = iter(_cast(there, ctx.dtype))
        return None, *(None if grad is None else next(found) for grad in grads)


def _cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if found:
        torch._foreach_copy_(found, list(tensors))
    return found


class _Weights:
    """Hooks around a module that cast the weights of its convolutions and projections together.

    While the module computes, they stand before the parameters of the same names, where autocast
    finds nothing left to cast.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = [layer for layer in layers if type(layer) in (nn.Conv2d, nn.Linear)]

    def before(self, module: nn.Module, args: tuple) -> None:
        owners = [
            (layer, name, parameter)
            for layer in self.layers
            for name, parameter in layer._parameters.items()
            if parameter is not None and parameter.dtype == torch.float32
        ]
        if not owners or not torch.is_autocast_enabled(owners[0][-1].device.type):
            return
        dtype = torch.get_autocast_dtype(owners[0][-1].device.type)
        found = Cast.apply(dtype, *(parameter for *_, parameter in owners))
        for (layer, name, _), weight in zip(owners, found, strict=True):
            layer.__dict__[name] = weight

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        for layer in self.layers:
            for name in layer._parameters:
                layer.__dict__.pop(name, None)


class _Counting:
    """Stands in for the number of batches of a BatchNorm; notes who adds to it."""

    def __init__(self, number: torch.Tensor, noted: Counter):
        self.number, self.noted = number, noted

    def add_(self, count: int) -> None:
        self.noted[self.number] += count


class _Draws:
    """Hooks around a forward pass in training: all drop paths draw at once."""

    def __init__(self, model: nn.Module):
        self.modules = list(model.modules())
        self.paths = [m for m in self.modules if isinstance(m, DropPath) and m.drop_prob]
        self.keep: torch.Tensor | None = None

    def before(self, module: nn.Module, args: tuple) -> None:
        """Set the factors of a batch: 0 for a dropped path, else 1 / (1 - its rate)."""
        recomputes = any(getattr(m, "grad_checkpointing", False) for m in self.modules)
        if not module.training or not self.paths or recomputes:
            return  # a block that is computed again has to draw by itself, as it did
        device, dtype = args[0].device, torch.float32
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if self.keep is None or self.keep.device != device:  # copied once, not in every step
            self.keep = torch.tensor([[1 - path.drop_prob] for path in self.paths], device=device)
        drawn = torch.rand(len(self.paths), len(args[0]), device=device) < self.keep
        for path, factor in zip(self.paths, (drawn / self.keep).to(dtype), strict=True):
            path.factor = factor

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        for path in self.paths:
            path.factor = None


class _Counts:
    """Hooks around a forward pass: BatchNorms count their batches together."""

    def __init__(self, model: nn.Module):
        norms = (m for m in model.modules() if isinstance(m, _BatchNorm))
        self.norms = [norm for norm in norms if norm.momentum is not None]
        self.counted: Counter = Counter()

    def before(self, module: nn.Module, args: tuple) -> None:
        for norm in self.norms:
            if norm.num_batches_tracked is not None:
                counting = _Counting(norm.num_batches_tracked, self.counted)
                norm.__dict__["num_batches_tracked"] = counting

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        for norm in self.norms:
            norm.__dict__.pop("num_batches_tracked", None)
        if self.counted:
            numbers, counts = list(self.counted), list(self.counted.values())
            torch._foreach_add_(numbers, counts)
            self.counted.clear()


def _surround(module: nn.Module, hooks: _Weights | _Draws | _Counts) -> None:
    module.register_forward_pre_hook(hooks.before)
    module.register_forward_hook(hooks.after, always_call=True)


def draw_together(model: nn.Module) -> None:
    """Let all drop paths of a model draw at once, in place.

    Blocks that are compiled one by one then get their rates as data, and share a graph.
    """
    _surround(model, _Draws(model))


def join_kernels(model: nn.Module) -> None:
    """Let a model join the small kernels of its forward and backward passes, in place.

    Weights are cast block by block, so that gradients are ready as early as they are needed by
    DistributedDataParallel.

    Args:
        model: Model that is neither sharded nor compiled.
    """
    blocks = find_blocks(model)
    inner = {layer for block in blocks for layer in block.modules()}
    for block in blocks:
        _surround(block, _Weights(list(block.modules())))
    _surround(model, _Weights([layer for layer in model.modules() if layer not in inner]))
    _surround(model, _Counts(model))
    draw_together(model)


class MovingAverage(ModelEmaV3):
    """timm's moving average, by two kernels; of a sharded model, sharded like it."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move by ``1 - decay`` towards the model; integer buffers are copied."""
        states = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        pairs = [(_local(mean), _local(value).to(_local(mean).device)) for mean, value in states]
        moving, counted = (
            [pair for pair in pairs if pair[0].is_floating_point() is floating]
            for floating in (True, False)
        )
        means, values = ([pair[i] for pair in moving] for i in range(2))
        torch._foreach_lerp_(means, values, weight=1 - decay)
        if counted:
            torch._foreach_copy_(*map(list, zip(*counted, strict=True)))


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
