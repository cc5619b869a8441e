"""Where a process stands among those of its run, from the variables of what started it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class LaunchError(RuntimeError):
    """The environment of a distributed start, or the device, is missing or inconsistent."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among all of a run: global rank, number of processes, local rank.

    ``launcher`` names what started it: torchrun, srun, mpirun or, alone, python. ``restarts``
    says how often torchrun or Slurm has started the run again.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = "python"
    restarts: int = 0


class _Launcher(NamedTuple):
    name: str
    marks: tuple[str, ...]  # any of these says that this launcher was at work
    rank: str
    size: str
    local_rank: str


# In the order in which they are tried. OpenMPI and Hydra go before Slurm, whose variables they
# inherit. A Slurm step has its own count of tasks; the job's would also be seen by a script that
# sbatch or salloc runs directly.
_LAUNCHERS = (
    _Launcher("torchrun", ("RANK", "WORLD_SIZE"), "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    _Launcher(
        "mpirun",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    _Launcher("mpirun", ("MPI_LOCALRANKID",), "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    _Launcher(
        "srun", ("SLURM_STEP_NUM_TASKS",), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
    ),
)


def find_place(env: Mapping[str, str]) -> Place:
    """Read this process's place from the variables of torchrun, mpirun or srun.

    Raises:
        LaunchError: A variable is missing, is no number or contradicts another.
    """
    launcher = next((x for x in _LAUNCHERS if any(mark in env for mark in x.marks)), None)
    restarts = _read(env, ["TORCHELASTIC_RESTART_COUNT"]) or _read(env, ["SLURM_RESTART_COUNT"])
    if launcher is None:
        return Place(restarts=restarts or 0)
    variables = (launcher.rank, launcher.size, launcher.local_rank)
    rank, size, local_rank = (_read(env, [name]) for name in variables)
    if rank == 0 and size == 1:
        return Place(restarts=restarts or 0)
    missing = [name for name in variables if name not in env]
    if missing:
        present = next(name for name in (*variables, *launcher.marks) if name in env)
        raise LaunchError(
            f"{' and '.join(missing)} not set although {present} is: start with torchrun, or "
            f"unset {present} to run a single process"
        )
    if not 0 <= rank < size or not 0 <= local_rank < size:
        raise LaunchError(
            f"{launcher.rank}={rank} and {launcher.local_rank}={local_rank} must lie within "
            f"0..{size - 1} ({launcher.size}={size})"
        )
    return Place(rank, size, local_rank, launcher.name, restarts or 0)


def _read(env: Mapping[str, str], names: Iterable[str]) -> int | None:
    for name in names:
        if name in env:
            try:
                return int(env[name])
            except ValueError:
                raise LaunchError(f"{name}={env[name]!r} is not a number") from None
    return None


def rendezvous(place: Place, env: Mapping[str, str]) -> tuple[str, int]:
    """Address and port at which the processes of a run meet.

    ``MASTER_ADDR`` and ``MASTER_PORT`` where set; under srun the first node and a port made of
    the job's number; under mpirun on one node this machine.

    Raises:
        LaunchError: They are not set and cannot be known.
    """
    address, port = env.get("MASTER_ADDR"), _read(env, ["MASTER_PORT"])
    if place.launcher == "srun":
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        address = address or env.get("SLURM_LAUNCH_NODE_IPADDR") or first_node(nodes)
        port = port or 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
    elif place.launcher == "mpirun":
        local_size = _read(env, ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"])
        if local_size == place.world_size:
            address = address or "127.0.0.1"
        port = port or 29500
    if not address or port is None:
        raise LaunchError(
            f"rank {place.rank} of {place.world_size} does not know where to meet the others: set "
            f"MASTER_ADDR and MASTER_PORT to an address and a free port of the first machine"
        )
    return address, port


def first_node(nodelist: str) -> str | None:
    """First host of a Slurm node list: ``gpu[03-05,9],x`` gives ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodelist)
    return match and match[1] + (match[2] or "")
