"""Learning rates of a run, and timm's schedules of them."""

import warnings
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler

from models.errors import did_you_mean
from utils import UserError, log

SCALED_DOWN = ("min_lr", "warmup_lr")
REFERENCE_BATCH = 512  # global batch size for which --lr, --min-lr and --warmup-lr are given
NAMES = ("constant", "cosine", "multistep", "none", "plateau", "poly", "rsqrt", "step")
NAMES += ("tanh", "wsd")
LATER = ("rsqrt", "wsd")  # not in all supported versions of timm
WITHOUT_FLOOR = ("constant", "multistep", "none", "step")
# what the plateau schedule has seen; its other entries are options, which follow the flags
PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class Rates(NamedTuple):
    """Learning rates that a schedule spans.

    Attributes:
        peak: ``--lr``, scaled.
        floor: ``--min-lr``, scaled down.
        warmup: ``--warmup-lr``, scaled down.
        unscaled: Names of the flags that are not scaled down, in runs of older versions.
    """

    peak: float
    floor: float
    warmup: float
    unscaled: tuple[str, ...] = ()


def learning_rates(
    args: Namespace, world_size: int, checkpoint: Mapping[str, Any] | None = None
) -> Rates:
    """Return the learning rates, scaled linearly with the global batch size, relative to 512.

    DeiT scales the peak alone. A floor that stays would be above the peak of a small batch, so
    that below 512 the floor and the start of the warm-up are scaled down with it; above, they stay.
    The global batch counts all ranks and accumulated batches. ``--unscale-lr`` scales nothing.

    Args:
        args: Flags.
        world_size: Number of ranks.
        checkpoint: Checkpoint of the run to resume. Older versions and DeiT scaled the peak alone:
            their runs keep the rates that they have, unless the flag is another one now.
    """
    unscaled = () if checkpoint is None else _unscaled(args, checkpoint)
    if args.unscale_lr:
        return Rates(args.lr, args.min_lr, args.warmup_lr, unscaled)
    batch = args.batch_size * args.accum_iter * world_size
    peak = args.lr * args.batch_size * args.accum_iter * world_size / REFERENCE_BATCH
    part = min(batch, REFERENCE_BATCH)
    floor, warmup = (
        getattr(args, name) * (REFERENCE_BATCH if name in unscaled else part) / REFERENCE_BATCH
        for name in SCALED_DOWN
    )
    return Rates(peak, floor, warmup, unscaled)


def _unscaled(args: Namespace, checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the flags that a checkpoint's run did not scale down, and that did not change."""
    names, saved = checkpoint.get("unscaled_rates"), checkpoint.get("args")
    names = [str(name) for name in names] if isinstance(names, list | tuple) else SCALED_DOWN
    values = {name: saved.get(name) for name in names} if isinstance(saved, Mapping) else {}
    changed = [n for n, v in values.items() if type(v) in (int, float) and v != vars(args).get(n)]
    return tuple(name for name in SCALED_DOWN if name in names and name not in changed)


def describe(args: Namespace, rates: Rates, global_batch: int) -> None:
    """Log the rates in one line, and one line for each that is not what a schedule expects."""
    used = [] if args.sched in WITHOUT_FLOOR else [("floor", rates.floor, "--min-lr", args.min_lr)]
    if args.warmup_epochs and args.sched != "none":
        used.append(("warm-up from", rates.warmup, "--warmup-lr", args.warmup_lr))
    others = "".join(f", {what} {rate:.6g} ({flag} {given:g})" for what, rate, flag, given in used)
    log(
        f"learning rate {rates.peak:.6g} (--lr {args.lr:g}){others}, for {global_batch} images per "
        f"step"
    )
    kept = [f"--{name.replace('_', '-')}" for name in rates.unscaled if getattr(args, name)]
    if kept and not args.unscale_lr and global_batch < REFERENCE_BATCH:
        log(f"{' and '.join(kept)}: not scaled with the batch, as the run to resume began so")
    for what, rate, flag, given in used:
        if rate > rates.peak:
            log(
                f"warning: {what} {rate:.6g} ({flag} {given:g}) is above the peak "
                f"{rates.peak:.6g} (--lr {args.lr:g}); {flag} {args.lr / 100:g} would be below it"
            )
    if args.sched == "multistep" and args.decay_milestones[0] > args.epochs:
        given = " ".join(map(str, args.decay_milestones))
        log(
            f"warning: the learning rate never decays: no --decay-milestones {given} is within "
            f"--epochs {args.epochs}"
        )


def check(args: Namespace) -> None:
    """Check the flags of schedules against each other.

    Raises:
        UserError: Names the flag and its value.
    """
    if args.sched not in NAMES:
        raise _unknown(args.sched)
    if args.sched == "plateau" and args.sched_on_updates:
        raise UserError("--sched plateau steps per epoch: leave --sched-on-updates out")
    milestones, given = args.decay_milestones, " ".join(map(str, args.decay_milestones))
    if sorted({*milestones}) != milestones:
        raise UserError(f"--decay-milestones {given} must increase, such as 30 60 90")
    if args.lr_noise is not None and len(args.lr_noise) > 2:
        given = " ".join(map(str, args.lr_noise))
        raise UserError(f"--lr-noise {given} must be one or two parts of the epochs")


def build(
    args: Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int, rates: Rates
) -> tuple[Scheduler, int]:
    """Build timm's schedule ``--sched``.

    Returns:
        The schedule, and the number of epochs to train: ``--epochs``, unless
        ``--lr-cycle-limit`` or ``--warmup-prefix`` add to them.

    Raises:
        UserError: Unknown schedule, or an option it does not accept.
    """
    name, decay_rate, warmup_epochs = args.sched, args.decay_rate, args.warmup_epochs
    if name in ("none", "constant"):  # timm's none leaves --layer-decay out; old ones lack constant
        warmup_epochs = 0 if name == "none" else warmup_epochs
        name, decay_rate = "step", 1.0
    try:
        with warnings.catch_warnings():  # of plateau, whose state timm's own script does not save
            warnings.simplefilter("ignore", FutureWarning)
            scheduler, epochs = create_scheduler_v2(
                optimizer,
                sched=name,
                num_epochs=args.epochs,
                decay_epochs=args.decay_epochs,
                decay_milestones=args.decay_milestones,
                # the plateau schedule counts evaluations
                patience_epochs=args.patience_epochs // args.val_interval,
                decay_rate=decay_rate,
                min_lr=rates.floor,
                # timm's plateau schedule starts there even without a warm-up
                warmup_lr=rates.warmup if warmup_epochs else rates.peak,
                warmup_epochs=warmup_epochs,
                warmup_prefix=args.warmup_prefix,
                noise=args.lr_noise,
                noise_pct=args.lr_noise_pct,
                noise_std=args.lr_noise_std,
                cycle_mul=args.lr_cycle_mul,
                cycle_decay=args.lr_cycle_decay,
                cycle_limit=args.lr_cycle_limit,
                k_decay=args.lr_k_decay,
                step_on_epochs=not args.sched_on_updates,
                updates_per_epoch=updates_per_epoch,
            )
    except (ValueError, AssertionError) as error:
        if args.sched not in NAMES or not hasattr(timm.scheduler, "WSDLRScheduler"):
            raise _unknown(args.sched) from error
        raise UserError(f"cannot build schedule --sched {args.sched}: {error}; {HINT}") from error
    if scheduler is None:  # older versions of timm, for an unknown name
        raise _unknown(args.sched)
    return scheduler, epochs


HINT = (
    "give --decay-epochs 0.2 (a share, or a number of epochs), --warmup-epochs below --epochs and, "
    "for rsqrt, of at least 1"
)


def _unknown(name: str) -> UserError:
    known = [n for n in NAMES if n not in LATER or hasattr(timm.scheduler, "WSDLRScheduler")]
    return UserError(
        f"unknown schedule --sched {name}; timm {timm.__version__} has {', '.join(known)}"
        f"{did_you_mean(name, known)}"
    )


def full_state(scheduler: Scheduler) -> dict[str, Any]:
    """Return the full state of a schedule as plain values, including what timm's own omits."""
    state = scheduler.state_dict()
    if isinstance(scheduler, PlateauLRScheduler):
        state |= {"plateau": scheduler.lr_scheduler.state_dict(), "lrs": scheduler.restore_lr}
    return state


def restore(scheduler: Scheduler, state: Mapping[str, Any]) -> None:
    """Restore the :func:`full_state` of a schedule that depends on its past (plateau).

    The others are functions of the step and of the flags, which may have changed.
    """
    if isinstance(scheduler, PlateauLRScheduler) and state:
        scheduler.load_state_dict(dict(state))
        if "plateau" in state:
            past = {key: state["plateau"][key] for key in PLATEAU}
            scheduler.lr_scheduler.load_state_dict(past)
            scheduler.restore_lr = state["lrs"]
