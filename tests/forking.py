"""Python processes that need not import PyTorch: forked from one that has.

A process of main.py spends 4 to 6 s of CPU on its imports, and the tests start many. So each test
process keeps a *fork server*, begun when it is first needed: this file run as a program, which
imports what they all import and waits. :class:`Forked` is a ``subprocess.Popen`` that asks it for
a process in place of starting Python. What comes is a process of its own and a child of the test
process, as any other: with its own process id, signals, exit status, output, environment and
folder. What it shares with its brothers is what was settled before the fork:

- variables that are read as packages are imported (``OMP_NUM_THREADS``, ``TORCH_LOGS``) are those
  of the server, and ``/proc/PID/environ`` shows them;
- the seed of ``hash(str)`` and the addresses of what the server holds in memory;
- warnings and output of the imports are the server's;
- modules are not taken down at its end, which is otherwise as usual.

A test that is about any of this takes an ordinary process. :func:`can_fork` draws the line.
"""

import atexit
import ctypes
import importlib.util
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TOGETHER = ("datasets", "engine", "models", "pipeline", "tools", "training", "utils")
OPTIONAL = ("sklearn.datasets",)  # of the handwritten digits
PROGRAMS = ("tools.", "object_detection.", "torch.distributed.")
SUBREAPER = 36  # of prctl: orphans among the descendants become children of this process
LARGEST = 1 << 20  # bytes of a request


def can_fork(words: list[str]) -> bool:
    """Whether a process of ``words`` may come from the fork server.

    A script, a program of ours and torchrun may (what torchrun starts are ordinary processes); one
    with options for the interpreter or with code on the command line may not.
    """
    module = words[0] == "-m" and words[1].startswith(PROGRAMS)
    return sys.platform == "linux" and (module or words[0].endswith(".py"))


# --- the test process ------------------------------------------------------------------------


class Server:
    """The fork server of this process; its imports see the environment ``env``."""

    def __init__(self, env: dict[str, str]):
        self.owner = os.getpid()
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            words = [sys.executable, __file__]
            self.process = subprocess.Popen(words, env=env, stdin=theirs, stdout=theirs)
        atexit.register(self.close)

    def fork(self, words: list[str], folder: str, env: dict[str, str], files: list[int]) -> int:
        """The id of a new process, whose standard input, output and errors are ``files``."""
        request = json.dumps([os.getpid(), words, folder, env]).encode()
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(SUBREAPER, 1)
        try:
            socket.send_fds(self.connection, [request], files)
            answer = self.connection.recv(LARGEST)
        finally:
            prctl(SUBREAPER, 0)
        if not int(answer or 0):
            raise RuntimeError("the fork server has ended, or its process is not this one's child")
        return int(answer)

    def close(self) -> None:
        """End it, by hanging up: the system does it for a test process that is killed."""
        if os.getpid() == self.owner:
            self.connection.close()
            self.process.wait()


class Forked(subprocess.Popen):
    """A process of the fork server; ``args`` begin with the interpreter, ``env`` is needed."""

    server: Server | None = None

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest
    ) -> None:
        """In place of the standard library's fork and exec."""
        pipes = rest[3:9]  # both ends of those for standard input, output and errors
        given = (pipes[0], pipes[3], pipes[5])
        files = [number if end == -1 else end for number, end in enumerate(given)]
        try:
            if Forked.server is None:
                Forked.server = Server(env)
            self.pid = Forked.server.fork(args[1:], str(cwd), env, files)
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)


# --- the fork server -------------------------------------------------------------------------


def import_packages() -> None:
    """Import what the programs do, without starting a thread."""
    for name in TOGETHER:
        importlib.import_module(name)
    for name in OPTIONAL:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)


def serve() -> list[str]:
    """Fork a process for each request; returns in these, with their words."""
    connection = socket.socket(fileno=os.dup(0))
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, meant for the tests
    while True:
        request, files, *_ = socket.recv_fds(connection, LARGEST, 3)
        if not request:
            os._exit(0)  # the test process has hung up
        between = os.fork()
        if not between:
            break
        os.waitpid(between, 0)
        for file in files:
            os.close(file)

    # a process whose parent ends gets the test process, the nearest that takes orphans, as parent
    between = os.getpid()
    if os.fork():
        os._exit(0)
    tester, words, folder, env = json.loads(request)
    while os.getppid() == between:
        time.sleep(0.001)
    connection.send(str(os.getpid() if os.getppid() == tester else 0).encode())
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, interrupt)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    return words


def seed_anew() -> None:
    """Draw other random numbers than the processes before and after this one."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.default_generator.seed()


def run(words: list[str]) -> None:
    """What ``python WORDS`` does."""
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def leave(end: dict[str, int]) -> None:
    """End without taking down what was imported before the fork, which costs a second.

    Threads have ended and the exit handlers been called when this one, the first, is.
    """
    sys.stdout.flush()  # if one cannot be written, Python says so and ends in its own way
    sys.stderr.flush()
    if end["status"] < 0:
        signal.signal(-end["status"], signal.SIG_DFL)
        os.kill(os.getpid(), -end["status"])
    os._exit(end["status"])


if __name__ == "__main__":
    end = {"status": 1}  # of an error, whose trace the interpreter prints
    atexit.register(leave, end)
    import_packages()
    command = serve()
    seed_anew()
    try:
        run(command)
        end["status"] = 0
    except KeyboardInterrupt:
        end["status"] = -signal.SIGINT
        raise
    except SystemExit as error:
        code = error.code or 0  # a message is printed, and means 1
        end["status"] = code & 255 if isinstance(code, int) else 1
        raise
