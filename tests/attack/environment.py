"""Environments: launchers' variables, folders, descriptors and limits."""

import os
import random
import resource
from collections.abc import Callable
from functools import partial

from tests.attack.case import FINE, REFUSED, Case
from tests.attack.programs import DATA, TRAIN, VIT

EVAL = ["--eval", "--resume", "+mid.pth", *DATA]
RUN = [*TRAIN, *VIT]


def variables(**values: str | None) -> Callable[[], None]:
    """Return a function that sets variables, or removes those that are None."""

    def around() -> None:
        for key, value in values.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value

    return around


def closed(*numbers: int) -> Callable[[], None]:
    """Return a function that closes descriptors."""
    return lambda: [os.close(number) for number in numbers]


def limited(kind: int, most: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (most, most))


def unwritable() -> None:
    """Make the home folder one that does not exist, and cannot."""
    for name in ("HOME", "TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        os.environ[name] = "/proc/nowhere"


RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
LAUNCHERS: dict[str, tuple[dict[str, str], str]] = {
    "RANK text": (RANKS | {"RANK": "first"}, "RANK"),
    "RANK empty": (RANKS | {"RANK": ""}, "RANK"),
    "RANK negative": (RANKS | {"RANK": "-1"}, "RANK"),
    "RANK beyond": (RANKS | {"RANK": "2"}, "RANK"),
    "RANK long": (RANKS | {"RANK": "9" * 5000}, "RANK"),
    "RANK of two lines": (RANKS | {"RANK": "0\nerror: b\x1b[2J"}, "RANK"),
    "RANK alone": ({"RANK": "0"}, "WORLD_SIZE"),
    "WORLD_SIZE 0": (RANKS | {"WORLD_SIZE": "0"}, "WORLD_SIZE"),
    "WORLD_SIZE negative": (RANKS | {"WORLD_SIZE": "-2"}, "WORLD_SIZE"),
    "WORLD_SIZE text": (RANKS | {"WORLD_SIZE": "two"}, "WORLD_SIZE"),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"}, "RANK"),
    "LOCAL_RANK text": (RANKS | {"LOCAL_RANK": "x"}, "LOCAL_RANK"),
    "LOCAL_RANK beyond": (RANKS | {"LOCAL_RANK": "9"}, "LOCAL_RANK"),
    "MASTER_PORT none": (RANKS, "MASTER_PORT"),
    "MASTER_PORT text": (RANKS | {"MASTER_PORT": "x"}, "MASTER_PORT"),
    "MASTER_PORT beyond": (RANKS | {"MASTER_PORT": "99999"}, "99999"),
    "MASTER_PORT negative": (RANKS | {"MASTER_PORT": "-1"}, "-1"),
    "restarts text": ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT"),
    "Slurm's restarts text": ({"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT"),
    "Slurm's tasks text": ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS"),
    "Slurm without nodes": (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        "MASTER_ADDR",
    ),
    "Slurm's job text": (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        | {"SLURM_JOB_ID": "x", "SLURM_STEP_NODELIST": "a"},
        "SLURM_JOB_ID",
    ),
    "OpenMPI's rank text": (
        {"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "2"},
        "OMPI_COMM_WORLD_RANK",
    ),
}
Around = Callable[[], object]
SOUND: dict[str, Around] = {
    "no TMPDIR": variables(TMPDIR="nonesuch/folder"),
    "no HOME": variables(HOME=None),
    "HOME unwritable": unwritable,
    "OMP_NUM_THREADS=x": variables(OMP_NUM_THREADS="x"),
    "OMP_NUM_THREADS=-1": variables(OMP_NUM_THREADS="-1"),
    "LANG=C": variables(LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii"),
    "COLUMNS=x": variables(COLUMNS="x"),
    "COLUMNS=0": variables(COLUMNS="0"),
    "TERM none": variables(TERM=None, PATH=None),
    "odd variables": variables(PYTHONWARNINGS="x", CUDA_VISIBLE_DEVICES="x", TZ="\x1b[2J"),
    "RANK 0 of 1": variables(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"),
    "stdin closed": closed(0),
    "stdout closed": closed(1),
    "stderr closed": closed(2),
    "stdin and stdout closed": closed(0, 1),
    "all closed": closed(0, 1, 2),
    "32 descriptors": limited(resource.RLIMIT_NOFILE, 32),
    "umask 077": partial(os.umask, 0o077),
    "umask 777": partial(os.umask, 0o777),
}


def cases(rng: random.Random) -> list[Case]:
    """Return the cases of this class; none depends on chance."""
    found = [
        Case("environment", name, "main", EVAL, named=named, around=variables(**values))
        for name, (values, named) in LAUNCHERS.items()
    ]
    predict = ["+photo.jpg", "--checkpoint", "+mid.pth", "--device", "cpu", "--csv", "=table.csv"]
    for name, around in SOUND.items():
        for program, words in (("main", RUN), ("predict", predict)):
            if name == "umask 777" and os.getuid():  # only root can read what it wrote
                continue
            case = Case("environment", name, program, words, outcome=FINE, around=around)
            found.append(case)
    leaves = ("args.yaml", "data.json", "events.*", "log.txt")
    features = ["features", "+mid.pth", "--image", "+photo.jpg", "--tensorboard", "=run"]
    for size, program, words, named in (
        (10, "main", RUN, "checkpoint.pth"),
        (10, "visualize", features, "run"),
        (100, "main", RUN, "checkpoint.pth"),
        (100, "export", ["--checkpoint", "+mid.pth", "--output", "=x.pt2", "--no-check"], "x.pt2"),
        (100, "convert", ["+mid.pth", "=x.safetensors"], "x.safetensors"),
        (100, "convert", ["+mid.pth", "=x.pth"], "x.pth"),
    ):
        name, around = f"files of {size} kB", limited(resource.RLIMIT_FSIZE, 1000 * size)
        case = Case("environment", name, program, words, named=named, around=around)
        found.append(Case(**vars(case) | {"leaves": leaves, "outcome": REFUSED}))
    return found
