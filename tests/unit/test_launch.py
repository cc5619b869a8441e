"""The environments of torchrun, srun and mpirun."""

import threading

import pytest
import torch
import torch.distributed as dist

from training.launch import (
    DistInfo,
    compare_world_sizes,
    dist_info_from_env,
    first_node,
    rendezvous,
    select_device,
)
from utils import UserError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, DistInfo()),
        (TORCHRUN, DistInfo(3, 8, 1, "torchrun")),
        (TORCHRUN | SLURM, DistInfo(3, 8, 1, "torchrun")),
        (SLURM, DistInfo(5, 16, 5, "srun")),
        (SLURM | {"PMI_RANK": "5", "PMI_SIZE": "16"}, DistInfo(5, 16, 5, "srun")),
        (OPENMPI | SLURM, DistInfo(1, 2, 1, "mpirun")),
        (HYDRA | SLURM, DistInfo(1, 4, 1, "mpirun")),
        # a script that sbatch runs directly, and a shell of srun --pty
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, DistInfo()),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, DistInfo()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, DistInfo()),
    ],
)
def test_places(env, place):
    assert dist_info_from_env(env) == place


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE .*LOCAL_RANK .*RANK"),
        ({"WORLD_SIZE": "2"}, "RANK .*LOCAL_RANK .*WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        (TORCHRUN | {"RANK": "8"}, r"RANK=8 .*LOCAL_RANK=1 .*0\.\.7"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE='many'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID .*SLURM_LOCALID"),
    ],
)
def test_inconsistent_environments_are_named(env, named):
    with pytest.raises(UserError, match=named):
        dist_info_from_env(env)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (TORCHRUN | {"MASTER_ADDR": "n1", "MASTER_PORT": "123"}, ("n1", 123)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[03-05]", "SLURM_JOB_ID": "7"}, ("gpu03", 20007)),
        (SLURM | {"SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "45000"}, ("a", 25000)),
        (SLURM | {"SLURM_STEP_NODELIST": "a", "MASTER_ADDR": "b"}, ("b", 20000)),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ("127.0.0.1", 29500)),
    ],
)
def test_rendezvous(env, expected):
    assert rendezvous(dist_info_from_env(env), env) == expected


@pytest.mark.parametrize("env", [TORCHRUN, OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}])
def test_unknown_rendezvous_is_an_error(env):
    with pytest.raises(UserError, match=r"MASTER_ADDR .*MASTER_PORT"):
        rendezvous(dist_info_from_env(env), env)


def test_first_node():
    assert first_node("gpu[03-05,9],x") == "gpu03"
    assert first_node("node7,node8") == "node7"
    assert first_node("") is None


def test_devices(monkeypatch):
    assert select_device("cpu", DistInfo()) == torch.device("cpu")
    with pytest.raises(UserError, match="'gpu'"):
        select_device("gpu", DistInfo())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert select_device(None, DistInfo()) == torch.device("cuda", 0)
    assert select_device("cuda:1", DistInfo()) == torch.device("cuda", 1)
    assert select_device("cuda", DistInfo(3, 4, 1, "torchrun")) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"rank 2 .*\b2\b"):
        select_device("cuda", DistInfo(2, 4, 2, "torchrun"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="--device cpu"):
        select_device("cuda", DistInfo())


def test_rank_0_stays_until_a_rank_of_another_world_has_read_its_size():
    store, errors = dist.HashStore(), []

    def compare(rank, size):
        try:
            compare_world_sizes(DistInfo(rank, size, rank), store)
        except UserError as error:
            errors.append(str(error))

    first = threading.Thread(target=compare, args=(0, 2))
    first.start()
    store.set("size of rank 1", "3")
    first.join(timeout=0.5)
    assert first.is_alive()
    compare(1, 3)
    first.join(timeout=60)
    assert len(errors) == 2
