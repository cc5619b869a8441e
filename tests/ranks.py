"""Programs in processes of multiprocessing's fork server, which has imported PyTorch already."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["main", "conftest"])


def run(words: list[str], env: dict[str, str], output: Connection, errors: Connection) -> None:
    """Do what ``python WORDS`` does."""
    import torch

    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    output.close()
    errors.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    multiprocessing.set_start_method("fork", force=True)  # for loader processes, as usual
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def start(words: list[str], env: dict[str, str], output: IO, errors: IO) -> Any:
    """Start ``python WORDS``, which prints into ``output`` and ``errors``."""
    with Connection(os.dup(output.fileno())) as out, Connection(os.dup(errors.fileno())) as err:
        process = SERVER.Process(target=run, args=(words, env, out, err))
        process.start()
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def member(function: Callable, rank: int, world: int, port: int, *args: Any) -> Any:
    """Call ``function`` as a rank of a Gloo group."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    meeting = {"init_method": f"tcp://127.0.0.1:{port}", "timeout": timedelta(minutes=1)}
    dist.init_process_group("gloo", rank=rank, world_size=world, **meeting)
    try:
        return function(rank, world, *args)
    finally:
        dist.destroy_process_group()


def group(function: Callable, world: int, *args: Any) -> list[Any]:
    """Results of ``function(rank, world, *args)`` in a Gloo group of processes, by rank."""
    port = free_port()
    with ProcessPoolExecutor(world, SERVER) as pool:
        calls = [pool.submit(member, function, r, world, port, *args) for r in range(world)]
        return [call.result() for call in calls]


class Rank:
    """A process of a program, with those parts of ``subprocess.Popen`` that the tests use.

    Args:
        words: A script or ``-m MODULE``, and its arguments.
        env: Environment variables.
    """

    def __init__(self, words: list[str], env: dict[str, str]):
        reader, writer = SERVER.Pipe(duplex=False)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until communicate()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        with reader, writer:
            self._process = start(words, env, writer, self._errors)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end; returns what is left of the output, and the errors."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"{self._process} takes more than {timeout} s")
        with self.stdout, self._errors:
            self._errors.seek(0)
            return self.stdout.read(), self._errors.read()
