"""Several processes: exact evaluation, resume, every launcher, and starts that go wrong."""

import json
import re

import pytest
from conftest import (
    free_port,
    run_main,
    run_python,
    run_ranks,
    same_log,
    same_state,
    start_rank,
    together,
    write_images,
)

LAUNCH = ["-m", "torch.distributed.launch", "--use_env"]
SMALL = ["--model", "test_resnet", "--input-size", 32, "--num_workers", 0, "--device", "cpu"]


def accuracy_lines(output):
    return [line for line in output.splitlines() if "* Acc@1" in line]


def processes_and_launcher(output):
    return re.search(r"(\d+) process\S* .*\b(\w+)\n", output).groups()


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
    assert same_log(tmp_path, folder)
    assert same_state(tmp_path, folder)


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


def test_an_incomplete_environment_is_named():
    process = start_rank("main.py", *SMALL, RANK=0, WORLD_SIZE=2, LOCAL_RANK=0)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "MASTER_ADDR" in errors and "MASTER_PORT" in errors


def test_an_error_on_the_processes_ends_the_run(images):
    codes, _, errors = together(2, [*SMALL, "--data-path", images, "--batch-size", 42])
    assert codes == [1, 1]
    assert "--batch-size 42" in errors[0] and "80 images" in errors[0]


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
    process = start_rank(script, *(free_port() for _ in range(4)))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found = {}
    for line in output.splitlines():
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
