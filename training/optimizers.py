"""Optimizers of a run: which flags they support, and their full state."""

import difflib
import inspect
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import nn
from torch.distributed.fsdp import FSDPModule

from models import CheckpointError
from training.keywords import OPTIMIZER_ELSEWHERE, keyword_arguments
from utils import UserError

GENERATOR = "generator"  # key of an optimizer's random state
# entries of parameter groups that are state, unlike options: the plateau schedule keeps its state
# in the learning rate, and Lamb, Adan and Lookahead count steps
PROGRESS = ("params", "lr", "step", "lookahead_step")
# classes of timm whose steps need more of a parameter than its shard (as do cautious ones): they
# fail, or (Muon) make other steps
FULL_TENSORS = {
    *("Adafactor", "AdafactorBigVision", "AdamP", "Kron", "Mars", "Muon", "NvNovoGrad", "SGDP"),
}
LOOKAHEAD = "lookahead_"
# optimizers of PyTorch; fused, they also skip a step of the gradient scaler without a device sync
FUSED = ("adamw", "adam", "sgd", "momentum")
FUSED_SHARDED = ("adamw", "adam")


def build(args: Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build timm's optimizer ``--opt``; norms, biases and ``no_weight_decay`` do not decay.

    With ``--layer-decay``, the learning rate falls by that factor with every layer from the
    classifier down (BEiT, arXiv 2106.08254, section 3.1). Layers are timm's: a norm before the
    classifier belongs to the last block, where BEiT's code counts it with the classifier.

    Raises:
        UserError: Unknown optimizer, an option it does not accept, or a model without
            ``group_matcher`` with ``--layer-decay``.
    """
    options = {"eps": args.opt_eps, "betas": args.opt_betas, "layer_decay": args.layer_decay}
    sharded = isinstance(model, FSDPModule)
    if args.opt.lower() in (FUSED_SHARDED if sharded else FUSED):
        options["fused"] = True
    try:
        name = args.opt.lower().removeprefix(LOOKAHEAD)
        kind, betas = get_optimizer_info(name), args.opt_betas
        _check_class(args.opt, name, kind.opt_class)
        if betas is not None and kind.has_betas and len(betas) != kind.num_betas:
            given = " ".join(map(str, betas))
            raise ValueError(f"--opt-betas {given} must be {kind.num_betas} numbers")
        if "kron" in name:  # its random numbers are then its own: equal on all ranks, and saved
            options["deterministic"] = True
        options |= _options(args, name)
        optimizer = create_optimizer_v2(
            model,
            opt=args.opt,
            lr=lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            **{key: value for key, value in options.items() if value is not None},
        )
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"cannot build optimizer --opt {args.opt}: {error}") from error
    if args.layer_decay not in (None, 1) and not hasattr(model, "group_matcher"):
        name = type(model).__name__
        raise UserError(f"{name} has no group_matcher for its layers: leave --layer-decay out")
    return optimizer


def _check_class(given: str, name: str, opt_class: type | str) -> None:
    """Refuse the optimizers that timm imports from other packages, whose state is their own."""
    if isinstance(opt_class, str):
        plain = name.removeprefix("bnb").removeprefix("fused").removesuffix("8bit")
        other = plain if plain in list_optimizers() else "adamw"
        package = opt_class.partition(".")[0]
        raise UserError(f"--opt {given} of {package} is not supported: use --opt {other}")


def _options(args: Namespace, name: str) -> dict[str, Any]:
    """Return ``--opt-kwargs``, which the constructor of the optimizer must accept."""
    options = keyword_arguments(args.opt_kwargs, "--opt-kwargs", OPTIMIZER_ELSEWHERE)
    parameters = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    accepted = [key for key in parameters if key not in OPTIMIZER_ELSEWHERE]
    for key in options:
        if key not in accepted:
            near = ", ".join(difflib.get_close_matches(key, accepted) or accepted)
            raise UserError(
                f"--opt-kwargs {key}={options[key]}: --opt {args.opt} does not accept {key}; it "
                f"accepts {near}"
            )
    return options


def layer_scales(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rate scales of ``--layer-decay``, in ascending order."""
    return sorted({group.get("lr_scale", 1.0) for group in optimizer.param_groups})


def check(optimizer: torch.optim.Optimizer, args: Namespace, world_size: int) -> None:
    """Check the flags that an optimizer does not support.

    One of second order (AdaHessian) differentiates gradients. DistributedDataParallel,
    torch.compile and recomputed blocks cannot, and the scale of float16 losses would stay in the
    second derivatives.

    Raises:
        UserError: Names the optimizer and the flag.
    """
    unsupported = {"--fsdp": args.fsdp and _needs_full_tensors(optimizer)}
    if getattr(optimizer, "is_second_order", False):
        unsupported = {
            "--fsdp": args.fsdp,
            f"{world_size} processes": world_size > 1,
            "--compile": args.compile is not None,
            "--grad-checkpointing": args.grad_checkpointing,
            "--amp-dtype float16": args.amp and args.amp_dtype == "float16",
        }
    for what, is_given in unsupported.items():
        if is_given:
            raise UserError(
                f"--opt {args.opt} does not support {what}: choose another optimizer, such as "
                f"adamw, or leave {what} out"
            )


def _needs_full_tensors(optimizer: torch.optim.Optimizer) -> bool:
    base = _base(optimizer)
    is_cautious = any(group.get("caution") for group in base.param_groups)
    return is_cautious or type(base).__name__ in FULL_TENSORS


def _base(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that has the state: Lookahead keeps its own in that of another."""
    return getattr(optimizer, "_base_optimizer", optimizer)


def full_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return ``state_dict()`` and, for optimizers that have one, the state of the generator."""
    state = optimizer.state_dict()
    generator = getattr(_base(optimizer), GENERATOR, None)
    return state if generator is None else {**state, GENERATOR: generator.get_state()}


def compare(name: str, saved: Any, source: str, options: Sequence[str] = ()) -> None:
    """Compare ``--opt`` with that of a checkpoint, whose state has another meaning elsewhere.

    Args:
        name: Optimizer of the run.
        saved: Flags of the checkpoint; of other programs, these may be missing or of any type.
        source: Name of the checkpoint.
        options: ``--opt-kwargs`` of the run.

    Raises:
        CheckpointError: They are optimizers of different classes or arguments.
    """
    other = saved.get("opt") if isinstance(saved, Mapping) else None
    if isinstance(other, str) and _kind(other) != _kind(name):
        raise CheckpointError(
            f"{source} was trained with --opt {other}, whose state --opt {name} cannot use: give "
            f"--opt {other}, or start from its weights with --finetune"
        )
    before = saved.get("opt_kwargs", ()) if isinstance(saved, Mapping) else options
    if isinstance(before, list | tuple) and sorted(map(str, before)) != sorted(options):
        given = " ".join(("--opt-kwargs", *map(str, before))) if before else "no --opt-kwargs"
        raise CheckpointError(
            f"{source} was trained with {given}, and other arguments may need another state than "
            f"--opt-kwargs {' '.join(options)}: give the same, or start from its weights with "
            f"--finetune"
        )


def _kind(name: str) -> tuple[bool, Any]:
    base = name.lower().removeprefix(LOOKAHEAD)
    try:
        return base != name.lower(), get_optimizer_info(base).opt_class
    except ValueError:  # unknown to this version of timm
        return base != name.lower(), base


def restore(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str) -> None:
    """Load a :func:`full_state` strictly; options other than the learning rate stay as flagged.

    Raises:
        CheckpointError: Groups or shapes differ from the optimizer's.
    """
    own = [{k: v for k, v in g.items() if k not in PROGRESS} for g in optimizer.param_groups]
    groups = state["param_groups"]
    if len(groups) == len(own):  # else it does not fit, as PyTorch reports
        # before loading: where step counters are kept depends on options such as fused, which
        # checkpoints of DeiT and of older versions of PyTorch do not have
        groups = [{**group, **options} for group, options in zip(groups, own, strict=True)]
    try:
        optimizer.load_state_dict({**state, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{source}: the optimizer state does not fit: {error}; --opt, --linear-probe, "
            f"--freeze-stages and --layer-decay must be those of the checkpoint; or start from its "
            f"weights with --finetune"
        ) from error
    base = _base(optimizer)
    for parameter, values in base.state.items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.ndim and not _fits(value.shape, parameter.shape):
                raise CheckpointError(
                    f"{source}: the optimizer's {key} has shape {tuple(value.shape)}, its "
                    f"parameter {tuple(parameter.shape)}; --opt and the model must be those of "
                    f"the checkpoint"
                )
    if GENERATOR in state and hasattr(base, GENERATOR):
        _restore_generator(base, state[GENERATOR])


def _fits(shape: torch.Size, parameter: torch.Size) -> bool:
    """Return True for the shape of a parameter, or of its mean over a dimension (Adafactor)."""
    means = (
        (*parameter[:i], *kept, *parameter[i + 1 :])
        for i in range(len(parameter))
        for kept in ((), (1,))
    )
    return shape == parameter or tuple(shape) in means


def _restore_generator(optimizer: torch.optim.Optimizer, state: torch.Tensor) -> None:
    device = optimizer.param_groups[0]["params"][0].device
    generator = torch.Generator(device)
    if state.shape == generator.get_state().shape:  # else of another kind of device
        generator.set_state(state)
        setattr(optimizer, GENERATOR, generator)
