"""The flags of ``main.py``: DeiT's and Visformer's spellings and defaults, then our own."""

import argparse
import ast
import math
import os
import sys
from argparse import BooleanOptionalAction as OnOff
from collections.abc import Callable, Sequence
from typing import Any

import torch

from datasets import DATA_SETS, HUB, data_set_named
from pipeline.sources.fine_grained import INAT_CATEGORIES
from training.recipes import recipe_argv
from utils import UserError

ELSEWHERE = {  # arguments of models that are not for --model-kwargs, and where they come from
    "num_classes": "is the dataset's: leave it out",
    "img_size": "is --input-size",
    "drop_rate": "is --drop",
    "drop_path_rate": "is --drop-path",
    "qk_scale_factor": "is --qk-scale-factor",
    "locality_strength": "is --locality-strength",
    "local_up_to_layer": "is --local-up-to-layer",
    "pretrained": "would load weights: give --finetune CHECKPOINT",
    "checkpoint_path": "would load weights: give --finetune CHECKPOINT",
    "features_only": "makes a backbone, which has no classes to learn: leave it out",
    "in_chans": "is 3, as images have here: leave it out",
}


def keyword_arguments(words: Sequence[str]) -> dict[str, Any]:
    """What ``--model-kwargs`` gives: ``KEY=VALUE`` with a Python literal, or else a text, as value.

    Raises:
        UserError: A word is not of that form, or is what another flag says.
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
    """Accepts every long flag with dashes and with underscores."""

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
    """The parser of all flags."""
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
    """``add_argument`` of a group; a flag that its name explains needs no help text."""

    def add(*names: str, **options: Any) -> None:
        options.setdefault("help", "default: %(default)s")
        group.add_argument(*names, **options)

    return add


def usable_cpus() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--batch-size", type=int, default=64, help="images per process and step")
    add("--epochs", type=int, default=300)
    add("--output_dir", default="", help="folder of checkpoints and logs; empty for none")
    add("--resume", default="", help="checkpoint (file or address), or auto: of --output_dir")
    add("--start_epoch", type=int, default=0)
    add("--stop-epoch", type=int, help="stop before this epoch, the schedule being for --epochs")
    add("--eval", action="store_true", help="evaluate the checkpoint of --resume and leave")
    add("--seed", type=int, default=0)
    add("--save-every-steps", type=int, metavar="N", help="checkpoints within an epoch, too")
    add("--save-every-minutes", type=float, metavar="M", help="checkpoints within an epoch, too")
    add("--keep-checkpoints", type=int, default=1, metavar="K", help="the last and the best ones")
    add("--deterministic", action="store_true", help="the same bits on CUDA, too; slower")
    add("--max-nonfinite", type=int, default=10, help="losses in a row, not finite, to give up at")
    add("--log-interval", type=int, default=50, help="steps between readings of the loss")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--model", default="visformer_small", help="any name that timm knows")
    add("--input-size", type=int, help="pixels; 224, or 32 for DIGITS, if not given")
    add("--drop", type=float, default=0.0, metavar="RATE", help="dropout")
    add("--drop-path", type=float, default=0.1, metavar="RATE", help="stochastic depth")
    add(
        "--qk-scale-factor",
        type=float,
        metavar="EXPONENT",
        help="queries and keys are each scaled by head_dim ** EXPONENT (models: -0.25)",
    )
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="of the model's own")
    add("--locality-strength", type=float, help="ConViT: how local heads begin (model: 1)")
    add("--local-up-to-layer", type=int, metavar="N", help="ConViT: blocks of GPSA (model: 10)")
    add("--model-ema", action=OnOff, default=True, help="keep a moving average of the weights")
    add("--model-ema-decay", type=float, default=0.99996)
    add("--model-ema-warmup", action=OnOff, default=False, help="let the decay grow to its value")
    add("--model-ema-force-cpu", action="store_true")
    add("--fuse", action="store_true", help="with --eval: fold the net for inference first")
    add("--train-mode", action=OnOff, default=True, help="off: BatchNorm and dropout as in eval")


def _add_finetuning(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--finetune", default="", help="weights to start from; other classes, new classifier")
    add("--layer-decay", type=float, metavar="RATE", help="of the learning rate, layer by layer")
    add("--freeze-stages", type=int, metavar="N", help="0: the stem does not learn, 1: nor stage 1")
    add("--linear-probe", action="store_true", help="only the classifier learns")
    add("--teacher-model", help="any name that timm knows; not needed with a file of this project")
    add("--teacher-path", default="", help="its weights, file or address; timm's own, if not given")
    add("--distillation-type", choices=["none", "soft", "hard"], default="none")
    add("--distillation-alpha", type=float, default=0.5, help="weight of the teacher's part")
    add("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--opt", default="adamw", help="any optimizer that timm knows")
    add("--opt-eps", type=float, default=1e-8)
    add("--opt-betas", type=float, nargs="+")
    add("--clip-grad", type=float, metavar="NORM", help="largest norm of the gradient")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.05)
    add("--accum-iter", type=int, default=1, help="batches per optimizer step")
    add("--amp", action=OnOff, default=False, help="automatic mixed precision")
    add("--amp-dtype", choices=["float16", "bfloat16"], default="float16")
    add("--channels-last", action=OnOff, help="memory format; as suits the model, if not given")
    add(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model by torch.compile (inductor, if no backend is named)",
    )
    add("--grad-checkpointing", action="store_true", help="recompute blocks to save memory")
    add("--fsdp", action="store_true", help="share weights and moments among the processes")
    add("--bce-loss", action="store_true", help="binary cross-entropy per class")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--sched", default="cosine", help="any schedule that timm knows")
    add("--sched-on-updates", action=OnOff, default=False, help="step per update, not per epoch")
    add("--lr", type=float, default=5e-4, help="for 512 images per step, scaled linearly")
    add("--unscale-lr", action="store_true", help="take --lr as it is")
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
    add("--std-aug", action="store_true", help="random resized crop and mirroring only")
    add("--ThreeAugment", action="store_true", help="grey, solarise or blur (DeiT III)")
    add("--src", action="store_true", help="resize and padded crop instead of random resized crop")
    add("--train-interpolation", default="bicubic", choices=["random", "bilinear", "bicubic"])
    add("--repeated-aug", action=OnOff, default=True, help="three copies of a third of the images")
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
    add("--val-path", help="for WDS: the validation shards, if they are elsewhere")
    add("--shard-cache", metavar="FOLDER", help="for WDS: where remote shards are kept")
    add("--download", action="store_true", help="fetch the dataset into --data-path")
    add("--inat-category", choices=INAT_CATEGORIES, default="name", help="level of the classes")
    add("--input-key", default="image", help=f"for {HUB}NAME: column of the images")
    add("--target-key", default="label", help=f"for {HUB}NAME: column of the classes")
    add("--sampling-ratio", type=float, default=1.0, help="share of every class to train on")
    add("--loader", choices=["fast", "timm"], default="fast", help="timm: the slow reference")
    where = ["auto", "workers", "device"]
    add("--augment-on", choices=where, default="auto", help="auto: the device, if it is CUDA")
    add("--decode-on-device", action="store_true", help="decode training JPEGs there, too")
    add("--on-corrupt", choices=["error", "skip"], default="error", help="unreadable images")
    add("--eval-crop-ratio", type=float, default=0.875)
    add("--dist-eval", action=OnOff, default=True, help="share evaluation among the processes")
    workers = min(10, usable_cpus())
    add("--num_workers", type=int, default=workers, help="loader processes per process")
    add("--pin-mem", action=OnOff, default=True)


def add_processes(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--device", help="cuda if present, else cpu, if not given")
    add("--world_size", type=int, default=1, help="set by the launcher")
    add("--dist_url", default="env://")
    add("--dist-timeout", type=float, default=600.0, help="seconds to wait for other processes")
    add("--local_rank", type=int, help=argparse.SUPPRESS)


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """Parse a command line, with the flags of ``--config FILE`` put before it.

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
    silent = get_args_parser()
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    given = set(vars(silent.parse_args(argv)))
    _check(args)
    typed = silent.parse_args(words)
    resumes = getattr(typed, "resume", "") not in ("", "auto") and not args.eval
    if resumes and getattr(typed, "finetune", ""):
        raise UserError(
            f"--resume {args.resume} goes on from that checkpoint, and --finetune {args.finetune} "
            f"would never be read: leave one of them out"
        )
    return args, given


RANGES = {  # of flags: the least and the largest value
    "num_workers": (0, math.inf),
    "seed": (0, math.inf),
    "start_epoch": (0, math.inf),
    "warmup_epochs": (0, math.inf),
    "weight_decay": (0, math.inf),
    "mixup": (0, math.inf),
    "cutmix": (0, math.inf),
    "color_jitter": (0, math.inf),
    "drop": (0, 1),
    "drop_path": (0, 1),
    "smoothing": (0, 1),
    "reprob": (0, 1),
    "mixup_prob": (0, 1),
    "mixup_switch_prob": (0, 1),
    "model_ema_decay": (0, 1),
    "distillation_alpha": (0, 1),
}
POSITIVE = ("batch_size", "epochs", "accum_iter", "log_interval", "keep_checkpoints", "clip_grad")
POSITIVE += ("max_nonfinite", "save_every_steps", "save_every_minutes", "dist_timeout")
POSITIVE += ("input_size", "eval_crop_ratio", "distillation_tau")


def _check_ranges(args: argparse.Namespace) -> None:
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value} must be positive")
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if not low <= value <= high or math.isinf(value):
            what = f"{low} or more" if math.isinf(high) else f"from {low} to {high}"
            raise UserError(f"--{name.replace('_', '-')} {value} must be {what}")
    ratios = args.cutmix_minmax
    if ratios is not None and not (len(ratios) == 2 and 0 <= ratios[0] < ratios[1] <= 1):
        given = " ".join(map(str, ratios))
        raise UserError(f"--cutmix-minmax {given} must be two shares from 0 to 1, such as 0.2 0.8")
    if args.opt_betas is not None and len(args.opt_betas) < 2:
        raise UserError(f"--opt-betas {args.opt_betas[0]} must be two numbers or more")


def _check(args: argparse.Namespace) -> None:
    _check_ranges(args)
    if not 0 <= args.lr < math.inf:
        raise UserError(f"--lr {args.lr} must be 0 or more, and finite")
    _check_finetuning(args)
    keyword_arguments(args.model_kwargs)
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto looks into --output_dir, which is not given")
    if args.eval and not args.resume:
        raise UserError("--eval needs --resume CHECKPOINT")
    if args.fuse and not args.eval:
        raise UserError("--fuse is for --eval: a fused net cannot be trained")
    if args.compile is not None and args.compile not in torch.compiler.list_backends(None):
        backends = ", ".join(torch.compiler.list_backends())
        raise UserError(f"--compile {args.compile} is no backend here; there are {backends}")


def _check_finetuning(args: argparse.Namespace) -> None:
    if not 0 < args.sampling_ratio <= 1:
        raise UserError(f"--sampling-ratio {args.sampling_ratio} must be above 0, at most 1")
    if args.layer_decay is not None and not 0 < args.layer_decay <= 1:
        raise UserError(f"--layer-decay {args.layer_decay} must be above 0, at most 1")
    if args.freeze_stages is not None and args.freeze_stages < 0:
        raise UserError(f"--freeze-stages {args.freeze_stages} must be 0 or more")
    for flag in ("linear_probe", "freeze_stages"):
        wanted = getattr(args, flag) not in (None, False)
        if wanted and not (args.finetune or args.resume):
            raise UserError(
                f"--{flag.replace('_', '-')} keeps weights as they are, and here they would be "
                f"random: give --finetune CHECKPOINT"
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
        raise UserError(f"teacher {teacher} would do nothing: give --distillation-type")
