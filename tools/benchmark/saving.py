"""Measure the cost of fault tolerance: steps per second with what resumption needs, and without.

``python -m tools.benchmark.saving`` trains on one batch from memory, in turn with signal handling,
watchdog and background checkpoints, and without; under
``torchrun --nproc_per_node N -m tools.benchmark.saving``, on N processes.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator

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
from training.network import choose_precision
from training.output import Output
from training.run_state import RunState
from training.trainer import Trainer
from utils import log

CLASSES = 1000


class OneBatch:
    """A loader that yields the same batch ``steps`` times."""

    def __init__(self, batch_size: int, size: int, steps: int, place: DistInfo):
        self.batch_size, self.steps = batch_size, steps
        images = torch.randn(batch_size, 3, size, size)
        self.batch = Batch(images, torch.randint(CLASSES, (batch_size,)), [])
        count = steps * batch_size * place.world_size
        self.sampler = RASampler(count, place.world_size, place.rank, batch_size, 1)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.steps)


class Bare(Trainer):
    """A trainer without signal handling, watchdog and checkpoints."""

    def after_update(self, meter: engine.Meter) -> bool:
        """Continue."""
        return False


def build(
    kind: type[Trainer], args: Namespace, place: DistInfo, group: dist.ProcessGroup | None
) -> Trainer:
    """Return a trainer of its own model; only :class:`Trainer` itself has an output folder."""
    size = args.input_size
    model, kwargs = models.build_model(args.model, {"num_classes": CLASSES}, {"img_size": size})
    precision = choose_precision(args, model, torch.device(args.device))
    precision.place(model)
    loader = OneBatch(args.batch_size, size, args.steps, place)
    loader.batch = to_device(loader.batch, precision.device, memory_format=precision.memory_format)
    parts = (args, model, args.model, kwargs, precision, 1e-4, args.steps, loader.sampler)
    output = Output(args.output_dir if kind is Trainer else "")
    state = RunState(*parts, place, group)
    return kind(state, output, loader, None, None, torch.nn.CrossEntropyLoss())


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
    group = utils.control_group(args.dist_timeout)
    trainers = [build(kind, args, place, group) for kind in (Trainer, Bare)]
    times: list[list[float]] = [[], []]
    with trainers[0].signals, trainers[0].watchdog:
        wrapped = [trainer.wrapped() for trainer in trainers]
        for _ in range(args.rounds + 1):
            for trainer, model, series in zip(trainers, wrapped, times, strict=True):
                series.append(seconds(trainer, model))
    trainers[0].output.close()
    safe, bare = (statistics.median(series[1:]) for series in times)  # the first warms up
    log(
        f"{args.model} {place.world_size} process(es), a checkpoint every "
        f"{args.save_every_steps} of {args.steps} steps: with/without steps per second "
        f"{bare / safe:.3f} ({args.steps / safe:.2f} and {args.steps / bare:.2f})"
    )
    log(f"{measure.machine(args.device)}, {args.input_size} pixels, batch {args.batch_size}")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser("tools.benchmark.saving", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", nargs="?", default="visformer_tiny")
    measure.add_flags(parser, batch_size=32)
    add("--input-size", type=int, default=64)
    add("--steps", type=int, default=100, help="steps of a measurement")
    add("--save-every-steps", type=int, default=50)
    add("--amp", action="store_true", help="float16 autocast")
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
