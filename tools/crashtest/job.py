"""One start of the training, followed from the outside, and its processes."""

import contextlib
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from training.checkpoints import CHECKPOINT
from training.files import TEMPORARY

ROOT = Path(__file__).resolve().parent.parent.parent
HAS_PROC = Path("/proc/self/environ").exists()
MARK = "CRASHTEST_RUN"  # variable by which the processes of a run are known
POLL = 0.01  # seconds between looks at a run
ORPHAN_SECONDS = 10.0  # that processes may outlive their run
SHOWN = 15  # last lines of a run that failed

STOPPED = re.compile(r"stopped by SIG\w+ in")
STEP = re.compile(r"epoch (\d+) step (\d+)/(\d+) loss")
WITHIN = re.compile(r"going on in epoch (\d+) after step (\d+)")
BEGIN = re.compile(r"training epochs (\d+) to|nothing left to train: (\d+) of")


class CrashError(RuntimeError):
    """A run hangs, fails without being killed, or does not keep a promise."""


def processes(mark: str) -> dict[int, tuple[int, str]]:
    """Living processes with ``mark`` in their environment: (parent, command line) by number."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is somebody else's
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                command = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                )
                found[int(entry.name)] = int(parent), command
    return found


def send(number: signal.Signals, pids: Sequence[int]) -> None:
    """Send a signal to processes, some of which may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_orphans(mark: str, among: set[int] | None = None) -> int:
    """Wait for processes of a run to end; kill those that do not, and count them.

    Args:
        mark: Of the run.
        among: Only these processes; all, if not given.
    """
    deadline = time.monotonic() + ORPHAN_SECONDS
    while left := [pid for pid in processes(mark) if among is None or pid in among]:
        if time.monotonic() > deadline:
            send(signal.SIGKILL, left)
            return len(left)
        time.sleep(POLL)
    return 0


class Job:
    """One start of the training, followed through its output and its folder.

    Args:
        command: To start, in the repository's folder.
        folder: The run's ``--output_dir``.
        text: File for what it prints.
        limit: Seconds after which it counts as hanging.
        per_epoch: Steps of an epoch, if known.
        reached: Steps, counted over epochs, that the run had done before.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        text: Path,
        limit: float,
        per_epoch: int = 0,
        reached: int = 0,
    ):
        self.folder, self.text, self.limit = folder, text, limit
        self.per_epoch, self.reached, self.repeated = per_epoch, reached, 0
        self.begun: int | None = None  # step at which it began, once it says so
        self.stepping, self.saves, self.stopped = False, 0, False
        self.first_step = self.last_step = self.save_seconds = 0.0
        self._within = self._read = 0
        self._newest, self._saving_since = self._identity(), 0.0
        self.mark = uuid.uuid4().hex
        env = os.environ | {"OMP_NUM_THREADS": "1", MARK: self.mark}
        pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        with text.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, start_new_session=True, **pipes
            )
        self.since = time.monotonic()

    def _identity(self) -> tuple[int, int]:
        with contextlib.suppress(FileNotFoundError):
            status = (self.folder / CHECKPOINT).stat()
            return status.st_ino, status.st_mtime_ns
        return 0, 0

    @property
    def is_saving(self) -> bool:
        """Whether a temporary file of a checkpoint is there."""
        return any(self.folder.glob(f".{CHECKPOINT}-*{TEMPORARY}"))

    def look(self) -> None:
        """Take note of what has happened since the last look."""
        with self.text.open("rb") as file:
            file.seek(self._read)
            lines = file.read().rpartition(b"\n")[0]
        self._read += len(lines) + bool(lines)
        for line in lines.decode(errors="replace").splitlines():
            self._note(line)
        if self.is_saving and not self._saving_since:
            self._saving_since = time.monotonic()
        if (newest := self._identity()) != self._newest:
            self._newest, self.saves = newest, self.saves + 1
            seconds = time.monotonic() - self._saving_since if self._saving_since else 0.0
            self.save_seconds, self._saving_since = max(self.save_seconds, seconds), 0.0

    def _note(self, line: str) -> None:
        if match := STEP.search(line):
            epoch, step, self.per_epoch = map(int, match.groups())
            self.reached, self.stepping = epoch * self.per_epoch + step, True
            self.last_step = time.monotonic() - self.since
            self.first_step = self.first_step or self.last_step
        elif STOPPED.search(line):
            self.stopped = True
        elif match := WITHIN.search(line):
            self._within = int(match[1]) * self.per_epoch + int(match[2])
        elif match := BEGIN.search(line):
            self.begun = max(int(match[1] or match[2]) * self.per_epoch, self._within)
            self.repeated += max(self.reached - self.begun, 0)
            self.reached = self.begun
            self.stepping, self.saves, self._within = False, 0, 0

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until something holds; False if the process has ended before.

        Raises:
            CrashError: It takes too long.
        """
        while self.process.poll() is None:
            self.look()
            if until():
                return True
            if time.monotonic() - self.since > self.limit:
                raise CrashError(f"no end after {self.limit:.0f} s")
            time.sleep(POLL)
        self.look()
        return False

    def ranks(self) -> list[int]:
        """The processes that the launcher started."""
        found = processes(self.mark).items()
        pid = self.process.pid
        return sorted(p for p, (parent, words) in found if parent == pid and "main.py" in words)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Kill what is left of it; an error is told with the last lines that were printed."""
        self.process.kill()
        self.process.wait()
        send(signal.SIGKILL, list(processes(self.mark)))
        if isinstance(error, CrashError):
            lines = self.text.read_text(errors="replace").splitlines()[-SHOWN:]
            error.args = ("\n".join([f"{error}; the end of {self.text}:", *lines]),)
