"""Dead and stuck processes: an error that names them, in bounded time, and nothing left behind."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import free_port, ranks, read_log, same_log, same_state, start_python, together
from test_distributed import LAUNCH

from datasets import DataError
from training.watchdog import Watchdog
from utils import UserError

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="finds processes through /proc"
)
pytestmark = needs_proc
RUN = ["--model", "visformer_tiny", "--batch-size", 8, "--log-interval", 1, "--device", "cpu"]
RUN += ["--epochs", 1, "--num_workers", 1]


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


def until(process, line):
    """What a process prints up to a line that begins so."""
    output = ""
    for text in process.stdout:
        output += text
        if text.startswith(line):
            return output
    raise AssertionError(f"no line {line!r} in {output}{process.stderr.read()}")


def is_gone(pid):
    """Waits for the end of a process that is nobody's child here."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    import select

    try:
        return bool(select.select([descriptor], [], [], 20)[0])
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("victim", "number"), [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)]
)
def test_a_rank_that_dies_or_hangs_is_named(victim, number):
    processes = ranks(2, [*RUN, "--dist-timeout", 8])
    until(processes[0], "epoch 0 step 3/")
    pids = [process.pid for process in processes]
    everyone = pids + [child for pid in pids for child in children(pid)]
    assert len(everyone) >= 4  # two ranks, and a loader process each
    processes[victim].send_signal(number)
    survivor = processes[1 - victim]
    _, errors = survivor.communicate(timeout=100)
    processes[victim].kill()
    processes[victim].communicate(timeout=60)
    assert survivor.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error on rank")]
    assert f"error on rank {1 - victim}: " in line
    assert re.search(r"at epoch 0 step \d+", line)
    if victim == 1:
        assert re.search(r"rank 1 gives no sign of life, last at epoch 0 step \d+", line)
    else:
        assert "where all met, at rank 0 or its launcher, nothing answers" in line
    assert all(is_gone(pid) for pid in everyone)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_loader_process_that_dies_or_hangs(number):
    words = ["main.py", *RUN, "--dist-timeout", 6]
    with start_python(*words) as process:
        until(process, "epoch 0 step 2/")
        (worker,) = children(process.pid)
        os.kill(worker, number)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    if number == signal.SIGKILL:
        assert re.search(r"^error: a loader process died .* \(at epoch 0 step \d+\)$", errors, re.M)
    else:
        wanted = (
            r"no progress for 6 s \(--dist-timeout\) at epoch 0 step \d+, waiting for its loader"
        )
        assert re.search(wanted, errors)
    assert is_gone(worker)


def test_loader_processes_die_with_the_run():
    words = ["main.py", *RUN]
    with start_python(*words) as process:
        until(process, "epoch 0 step 1/")
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGTERM)  # a launcher's, to all of its processes
        until(process, "epoch 0 step 8/")
        os.kill(worker, signal.SIGSTOP)
        process.kill()
        assert is_gone(worker)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    codes, _, errors = together(2, [*JOB, "--output_dir", folder])
    assert codes == [0, 0], errors
    return folder


JOB = ["--model", "visformer_tiny", "--batch-size", 64, "--num_workers", 1, "--device", "cpu"]
JOB += ["--epochs", 1, "--log-interval", 1]


def test_the_launcher_starts_again_and_goes_on(whole, tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--max-restarts", 1]
    launch += ["--master_port", free_port()]
    words = [*launch, "main.py", *JOB, "--output_dir", tmp_path, "--save-every-steps", 2]
    mark = f"MARK={tmp_path.name}"
    with start_python(*words, MARK=tmp_path.name) as process:
        until(process, "epoch 0 step 9/")
        ranks_of_it = [
            pid
            for pid in children(process.pid)
            if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()
        ]
        os.kill(ranks_of_it[0], signal.SIGKILL)
        output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert re.search(r"going on in epoch 0 after step \d+", output)
    assert [line["epoch"] for line in read_log(tmp_path)] == [0]
    assert same_log(tmp_path, whole)
    assert same_state(tmp_path, whole)
    assert not marked(mark)


def test_ranks_end_with_their_launcher(tmp_path):
    words = [*LAUNCH, "--nproc_per_node", 2, "--master_port", free_port(), "main.py", *RUN]
    with start_python(*words, "--output_dir", tmp_path, MARK=tmp_path.name) as process:
        until(process, "epoch 0 step 2/")
        everyone = marked(f"MARK={tmp_path.name}")
        assert len(everyone) >= 5
        process.kill()
        assert all(is_gone(pid) for pid in everyone)
    assert (tmp_path / "checkpoint.pth").is_file()  # saved on the way out


def test_memory_that_runs_out_is_an_error_with_a_place():
    message = r"out of memory at epoch 2 step 7 \(no more\): a smaller --batch-size"
    with pytest.raises(UserError, match=message), Watchdog(0, 1, 60.0) as watchdog:
        watchdog.at("epoch 2 step 7")
        raise MemoryError("no more")


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
    assert ("at epoch 2 step 7" in str(caught.value)) == (kind is UserError)
