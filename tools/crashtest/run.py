"""Runs that are interrupted until enough is enough, and the undisturbed ones beside them."""

import random
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.crashtest.compare import compare, survey
from tools.crashtest.job import HAS_PROC, CrashError, Job, end_orphans, processes, send
from training.files import TEMPORARY

STEPS = 6  # within whose time a moment between two saves falls
VAIN = 0.1  # share of moments at which a run has hardly started


@dataclass(frozen=True)
class Part:
    """A way to interrupt: which processes get which signal; ``restarts``: torchrun goes on."""

    ranks: int
    victims: str
    number: signal.Signals
    restarts: bool = False

    def __str__(self) -> str:
        return f"{self.number.name} of {self.victims}{', --max-restarts' * self.restarts}"


def parts_of(ranks: int, signals: str) -> list[Part]:
    """The parts of the test with so many ranks and ``KILL``, ``TERM`` or ``mixed``."""
    kill, term = signal.SIGKILL, signal.SIGTERM
    if ranks == 1:
        parts = [Part(1, "the process", kill), Part(1, "the process", term)]
    else:
        parts = [Part(ranks, who, kill) for who in ("one rank", "all", "the launcher")]
        parts.append(Part(ranks, "the launcher", term))
        parts.append(Part(ranks, "one rank", kill, restarts=True))
    if not HAS_PROC:
        parts = [part for part in parts if part.victims.startswith("the")]
    return [part for part in parts if signals in ("mixed", part.number.name.removeprefix("SIG"))]


@dataclass
class Counts:
    """What a part has come to."""

    runs: int = 0
    kills: int = 0
    kills_while_saving: int = 0
    restarts: int = 0
    steps_done_twice: int = 0
    lost_checkpoints: int = 0
    orphans: int = 0
    bits_of_difference: int = 0

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost, left over or different."""
        return not (self.lost_checkpoints or self.orphans or self.bits_of_difference)


@dataclass(frozen=True)
class Moment:
    """When to interrupt.

    Attributes:
        kind: ``start``, counted from the start; ``steps``, from the last of the saves waited
            for, or from the first step; ``saving``, from the beginning of the save after them.
        saves: Checkpoints to wait for, so that the run makes progress.
        share: Number in 0..1 by which to wait on.
    """

    kind: str
    saves: int
    share: float

    def is_near(self, job: Job) -> bool:
        """Whether what it is counted from has come."""
        if self.kind == "start":
            return True
        ready = job.stepping and job.saves >= self.saves
        return ready and (self.kind == "steps" or job.is_saving)


def draw_moment(draws: random.Random, kills: int, in_vain: bool) -> Moment:
    """A random moment.

    Args:
        draws: Random numbers.
        kills: So far in the part, whose first moments are of the three kinds in turn.
        in_vain: Whether the last one came before any checkpoint: this one will not.
    """
    kind, rare = ("saving", "steps")[kills % 2], draws.random() < VAIN
    saves, share = draws.choice((0, 1, 1, 2)), draws.random()
    if in_vain or kills < 2:
        saves = max(saves, 1)
    elif rare or kills == 2:
        kind = "start"
    return Moment(kind, saves, share)


def command(
    args: Namespace, folder: Path, ranks: int, workers: int, restarts: int = 0
) -> list[str]:
    """Words that train into ``folder``; ``restarts`` are those that torchrun may make."""
    flags = {"model": args.model, "epochs": args.epochs, "batch-size": args.batch_size}
    flags |= {"warmup-epochs": 0, "model-ema-decay": 0.9, "device": "cpu", "dist-timeout": 60}
    flags |= {"save-every-steps": 2, "log-interval": 1, "num_workers": workers}
    flags |= {"output_dir": folder, "resume": "auto"}
    words = ["main.py", *(f"--{key}={value}" for key, value in flags.items()), *args.flags]
    if ranks > 1:
        options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        words = ["-m", "torch.distributed.run", *options, *words]
    return [sys.executable, *words]


@dataclass(frozen=True)
class Reference:
    """An undisturbed run.

    Attributes:
        folder: Its ``--output_dir``.
        per_epoch: Steps of an epoch.
        start, step, save: Seconds to its first step, of an average one, and of its longest save.
    """

    folder: Path
    per_epoch: int
    start: float
    step: float
    save: float


def train_undisturbed(args: Namespace, folder: Path, ranks: int) -> Reference:
    """Train once from the start to the end.

    Raises:
        CrashError: It fails or hangs.
    """
    words = command(args, folder, ranks, args.workers[0])
    with Job(words, folder, folder.with_suffix(".txt"), args.limit) as job:
        job.wait()
        if job.process.returncode:
            raise CrashError(f"status {job.process.returncode} without having been disturbed")
        step = (job.last_step - job.first_step) / max(job.reached - 1, 1)
        return Reference(folder, job.per_epoch, job.first_step, step, job.save_seconds)


class Run:
    """A run that is interrupted and resumed until it ends.

    Args:
        args: The flags.
        part: How to interrupt.
        kills: Interruptions of the part in all; afterwards, the run is left alone.
        reference: What it should come to.
        folder: Its ``--output_dir``.
        draws: Random numbers.
        counts: To add to.
    """

    def __init__(
        self,
        args: Namespace,
        part: Part,
        kills: int,
        reference: Reference,
        folder: Path,
        draws: random.Random,
        counts: Counts,
    ):
        self.args, self.part, self.kills, self.reference = args, part, kills, reference
        self.folder, self.draws, self.counts = folder, draws, counts
        self.progress, self.in_vain = 0, False
        self.damaged: set[int] = set()

    def train(self) -> None:
        """Train to the end, and compare.

        Raises:
            CrashError: A start hangs, ends by itself, or does not keep a promise.
            CheckpointError: It left no checkpoint that can be read.
            OSError: It left no log.
        """
        self.counts.runs += 1
        reached = starts = 0
        finished = False
        while not finished:
            workers = self.draws.choice(self.args.workers)
            restarts = self.kills + 1 if self.part.restarts else 0
            words = command(self.args, self.folder, self.part.ranks, workers, restarts)
            text = self.folder.with_name(f"{self.folder.name}-{starts}.txt")
            self.counts.restarts += starts > 0
            per_epoch = self.reference.per_epoch
            with Job(words, self.folder, text, self.args.limit, per_epoch, reached) as job:
                finished = self.follow(job)
                reached, starts = job.reached, starts + 1
                self.counts.steps_done_twice += job.repeated
                self.counts.orphans += end_orphans(job.mark)
            if not finished:
                self.survey(job)
        if left := [path.name for path in self.folder.glob(f".*{TEMPORARY}")]:
            raise CrashError(f"temporary files are left in {self.folder}: {', '.join(left)}")
        self.counts.bits_of_difference += compare(self.folder, self.reference.folder)

    def follow(self, job: Job) -> bool:
        """Interrupt a start until it has ended; whether the run is then finished."""
        while True:
            victims = self.reach(job)
            if job.begun is not None and job.begun < self.progress:
                self.counts.lost_checkpoints += 1
            if not victims:
                if job.process.returncode:
                    raise CrashError(f"status {job.process.returncode} without being killed")
                return True
            saving, old = job.is_saving, set(processes(job.mark)) - {job.process.pid}
            job.since = time.monotonic()
            if self.part.restarts:
                job.begun, job.stepping = None, False
            send(self.part.number, victims)
            if self.part.restarts:
                self.survey(job)
                went_on = job.wait(lambda: job.begun is not None)
                self.counts.restarts += went_on
                self.counts.orphans += end_orphans(job.mark, old)
            else:
                went_on = job.wait()
            if job.process.returncode == 0 and not job.stopped:
                return True  # it was about to end anyway
            self.counts.kills += 1
            self.counts.kills_while_saving += saving
            if not went_on:
                self.check_status(job.process.returncode)
                return False

    def check_status(self, status: int) -> None:
        """Raise CrashError unless a start may end with a status after an interruption."""
        if self.part.restarts:
            raise CrashError(f"the launcher gave up with status {status}")
        if self.part.ranks == 1 and status not in (0, -self.part.number):
            raise CrashError(f"status {status} after {self.part.number.name}")

    def reach(self, job: Job) -> Sequence[int]:
        """Wait for a random moment; the processes to interrupt, none once the job has ended."""
        if self.counts.kills >= self.kills:
            job.wait()
            return []
        moment = draw_moment(self.draws, self.counts.kills, self.in_vain)
        if not job.wait(lambda: moment.is_near(job)):
            return []
        seconds = {"start": self.reference.start, "saving": self.reference.save}
        seconds["steps"] = STEPS * self.reference.step
        since = job.since if moment.kind == "start" else time.monotonic()
        due = since + moment.share * seconds[moment.kind]
        victims: list[int] = []

        def is_due() -> bool:
            if time.monotonic() >= due:
                victims[:] = self.victims(job)
            return bool(victims)

        return victims if job.wait(is_due) else []

    def victims(self, job: Job) -> list[int]:
        """The processes to interrupt; none as long as there are none of the kind."""
        if self.part.victims == "one rank":
            ranks = job.ranks()
            return [self.draws.choice(ranks)] if len(ranks) == self.part.ranks else []
        ranks = job.ranks() if self.part.victims == "all" else []
        return [job.process.pid, *ranks]

    def survey(self, job: Job) -> None:
        """See what there is to resume from after an interruption.

        Raises:
            CrashError: Less was saved on request than had been done.
        """
        progress, damaged = survey(self.folder, self.reference.per_epoch)
        self.counts.lost_checkpoints += len(damaged - self.damaged) + (progress < self.progress)
        self.in_vain, self.damaged = progress <= self.progress, self.damaged | damaged
        self.progress = progress
        if self.part.number == signal.SIGTERM and job.stepping and progress < job.reached:
            name = self.part.number.name
            raise CrashError(f"{name} after step {job.reached}, but {progress} steps were saved")
