"""Model of a run: built from the flags and a checkpoint, with its precision."""

import copy
import functools
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import engine
import models
from models import DataConfig, ModelSource
from pipeline.images import DataError
from training.flags import AMP_DTYPES, get_args_parser
from training.keywords import keyword_arguments
from utils import UserError, log, random_state, set_random_state


def choose_source(
    args: Namespace, given: set[str], label: str, checkpoint: Mapping[str, Any]
) -> ModelSource:
    """Return the model that a run starts from.

    It is that of the checkpoint to resume, of ``--finetune``, or of ``--model`` with timm's
    weights or with random ones. A file's own name of its model takes precedence over the default
    of ``--model``, and a given ``--model`` over that, if the weights fit it.

    Args:
        args: Flags.
        given: Names of the flags that were given.
        label, checkpoint: Name and content of the checkpoint to resume; empty without one.
    """
    name = args.model if "model" in given else None
    exponent = args.qk_scale_factor
    if checkpoint:
        source = models.from_checkpoint(checkpoint, label, name, args.model, exponent)
    elif args.finetune:
        source = models.find_model(
            args.finetune, name, pretrained=True, default=args.model, exponent=exponent
        )
    else:
        source = models.find_model(args.model, pretrained=args.pretrained, exponent=exponent)
        if source.checkpoint and not args.pretrained:  # of the Hub, for its architecture alone
            source = source.without_weights()
    if source.name != args.model:
        log(f"{source.label} is of model {source.name}")
    check_exponent(source, exponent)
    return of_channels(source, args.in_chans)


def of_channels(
    source: ModelSource, in_chans: int | None, warn: Callable[[str], None] = log
) -> ModelSource:
    """Return a model for images of ``--in-chans``, None if not given; warn if weights have others.

    Raises:
        ModelError: The weights are of grey images, and three channels are asked for.
    """
    found, own = source.with_channels(in_chans), source.data_config.in_chans
    if source.has_weights and found.data_config.in_chans != own:
        warn(f"warning: --in-chans {in_chans}, but {source.label} expects {own}")
    return found


def check_exponent(
    source: ModelSource, exponent: float | None, warn: Callable[[str], None] = log
) -> None:
    """Warn if ``--qk-scale-factor`` is given and differs from that of a checkpoint."""
    saved = source.required.get("qk_scale_factor")
    if source.checkpoint and exponent not in (None, saved):
        warn(
            f"warning: --qk-scale-factor {exponent} is ignored: {source.label} was trained with "
            f"{saved}, and another would change what the model computes"
        )


def model_arguments(
    args: Namespace, given: set[str], source: ModelSource, num_classes: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return required and optional keyword arguments of the model, from the flags."""
    optional = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    required = keyword_arguments(args.model_kwargs) | {"num_classes": num_classes}
    if "qk_scale_factor" not in source.required:
        required["qk_scale_factor"] = args.qk_scale_factor
    for key in ("locality_strength", "local_up_to_layer"):
        if getattr(args, key) is not None:
            required[key] = getattr(args, key)
    defaults = get_args_parser()
    for flag, key in (("drop", "drop_rate"), ("drop_path", "drop_path_rate")):
        # a recipe may hold every flag, as args.yaml does
        if flag in given and getattr(args, flag) != defaults.get_default(flag):
            required[key] = optional.pop(key)
    return required, optional


def check_size(
    args: Namespace, given: set[str], source: ModelSource, size: int | tuple[int, int]
) -> None:
    """Raise ModelError if a model of this repository does not accept a size, before data is read.

    The model is built without memory, unless the size is that of the source.
    """
    other = models.height_and_width(size) != source.data_config.input_size
    if other and models.is_own_model(source.name):
        arguments = model_arguments(args, given, source, source.num_classes or 1)
        with torch.device("meta"):
            model, _ = replace(source, pretrained=False).build_with_kwargs(size, *arguments)
        models.check_input_size(model, source.name, size, source.data_config.in_chans)


@functools.cache
def convolves_in_bfloat16() -> bool:
    """Return False on CPUs where oneDNN's kernels for AMX are wrong (PyTorch issue 169688).

    They are for some shapes, among them the first patch embedding of visformer_tiny.
    """
    generator = torch.Generator().manual_seed(0)
    image, weight = (torch.randn(s, generator=generator) for s in ((1, 16, 16, 16), (16, 16, 4, 4)))
    exact = F.conv2d(image, weight, stride=4)
    found = F.conv2d(image.bfloat16(), weight.bfloat16(), stride=4).float()
    return bool((found - exact).norm() < 0.1 * exact.norm())


def with_amp_dtype(
    args: Namespace, device: torch.device, checkpoint: Mapping[str, Any] | None = None
) -> Namespace:
    """Return the flags with a value of ``--amp-dtype``, if they have ``--amp``.

    If not given, it is that of the run to resume, else autocast's default for the device, which a
    line of the log names on a CPU: there, float16 is many times slower than float32.

    Args:
        args: Flags.
        device: Device of the model.
        checkpoint: Content of the checkpoint to resume, if any.
    """
    if not args.amp:
        return args
    resumes = checkpoint and "optimizer" in checkpoint
    dtype, saved = args.amp_dtype, checkpoint.get("args") if resumes else None
    if dtype is None and isinstance(saved, Mapping) and saved.get("amp_dtype") in AMP_DTYPES:
        dtype = saved["amp_dtype"]
    elif dtype is None:
        dtype = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        if device.type == "cpu":
            log(f"--amp computes in {dtype} on a CPU; --amp-dtype float16 forces float16")
    return Namespace(**vars(args) | {"amp_dtype": dtype})


def choose_precision(args: Namespace, model: nn.Module, device: torch.device) -> engine.Precision:
    """Return the precision of the flags; the memory format defaults to the model's.

    Without ``--amp-dtype``, mixed precision has the dtype of :func:`with_amp_dtype`.

    Raises:
        UserError: This CPU does not compute in bfloat16 as it should.
    """
    dtype = getattr(torch, with_amp_dtype(args, device).amp_dtype) if args.amp else None
    if dtype is torch.bfloat16 and device.type == "cpu" and not convolves_in_bfloat16():
        raise UserError(
            "convolutions in bfloat16 are wrong on this CPU with this PyTorch: leave --amp out, or "
            "set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment"
        )
    last = getattr(args, "channels_last", None)
    if last is None:
        last = getattr(model, "channels_last", False)
    return engine.Precision(device, dtype, torch.channels_last if last else torch.contiguous_format)


def recompute_blocks(model: nn.Module, name: str) -> None:
    """Recompute the blocks of a model in the backward pass."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        message = f"{name} cannot recompute blocks: leave --grad-checkpointing out"
        raise models.ModelError(message) from error


def compare_classes(source: ModelSource, names: Sequence[str], new_head: bool) -> None:
    """Warn if weights have other class names than the dataset.

    Raises:
        DataError: They have another number of classes, and do not get a new classifier.
    """
    if not source.has_weights or new_head:
        return
    if source.num_classes not in (None, len(names)):
        raise DataError(
            f"{source.label} has {source.num_classes} classes, the dataset has {len(names)}: "
            f"--finetune trains a new classifier"
        )
    saved = list(source.classes or names)
    if saved != list(names):
        number = next(
            i for i, pair in enumerate(zip(saved, names, strict=True)) if len({*pair}) > 1
        )
        log(
            f"warning: class {number} is {saved[number]!r} in {source.label}, and "
            f"{names[number]!r} in the dataset"
        )


@dataclass
class Network:
    """Model of a run on its device, with the arguments that built it."""

    model: nn.Module
    name: str
    kwargs: dict[str, Any]
    precision: engine.Precision
    images: DataConfig


def build_network(
    args: Namespace,
    given: set[str],
    source: ModelSource,
    images: DataConfig,
    num_classes: int,
    device: torch.device,
) -> Network:
    """Build the model of the flags and the source, and freeze the parts flagged."""
    required, optional = model_arguments(args, given, source, num_classes)
    model, kwargs = source.build_with_kwargs(images.size, required, optional)
    name = source.name
    if hasattr(model, "qk_scale_factor"):
        kwargs["qk_scale_factor"] = model.qk_scale_factor
    models.check_input_size(model, name, images.size, images.in_chans)
    for size in args.progressive_sizes or ():
        models.check_input_size(model, name, size, images.in_chans, "--progressive-sizes")
    precision = choose_precision(args, model, device)
    precision.place(model)
    if args.grad_checkpointing:
        recompute_blocks(model, name)
    freeze(args, model)
    learning = count_parameters(model)
    whole = sum(p.numel() for p in model.parameters())
    part = "" if learning == whole else f" ({learning / 1e6:.3f} M trainable)"
    log(f"model {name} {kwargs}: {whole / 1e6:.2f} M parameters{part}, {precision}")
    return Network(model, name, kwargs, precision, images)


def freeze(args: Namespace, model: nn.Module) -> None:
    """Freeze the parts that ``--linear-probe``, ``--attn-only`` or ``--freeze-stages`` names."""
    if args.linear_probe:
        models.freeze_all_but_classifier(model)
    elif args.attn_only:
        models.freeze_all_but_attention(model)
    elif args.freeze_stages is not None:
        models.freeze_stages(model, args.freeze_stages)


def check_single_images(network: Network, args: Namespace) -> None:
    """Check that the model can train on batches of one image, if it has to.

    BatchNorm cannot, where a channel has one value: over one image of 1x1 pixels.

    Raises:
        UserError: It cannot.
    """
    if args.batch_size > 1 or not args.train_mode:
        return
    model, state = copy.deepcopy(network.model).train(), random_state(network.precision.device)
    engine.eval_frozen(model)
    image = network.precision.move(
        torch.zeros(1, network.images.in_chans, *network.images.input_size)
    )
    try:
        with torch.no_grad(), network.precision.autocast():
            model(image)
    except ValueError as error:
        raise UserError(
            f"{network.name} cannot be trained with --batch-size 1: {error}; give --batch-size 2 "
            f"or more"
        ) from error
    finally:
        set_random_state(state, network.precision.device)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
