"""Signals of loader workers, and their end."""

import ctypes
import os
import signal
import sys
import threading


def die_with_parent(number: int) -> None:
    """Have this process receive a signal when its parent ends (Linux only)."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended since
            os.kill(os.getpid(), number)


def worker_init_fn(worker: int) -> None:
    """Ignore stop signals unless the parent sends them, and die with the parent.

    Terminals, Slurm and torchrun signal all processes of a run, but the current step still needs
    its data. Only the parent may end a worker.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # tells the sender of a signal; not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    die_with_parent(signal.SIGKILL)


def _exit_with_parent(parent: int) -> None:
    """End this process on SIGTERM from its parent."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
