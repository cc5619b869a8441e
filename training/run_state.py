"""State of a run: everything a training checkpoint holds, and resuming from one."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import engine
import utils
from models import ModelSource
from samplers import RASampler
from training import fsdp, optimizers, schedules
from training.joined import MovingAverage
from training.launch import DistInfo
from training.network import Network
from training.saved_state import check_state, restoring
from utils import UserError, log

SILENT = (
    "resume",
    "stop_epoch",
    "finetune",
    "pretrained",
    "output_dir",
    "eval_crop_ratio",
    "log_to",
    "experiment",
    "interpolation",
)  # flags that may differ silently


class RunState:
    """Model, moving average, optimizer, schedule, scaler, random state and progress of a run.

    Args:
        args: Flags.
        network: Model on its device, with its name, arguments, precision and preprocessing.
        rates: Learning rates that the schedule spans.
        updates_per_epoch: Optimizer steps per epoch.
        sampler: Sampler of the training set.
        info: Ranks of this process.
        group: CPU process group; None for a single process.
        classes: Class names in the order of the classifier's outputs.
    """

    def __init__(
        self,
        args: Namespace,
        network: Network,
        rates: schedules.Rates,
        updates_per_epoch: int,
        sampler: RASampler,
        info: DistInfo,
        group: dist.ProcessGroup | None = None,
        classes: Sequence[str] = (),
    ):
        self.args, self.network, self.rates = args, network, rates
        self.model, self.precision = network.model, network.precision
        self.updates_per_epoch = updates_per_epoch
        self.sampler, self.info, self.group = sampler, info, group
        self.classes = [str(name) for name in classes]
        self.epoch = args.start_epoch - 1
        self.meter = engine.Meter()
        self.best_acc1 = 0.0
        self.best: list[tuple[float, int]] = []  # (accuracy, epoch), best first
        self.gelu = "none"
        self.ema: MovingAverage | None = None
        if args.fsdp:
            self._shard()
        else:
            self.ema = self.start_average()
        self.optimizer = optimizers.build(args, self.model, rates.peak)
        optimizers.check(self.optimizer, args, info.world_size)
        if args.layer_decay is not None:
            scales = optimizers.layer_scales(self.optimizer)
            low, high = scales[0], scales[-1]
            log(f"{len(scales)} layers with learning rates scaled by {low:.3g} to {high:.3g}")
        self.scheduler, self.epochs = schedules.build(
            args, self.optimizer, updates_per_epoch, rates
        )
        self._random: Mapping[str, Any] | None = None  # to restore, in the middle of an epoch
        self._steps_before = 0  # steps of the epoch that the sampler skips already

    @property
    def steps_here(self) -> int:
        """Steps of the epoch since it started, or was resumed."""
        return self.meter.steps - self._steps_before

    def _shard(self) -> None:
        """Shard model and moving average over the ranks."""
        fsdp.check(self.args, self.info.world_size)
        self.model.cpu()
        self.ema = self.start_average()
        for model in [self.model] + ([self.ema.module] if self.ema else []):
            fsdp.shard(model, self.precision.device)

    def start_average(self) -> MovingAverage | None:
        """Return a moving average starting at the current weights; None without --model-ema."""
        if not self.args.model_ema:
            return None
        if self.ema is not None and self.args.fsdp:
            return self.ema  # shards cannot be copied; it was loaded with the model
        return MovingAverage(
            self.model,
            self.args.model_ema_decay,
            use_warmup=self.args.model_ema_warmup,
            device=torch.device("cpu") if self.args.model_ema_force_cpu else None,
        )

    def state(self) -> dict[str, Any] | None:
        """Return the contents of a checkpoint on rank 0, else None; all ranks must call it."""
        mine = {"random": utils.random_state(self.precision.device)}
        mine["meter"] = self.meter.state_dict()
        ranks: list[Any] = [mine]
        if self.group is not None:
            ranks = [None] * self.info.world_size
            dist.gather_object(mine, ranks if self.info.rank == 0 else None, group=self.group)
        weights = {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": optimizers.full_state(self.optimizer),
        }
        weights = fsdp.gather(weights, keep=self.info.rank == 0)
        if self.info.rank:
            return None
        return {
            **weights,
            "lr_scheduler": schedules.full_state(self.scheduler),
            "unscaled_rates": self.rates.unscaled,
            "scaler": self.precision.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.meter.steps,
            "sampler": self.sampler.state_dict(self.steps_here),
            "ranks": ranks,
            "best_acc1": self.best_acc1,
            "best": self.best,
            "model_name": self.network.name,
            "model_kwargs": self.network.kwargs,
            "input_size": self.network.images.size,
            "data_config": self.network.images.record(),
            "classes": self.classes,
            "gelu": self.gelu,
            "args": vars(self.args),
        }

    def is_nonfinite(self, contents: Mapping[str, Any]) -> bool:
        """Return True if loss or weights of a state are not finite.

        In float16, the loss scaler skips updates with a nonfinite loss, which is then no reason.
        """
        bad = any(rank["meter"]["in_row"] for rank in contents["ranks"])
        weights = [contents["model"][name] for name, _ in self.model.named_parameters()]
        norm = nn.utils.get_total_norm(weights)
        return (bad and not self.precision.scaler.is_enabled()) or not norm.isfinite().item()

    def start(self, source: ModelSource, resumes: bool) -> None:
        """Resume the run of a checkpoint, or start from the weights of a source, if it has any.

        Raises:
            UserError: Parts of the model are frozen, and there are no weights to load.
        """
        args = self.args
        if resumes:
            self.restore(source)
            if args.finetune or args.pretrained:
                flag = f"--finetune {args.finetune}" if args.finetune else "--pretrained"
                log(f"{flag} is not read: the run continues from {source.label}")
        elif source.has_weights:
            self.finetune(source)
        elif args.linear_probe or args.attn_only or args.freeze_stages is not None:
            raise UserError(
                f"{args.output_dir} has no checkpoint to resume, and --linear-probe, --attn-only "
                f"and --freeze-stages would freeze random weights: give --finetune CHECKPOINT"
            )
        self.set_lr()

    def restore(self, origin: ModelSource) -> None:
        """Resume from a checkpoint; weights without an optimizer start at ``--start_epoch``."""
        checkpoint, source = origin.checkpoint, origin.label
        resumes = "optimizer" in checkpoint and "epoch" in checkpoint
        if resumes:
            check_state(checkpoint, source)
        self.load(origin)
        self.ema = self.start_average()
        if self.ema is not None and checkpoint.get("model_ema"):
            origin.load(self.ema.module, "ema")
        if not resumes:
            log(f"{source} has no optimizer state: its weights start a new run")
            return
        options = self.args.opt_kwargs
        optimizers.compare(self.args.opt, checkpoint.get("args"), source, options)
        moments = fsdp.shard_optimizer_state(self.optimizer, checkpoint["optimizer"])
        with restoring("optimizer", source):
            optimizers.restore(self.optimizer, moments, source)
        if checkpoint.get("scaler"):  # empty unless the run used float16
            with restoring("scaler", source):
                self.precision.scaler.load_state_dict(checkpoint["scaler"])
        self.best_acc1 = float(checkpoint.get("best_acc1", 0.0))
        self.best = [tuple(pair) for pair in checkpoint.get("best", ())]
        self.epoch = checkpoint["epoch"]
        with restoring("args", source):
            self.log_changed_flags(checkpoint.get("args"))
        with restoring("lr_scheduler", source):
            schedules.restore(self.scheduler, checkpoint.get("lr_scheduler") or {})
        if checkpoint.get("step"):
            with restoring("progress within the epoch (step, sampler, ranks)", source):
                self._restore_progress(checkpoint, source)

    def _restore_progress(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Resume in the middle of an epoch."""
        epoch, ranks, info = self.epoch + 1, checkpoint["ranks"], self.info
        try:
            self.sampler.load_state_dict(checkpoint["sampler"])
        except ValueError as error:
            log(f"warning: {source} was saved within epoch {epoch}, which restarts: {error}")
            return
        if len(ranks) == info.world_size and not self.sampler.is_continued_elsewhere:
            self.meter.load_state_dict(ranks[info.rank]["meter"])
        else:
            meters = [state["meter"] for state in ranks]
            merged = self.sampler.steps_done, info.world_size, info.rank
            self.meter.load_state_dict(engine.merge_meters(meters, *merged))
            log(
                f"epoch {epoch} was started by {len(ranks)} process(es) with batches of "
                f"{checkpoint['sampler']['batch_size']}: the remaining samples are redistributed"
            )
        log(f"resuming in epoch {epoch} after step {self.meter.steps}")
        self._steps_before = self.meter.steps
        self._random = ranks[info.rank]["random"] if info.rank < len(ranks) else {}
        if self._random:  # an error of its values is to be found before the epoch begins
            utils.set_random_state(self._random, self.precision.device)

    def finetune(self, source: ModelSource) -> None:
        """Load the weights of a source, with a new classifier for other classes."""
        others = list(source.classes or self.classes) != self.classes
        self.load(source, new_head=True, other_classes=others)
        self.ema = self.start_average()

    def load(self, source: ModelSource, **options: bool) -> None:
        """Load weights, and keep the settings that change the model's function."""
        log(str(source.load(self.model, **options) or source.label))
        if self.ema is not None and self.args.fsdp:
            source.load(self.ema.module, **options)
        self.gelu = source.checkpoint.get("gelu", self.gelu)
        if hasattr(self.model, "qk_scale_factor"):
            self.network.kwargs["qk_scale_factor"] = self.model.qk_scale_factor

    def log_changed_flags(self, saved: Any) -> None:
        """Log the flags that differ from the checkpoint's; the current ones apply."""
        if not isinstance(saved, Mapping):
            return
        changed = [
            f"{name} {value} (was {saved[name]})"
            for name, value in vars(self.args).items()
            if name in saved and saved[name] != value and name not in SILENT
        ]
        if changed:
            log(f"flags that differ from the checkpoint's: {', '.join(changed)}")

    def set_lr(self, metric: float | None = None) -> None:
        """Set the learning rate at the current step of the epoch after ``self.epoch``."""
        self.scheduler.step(self.epoch + 1, metric)
        updates = -(-self.meter.steps // self.args.accum_iter)
        self.scheduler.step_update((self.epoch + 1) * self.updates_per_epoch + updates)

    def begin_epoch(self) -> int:
        """Seed and shuffle the epoch after ``self.epoch``, or resume in it; return its number."""
        epoch, seed = self.epoch + 1, self.args.seed
        if self._random is None:
            utils.seed_everything(seed, epoch, self.info.rank)
            self.sampler.set_epoch(epoch)
            self._steps_before = 0
        else:
            utils.seed_everything(seed, epoch, self.info.rank, self._steps_before)
            if self._random:  # empty for a rank that is new
                utils.set_random_state(self._random, self.precision.device)
            self._random = None
        return epoch

    def end_epoch(self, accuracy: float | None) -> bool:
        """Finish the epoch; return True if its top-1 accuracy is the best so far.

        Args:
            accuracy: In percent; None if it was not measured after this epoch.
        """
        self.epoch += 1
        self.meter.restart()
        self._steps_before = 0
        self.set_lr(metric=accuracy)
        if accuracy is None:
            return False
        ranked = sorted([*self.best, (accuracy, self.epoch)], key=lambda pair: (-pair[0], pair[1]))
        self.best = ranked[: self.args.keep_checkpoints]
        is_best = accuracy > self.best_acc1
        self.best_acc1 = max(accuracy, self.best_acc1)
        return is_best
