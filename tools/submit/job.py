"""What every task of a submitted job does: run ``main.py`` in its place of the run."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from utils import UserError

ROOT = Path(__file__).resolve().parents[2]
PORTS = 20000  # from which, and how many, jobs choose by their number


def place(env: JobEnvironment) -> dict[str, str]:
    """The variables by which ``main.py`` finds its place, and the others."""
    number = int("".join(digit for digit in env.job_id if digit.isdigit()))
    return {
        "RANK": str(env.global_rank),
        "WORLD_SIZE": str(env.num_tasks),
        "LOCAL_RANK": str(env.local_rank),
        "MASTER_ADDR": env.hostnames[0] if env.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(PORTS + number % PORTS),
    }


class Job:
    """``main.py`` with the flags ``argv``, in a process of its own.

    submitit calls it in every task. Before the job's time is up, it calls :meth:`checkpoint` in
    the first one, writes down what that returns, and queues the job again.

    Args:
        argv: Flags; ``%j`` in them stands for the job's number.
    """

    def __init__(self, argv: list[str]):
        self.argv = argv
        self._child: subprocess.Popen | None = None

    def __getstate__(self) -> Mapping[str, Any]:
        return {"argv": self.argv, "_child": None}

    def __call__(self) -> None:
        """Run to the end.

        Raises:
            UserError: The status is not 0.
        """
        env = JobEnvironment()
        argv = [word.replace("%j", env.job_id) for word in self.argv]
        # a signal that main.py does not know, and Slurm sends to all processes of a task
        number = signal.Signals[f"SIG{env.USR_SIG}"]
        caught = signal.signal(number, signal.SIG_IGN)
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-u", str(ROOT / "main.py"), *argv],
                env=os.environ | place(env),
            )
        finally:
            signal.signal(number, caught)
        if env.cluster != "slurm":  # Slurm's SIGTERM reaches the child by itself
            signal.signal(signal.SIGTERM, lambda *_: self._child.send_signal(signal.SIGTERM))
        try:
            self._wait()
        finally:
            if self._child.poll() is None:
                self._child.terminate()
        if self._child.returncode:
            raise UserError(f"main.py ended with status {self._child.returncode}")

    def _wait(self) -> None:
        # Popen.wait holds a lock that a signal's handler, which waits as well, could not take
        os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)

    def checkpoint(self) -> DelayedSubmission:
        """Let all ranks save and stop, by a signal to this one; what to run when queued again."""
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(signal.SIGUSR1)
            self._wait()
        return DelayedSubmission(Job([*self.argv, "--resume", "auto"]))
