"""All that a checkpoint of training holds, and going on from one."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn

import engine
import models
import utils
from pipeline.images import NORMALIZATION
from samplers import RASampler
from training import fsdp, run_state
from training.launch import DistInfo
from utils import log

UNTOLD = ("resume", "stop_epoch", "finetune", "output_dir")  # flags that may differ in silence


class RunState:
    """Model, moving average, optimizer, schedule, scaler, random numbers and progress of a run.

    Args:
        args: The flags.
        model: The model, on its device.
        model_name, model_kwargs: How :func:`models.build_model` made it.
        precision: Mixed precision.
        lr: Learning rate, scaled.
        updates_per_epoch: Optimizer steps of an epoch.
        sampler: Of the training set.
        place: Of this process.
        group: Processes to gather from, over the CPU; None for a single one.
        classes: Names of the classes, in the order of the classifier's outputs.
    """

    def __init__(
        self,
        args: Namespace,
        model: nn.Module,
        model_name: str,
        model_kwargs: dict[str, Any],
        precision: engine.Precision,
        lr: float,
        updates_per_epoch: int,
        sampler: RASampler,
        place: DistInfo,
        group: dist.ProcessGroup | None = None,
        classes: Sequence[str] = (),
    ):
        self.args, self.model = args, model
        self.model_name, self.model_kwargs = model_name, model_kwargs
        self.precision, self.updates_per_epoch = precision, updates_per_epoch
        self.sampler, self.place, self.group = sampler, place, group
        self.classes = [str(name) for name in classes]
        self.epoch = args.start_epoch - 1
        self.meter = engine.Meter(precision.device)
        self.best_acc1 = 0.0
        self.best: list[tuple[float, int]] = []  # accuracies and epochs, the best first
        self.gelu = "none"
        self.ema: ModelEmaV3 | None = None
        if args.fsdp:
            self._shard()
        else:
            self.ema = self.start_average()
        self.optimizer = engine.build_optimizer(args, model, lr)
        if args.layer_decay is not None:
            scales = engine.layer_scales(self.optimizer)
            low, high = scales[0], scales[-1]
            log(f"{len(scales)} layers learn at {low:.3g} (lowest) to {high:.3g} of that rate")
        self.scheduler = engine.build_scheduler(args, self.optimizer, updates_per_epoch)
        self._random: Mapping[str, Any] | None = None  # to go on with, in the middle of an epoch
        self._steps_before = 0  # of the epoch, by which the sampler already begins later

    def _shard(self) -> None:
        """Share model and moving average among the processes."""
        fsdp.check(self.args, self.place.world_size)
        self.model.cpu()
        self.ema = self.start_average()
        for model in [self.model] + ([self.ema.module] if self.ema else []):
            fsdp.shard(model, self.precision.device)

    def start_average(self) -> ModelEmaV3 | None:
        """A moving average that begins at the model's present weights, if there is to be one."""
        if not self.args.model_ema:
            return None
        if self.ema is not None and self.args.fsdp:
            return self.ema  # shards cannot be copied; it was loaded together with the model
        kind = fsdp.ShardedAverage if self.args.fsdp else ModelEmaV3
        return kind(
            self.model,
            self.args.model_ema_decay,
            use_warmup=self.args.model_ema_warmup,
            device=torch.device("cpu") if self.args.model_ema_force_cpu else None,
        )

    def state(self) -> dict[str, Any] | None:
        """The content of a checkpoint, on the first process; all must call it."""
        mine = {"random": utils.random_state(self.precision.device)}
        mine["meter"] = self.meter.state_dict()
        ranks: list[Any] = [mine]
        if self.group is not None:
            ranks = [None] * self.place.world_size
            dist.gather_object(mine, ranks if self.place.rank == 0 else None, group=self.group)
        weights = {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }
        weights = fsdp.gather(weights, keep=self.place.rank == 0)
        if self.place.rank:
            return None
        return {
            **weights,
            "lr_scheduler": engine.scheduler_state(self.scheduler),
            "scaler": self.precision.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.meter.steps,
            "sampler": self.sampler.state_dict(self.meter.steps - self._steps_before),
            "ranks": ranks,
            "best_acc1": self.best_acc1,
            "best": self.best,
            "model_name": self.model_name,
            "model_kwargs": self.model_kwargs,
            "input_size": self.args.input_size,
            "classes": self.classes,
            "gelu": self.gelu,
            "args": vars(self.args),
        }

    def is_poisoned(self, content: Mapping[str, Any]) -> bool:
        """Whether the weights of a state are spoilt, or will be found to be.

        In float16, the loss scaler keeps a loss that is not finite from that.
        """
        bad = any(rank["meter"]["in_row"] for rank in content["ranks"])
        weights = [content["model"][name] for name, _ in self.model.named_parameters()]
        norm = nn.utils.get_total_norm(weights)
        return (bad and not self.precision.scaler.is_enabled()) or not norm.isfinite().item()

    def restore(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Continue from a checkpoint; one of weights alone starts at ``--start_epoch``."""
        self.load(checkpoint, source)
        self.ema = self.start_average()
        if self.ema is not None and checkpoint.get("model_ema"):
            models.load_weights(self.ema.module, checkpoint, source, ema=True)
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            log(f"{source} holds no optimizer: its weights start a new run")
            return
        moments = fsdp.spread_moments(self.optimizer, checkpoint["optimizer"])
        run_state.restore_optimizer(self.optimizer, moments, source)
        if checkpoint.get("scaler"):  # empty unless the run used float16
            self.precision.scaler.load_state_dict(checkpoint["scaler"])
        self.best_acc1 = checkpoint.get("best_acc1", 0.0)
        self.best = [tuple(pair) for pair in checkpoint.get("best", ())]
        self.epoch = checkpoint["epoch"]
        self.tell_changes(checkpoint.get("args"))
        engine.restore_scheduler(self.scheduler, checkpoint.get("lr_scheduler") or {})
        if checkpoint.get("step"):
            self._restore_progress(checkpoint, source)

    def _restore_progress(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Go on in the middle of an epoch."""
        epoch, ranks, place = self.epoch + 1, checkpoint["ranks"], self.place
        try:
            self.sampler.load_state_dict(checkpoint["sampler"])
        except ValueError as error:
            log(f"warning: {source} is of the middle of epoch {epoch}, which begins anew: {error}")
            return
        if len(ranks) == place.world_size and not self.sampler.is_continued_elsewhere:
            self.meter.load_state_dict(ranks[place.rank]["meter"])
        else:
            steps = self.sampler.steps_done // self.args.accum_iter * self.args.accum_iter
            meters = [state["meter"] for state in ranks]
            self.meter.load_state_dict(
                engine.merge_meters(meters, steps, place.world_size, place.rank)
            )
            log(
                f"epoch {epoch} was begun by {len(ranks)} process(es) with batches of "
                f"{checkpoint['sampler']['batch_size']}: the samples that they have not seen are "
                f"dealt anew"
            )
        log(f"going on in epoch {epoch} after step {self.meter.steps}")
        self._steps_before = self.meter.steps
        self._random = ranks[place.rank]["random"] if place.rank < len(ranks) else {}

    def finetune(self, path: str) -> None:
        """Start from the weights of a checkpoint, with a new classifier for other classes."""
        checkpoint = models.read_checkpoint(path)
        others = (models.class_names(checkpoint, path) or self.classes) != self.classes
        self.load(checkpoint, path, new_head=True, other_classes=others)
        mean, std = models.normalization_of(checkpoint, self.model.pretrained_cfg)
        if (mean, std) != NORMALIZATION:
            log(
                f"warning: {path} expects images of mean {mean} and std {std}; in training they "
                f"are normalised by {NORMALIZATION[0]} and {NORMALIZATION[1]}"
            )
        wanted, exponent = self.args.qk_scale_factor, self.model_kwargs.get("qk_scale_factor")
        if wanted not in (None, exponent):
            log(
                f"warning: --qk-scale-factor {wanted} is ignored: {path} was trained with "
                f"{exponent}, and another would change what the model computes"
            )
        self.ema = self.start_average()

    def load(self, checkpoint: Mapping[str, Any], source: str, **options: bool) -> None:
        """Load weights, and remember what they say about the function of the model."""
        log(str(models.load_weights(self.model, checkpoint, source, **options)))
        if self.ema is not None and self.args.fsdp:
            models.load_weights(self.ema.module, checkpoint, source, **options)
        self.gelu = checkpoint.get("gelu", self.gelu)
        if hasattr(self.model, "qk_scale_factor"):
            self.model_kwargs["qk_scale_factor"] = self.model.qk_scale_factor

    def tell_changes(self, saved: Any) -> None:
        """Say which flags differ from those of the checkpoint: they hold from here on."""
        if not isinstance(saved, Mapping):
            return
        changed = [
            f"{name} {value} (was {saved[name]})"
            for name, value in vars(self.args).items()
            if name in saved and saved[name] != value and name not in UNTOLD
        ]
        if changed:
            log(f"flags other than the checkpoint's: {', '.join(changed)}")

    def set_lr(self, metric: float | None = None) -> None:
        """The learning rate of where the run is, in the epoch that follows ``self.epoch``."""
        self.scheduler.step(self.epoch + 1, metric)
        updates = -(-self.meter.steps // self.args.accum_iter)
        self.scheduler.step_update((self.epoch + 1) * self.updates_per_epoch + updates)

    def begin_epoch(self) -> int:
        """Seed and deal the epoch that follows ``self.epoch``, or go on in it; its number."""
        epoch, seed = self.epoch + 1, self.args.seed
        if self._random is None:
            utils.seed_everything(seed, epoch, self.place.rank)
            self.sampler.set_epoch(epoch)
            self._steps_before = 0
        else:
            utils.seed_everything(seed, epoch, self.place.rank, self._steps_before)
            if self._random:  # not of a process that is new
                utils.set_random_state(self._random, self.precision.device)
            self._random = None
        return epoch

    def end_epoch(self, accuracy: float) -> bool:
        """Count the epoch as done; whether its top-1 accuracy is the best so far."""
        self.epoch += 1
        self.meter.restart()
        self._steps_before = 0
        self.set_lr(metric=accuracy)
        ranked = sorted([*self.best, (accuracy, self.epoch)], key=lambda pair: (-pair[0], pair[1]))
        self.best = ranked[: self.args.keep_checkpoints]
        is_best = accuracy > self.best_acc1
        self.best_acc1 = max(accuracy, self.best_acc1)
        return is_best


def restore_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str
) -> None:
    """Load an optimizer's state, strictly; its options, learning rate apart, are not loaded.

    They are those of the flags, which may have changed.

    Raises:
        models.CheckpointError: Groups or shapes differ from the optimizer's.
    """
    loaded = ("params", "lr")  # the plateau schedule keeps its state in the latter
    options = [{k: v for k, v in g.items() if k not in loaded} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(state))
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)
    except (ValueError, KeyError) as error:
        raise models.CheckpointError(
            f"{source}: the optimizer's state does not fit: {error}; --opt, --linear-probe, "
            f"--freeze-stages and --layer-decay must be those of the checkpoint, or start from its "
            f"weights by --finetune"
        ) from error
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
                raise models.CheckpointError(
                    f"{source}: the optimizer's {key} of shape {tuple(value.shape)} meets a "
                    f"parameter of shape {tuple(parameter.shape)}; --opt and the model's layout "
                    f"must be those of the checkpoint"
                )
