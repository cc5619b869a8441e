"""The loop over epochs: train, evaluate, log, save, and stop when asked to."""

import copy
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from timm.data import Mixup
from torch import nn

import engine
import utils
from pipeline.prefetch import Prefetcher
from training import fsdp, launch
from training.output import Output, list_corrupt
from training.progress import Progress
from training.run_state import RunState
from training.stopping import RequestExchange, StopSignals
from training.watchdog import Watchdog
from utils import log


class Evaluation:
    """Evaluates a model, prints DeiT's line, and returns the statistics of the log.

    Args:
        args: The flags.
        loader: This process's part of the evaluation set.
        precision: Mixed precision.
        group: Processes to gather from, over the CPU; None for a single one.
    """

    def __init__(
        self,
        args: Namespace,
        loader: Prefetcher,
        precision: engine.Precision,
        group: dist.ProcessGroup | None,
    ):
        self.args, self.loader, self.precision, self.group = args, loader, precision, group

    def __call__(
        self, model: nn.Module, prefix: str = "", after_batch: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Accuracies and loss of ``model``; see :func:`engine.evaluate`."""
        args, precision = self.args, self.precision
        if next(model.parameters()).device.type != precision.device.type:  # --model-ema-force-cpu
            model = copy.deepcopy(model).to(precision.device)
        utils.broadcast_buffers(model)
        with fsdp.gathered(model):
            stats = engine.evaluate(
                self.loader,
                engine.compiled(model, args.compile),
                precision.device,
                precision,
                args.dist_eval,
                after_batch,
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
    """Trains a run up to ``--epochs`` or ``--stop-epoch``, or until it is asked to stop.

    Args:
        state: The run.
        output: Its folder.
        loader: This process's part of the training set.
        evaluation: What to do after every epoch.
        mixup_fn: Mixes a batch on the device.
        criterion: The loss.
    """

    def __init__(
        self,
        state: RunState,
        output: Output,
        loader: Prefetcher,
        evaluation: Evaluation,
        mixup_fn: Mixup | None,
        criterion: nn.Module,
    ):
        self.state, self.output, self.loader = state, output, loader
        self.evaluation, self.mixup_fn, self.criterion = evaluation, mixup_fn, criterion
        self.args, self.place = state.args, state.place
        self.exchange = RequestExchange(state.group)
        self.signals = StopSignals()
        self.watchdog = Watchdog(self.place.rank, self.place.world_size, self.args.dist_timeout)
        self._saved_at = time.monotonic()
        self._owed = False  # a save that came while another one was on its way

    def train(self, n_parameters: int) -> int:
        """Train; returns the exit status, which is not 0 after an interrupt."""
        state, args = self.state, self.args
        stop = args.epochs if args.stop_epoch is None else min(args.epochs, args.stop_epoch)
        if state.epoch + 1 >= stop:
            log(f"nothing left to train: {state.epoch + 1} of {stop} epochs are done")
            return 0
        log(f"training epochs {state.epoch + 1} to {stop - 1} of {args.epochs}")
        started = time.time()
        with self.signals, self.watchdog:
            model = self.wrapped()
            while state.epoch + 1 < stop:
                stats = self.train_epoch(model, stop)
                if stats is None:
                    return self.stopped()
                stats |= self.evaluate()
                if any(self.exchange.now(self.requests())[:1]):
                    return self.stopped()
                self.finish_epoch(stats | {"n_parameters": n_parameters})
            self.output.finish_saving()
        if state.epoch + 1 < args.epochs:
            log(f"stopped before epoch {stop} of {args.epochs} (--stop-epoch)")
        log(f"Training time {timedelta(seconds=int(time.time() - started))}")
        return 0

    def wrapped(self) -> nn.Module:
        """The model as it is trained: distributed, compiled."""
        args, precision, model = self.args, self.state.precision, self.state.model
        if args.fsdp:
            return model  # sharded already, in groups that do not change
        if self.place.world_size > 1:
            static = args.accum_iter == 1 and args.compile is None
            model = engine.distribute(model, precision.device, static)
        model = engine.compiled(model, args.compile)
        if self.place.world_size > 1:
            engine.warm_up_ddp(model, precision, args.batch_size, args.input_size)
        return model

    def train_epoch(self, model: nn.Module, stop: int) -> dict[str, float] | None:
        """What is left of the epoch at hand; None if the run has to stop."""
        state, args = self.state, self.args
        epoch = state.begin_epoch()
        self.watchdog.where = f"epoch {epoch} step {state.meter.steps}"
        progress = Progress(
            self.loader,
            epoch,
            stop,
            self.place.world_size,
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
            log_interval=args.log_interval,
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

    def requests(self) -> list[int]:
        """What this process wants to happen: stop (the signal), save, give up."""
        return [self.signals.requested or 0, self.is_save_due(), self.state.meter.bad_in_row]

    def is_save_due(self) -> bool:
        """Whether the first process has a checkpoint to write, and may."""
        args, steps = self.args, self.state.meter.steps
        if self.place.rank or not args.output_dir:
            return False
        every, minutes = args.save_every_steps, args.save_every_minutes
        self._owed |= bool(every and steps // every > (steps - args.accum_iter) // every)
        self._owed |= bool(minutes and time.monotonic() - self._saved_at >= 60 * minutes)
        return self._owed and not self.output.busy

    def after_update(self, meter: engine.Meter) -> bool:
        """Do what the processes agreed on a step ago; True if that is to stop."""
        epoch = self.state.epoch + 1
        self.watchdog.at(f"epoch {epoch} step {meter.steps}")
        stop, save, bad_in_row = self.exchange.exchange(self.requests())
        if bad_in_row >= self.args.max_nonfinite:
            engine.check_finite(meter, 0, epoch, self.state.precision, self.state.model)
        if save and not stop:
            self.save()
        return bool(stop)

    def evaluate(self) -> dict[str, float]:
        """Statistics of the model and of its moving average."""
        self.output.wait()  # loader processes are begun without another thread under way
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
        is_best = state.end_epoch(stats["test_acc1"])
        log(f"Max accuracy: {state.best_acc1:.2f}%")
        output.log_epoch(stats | {"epoch": state.epoch}, state.epoch)
        self.save(is_best, state.epoch, [epoch for _, epoch in state.best])

    def save(self, *names: Any) -> None:
        """Write a checkpoint in the background; see :meth:`Output.save` for its names."""
        content = self.state.state()
        self._owed, self._saved_at = False, time.monotonic()
        if content is None:
            return
        if self.state.is_poisoned(content):
            log("warning: loss or weights are not finite: the last checkpoint is kept as it is")
        else:
            self.output.save(content, *names)

    def stopped(self) -> int:
        """Save where the run is, and say so; the exit status."""
        state = self.state
        self.watchdog.pause()
        (number, *_) = self.exchange.now(self.requests())
        name, where = signal.Signals(number).name, f"epoch {state.epoch + 1}"
        where += f" after step {state.meter.steps}"
        if not self.args.output_dir:
            message = f"stopped by {name} in {where}; without --output_dir nothing is saved"
            return launch.fail(message, 128 + number) if self.place.rank == 0 else 128 + number
        self.save()
        self.output.finish_saving()
        log(f"stopped by {name} in {where}; --resume auto goes on")
        return 128 + number if number == signal.SIGINT else 0
