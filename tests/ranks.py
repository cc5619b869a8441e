"""Programs in processes of multiprocessing's fork server, which has imported PyTorch already."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["main", "ranks"])


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
        with reader, writer, Connection(os.dup(self._errors.fileno())) as errors:
            self._process = SERVER.Process(target=run, args=(words, env, writer, errors))
            self._process.start()
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
