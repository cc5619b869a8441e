"""Loop over epochs: train, evaluate, log, save, and stop on request."""

import copy
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn
from torchvision.utils import make_grid

import datasets
import engine
import utils
from models import DataConfig
from pipeline.prefetch import Prefetcher
from samplers import SampleIndex
from training import fsdp, launch, losses
from training.compilation import compiled
from training.ddp import distribute, warm_up_ddp
from training.joined import draw_together, join_kernels
from training.network import count_parameters
from training.output import Output, list_corrupt
from training.progress import Progress, shown
from training.run_state import RunState
from training.stopping import LoaderStalled, RequestExchange, StopSignals
from training.tracking import Tracking
from training.watchdog import Watchdog
from utils import log


class Evaluation:
    """Evaluates a model, prints DeiT's line, and returns the statistics for the log.

    Args:
        args: Flags.
        loader: This rank's part of the evaluation set.
        size: Number of images of the evaluation set.
        precision: Mixed precision.
        group: CPU process group; None for a single process.
    """

    def __init__(
        self,
        args: Namespace,
        loader: Prefetcher,
        size: int,
        precision: engine.Precision,
        group: dist.ProcessGroup | None,
    ):
        self.args, self.loader, self.size = args, loader, size
        self.precision, self.group = precision, group

    def __call__(
        self, model: nn.Module, prefix: str = "", after_batch: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Return accuracies and loss of ``model``; see :func:`engine.evaluate`."""
        args, precision = self.args, self.precision
        if next(model.parameters()).device.type != precision.device.type:  # --model-ema-force-cpu
            model = copy.deepcopy(model).to(precision.device)
        utils.broadcast_buffers(model)
        with fsdp.gathered(model):
            stats = engine.evaluate(
                shown(self.loader, f"{prefix}evaluation", len(self.loader)),
                compiled(model, args.compile, args.compile_mode, args.compile_blocks),
                precision.device,
                precision,
                args.dist_eval,
                after_batch,
                size=self.size,
                group=self.group,
            )
        images, corrupt, messages = (stats.pop(key) for key in ("images", "corrupt", "messages"))
        if corrupt and args.output_dir:
            list_corrupt(Path(args.output_dir), utils.gather_lines(messages, self.group))
        skipped = f" ({corrupt} corrupt ones skipped)" if corrupt else ""
        log(
            f"{prefix}* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} "
            f"loss {stats['loss']:.3f} on {images} images{skipped}"
        )
        return stats | ({"corrupt": corrupt} if corrupt else {})


class Trainer:
    """Trains up to ``--epochs`` or ``--stop-epoch``, or until a request to stop.

    Args:
        state: State of the run.
        output: Output folder.
        loader: This rank's part of the training set.
        evaluation: Called after every ``--val-interval`` epochs, and after the last one.
        mixup_fn: Mixes a batch on the device.
        criterion: Loss.
        batches_at: Returns ``loader`` with images of another size, in pixels.
        tracking: Trackers of the epochs.
    """

    def __init__(
        self,
        state: RunState,
        output: Output,
        loader: Prefetcher,
        evaluation: Evaluation,
        mixup_fn: Mixup | None,
        criterion: nn.Module,
        batches_at: Callable[[int], Prefetcher],
        tracking: Tracking,
    ):
        self.tracking = tracking
        self.state, self.output, self.loader = state, output, loader
        self.evaluation, self.mixup_fn, self.criterion = evaluation, mixup_fn, criterion
        self.batches_at = batches_at
        self.args, self.info = state.args, state.info
        self.exchange = RequestExchange(state.group)
        self.signals = StopSignals()
        self.watchdog = Watchdog(self.info.rank, self.info.world_size, self.args.dist_timeout)
        self._saved_at = time.monotonic()
        self._owed = False  # a save that was due while another one was being written

    def train(self) -> int:
        """Train; return the exit status, which is not 0 after an interrupt."""
        state, args = self.state, self.args
        stop = state.epochs if args.stop_epoch is None else min(state.epochs, args.stop_epoch)
        if state.epoch + 1 >= stop:
            log(finished(state.epoch + 1, args))
            return 0
        log(f"training epochs {state.epoch + 1} to {stop - 1} of {state.epochs}")
        started, n_parameters = time.time(), count_parameters(state.model)
        with self.signals, self.watchdog:
            model = self.wrapped()
            while state.epoch + 1 < stop:
                try:
                    stats = self.train_epoch(model, stop)
                    if stats is None:
                        return self.stopped()
                    if engine.is_evaluated(args, state.epoch + 1):
                        stats |= self.evaluate()
                except LoaderStalled:
                    return self.stalled()
                if any(self.exchange.now(self.requests())[:1]):
                    return self.stopped()
                self.finish_epoch(stats | {"n_parameters": n_parameters})
            self.output.finish_saving()
        if state.epoch + 1 < state.epochs:
            log(f"stopped before epoch {stop} of {state.epochs} (--stop-epoch)")
        log(f"Training time {timedelta(seconds=int(time.time() - started))}")
        return 0

    def wrapped(self) -> nn.Module:
        """Return the model for training: compiled, distributed."""
        args, precision, model = self.args, self.state.precision, self.state.model
        if args.compile_blocks and not args.fsdp:
            draw_together(model)
        if args.compile is not None:
            model = compiled(model, args.compile, args.compile_mode, args.compile_blocks)
        elif not args.fsdp:
            join_kernels(model)
        # with FSDP, it is sharded already, in fixed groups
        if self.info.world_size > 1 and not args.fsdp:
            static = args.accum_iter == 1 and args.compile is None
            model = distribute(model, precision.device, static)
            channels = self.state.network.images.in_chans
            warm_up_ddp(model, precision, args.batch_size, args.input_size, channels)
        return model

    def train_epoch(self, model: nn.Module, stop: int) -> dict[str, float] | None:
        """Train the rest of the current epoch; return None if the run has to stop."""
        state, args = self.state, self.args
        self.resize(state.epoch + 1)
        epoch = state.begin_epoch()
        losses.switch_mixup(self.mixup_fn, args, epoch)
        self.watchdog.where = f"epoch {epoch} step {state.meter.steps}"
        progress = Progress(
            self.loader,
            epoch,
            stop,
            self.info.world_size,
            state.meter.steps,
            self.watchdog.loading,
        )
        stats = engine.train_one_epoch(
            model,
            self.criterion,
            progress,
            state.optimizer,
            state.precision.device,
            epoch,
            state.precision,
            max_norm=args.clip_grad,
            model_ema=state.ema,
            mixup_fn=self.mixup_fn,
            lr_scheduler=state.scheduler,
            accum_iter=args.accum_iter,
            set_training_mode=args.train_mode,
            log_interval=progress.interval(args.log_interval),
            report=progress.report,
            max_nonfinite=args.max_nonfinite,
            meter=state.meter,
            after_update=self.after_update,
        )
        if stats is None:
            return None
        if stats.get("corrupt"):
            self.output.list_corrupt(utils.gather_lines(state.meter.corrupt, state.group))
        return {f"train_{key}": value for key, value in stats.items()}

    def resize(self, epoch: int) -> None:
        """Replace the loader where ``--progressive-sizes`` has another size for an epoch."""
        size = engine.train_size(self.args, epoch)
        if not self.args.progressive_sizes or size == self.loader.loader.dataset.augmentation.size:
            return
        self.output.wait()  # loader workers are started while no other thread runs
        self.loader = self.batches_at(size)
        log(f"epoch {epoch} starts to train on images of {size} pixels")

    def requests(self) -> list[int]:
        """Return this rank's requests: signal to stop, save, nonfinite losses in a row."""
        return [self.signals.requested or 0, self.is_save_due(), self.state.meter.bad_in_row]

    def is_save_due(self) -> bool:
        """Return True if rank 0 should save a checkpoint now."""
        args, steps = self.args, self.state.meter.steps
        if self.info.rank or not args.output_dir:
            return False
        every, minutes = args.save_every_steps, args.save_every_minutes
        self._owed |= bool(every and steps // every > (steps - args.accum_iter) // every)
        self._owed |= bool(minutes and time.monotonic() - self._saved_at >= 60 * minutes)
        return self._owed and not self.output.busy

    def after_update(self, meter: engine.Meter) -> bool:
        """Act on the all-reduced requests of the previous step; return True to stop."""
        epoch = self.state.epoch + 1
        self.watchdog.at(f"epoch {epoch} step {meter.steps}")
        stop, save, bad_in_row = self.exchange.exchange(self.requests())
        if bad_in_row >= self.args.max_nonfinite:
            engine.check_finite(meter, 0, epoch, self.state.precision, self.state.model)
        if save and not stop:
            self.save()
        return bool(stop)

    def evaluate(self) -> dict[str, float]:
        """Return statistics of the model and of its moving average."""
        self.output.wait()  # loader workers are started while no other thread runs
        where = self.watchdog.where

        def after_batch() -> bool:
            self.watchdog.at(f"the evaluation after {where}")
            return self.signals.requested is not None

        stats = self.evaluation(self.state.model, "", after_batch)
        found = {f"test_{key}": value for key, value in stats.items()}
        if self.state.ema is not None:
            stats = self.evaluation(self.state.ema.module, "EMA ", after_batch)
            found |= {f"ema_{key}": value for key, value in stats.items()}
        self.watchdog.pause()
        return found

    def finish_epoch(self, stats: dict[str, Any]) -> None:
        """Log and save the epoch."""
        state, output = self.state, self.output
        accuracy = stats.get("test_acc1")
        is_best = state.end_epoch(accuracy)
        if accuracy is not None:
            log(f"Max accuracy: {state.best_acc1:.2f}%")
        stats = stats | {"epoch": state.epoch}
        output.log_epoch(stats, state.epoch)
        self.tracking.log(stats | {"best_acc1": state.best_acc1}, state.epoch)
        self.save(is_best, state.epoch, [epoch for _, epoch in state.best])

    def stalled(self) -> int:
        """Stop although the loader does not deliver; return the exit status.

        A single process saves its state after the last update. Several cannot: the others are
        within a step, and end as they lose this one.
        """
        launch.end_children()
        self.tracking.status = "interrupted"
        number = self.signals.requested
        if self.info.world_size == 1 and self.state.steps_here % self.args.accum_iter == 0:
            log("the loader does not deliver: it is left")
            return self.stopped()
        message = f"stopped by {number.name} while the loader does not deliver, at "
        message += f"{self.watchdog.where}: the last checkpoint is kept"
        return launch.fail(message, 128 + number)

    def save(self, *names: Any) -> None:
        """Write a checkpoint in the background; see :meth:`Output.save` for ``names``."""
        contents = self.state.state()
        self._owed, self._saved_at = False, time.monotonic()
        if contents is None:
            return
        if self.state.is_nonfinite(contents):
            log("warning: loss or weights are not finite: the last checkpoint is not replaced")
        else:
            self.output.save(contents, *names)

    def stopped(self) -> int:
        """Save the current state and report it; return the exit status."""
        state = self.state
        self.tracking.status = "interrupted"
        self.watchdog.pause()
        (number, *_) = self.exchange.now(self.requests())
        name, where = signal.Signals(number).name, f"epoch {state.epoch + 1}"
        where += f" after step {state.meter.steps}"
        if not self.args.output_dir:
            message = f"stopped by {name} in {where}; without --output_dir nothing is saved"
            return launch.fail(message, 128 + number) if self.info.rank == 0 else 128 + number
        self.save()
        self.output.finish_saving()
        log(f"stopped by {name} in {where}; --resume auto continues")
        return 128 + number if number == signal.SIGINT else 0


def finished(epochs: int, args: Namespace) -> str:
    """Return the message of a run that has no epoch left to train, after ``epochs``."""
    if args.stop_epoch is not None and args.stop_epoch < args.epochs:
        limit, why = args.stop_epoch, "up to --stop-epoch"
    else:
        limit, why = args.epochs, "the run is finished"
    return f"nothing left to train: {epochs} of {limit} epochs are done, {why}"


def example_images(
    feed: Prefetcher, num_images: int, config: DataConfig, count: int = 32
) -> torch.Tensor:
    """Return a grid ``3 H W`` of augmented training images, spread over the classes.

    Small images are enlarged by a whole factor, to about 128 pixels.
    """
    images = feed.batch([SampleIndex(i * num_images // count) for i in range(count)]).images
    images = datasets.denormalize(images.float().cpu(), config)
    factor = max(1, 128 // max(images.shape[-2:]))
    return make_grid(F.interpolate(images, scale_factor=factor), nrow=8)
