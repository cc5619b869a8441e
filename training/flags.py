"""Flags of ``main.py``: spellings and defaults of DeiT and Visformer, then our own."""

import argparse
import ast
import math
import os
import sys
from argparse import BooleanOptionalAction as OnOff
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from datasets import DATA_SETS, HUB, data_set_named
from pipeline.sources.fine_grained import INAT_CATEGORIES
from training.recipes import recipe_argv
from utils import UserError, printable

ELSEWHERE = {  # model arguments that --model-kwargs does not accept, and what sets them instead
    "num_classes": "is set by the dataset: leave it out",
    "img_size": "is set by --input-size",
    "drop_rate": "is set by --drop",
    "drop_path_rate": "is set by --drop-path",
    "qk_scale_factor": "is set by --qk-scale-factor",
    "locality_strength": "is set by --locality-strength",
    "local_up_to_layer": "is set by --local-up-to-layer",
    "pretrained": "loads weights: use --pretrained",
    "checkpoint_path": "loads weights: use --finetune CHECKPOINT",
    "features_only": "makes a backbone without a classifier: leave it out",
    "in_chans": "is always 3 here: leave it out",
}


def keyword_arguments(words: Sequence[str]) -> dict[str, Any]:
    """Parse ``--model-kwargs``: ``KEY=VALUE`` words; a value is a Python literal, else a string.

    Raises:
        UserError: A word has another form, or another flag sets the argument.
    """
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--model-kwargs {word} must be KEY=VALUE, such as depth=6")
        if key in ELSEWHERE:
            raise UserError(f"--model-kwargs {word}: {key} {ELSEWHERE[key]}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


class Parser(argparse.ArgumentParser):
    """Accepts every long flag with dashes and with underscores; its errors are one line."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))

    def parse_known_args(self, args=None, namespace=None):
        known = {option.replace("_", "-"): option for option in self._option_string_actions}
        words = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                flag = known.get(flag.replace("_", "-"), flag)
            words.append(flag + equals + value)
        return super().parse_known_args(words, namespace)


def positive(text: str) -> int:
    """Convert the text of a flag to an integer of at least 1; a type for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = Parser(
        "main.py",
        description="Train and evaluate image classifiers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", help="YAML file of flags; the command line wins")
    _add_run(parser.add_argument_group("run"))
    _add_model(parser.add_argument_group("model"))
    _add_finetuning(parser.add_argument_group("fine-tuning and distillation"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_augmentation(parser.add_argument_group("augmentation"))
    _add_data(parser.add_argument_group("data"))
    add_processes(parser.add_argument_group("processes"))
    return parser


def flags_of(group: argparse._ArgumentGroup) -> Callable[..., None]:
    """Return ``add_argument`` of a group with the default value as default help text."""

    def add(*names: str, **options: Any) -> None:
        options.setdefault("help", "default: %(default)s")
        group.add_argument(*names, **options)

    return add


def usable_cpus() -> int:
    """Return the number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--batch-size", type=int, default=64, help="images per process and step")
    add("--epochs", type=int, default=300)
    add("--output_dir", default="", help="folder of checkpoints and logs; empty for none")
    add(
        "--resume",
        default="",
        help="weights as of --finetune, or auto: newest of --output_dir",
    )
    add("--start_epoch", type=int, default=0)
    add("--stop-epoch", type=int, help="stop before this epoch; the schedule still spans --epochs")
    add(
        "--eval",
        action="store_true",
        help="evaluate --resume or --pretrained and exit",
    )
    add("--seed", type=int, default=0)
    add("--save-every-steps", type=int, metavar="N", help="also save within an epoch")
    add("--save-every-minutes", type=float, metavar="M", help="also save within an epoch")
    add("--keep-checkpoints", type=int, default=1, metavar="K", help="keep the last K and best K")
    add("--deterministic", action="store_true", help="bitwise reproducible on CUDA as well; slower")
    add("--max-nonfinite", type=int, default=10, help="consecutive nonfinite losses that end it")
    add("--log-interval", type=int, default=50, help="steps between readings of the loss")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add(
        "--model",
        default="visformer_small",
        help="any model name of timm, hf-hub:ORG/NAME or local-dir:FOLDER",
    )
    add("--pretrained", action="store_true", help="start from the published weights of --model")
    add(
        "--input-size",
        type=int,
        help="pixels; default: that of the weights, else 224, or 32 for DIGITS",
    )
    add("--drop", type=float, default=0.0, metavar="RATE", help="dropout")
    add("--drop-path", type=float, default=0.1, metavar="RATE", help="stochastic depth")
    add(
        "--qk-scale-factor",
        type=float,
        metavar="EXPONENT",
        help="scale queries and keys by head_dim ** EXPONENT each (model default: -0.25)",
    )
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="model arguments")
    add("--locality-strength", type=float, help="ConViT: initial locality (model default: 1)")
    add("--local-up-to-layer", type=int, metavar="N", help="ConViT: GPSA blocks (default: 10)")
    add("--model-ema", action=OnOff, default=True, help="keep a moving average of the weights")
    add("--model-ema-decay", type=float, default=0.99996)
    add("--model-ema-warmup", action=OnOff, default=False, help="ramp up the decay")
    add("--model-ema-force-cpu", action="store_true")
    add("--fuse", action="store_true", help="with --eval: fuse the model for inference first")
    add("--train-mode", action=OnOff, default=True, help="off: train in evaluation mode")


def _add_finetuning(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add(
        "--finetune",
        default="",
        help="start from these weights: a file, an address, hf-hub:ORG/NAME, local-dir:FOLDER, or "
        "a model name for timm's; new classifier for other classes",
    )
    add("--layer-decay", type=float, metavar="RATE", help="learning-rate decay per layer")
    add("--freeze-stages", type=int, metavar="N", help="freeze the stem (0) and the first N stages")
    add("--linear-probe", action="store_true", help="train only the classifier")
    add("--teacher-model", help="as --model, with its published weights")
    add("--teacher-path", default="", help="weights of the teacher, as for --finetune")
    add("--distillation-type", choices=["none", "soft", "hard"], default="none")
    add("--distillation-alpha", type=float, default=0.5, help="weight of the distillation loss")
    add("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--opt", default="adamw", help="any optimizer of timm")
    add("--opt-eps", type=float, default=1e-8)
    add("--opt-betas", type=float, nargs="+")
    add("--clip-grad", type=float, metavar="NORM", help="maximum gradient norm")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.05)
    add("--accum-iter", type=int, default=1, help="batches per optimizer step")
    add("--amp", action=OnOff, default=False, help="automatic mixed precision")
    add("--amp-dtype", choices=["float16", "bfloat16"], default="float16")
    add("--channels-last", action=OnOff, help="memory format; default: chosen by the model")
    add(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model with torch.compile (default backend: inductor)",
    )
    add("--grad-checkpointing", action="store_true", help="recompute blocks to save memory")
    add("--fsdp", action="store_true", help="shard weights and optimizer state over the processes")
    add("--bce-loss", action="store_true", help="binary cross-entropy per class")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--sched", default="cosine", help="any schedule of timm")
    add("--sched-on-updates", action=OnOff, default=False, help="step per update, not per epoch")
    add("--lr", type=float, default=5e-4, help="for 512 images per step, scaled linearly")
    add("--unscale-lr", action="store_true", help="do not scale --lr")
    add("--lr-noise", type=float, nargs="+", metavar="PART")
    add("--lr-noise-pct", type=float, default=0.67)
    add("--lr-noise-std", type=float, default=1.0)
    add("--warmup-lr", type=float, default=1e-6)
    add("--min-lr", type=float, default=1e-5)
    add("--decay-epochs", type=float, default=30)
    add("--warmup-epochs", type=int, default=5)
    add("--cooldown-epochs", type=int, default=10)
    add("--patience-epochs", type=int, default=10)
    add("--decay-rate", "--dr", type=float, default=0.1)


def _add_augmentation(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--color-jitter", type=float, default=0.4, help="used without --aa")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's auto-augment policy; empty for none")
    add("--std-aug", action="store_true", help="random resized crop and horizontal flip only")
    add("--ThreeAugment", action="store_true", help="grey, solarise or blur (DeiT III)")
    add("--src", action="store_true", help="resize and padded crop instead of random resized crop")
    add("--train-interpolation", default="bicubic", choices=["random", "bilinear", "bicubic"])
    add("--repeated-aug", action=OnOff, default=True, help="three repeats of a third of the images")
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--remode", default="pixel", choices=["const", "rand", "pixel"])
    add("--recount", type=int, default=1)
    add("--resplit", action="store_true", help="accepted for old command lines; has no effect")
    add("--mixup", type=float, default=0.8, metavar="ALPHA")
    add("--cutmix", type=float, default=1.0, metavar="ALPHA")
    add("--cutmix-minmax", type=float, nargs="+", metavar="RATIO")
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5)
    add("--mixup-mode", default="batch", choices=["batch", "pair", "elem"])


def _data_set(name: str) -> str:
    try:
        data_set_named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    names = ", ".join(DATA_SETS)
    add(
        "--data-set",
        type=_data_set,
        metavar="NAME",
        help=f"{names}, or {HUB}NAME for the Hugging Face Hub; IMNET with --data-path, else DIGITS",
    )
    add("--data-path", help="folder of the dataset; for WDS, also a pattern of shards, or a URL")
    add("--val-path", help="for WDS: validation shards, if stored elsewhere")
    add("--shard-cache", metavar="FOLDER", help="for WDS: cache folder of remote shards")
    add("--download", action="store_true", help="download the dataset into --data-path")
    add("--inat-category", choices=INAT_CATEGORIES, default="name", help="level of the classes")
    add("--input-key", default="image", help=f"for {HUB}NAME: column of the images")
    add("--target-key", default="label", help=f"for {HUB}NAME: column of the classes")
    add("--sampling-ratio", type=float, default=1.0, help="fraction of every class to train on")
    add("--loader", choices=["fast", "timm"], default="fast", help="timm: the slow reference")
    where = ["auto", "workers", "device"]
    add("--augment-on", choices=where, default="auto", help="auto: the device if it is CUDA")
    add("--decode-on-device", action="store_true", help="decode training JPEGs on the device")
    add("--on-corrupt", choices=["error", "skip"], default="error", help="unreadable images")
    add("--eval-crop-ratio", type=float, help="default: that of the weights, else 0.875")
    add("--dist-eval", action=OnOff, default=True, help="distribute evaluation over the processes")
    workers = min(10, usable_cpus())
    add("--num_workers", type=int, default=workers, help="loader workers per process")
    add("--pin-mem", action=OnOff, default=True)


def add_processes(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--device", help="default: cuda if available, else cpu")
    add("--world_size", type=int, default=1, help="set by the launcher")
    add("--dist_url", default="env://")
    add("--dist-timeout", type=float, default=600.0, help="seconds to wait for other processes")
    add("--local_rank", type=int, help=argparse.SUPPRESS)


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return the values of the flags in ``argv``, without defaults; the parser loses its own."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """Parse a command line, preceded by the flags of ``--config FILE``.

    Returns:
        The flags, and the names of those that were given rather than left at their default.

    Raises:
        UserError: The file cannot be read, has unknown keys, or flags contradict each other.
    """
    parser = get_args_parser()
    recipe, words = parser.parse_args(argv).config, list(argv)
    argv = recipe_argv(parser, recipe) + words if recipe else words
    args = parser.parse_args(argv)
    del args.config  # its flags are in
    given, typed = given_flags(get_args_parser(), argv), given_flags(get_args_parser(), words)
    _check(args)
    resumes = typed.get("resume", "") not in ("", "auto")
    other = "--pretrained" if typed.get("pretrained") else f"--finetune {args.finetune}"
    if resumes and (typed.get("pretrained") or (typed.get("finetune") and not args.eval)):
        raise UserError(
            f"--resume {args.resume} continues from that checkpoint, and {other} would not be "
            f"read: leave one of them out"
        )
    return args, set(given)


RANGES = (  # a condition, the condition in words, and the flags whose values must meet it
    (
        lambda value: 0 < value < math.inf,
        "positive",
        "batch_size epochs accum_iter log_interval keep_checkpoints clip_grad max_nonfinite "
        "save_every_steps save_every_minutes dist_timeout input_size eval_crop_ratio "
        "distillation_tau",
    ),
    (
        lambda value: 0 <= value < math.inf,
        "0 or more, and finite",
        "num_workers seed start_epoch warmup_epochs weight_decay mixup cutmix color_jitter lr "
        "freeze_stages",
    ),
    (
        lambda value: 0 <= value <= 1,
        "from 0 to 1",
        "drop drop_path smoothing reprob mixup_prob mixup_switch_prob model_ema_decay "
        "distillation_alpha",
    ),
    (lambda value: 0 < value <= 1, "above 0, at most 1", "sampling_ratio layer_decay"),
)


def check_values(args: argparse.Namespace) -> None:
    """Check the ranges of numbers, and the backend of ``--compile``; None is always valid.

    Raises:
        UserError: A number, or one of a list, is out of range, or the backend is unknown.
    """
    for is_valid, what, names in RANGES:
        for name in names.split():
            value = getattr(args, name)
            for one in value if isinstance(value, list | tuple) else [value]:
                if one is not None and not is_valid(one):
                    raise UserError(f"--{name.replace('_', '-')} {one} must be {what}")
    if args.compile is not None and args.compile not in torch.compiler.list_backends(None):
        backends = ", ".join(torch.compiler.list_backends())
        raise UserError(f"unknown backend --compile {args.compile}; choose one of {backends}")


def _check(args: argparse.Namespace) -> None:
    check_values(args)
    ratios = args.cutmix_minmax
    if ratios is not None and not (len(ratios) == 2 and 0 <= ratios[0] < ratios[1] <= 1):
        given = " ".join(map(str, ratios))
        raise UserError(f"--cutmix-minmax {given} must be two ratios from 0 to 1, such as 0.2 0.8")
    if args.opt_betas is not None and len(args.opt_betas) < 2:
        raise UserError(f"--opt-betas {args.opt_betas[0]} must be two numbers or more")
    _check_finetuning(args)
    keyword_arguments(args.model_kwargs)
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto needs --output_dir FOLDER")
    if args.eval and not (args.resume or args.pretrained):
        raise UserError("--eval needs --resume CHECKPOINT, or --model NAME --pretrained")
    if args.pretrained and args.finetune:
        raise UserError(f"--pretrained and --finetune {args.finetune} exclude each other")
    if args.fuse and not args.eval:
        raise UserError("--fuse needs --eval: a fused model cannot be trained")


def _check_finetuning(args: argparse.Namespace) -> None:
    for flag in ("linear_probe", "freeze_stages"):
        wanted = getattr(args, flag) not in (None, False)
        if wanted and not (args.finetune or args.resume or args.pretrained):
            raise UserError(
                f"--{flag.replace('_', '-')} would freeze random weights: give --finetune "
                f"CHECKPOINT"
            )
    if args.linear_probe and (args.freeze_stages is not None or args.layer_decay is not None):
        other = "--layer-decay" if args.freeze_stages is None else "--freeze-stages"
        raise UserError(f"--linear-probe trains the classifier alone: leave {other} out")
    distils, teacher = args.distillation_type != "none", args.teacher_model or args.teacher_path
    if distils and not teacher:
        raise UserError(
            f"--distillation-type {args.distillation_type} needs a teacher: give --teacher-model "
            f"NAME or --teacher-path CHECKPOINT"
        )
    if teacher and not distils:
        raise UserError(f"teacher {teacher} is not used: give --distillation-type soft or hard")
