"""Each task of a submitted job: run ``main.py`` as one rank.

submitit imports this module in every task, so it imports nothing heavy.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

ROOT = Path(__file__).resolve().parents[2]
PORTS = 20000  # first port, and number of ports; the job's number selects one


def launcher_variables(env: JobEnvironment) -> dict[str, str]:
    """Return the environment variables from which ``main.py`` reads its rank and rendezvous."""
    number = int("".join(digit for digit in env.job_id if digit.isdigit()))
    return {
        "RANK": str(env.global_rank),
        "WORLD_SIZE": str(env.num_tasks),
        "LOCAL_RANK": str(env.local_rank),
        "MASTER_ADDR": env.hostnames[0] if env.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(PORTS + number % PORTS),
    }


class Job:
    """``main.py`` in a process of its own.

    submitit calls the object in every task. Before the job's time is up, it calls
    :meth:`checkpoint` in the first task, pickles the result, and requeues the job.

    Args:
        argv: Flags of ``main.py``; ``%j`` is replaced by the job's number.
    """

    def __init__(self, argv: list[str]):
        self.argv = argv
        self._child: subprocess.Popen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"argv": self.argv, "_child": None}

    def __call__(self) -> None:
        """Run to the end; raise UserError if the exit status of ``main.py`` is not 0."""
        env = JobEnvironment()
        argv = [word.replace("%j", env.job_id) for word in self.argv]
        # Slurm sends this signal to all processes of a task; main.py does not handle it
        number = signal.Signals[f"SIG{env.USR_SIG}"]
        caught = signal.signal(number, signal.SIG_IGN)
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-u", str(ROOT / "main.py"), *argv],
                env=os.environ | launcher_variables(env),
            )
        finally:
            signal.signal(number, caught)
        if env.cluster != "slurm":  # Slurm's own SIGTERM reaches the child directly
            signal.signal(signal.SIGTERM, lambda *_: self._child.send_signal(signal.SIGTERM))
        try:
            self._wait()
        finally:
            if self._child.poll() is None:
                self._child.terminate()
        if self._child.returncode:
            from utils import UserError

            raise UserError(f"main.py ended with status {self._child.returncode}")

    def _wait(self) -> None:
        # Popen.wait holds a lock; checkpoint, called by a signal handler, would wait for it forever
        os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)

    def checkpoint(self) -> DelayedSubmission:
        """Signal this rank, so that all ranks save and stop; return the job to requeue."""
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(signal.SIGUSR1)
            self._wait()
        return DelayedSubmission(Job([*self.argv, "--resume", "auto"]))
