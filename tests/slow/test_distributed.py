"""Several processes: exact evaluation, resume, every launcher, and starts that go wrong."""

import pytest
import torch
from conftest import (
    accuracy_lines,
    processes_and_launcher,
    run_main,
    run_python,
    run_ranks,
    same_run,
    start_rank,
    together,
    write_images,
)
from ranks import free_port, group
from torch import nn

import engine
from pipeline.reference import Batch
from samplers import EvalBatchSampler

LAUNCH = ["-m", "torch.distributed.launch", "--use_env"]
SMALL = ["--model", "test_resnet", "--input-size", 32, "--num_workers", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images", train=40, val=25)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Two processes, two epochs, never stopped: flags, folder and output.

    It is started in the user's own form.
    """
    folder = tmp_path_factory.mktemp("whole")
    run = [*SMALL, "--data-path", images, "--epochs", 2, "--warmup-epochs", 1, "--batch-size", 8]
    run += ["--model-ema-decay", 0.9]
    options = ["--nproc_per_node", 2, "--master_port", free_port()]
    done = run_python(*LAUNCH, *options, "main.py", *run, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    assert "strides" not in done.stderr  # gradients lie in the exchanged buffers as they come
    return run, folder, done.stdout


def test_stopped_and_resumed_on_two_processes(whole, tmp_path):
    run, folder, output = whole
    assert processes_and_launcher(output) == ("2", "torchrun")
    assert len(accuracy_lines(output)) == 4  # of two epochs: one process prints
    run_ranks(2, [*run, "--output_dir", tmp_path, "--stop-epoch", 1])
    run_ranks(2, [*run, "--output_dir", tmp_path, "--resume", "auto"])
    assert same_run(tmp_path, folder)


@pytest.fixture(scope="module")
def evaluation(whole, images):
    """Flags that evaluate the run, and the lines that it should print."""
    _, folder, output = whole
    flags = ["--eval", "--resume", folder / "checkpoint.pth", "--data-path", images]
    flags += ["--num_workers", 0, "--device", "cpu", "--batch-size"]
    return flags, accuracy_lines(output)[-2:]


# a batch of 40 makes evaluation batches of 60: the second process gets none of the 50 images
@pytest.mark.parametrize(("processes", "batch_size"), [(1, 8), (3, 8), (2, 40)])
def test_evaluation_is_exact_on_any_number_of_processes(evaluation, processes, batch_size):
    flags, expected = evaluation
    if processes == 1:
        output = run_main(*flags, batch_size)[1]
    else:
        output = run_ranks(processes, [*flags, batch_size])
    # the two processes that trained evaluated what the first one saved
    assert accuracy_lines(output) == expected
    assert "50 images" in expected[0]


def slurm(rank):
    return {
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_STEP_NUM_TASKS": 2,
        "SLURM_STEP_NODELIST": "localhost",
    }


def openmpi(rank):
    return {
        "OMPI_COMM_WORLD_RANK": rank,
        "OMPI_COMM_WORLD_LOCAL_RANK": rank,
        "OMPI_COMM_WORLD_SIZE": 2,
        "OMPI_COMM_WORLD_LOCAL_SIZE": 2,
    }


@pytest.mark.parametrize(("variables", "name"), [(slurm, "srun"), (openmpi, "mpirun")])
def test_other_launchers(evaluation, variables, name):
    flags, expected = evaluation
    port = free_port()
    processes = [
        start_rank("main.py", *flags, 8, MASTER_PORT=port, **variables(rank)) for rank in range(2)
    ]
    (output, _), second = results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert processes_and_launcher(output) == ("2", name)
    assert accuracy_lines(output) == expected
    assert second[0] == ""


def test_a_missing_process_is_an_error_not_a_hang():
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    flags = [*SMALL, "--dist-timeout", 3]
    process = start_rank("main.py", *flags, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, **env)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    for part in ("error on rank 1: ", "rank 1 of 2", "--dist-timeout 3 s"):
        assert part in errors


def test_an_error_on_the_processes_ends_the_run(images):
    codes, _, errors = together(2, [*SMALL, "--data-path", images, "--batch-size", 42])
    assert codes == [1, 1]
    assert "--batch-size 42" in errors[0] and "80 images" in errors[0]


GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(501, 3, 2, 2, generator=GENERATOR)
TARGETS = torch.randint(7, (501,), generator=GENERATOR)


def evaluate(rank, world, size):
    """A rank's results for the first ``size`` images."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    loader = [
        Batch(IMAGES[indices], TARGETS[indices], ["bad"] * (indices[0] == 0))
        for indices in EvalBatchSampler(size, 48, world, rank)
    ]
    stats = engine.evaluate(loader, model, torch.device("cpu"))
    del stats["messages"]
    return stats


def evaluate_all(rank, world):
    return {size: evaluate(rank, world, size) for size in (1, 2, 7, 500, 501)}


def test_evaluation_of_any_size_is_exact_on_any_number_of_processes():
    first, *others = [stats for world in (1, 2, 3, 4) for stats in group(evaluate_all, world)]
    assert others == [first] * 9
    for size, stats in first.items():
        assert stats["images"] == size
        assert stats["corrupt"] == 1  # of the first batch, which one process has
    # one image more, and the accuracy says so: a duplicate or a lost image would, too
    assert first[500]["loss"] != first[501]["loss"]
