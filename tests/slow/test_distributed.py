"""Several processes: exact evaluation, resume, every launcher, and starts that go wrong."""

import json
import re

import pytest
import torch
from conftest import free_port, read_log, run_python, start_python, together

LAUNCH = ["-m", "torch.distributed.launch", "--use_env"]
SMALL = ["--model", "visformer_tiny", "--input-size", 32, "--num_workers", 0, "--device", "cpu"]


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
    run += ["--model-ema-decay", 0.9, "--sampling-ratio", 0.25]
    done = launch(2, *run, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    assert "strides" not in done.stderr  # gradients lie in the exchanged buffers as they come
    return run, folder, done.stdout


def test_stopped_and_resumed_on_two_processes(whole, tmp_path):
    run, folder, output = whole
    assert "2 process(es) started by torchrun" in output
    assert len(re.findall(r"^Max accuracy", output, re.MULTILINE)) == 2  # one process prints
    for flags in (["--stop-epoch", 1], ["--resume", "auto"]):
        codes, _, errors = together(2, [*run, "--output_dir", tmp_path, *flags])
        assert codes == [0, 0], errors
    expected, resumed = read_log(folder), read_log(tmp_path)
    for line in expected + resumed:
        del line["train_images_per_second"]
    assert resumed == expected
    one, two = (torch.load(f / "checkpoint.pth", weights_only=True) for f in (folder, tmp_path))
    for key in ("model", "model_ema"):
        assert all(torch.equal(value, two[key][name]) for name, value in one[key].items())


# a batch of 400 makes evaluation batches of 600: the second process gets none of the 500 images
@pytest.mark.parametrize(("processes", "batch_size"), [(1, 32), (3, 32), (4, 32), (2, 400)])
def test_evaluation_is_exact_on_any_number_of_processes(whole, cifar, processes, batch_size):
    _, folder, output = whole
    flags = ["--eval", "--resume", folder / "checkpoint.pth", "--data-path", cifar]
    flags += ["--batch-size", batch_size, "--num_workers", 0, "--device", "cpu"]
    codes, found, errors = together(processes, flags)
    assert codes == [0] * processes, errors
    # the two processes that trained evaluated what the first one saved
    assert accuracy_lines(found) == accuracy_lines(output)[-2:]
    assert "on 500 images" in found


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
    processes = [start_python("main.py", *flags, **variables(rank, port)) for rank in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"2 process(es) started by {name}" in outputs[0][0]
    assert accuracy_lines(outputs[0][0]) == accuracy_lines(output)[-2:]
    assert outputs[1][0] == ""


def test_missing_process_is_an_error_not_a_hang():
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
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


EXACT = """
import json, multiprocessing, os, sys, torch, torch.distributed as dist
import engine
from pipeline.reference import Batch
from samplers import EvalBatchSampler

torch.set_num_threads(1)
CPU = torch.device("cpu")
generator = torch.Generator().manual_seed(0)
images = torch.randn(501, 3, 2, 2, generator=generator)
targets = torch.randint(7, (501,), generator=generator)
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 7))


def loader(size, world, rank):
    for indices in EvalBatchSampler(size, 48, world, rank):
        yield Batch(images[indices], targets[indices], ["bad"] * (indices[0] == 0))


def work(rank, world, port):
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    for size in (1, 2, 7, 500, 501):
        stats = engine.evaluate(loader(size, world, rank), model, CPU)
        del stats["messages"]
        os.write(1, f"{json.dumps([world, size, stats])}\\n".encode())
    dist.destroy_process_group()


for world, port in zip((1, 2, 3, 4), map(int, sys.argv[1:])):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
"""


def test_evaluation_of_any_size_is_exact_on_any_number_of_processes(tmp_path):
    script = tmp_path / "exact.py"
    script.write_text(EXACT)
    done = run_python(script, *(free_port() for _ in range(4)))
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        world, size, stats = json.loads(line)
        assert stats["images"] == size
        assert stats["corrupt"] == 1  # of the first batch, which one process has
        found.setdefault(size, []).append((world, stats))
    assert sorted(found) == [1, 2, 7, 500, 501]
    for results in found.values():
        assert sorted(world for world, _ in results) == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
        assert all(stats == results[0][1] for _, stats in results)
    # one image more, and the accuracy says so: a duplicate or a lost image would, too
    assert found[500][0][1]["loss"] != found[501][0][1]["loss"]
