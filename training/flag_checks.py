"""What the values of ``main.py``'s flags may be, alone and together."""

import argparse
import ast
import math
from collections.abc import Sequence
from typing import Any

import torch

from utils import UserError

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


RANGES = (  # a condition, the condition in words, and the flags whose values must meet it
    (
        lambda value: 0 < value < math.inf,
        "positive",
        "batch_size epochs accum_iter log_interval keep_checkpoints clip_grad max_nonfinite "
        "save_every_steps save_every_minutes dist_timeout eval_crop_ratio "
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


def check_flags(args: argparse.Namespace) -> None:
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
