"""torch.compile: of a whole model, or of its blocks one by one."""

from argparse import Namespace

import torch
from torch import nn

from training.blocks import find_blocks
from utils import UserError

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that record and replay CUDA graphs


def check(args: Namespace) -> None:
    """Check ``--compile``, ``--compile-mode`` and ``--compile-blocks``, alone and together.

    Raises:
        UserError: The backend is unknown, or the flags contradict each other.
    """
    backend, mode = args.compile, args.compile_mode
    if backend is None:
        for flag, given in (("-mode", mode), ("-blocks", args.compile_blocks)):
            if given:
                value = f" {given}" if flag == "-mode" else ""
                raise UserError(f"--compile{flag}{value} has no effect without --compile")
        return
    if backend not in torch.compiler.list_backends(None):
        backends = ", ".join(torch.compiler.list_backends())
        raise UserError(f"unknown backend --compile {backend}; choose one of {backends}")
    if mode in (None, "default"):
        return
    if backend != "inductor":
        raise UserError(f"--compile-mode {mode} is a mode of inductor, not of --compile {backend}")
    if args.deterministic and mode.startswith("max-autotune"):
        raise UserError(
            f"--deterministic does not support --compile-mode {mode}, which chooses kernels by "
            f"their time: use default or reduce-overhead"
        )


def compiled(
    model: nn.Module, backend: str | None, mode: str | None = None, blocks: bool = False
) -> nn.Module:
    """Compile ``model`` in place for fixed sizes, unless ``backend`` is None; return it.

    Its names, weights and copies stay those of a plain model; copies are not compiled.

    Args:
        model: Model on its device, not yet in DistributedDataParallel, which then stays out of the
            graph; already sharded, if it is to be.
        backend: Backend of torch.compile.
        mode: Mode of torch.compile, one of ``MODES``; None for the default.
        blocks: Compile the blocks, as :func:`find_blocks` finds them, instead of the whole: those
            of equal structure and sizes share one graph.

    Raises:
        UserError: The model has no blocks, or ``mode`` only affects CUDA devices and the model is
            on another.
    """
    if backend is None:
        return model
    device = next(model.parameters()).device.type
    if mode == "reduce-overhead" and device != "cuda":
        raise UserError(f"--compile-mode {mode} records CUDA graphs; it has no effect on {device}")
    parts = find_blocks(model) if blocks else [model]
    if not parts:
        raise UserError(f"--compile-blocks: {type(model).__name__} has no rows of blocks")
    # one graph for every structure, size and mode of blocks; beyond the limit, PyTorch would
    # go on without compiling
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit
    for part in parts:
        if part._compiled_call_impl is None:
            part.compile(backend=backend, mode=mode, dynamic=False)
    return model
