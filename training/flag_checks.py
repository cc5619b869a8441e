"""What the values of ``main.py``'s flags may be, alone and together."""

import argparse
import math

from timm.optim import get_optimizer_info, list_optimizers

from models.errors import did_you_mean
from pipeline.policies import check_policy
from pipeline.sources.split import HoldOut
from training import compilation, schedules
from training.keywords import OPTIMIZER_ELSEWHERE, keyword_arguments
from training.optimizers import LOOKAHEAD
from training.tracking import check_installed
from utils import UserError

RANGES = (  # a condition, the condition in words, and the flags whose values must meet it
    (
        lambda value: 0 < value < math.inf,
        "positive",
        "batch_size epochs accum_iter log_interval keep_checkpoints clip_grad max_nonfinite "
        "save_every_steps save_every_minutes dist_timeout eval_crop_ratio distillation_tau "
        "decay_epochs decay_milestones lr_cycle_mul lr_cycle_limit lr_k_decay lr_noise_pct "
        "val_interval progressive_sizes",
    ),
    (
        lambda value: 0 <= value < math.inf,
        "0 or more, and finite",
        "num_workers seed start_epoch warmup_epochs weight_decay mixup cutmix color_jitter lr "
        "freeze_stages min_lr warmup_lr decay_rate cooldown_epochs patience_epochs lr_noise_std "
        "lr_cycle_decay mixup_off_epoch",
    ),
    (
        lambda value: 0 <= value <= 1,
        "from 0 to 1",
        "drop drop_path smoothing reprob mixup_prob mixup_switch_prob model_ema_decay "
        "distillation_alpha lr_noise hflip vflip",
    ),
    (lambda value: 0 < value <= 1, "above 0, at most 1", "sampling_ratio layer_decay"),
)


def check_values(args: argparse.Namespace) -> None:
    """Check the ranges of numbers, and the flags of compilation; None is always valid.

    Raises:
        UserError: A number, or one of a list, is out of range, or the flags of compilation or of
            the validation split contradict each other.
    """
    for is_valid, what, names in RANGES:
        for name in names.split():
            value = getattr(args, name)
            for one in value if isinstance(value, list | tuple) else [value]:
                if one is not None and not is_valid(one):
                    raise UserError(f"--{name.replace('_', '-')} {one} must be {what}")
    HoldOut.of(vars(args))
    compilation.check(args)


def check_flags(args: argparse.Namespace) -> None:
    check_values(args)
    ratios = args.cutmix_minmax
    if ratios is not None and not (len(ratios) == 2 and 0 <= ratios[0] < ratios[1] <= 1):
        given = " ".join(map(str, ratios))
        raise UserError(f"--cutmix-minmax {given} must be two ratios from 0 to 1, such as 0.2 0.8")
    if args.opt_betas is not None and len(args.opt_betas) < 2:
        raise UserError(f"--opt-betas {args.opt_betas[0]} must be two numbers or more")
    check_optimizer(args.opt)
    check_policy(args.aa)
    _check_crop(args)
    _check_sizes(args)
    _check_finetuning(args)
    keyword_arguments(args.model_kwargs)
    keyword_arguments(args.opt_kwargs, "--opt-kwargs", OPTIMIZER_ELSEWHERE)
    schedules.check(args)
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto needs --output_dir FOLDER")
    if args.eval and not (args.resume or args.pretrained):
        raise UserError("--eval needs --resume CHECKPOINT, or --model NAME --pretrained")
    if args.log_to and not args.eval:
        if not args.output_dir:
            raise UserError(f"--log-to {args.log_to[0]} needs --output_dir FOLDER")
        check_installed(args.log_to)
    if args.experiment and not args.log_to:
        raise UserError(f"--experiment {args.experiment} names the run of a tracker: give --log-to")
    if args.pretrained and args.finetune:
        raise UserError(f"--pretrained and --finetune {args.finetune} exclude each other")
    if args.fuse and not args.eval:
        raise UserError("--fuse needs --eval: a fused model cannot be trained")


def _check_crop(args: argparse.Namespace) -> None:
    if args.src and args.train_crop_mode:
        raise UserError(f"--src and --train-crop-mode {args.train_crop_mode} exclude each other")
    # an area above 1 shrinks the image, whose pixels are then reflected; sides that differ by more
    # would need any amount of memory
    areas = (0.01, 4) if args.train_crop_mode in ("rkrc", "rkrr") else (0.001, 1)
    for flag, (low, high) in (("scale", areas), ("ratio", (0.1, 10))):
        value = getattr(args, flag)
        if value is not None and not (len(value) == 2 and low <= value[0] <= value[1] <= high):
            given = " ".join(map(str, value))
            raise UserError(
                f"--{flag} {given} must be two numbers from {low} to {high}, the smaller one first"
            )


def _check_sizes(args: argparse.Namespace) -> None:
    sizes = args.progressive_sizes
    if not sizes:
        return
    given = f"--progressive-sizes {' '.join(map(str, sizes))}"
    if sorted(set(sizes)) != sizes:
        raise UserError(f"{given} must grow")
    if args.input_size not in (None, sizes[-1]):
        raise UserError(f"{given} must end with --input-size {args.input_size}")
    if len(sizes) > args.epochs:
        raise UserError(f"{given} needs {len(sizes)} epochs or more, not --epochs {args.epochs}")


def check_optimizer(name: str) -> None:
    """Raise UserError, with the nearest names, unless timm has an optimizer of this name."""
    try:
        get_optimizer_info(name.lower().removeprefix(LOOKAHEAD))
    except ValueError as error:
        near = did_you_mean(name, list_optimizers()) or "; timm.optim.list_optimizers() has all"
        raise UserError(f"unknown optimizer --opt {name}{near}") from error


def _check_finetuning(args: argparse.Namespace) -> None:
    for flag in ("linear_probe", "freeze_stages", "attn_only"):
        wanted = getattr(args, flag) not in (None, False)
        if wanted and not (args.finetune or args.resume or args.pretrained):
            raise UserError(
                f"--{flag.replace('_', '-')} would freeze random weights: give --finetune "
                f"CHECKPOINT"
            )
    decays = args.layer_decay not in (None, 1)
    if args.linear_probe and (args.freeze_stages is not None or decays):
        other = (
            "--freeze-stages out" if args.freeze_stages is not None else "--layer-decay out, or 1"
        )
        raise UserError(f"--linear-probe trains the classifier alone: leave {other}")
    if args.attn_only and (args.linear_probe or args.freeze_stages is not None):
        other = "--linear-probe" if args.linear_probe else "--freeze-stages"
        raise UserError(f"--attn-only chooses what is trained: leave {other} out")
    distils, teacher = args.distillation_type != "none", args.teacher_model or args.teacher_path
    if distils and not teacher:
        raise UserError(
            f"--distillation-type {args.distillation_type} needs a teacher: give --teacher-model "
            f"NAME or --teacher-path CHECKPOINT"
        )
    if distils and args.cosub:
        raise UserError(
            f"--cosub and --distillation-type {args.distillation_type} exclude each other"
        )
    if teacher and not distils:
        raise UserError(f"teacher {teacher} is not used: give --distillation-type soft or hard")
