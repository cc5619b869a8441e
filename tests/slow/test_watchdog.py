"""Dead and stuck processes: an error that names them, in bounded time, and nothing left behind."""

import os
import re
import select
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import (
    free_port,
    ranks,
    read_log,
    run_ranks,
    same_run,
    start_python,
    start_rank,
    until,
)

from datasets import DataError
from training.watchdog import TICK, Watchdog
from utils import UserError

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="finds processes through /proc"
)
RUN = ["--model", "test_resnet", "--num_workers", 1, "--device", "cpu"]
LONG = [*RUN, "--batch-size", 4, "--log-interval", 5]
SHORT = [*RUN, "--batch-size", 64, "--log-interval", 1, "--epochs", 1, "--save-every-steps", 2]
POSITION = r"epoch \d+ step (\d+)"


def marked(mark):
    """Processes that carry a mark in their environment, zombies apart."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(") ")[2][0]
            if mark.encode() in (folder / "environ").read_bytes() and state != "Z":
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended
    return found


def children(pid):
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid):
    """Wait for the end of a process that need not be a child; False after 20 s."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 20)[0])
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("victim", "number"), [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)]
)
def test_a_rank_that_dies_or_hangs_is_named(victim, number):
    processes = ranks(2, [*LONG, "--dist-timeout", 8])
    until(processes[0], "epoch 0 step 5/")
    ends = time.monotonic() + 1.5 * TICK  # by then, each rank has published its position
    while time.monotonic() < ends:
        until(processes[0], "epoch ")
    pids = [process.pid for process in processes]
    everyone = pids + [child for pid in pids for child in children(pid)]
    assert len(everyone) >= 4  # two ranks, and a loader process each
    processes[victim].send_signal(number)
    survivor = processes[1 - victim]
    _, errors = survivor.communicate(timeout=100)
    processes[victim].kill()
    processes[victim].communicate(timeout=60)
    assert survivor.returncode == 1
    # torch's warnings may come before
    (line,) = [line for line in errors.splitlines() if line.startswith("error on rank ")]
    assert line.startswith(f"error on rank {1 - victim}: ")
    # where the survivor is; where rank 1 was last seen, which rank 0, with the store, cannot tell
    last_seen = POSITION if victim == 1 else ""
    assert re.search(rf"{POSITION}.*\brank {victim}\b.*{last_seen}", line)
    assert all(is_gone(pid) for pid in everyone)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_loader_process_that_dies_or_hangs(number):
    process = start_rank("main.py", *LONG, "--dist-timeout", 6)
    until(process, "epoch 0 step 5/")
    (worker,) = children(process.pid)
    os.kill(worker, number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error")]
    assert re.search(POSITION, line)
    assert ("--num_workers" if number == signal.SIGKILL else "6 s (--dist-timeout)") in line
    assert is_gone(worker)


def test_loader_processes_die_with_the_run():
    process = start_rank("main.py", *LONG)
    until(process, "epoch 0 step 5/")
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGTERM)  # a launcher's, to all of its processes
    until(process, "epoch 0 step 20/")
    os.kill(worker, signal.SIGSTOP)
    process.kill()
    assert is_gone(worker)


def test_the_launcher_restarts_ranks_which_end_with_it(tmp_path):
    """A rank is killed, then the launcher; what the last save had is resumed bitwise."""
    run_ranks(2, [*SHORT, "--output_dir", tmp_path / "whole"])
    run = [*SHORT, "--output_dir", tmp_path / "run"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--max-restarts", 1]
    launch += ["--master_port", free_port()]
    mark = f"MARK={tmp_path.name}"
    with start_python(*launch, "main.py", *run, MARK=tmp_path.name) as process:
        until(process, "epoch 0 step 6/")
        (second,) = [
            pid
            for pid in children(process.pid)
            if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()
        ]
        os.kill(second, signal.SIGKILL)
        output = until(process, "training epochs")
        output += process.stdout.readline()
        assert int(re.search(POSITION, output.splitlines()[-1])[1]) > 2  # restarts on its own
        everyone = marked(mark)
        assert len(everyone) >= 5
        process.kill()
        assert all(is_gone(pid) for pid in everyone)
    assert not marked(mark)
    assert not (tmp_path / "run" / "log.txt").exists()  # the epoch has not ended
    run_ranks(2, [*run, "--resume", "auto"])
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0]
    assert same_run(tmp_path / "run", tmp_path / "whole")


def test_memory_that_runs_out_is_an_error_with_a_place():
    with pytest.raises(UserError) as caught, Watchdog(0, 1, 60.0) as watchdog:
        watchdog.at("epoch 2 step 7")
        raise MemoryError("no more")
    for part in ("epoch 2 step 7", "no more", "--batch-size"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), UserError),
        (ConnectionResetError("Connection reset by peer"), UserError),
        (dist.DistBackendError("NCCL error: unhandled system error"), UserError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (DataError("cannot decode image /data/gloomy/NCCL.jpg: timed out"), DataError),
    ],
)
def test_the_loss_of_another_process_is_told_from_other_errors(error, kind):
    with pytest.raises(kind) as caught, Watchdog(0, 1, 60.0) as watchdog:
        watchdog.at("epoch 2 step 7")
        raise error
    assert type(caught.value) is kind
    assert ("epoch 2 step 7" in str(caught.value)) == (kind is UserError)
