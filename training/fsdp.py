"""Sharded weights, gradients, optimizer state and moving average (FSDP2).

A rank keeps 1/n of every tensor, split along its first dimension, and gathers the weights of a
block while it computes with them: ``torch.distributed.fsdp.fully_shard``. Outside this file a
sharded model is like any other: it loads full tensors, and its checkpoints hold full tensors.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.blocks import find_blocks
from training.compilation import CUDA_GRAPHS
from utils import UserError


def check(args: Namespace, world_size: int) -> None:
    """Check the flags that ``--fsdp`` does not support.

    Raises:
        UserError: There is a single process, or an unsupported flag is given.
    """
    if world_size == 1:
        raise UserError(
            "--fsdp shards a model over several processes, and there is one: leave it out, or "
            "start several with torchrun --nproc_per_node N"
        )
    if args.compile is not None:
        if not args.compile_blocks:
            raise UserError(
                "--fsdp compiles blocks: give --compile-blocks, too, or leave --compile"
            )
        if args.compile_mode in CUDA_GRAPHS:
            raise UserError(
                f"--fsdp does not support --compile-mode {args.compile_mode}: gathered weights "
                f"move, and CUDA graphs need them in place"
            )
    if args.model_ema and args.model_ema_force_cpu:
        raise UserError(
            "--fsdp shards the moving average like the weights: leave --model-ema-force-cpu out"
        )


def shard(model: nn.Module, device: torch.device) -> None:
    """Keep this rank's shard of every parameter, in place; all ranks must call it.

    Weights stay float32 and autocast lowers the precision, as without sharding: the trained and
    evaluated function is the same, BatchNorm statistics included. Gradients are averaged in
    float32.

    Args:
        model: Model on the CPU, so that the device never holds more than one full block;
            identical on all ranks.
        device: Device of the shards.

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
    model.register_load_state_dict_pre_hook(_shard_loaded)


def _shard_tensor(value: Any, parameter: torch.Tensor) -> Any:
    """Return this rank's shard of a full ``value`` that belongs to a sharded parameter."""
    full = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    if not full or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    # every rank has the full tensor and takes its part: no communication
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _shard_loaded(model: nn.Module, state: dict[str, Any], prefix: str, *others: object) -> None:
    for name, parameter in model.named_parameters():
        if prefix + name in state:
            state[prefix + name] = _shard_tensor(state[prefix + name], parameter)


def shard_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return a checkpoint's optimizer state of full tensors, sharded like the parameters."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    moments = {
        number: {key: _shard_tensor(value, parameters[number]) for key, value in values.items()}
        if number in parameters
        else values
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def gather(value: Any, keep: bool) -> Any:
    """Return plain values with full tensors on the CPU; all ranks must call it.

    One tensor is gathered at a time, so that the device holds no more than that.

    Args:
        value: Mappings, lists and tensors.
        keep: False drops the gathered tensors, on ranks that do not need them.
    """
    if isinstance(value, DTensor):
        full = value.detach().full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gather(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather(item, keep) for item in value)
    return value


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context manager in which the weights are full and the forward pass does not communicate.

    Ranks may then run different numbers of batches. Any other model is left unchanged.
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
            # the root's weights are needed as soon as the backward pass starts
            module.set_reshard_after_forward(module is not model, recurse=False)
