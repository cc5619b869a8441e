"""Models larger than a device: weights, gradients, moments and average in shards (FSDP2).

A process keeps 1/n of every tensor, cut along its first dimension, and gathers a block's weights
for as long as it computes with them: ``torch.distributed.fsdp.fully_shard``. Outside of this file a
sharded model is a model: it takes whole tensors when it is loaded, and a checkpoint holds whole
ones, so that its file does not tell how it was trained.
"""

import contextlib
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from utils import UserError

ROW = re.compile(r"(blocks|layers?|stages?)\d*")  # what models call their rows of blocks


def check(args: Namespace, world_size: int) -> None:
    """Refuse flags that do not go with ``--fsdp``.

    Raises:
        UserError: There is one process, or a flag that asks for something else.
    """
    if world_size == 1:
        raise UserError(
            "--fsdp shares a model among processes, and there is one: leave it out, or start "
            "several, by torchrun --nproc_per_node"
        )
    if args.compile is not None:
        raise UserError("--fsdp does not go with --compile: leave one of them out")
    if args.model_ema and args.model_ema_force_cpu:
        raise UserError(
            "--fsdp shards the moving average like the weights: leave --model-ema-force-cpu out"
        )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time; what they leave is gathered with the root.

    They are the children of every Sequential or ModuleList called blocks, layers, stages, or so
    with a number (ViT's ``blocks.3``, Visformer's ``stage2.0``, ResNet's ``layer1.2``). Where such
    rows lie in each other, the inner ones count (Swin's ``layers.1.blocks.0``).
    """
    rows = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        and ROW.fullmatch(name.rpartition(".")[2])
    }
    return [
        child
        for name, row in rows.items()
        for key, child in row.named_children()
        if any(True for _ in child.parameters())
        and not any(inner.startswith(f"{name}.{key}.") for inner in rows)
    ]


def shard(model: nn.Module, device: torch.device) -> None:
    """Leave this process its shard of every parameter, in place; all processes must call it.

    Weights stay float32, and autocast is what computes in less, as in a run that is not sharded:
    the same function, BatchNorm's statistics included, is trained and evaluated. Gradients are
    averaged in float32.

    Args:
        model: On the CPU, so that the device never holds more than one whole block; the same on
            every process.
        device: Where the shards go and blocks are gathered.

    Raises:
        UserError: A parameter cannot be sharded.
    """
    model.to(memory_format=torch.contiguous_format)  # the only layout that is sharded
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    try:
        for block in find_blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"--fsdp cannot shard {type(model).__name__}: {error}") from error
    model.register_load_state_dict_pre_hook(_spread_loaded)


def _spread(value: Any, parameter: torch.Tensor) -> Any:
    """This process's shard of a whole ``value`` that belongs to a sharded parameter."""
    whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    if not whole or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    # every process has the whole and takes its part: nothing is sent
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _spread_loaded(model: nn.Module, state: dict[str, Any], prefix: str, *others: object) -> None:
    for name, parameter in model.named_parameters():
        if prefix + name in state:
            state[prefix + name] = _spread(state[prefix + name], parameter)


def spread_moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of an optimizer, as a checkpoint holds it, sharded as its parameters are."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    moments = {
        number: {key: _spread(value, parameters[number]) for key, value in values.items()}
        if number in parameters
        else values
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def gather(value: Any, keep: bool) -> Any:
    """Plain values with every sharded tensor whole, on the CPU; all processes must call it.

    One tensor is gathered at a time, so that the device holds no more than that.

    Args:
        value: Mappings, lists and tensors.
        keep: Off drops what has been gathered, for the processes that do not need it.
    """
    if isinstance(value, DTensor):
        whole = value.detach().full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gather(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather(item, keep) for item in value)
    return value


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the block, a sharded model is whole, and its forward pass talks to nobody.

    Processes may then run different numbers of batches. Any other model is left alone.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.set_reshard_after_forward(False)
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            # the root's weights are needed as soon as the backward pass begins
            module.set_reshard_after_forward(module is not model, recurse=False)


class ShardedAverage(ModelEmaV3):
    """timm's moving average over the shards of a model, of which it is a sharded twin."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move by ``1 - decay`` towards the model; counters are copied."""
        states = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        pairs = [(_local(mean), _local(value)) for mean, value in states]
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        means, values = ([pair[i] for pair in moving] for i in range(2))
        torch._foreach_lerp_(means, values, weight=1 - decay)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
