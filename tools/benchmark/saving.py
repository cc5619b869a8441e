"""Measure the cost of fault tolerance: steps per second of training with it and without.

``python -m tools.benchmark.saving`` trains on one batch from memory, in turn with signal handling,
watchdog and background checkpoints, and without; under
``torchrun --nproc_per_node N -m tools.benchmark.saving``, on N processes.
"""

import argparse
import contextlib
import functools
import io
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence

import torch
import torch.distributed as dist

import engine
import models
import utils
from pipeline.prefetch import to_device
from pipeline.reference import Batch
from samplers import RASampler
from tools import cli
from tools.benchmark import measure
from training import launch
from training.launch import DistInfo
from training.network import Network, choose_precision, with_amp_dtype
from training.output import Output
from training.parser import PIXELS, Parser, add_input_size
from training.run_state import RunState
from training.schedules import Rates
from training.tracking import Tracking
from training.trainer import Trainer
from utils import log

CLASSES = 1000


class Batches(list):
    """A loader of batches that are in memory already."""

    def __init__(self, batches: Sequence[Batch]):
        super().__init__(batches)
        self.batch_size = len(batches[0].images)


class Bare(Trainer):
    """A trainer without signal handling, watchdog and checkpoints."""

    def after_update(self, meter: engine.Meter) -> bool:
        """Continue."""
        return False


def build(
    kind: type[Trainer], args: Namespace, place: DistInfo, group: dist.ProcessGroup | None
) -> Trainer:
    """Return a trainer of its own model; only :class:`Trainer` itself has an output folder."""
    size, count = args.input_size, args.batch_size
    model, kwargs = models.build_model(args.model, {"num_classes": CLASSES}, {"img_size": size})
    precision = choose_precision(args, model, torch.device(args.device))
    precision.place(model)
    pixels = torch.randn(count, 3, *models.height_and_width(size))
    batch = Batch(pixels, torch.randint(CLASSES, (count,)), [])
    batch = to_device(batch, precision.device, memory_format=precision.memory_format)
    images = args.steps * count * place.world_size
    sampler = RASampler(images, place.world_size, place.rank, count, 1)
    network = Network(model, args.model, kwargs, precision, models.DataConfig().at_size(size))
    rates = Rates(1e-4, args.min_lr, args.warmup_lr)
    state = RunState(args, network, rates, args.steps, sampler, place, group)
    output = Output(args.output_dir if kind is Trainer else "")
    loader = Batches([batch] * args.steps)
    criterion, tracking = torch.nn.CrossEntropyLoss(), Tracking(args, output, False)
    return kind(state, output, loader, None, None, criterion, lambda size: loader, tracking)


def seconds(trainer: Trainer, model: torch.nn.Module) -> float:
    """Return the time of an epoch; a checkpoint may still be written in the background."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train_epoch(model, stop=10**6)
    elapsed = time.perf_counter() - started
    trainer.state.meter.restart()
    trainer.state.epoch += 1
    trainer.output.wait()
    return elapsed


def compare(args: Namespace, place: DistInfo) -> None:
    """Measure both trainers in turn, and print the ratio of their rates."""
    args = with_amp_dtype(args, torch.device(args.device))
    engine.select_kernels(torch.device(args.device), args.tf32)
    group = utils.control_group(args.dist_timeout)
    trainers = {kind: build(kind, args, place, group) for kind in (Trainer, Bare)}
    safe = trainers[Trainer]
    with safe.signals, safe.watchdog:
        epochs = {k: functools.partial(seconds, t, t.wrapped()) for k, t in trainers.items()}
        times = measure.medians(measure.in_turn(epochs, args.rounds, warm_up=1))
    safe.output.close()
    log(
        f"{args.model} {place.world_size} process(es), a checkpoint every "
        f"{args.save_every_steps} of {args.steps} steps: with/without steps per second "
        f"{times[Bare] / times[Trainer]:.3f} "
        f"({args.steps / times[Trainer]:.2f} and {args.steps / times[Bare]:.2f})"
    )
    pixels = f"{models.size_text(args.input_size)} pixels"
    log(f"{measure.machine(args.device)}, {pixels}, batch {args.batch_size}")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser("python -m tools.benchmark.saving", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", nargs="?", default="visformer_tiny", metavar="MODEL", help="timm model name")
    measure.add_flags(parser, batch_size=32)
    add_input_size(parser, default=64, help=PIXELS)
    add("--steps", type=int, default=100, metavar="N", help="training steps of a measurement")
    every = "steps between checkpoints"
    add("--save-every-steps", type=int, default=50, metavar="N", help=every)
    add("--amp", action="store_true", help="train in automatic mixed precision")
    return parser


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``."""
    args = cli.parse(get_parser, argv)
    args.log_interval = 10**9
    with tempfile.TemporaryDirectory() as folder, launch.process_group(args) as (place, device):
        args.output_dir, args.device = folder, device.type
        compare(args, place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
