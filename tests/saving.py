"""States that runs save, and forked processes that save them."""

import os
import signal
import sys
import traceback

import torch

from models import read_checkpoint
from models.checkpoint.checksum import verify_checksum
from training.output import Output


def state(number):
    return {"number": number, "weights": torch.full((4,), float(number))}


def save(output, number, *args, **options):
    """Save a state, and wait until it is written."""
    output.save(state(number), *args, **options)
    output.wait()


def number_in(path):
    """The number of the state in a checkpoint, which is whole."""
    assert verify_checksum(path), path
    content = read_checkpoint(path)
    assert torch.equal(content["weights"], state(content["number"])["weights"])
    return content["number"]


def numbers(folder):
    return {path.name: number_in(path) for path in folder.glob("*.pth")}


def temporaries(folder):
    return [path.name for path in folder.glob(".*")]


def run(folder, *numbers):
    """A run that saves these states."""
    output = Output(str(folder))
    for number in numbers:
        save(output, number)
    output.close()


def warnings_of(text, *parts):
    """The warnings in an output that name all of ``parts``."""
    lines = [line for line in text.splitlines() if line.startswith("warning: ")]
    return [line for line in lines if all(str(part) in line for part in parts)]


def begin_child(function, *args):
    """Fork a process that calls ``function``; its id, and a file of what it prints."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)  # a child that hangs ends
        os.close(read)
        sys.stdout = sys.stderr = os.fdopen(write, "w", 1)
        status = 1
        try:
            function(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(write)
    return child, os.fdopen(read)


def in_child(function, *args):
    """Call ``function`` in a forked process; its return code (-9 if killed) and its output."""
    child, out = begin_child(function, *args)
    with out:
        text = out.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def fail(number, *args, **kwargs):
    raise OSError(number, os.strerror(number))


def done(function, *args):
    status, text = in_child(function, *args)
    assert status == 0, text
    return text
