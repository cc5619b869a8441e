"""How loader processes behave: whose signals they obey, and when they end."""

import ctypes
import os
import signal
import sys
import threading


def die_with_parent(number: int) -> None:
    """Let the system send this process a signal when the one that started it ends (Linux)."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended meanwhile
            os.kill(os.getpid(), number)


def worker_init_fn(worker: int) -> None:
    """Leave signals to the process that this loader process works for, and die with it.

    A terminal, Slurm and torchrun send what asks a run to stop to all of its processes, and the
    step at hand needs its data still. Only that process itself may end this one.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it tells who sent a signal; macOS does not have it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    die_with_parent(signal.SIGKILL)


def _obey(parent: int) -> None:
    """End this process when its parent asks for it, and nobody else."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
