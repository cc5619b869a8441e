"""One start of the training, observed from outside, and its processes."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from training.checkpoints import CHECKPOINT
from training.files import TEMPORARY

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.01  # seconds between looks at a run
ORPHAN_SECONDS = 30.0  # for which processes may outlive their run
SHOWN = 15  # last lines of a failed run

# lines of main.py
STOPPED = re.compile(r"stopped by SIG\w+ in")
STEP = re.compile(r"epoch (\d+) step (\d+)/(\d+) loss")
WITHIN = re.compile(r" in epoch (\d+) after step (\d+)")
BEGIN = re.compile(r"training epochs (\d+) to|nothing left to train: (\d+) of")


class CrashError(RuntimeError):
    """A run hangs, fails without being killed, or does not keep a promise."""


def processes(text: Path) -> dict[int, tuple[int, bytes]]:
    """Return the living processes that print into ``text``: ``{pid: (parent, command line)}``."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if (entry / "fd" / "1").readlink() == text:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                found[int(entry.name)] = int(parent), (entry / "cmdline").read_bytes()
    return found


def send(number: signal.Signals, pids: Sequence[int]) -> None:
    """Send a signal to processes, some of which may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_orphans(text: Path, among: set[int] | None = None) -> int:
    """Wait for processes of a run to end (``among``: only these), kill the rest and count them."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while left := [pid for pid in processes(text) if among is None or pid in among]:
        if time.monotonic() > deadline:
            send(signal.SIGKILL, left)
            return len(left)
        time.sleep(POLL)
    return 0


class Job:
    """One start of the training, observed through its output and its folder.

    Args:
        command: Command line, run in the repository's folder.
        folder: ``--output_dir`` of the run.
        text: Absolute path of the file for the output, which identifies the processes.
        limit: Seconds after which the start counts as hanging.
        per_epoch: Steps per epoch, if known.
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
        self.first: int | None = None  # step from which it resumed, once printed
        self.stepping, self.saves, self.stopped = False, 0, False
        self.first_step = self.last_step = self.save_seconds = 0.0
        self._within = self._read = 0
        self._newest, self._saving_since = self._identity(), 0.0
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with text.open("wb") as file:
            self.process = Popen(
                command,
                cwd=ROOT,
                env=env,
                stdin=DEVNULL,
                stdout=file,
                stderr=STDOUT,
                start_new_session=True,
            )
        self.since = time.monotonic()

    def _identity(self) -> tuple[int, int]:
        with contextlib.suppress(FileNotFoundError):
            status = (self.folder / CHECKPOINT).stat()
            return status.st_ino, status.st_mtime_ns
        return 0, 0

    @property
    def is_saving(self) -> bool:
        """Return True while a checkpoint's temporary file exists."""
        return any(self.folder.glob(f".{CHECKPOINT}-*{TEMPORARY}"))

    def look(self) -> None:
        """Note what has happened since the last look."""
        with self.text.open("rb") as file:
            file.seek(self._read)
            lines = file.read().rpartition(b"\n")[0]
        self._read += len(lines) + bool(lines)
        for line in lines.decode(errors="replace").splitlines():
            self._note(line)
        now = time.monotonic()
        if self.is_saving:
            self._saving_since = self._saving_since or now
        if (newest := self._identity()) != self._newest:
            self._newest, self.saves = newest, self.saves + 1
            self.save_seconds = max(self.save_seconds, now - (self._saving_since or now))
            self._saving_since = 0.0

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
            self.first = max(int(match[1] or match[2]) * self.per_epoch, self._within)
            self.repeated += max(self.reached - self.first, 0)
            self.reached = self.first
            self.stepping, self.saves, self._within = False, 0, 0

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until a condition holds; return False if the process ends before.

        Raises:
            CrashError: It takes longer than the limit.
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
        """Return the ids of the processes that the launcher started."""
        found = processes(self.text).items()
        children = {pid: words for pid, (parent, words) in found if parent == self.process.pid}
        return sorted(pid for pid, words in children.items() if b"main.py" in words)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Kill all remaining processes; add the last lines of the output to an error."""
        self.process.kill()
        self.process.wait()
        send(signal.SIGKILL, list(processes(self.text)))
        if isinstance(error, CrashError):
            lines = self.text.read_text(errors="replace").splitlines()[-SHOWN:]
            error.args = ("\n".join([f"{error}; the end of {self.text}:", *lines]),)
