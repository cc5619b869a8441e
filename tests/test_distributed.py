"""Several processes: exact evaluation, resume, every launcher, and starts that go wrong."""

import re
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, clean_env, read_log, run_python

LAUNCH = ["-m", "torch.distributed.launch", "--use_env"]
SMALL = ["--model", "visformer_tiny", "--input-size", 32, "--num_workers", 0, "--device", "cpu"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(processes, *flags, timeout=300):
    """The user's own form of a distributed start."""
    options = ["--nproc_per_node", processes, "--master_port", free_port()]
    return run_python(*LAUNCH, *options, "main.py", *flags, timeout=timeout)


def accuracy_lines(output):
    return [line for line in output.splitlines() if "* Acc@1" in line]


@pytest.fixture(scope="module")
def whole(cifar, tmp_path_factory):
    """Two processes, two epochs, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run = [*SMALL, "--data-path", cifar, "--epochs", 2, "--warmup-epochs", 1, "--batch-size", 32]
    run += ["--model-ema-decay", 0.9]
    done = launch(2, *run, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    assert "strides" not in done.stderr  # gradients lie in the exchanged buffers as they come
    return run, folder, done.stdout


def test_stopped_and_resumed_on_two_processes(whole, tmp_path):
    run, folder, output = whole
    assert "2 process(es) started by torchrun" in output
    assert len(re.findall(r"^Max accuracy", output, re.MULTILINE)) == 2  # one process prints
    done = launch(2, *run, "--output_dir", tmp_path, "--stop-epoch", 1)
    assert done.returncode == 0, done.stderr
    done = launch(2, *run, "--output_dir", tmp_path, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    expected, resumed = read_log(folder), read_log(tmp_path)
    for line in expected + resumed:
        del line["train_images_per_second"]
    assert resumed == expected
    one, two = (torch.load(f / "checkpoint.pth", weights_only=True) for f in (folder, tmp_path))
    for key in ("model", "model_ema"):
        assert all(torch.equal(value, two[key][name]) for name, value in one[key].items())


# a batch of 400 makes evaluation batches of 600: the second process gets none of the 500 images
@pytest.mark.parametrize(
    ("processes", "batch_size"), [(1, 32), (2, 32), (3, 32), (4, 32), (2, 400)]
)
def test_evaluation_is_exact_on_any_number_of_processes(whole, cifar, processes, batch_size):
    _, folder, output = whole
    flags = ["--eval", "--resume", folder / "checkpoint.pth", "--data-path", cifar]
    flags += ["--batch-size", batch_size, "--num_workers", 0, "--device", "cpu"]
    done = launch(processes, *flags) if processes > 1 else run_python("main.py", *flags)
    assert done.returncode == 0, done.stderr
    # the two processes that trained evaluated what the first one saved
    assert accuracy_lines(done.stdout) == accuracy_lines(output)[-2:]
    assert "on 500 images" in done.stdout


def start(rank, env, *flags):
    return subprocess.Popen(
        [sys.executable, "main.py", *map(str, flags)],
        cwd=ROOT,
        env=clean_env(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slurm(rank, port):
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }


def openmpi(rank, port):
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "MASTER_PORT": str(port),
    }


@pytest.mark.parametrize(("variables", "name"), [(slurm, "srun"), (openmpi, "mpirun")])
def test_other_launchers(whole, cifar, variables, name):
    _, folder, output = whole
    flags = ["--eval", "--resume", folder / "checkpoint.pth", "--data-path", cifar]
    flags += ["--batch-size", 32, "--num_workers", 0, "--device", "cpu"]
    port = free_port()
    processes = [start(rank, variables(rank, port), *flags) for rank in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"2 process(es) started by {name}" in outputs[0][0]
    assert accuracy_lines(outputs[0][0]) == accuracy_lines(output)[-2:]
    assert outputs[1][0] == ""


def test_missing_process_is_an_error_not_a_hang():
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = run_python("main.py", *SMALL, "--dist-timeout", 3, timeout=120, **env)
    assert done.returncode == 1
    assert "error on rank 1: rank 1 of 2 could not meet the others" in done.stderr
    assert "within --dist-timeout 3 s" in done.stderr


def test_incomplete_environment_is_named():
    done = run_python("main.py", *SMALL, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert done.returncode == 1
    assert "set MASTER_ADDR and MASTER_PORT" in done.stderr


def test_an_error_on_the_processes_ends_the_run(cifar, tmp_path):
    flags = [*SMALL, "--data-path", cifar, "--batch-size", 1002]
    done = launch(2, *flags)
    assert done.returncode == 1
    assert "--batch-size 1002 is larger than the training set: 2000 images" in done.stderr
