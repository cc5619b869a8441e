"""Runs that are interrupted and resumed, and the undisturbed ones to compare them with."""

import random
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.compare import compare, survey
from tests.crash.job import CrashError, Job, end_orphans, processes, send
from training.files import TEMPORARY

STEPS = 6  # a moment between two saves falls within the time of these
VAIN = 0.1  # share of moments at which a run has hardly started


@dataclass(frozen=True)
class Part:
    """Which processes receive which signal; with ``restarts``, torchrun restarts the run."""

    ranks: int
    victims: str
    number: signal.Signals
    restarts: bool = False

    def __str__(self) -> str:
        return f"{self.number.name} of {self.victims}{', --max-restarts' * self.restarts}"


def parts_of(ranks: int, signals: str) -> list[Part]:
    """Return the parts of the test for a number of ranks and ``KILL``, ``TERM`` or ``mixed``."""
    kill, term = signal.SIGKILL, signal.SIGTERM
    if ranks == 1:
        parts = [Part(1, "the process", kill), Part(1, "the process", term)]
    else:
        parts = [Part(ranks, who, kill) for who in ("one rank", "all", "the launcher")]
        parts.append(Part(ranks, "the launcher", term))
        parts.append(Part(ranks, "one rank", kill, restarts=True))
    return [part for part in parts if signals in ("mixed", part.number.name.removeprefix("SIG"))]


@dataclass
class Counts:
    """Results of a part."""

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
        """Return True if nothing was lost, left over or different."""
        return not (self.lost_checkpoints or self.orphans or self.bits_of_difference)


def command(
    args: Namespace, folder: Path, ranks: int, workers: int, restarts: int = 0
) -> list[str]:
    """Return the command that trains into ``folder``, with torchrun's ``--max-restarts``."""
    flags = {"model": args.model, "epochs": args.epochs, "batch-size": args.batch_size}
    flags |= {"warmup-epochs": 0, "model-ema-decay": 0.9, "device": "cpu", "dist-timeout": 60}
    flags |= {"save-every-steps": 2, "log-interval": 1, "num_workers": workers}
    flags |= {"output_dir": folder, "resume": "auto"}
    words = ["main.py", *(f"--{key}={value}" for key, value in flags.items()), *args.flags]
    if ranks > 1:
        options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        words = ["-m", "torch.distributed.run", *options, *words]
    return [sys.executable, *words]


def train_undisturbed(args: Namespace, folder: Path, ranks: int) -> Job:
    """Train once from start to end, as the reference for interrupted runs.

    Raises:
        CrashError: The run fails or hangs.
    """
    words = command(args, folder, ranks, args.workers[0])
    with Job(words, folder, folder.with_suffix(".txt"), args.limit) as job:
        job.wait()
        if job.process.returncode:
            raise CrashError(f"status {job.process.returncode} without having been disturbed")
        return job


@dataclass
class Run:
    """A run that is interrupted and resumed until it ends.

    Attributes:
        args: Parsed flags.
        part: How to interrupt.
        kills: Kills of the part in total; afterwards the run is not disturbed.
        reference: The undisturbed run.
        folder: ``--output_dir``.
        rng: Source of random numbers.
        counts: Updated in place.
        progress, damaged: Of the last :func:`survey`.
        in_vain: The last kill came before any further checkpoint.
    """

    args: Namespace
    part: Part
    kills: int
    reference: Job
    folder: Path
    rng: random.Random
    counts: Counts
    progress: int = 0
    damaged: set[int] = field(default_factory=set)
    in_vain: bool = False

    def train(self) -> None:
        """Train to the end, and compare.

        Raises:
            CrashError: A start hangs, ends by itself, or does not keep a promise.
            CheckpointError, OSError: A checkpoint or the log cannot be read at the end.
        """
        self.counts.runs += 1
        reached = starts = 0
        finished = False
        while not finished:
            workers = self.rng.choice(self.args.workers)
            restarts = self.kills + 1 if self.part.restarts else 0
            words = command(self.args, self.folder, self.part.ranks, workers, restarts)
            text = self.folder.with_name(f"{self.folder.name}-{starts}.txt")
            self.counts.restarts += starts > 0
            per_epoch = self.reference.per_epoch
            with Job(words, self.folder, text, self.args.limit, per_epoch, reached) as job:
                finished = self.follow(job)
                reached, starts = job.reached, starts + 1
                self.counts.steps_done_twice += job.repeated
                self.counts.orphans += end_orphans(job.text)
            if not finished:
                self.survey(job)
        if left := [path.name for path in self.folder.glob(f".*{TEMPORARY}")]:
            raise CrashError(f"temporary files are left in {self.folder}: {', '.join(left)}")
        self.counts.bits_of_difference += compare(self.folder, self.reference.folder)

    def follow(self, job: Job) -> bool:
        """Interrupt a start until it ends; return True if the run is then finished."""
        while True:
            victims = self.reach(job)
            if job.first is not None and job.first < self.progress:
                self.counts.lost_checkpoints += 1
            if not victims:
                if job.process.returncode:
                    raise CrashError(f"status {job.process.returncode} without being killed")
                return True
            saving, old = job.is_saving, set(processes(job.text)) - {job.process.pid}
            job.since = time.monotonic()
            if self.part.restarts:
                job.first, job.stepping = None, False
            send(self.part.number, victims)
            if self.part.restarts:
                self.survey(job)
                restarted = job.wait(lambda: job.first is not None)
                self.counts.restarts += restarted
                self.counts.orphans += end_orphans(job.text, old)
            else:
                restarted = job.wait()
            if job.process.returncode == 0 and not job.stopped:
                return True  # the signal came too late to matter
            self.counts.kills += 1
            self.counts.kills_while_saving += saving
            if not restarted:
                self.check_status(job.process.returncode)
                return False

    def check_status(self, status: int) -> None:
        """Raise CrashError unless an interrupted start may end with this status."""
        if self.part.restarts:
            raise CrashError(f"the launcher gave up with status {status}")
        if self.part.ranks == 1 and status not in (0, -self.part.number):
            raise CrashError(f"status {status} after {self.part.number.name}")

    def reach(self, job: Job) -> Sequence[int]:
        """Wait for a random moment; return the processes to kill, none once the job has ended."""
        if self.counts.kills >= self.kills:
            job.wait()
            return []
        kills, rare = self.counts.kills, self.rng.random() < VAIN
        kind, saves = ("saving", "steps")[kills % 2], self.rng.choice((0, 1, 1, 2))
        share = self.rng.random()  # further waiting, of the duration of such a part of a run
        if self.in_vain or kills < 2:  # wait for a checkpoint: the run must make progress
            saves = max(saves, 1)
        elif rare or kills == 2:  # the first three moments of a part are of the three kinds
            kind = "start"

        def is_near() -> bool:
            ready = job.stepping and job.saves >= saves
            return kind == "start" or (ready and (kind == "steps" or job.is_saving))

        if not job.wait(is_near):
            return []
        whole, steps = self.reference, max(self.reference.reached - 1, 1)
        seconds = {"start": whole.first_step, "saving": whole.save_seconds}
        seconds["steps"] = STEPS * (whole.last_step - whole.first_step) / steps
        due = (job.since if kind == "start" else time.monotonic()) + share * seconds[kind]
        victims: list[int] = []

        def is_due() -> bool:
            if time.monotonic() >= due:
                victims[:] = self.victims(job)
            return bool(victims)

        return victims if job.wait(is_due) else []

    def victims(self, job: Job) -> list[int]:
        """Return the processes to kill; none while not all ranks have started."""
        if self.part.victims == "one rank":
            ranks = job.ranks()
            return [self.rng.choice(ranks)] if len(ranks) == self.part.ranks else []
        return [job.process.pid, *(job.ranks() if self.part.victims == "all" else [])]

    def survey(self, job: Job) -> None:
        """Check what there is to resume from after a kill.

        Raises:
            CrashError: SIGTERM saved fewer steps than had been done.
        """
        progress, damaged = survey(self.folder, self.reference.per_epoch)
        self.counts.lost_checkpoints += len(damaged - self.damaged) + (progress < self.progress)
        self.in_vain, self.damaged = progress <= self.progress, self.damaged | damaged
        self.progress = progress
        if self.part.number == signal.SIGTERM and job.stepping and progress < job.reached:
            raise CrashError(f"SIGTERM after step {job.reached}, but {progress} steps were saved")
