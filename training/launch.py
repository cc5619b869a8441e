"""Launchers, process group, device, and how a program starts and ends."""

import contextlib
import io
import multiprocessing.util
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from models import ModelError
from pipeline.images import DataError
from pipeline.workers import die_with_parent
from utils import PeerError, UserError, printable, silence

# that a user can fix; each message names the bad value and what would be right
USER_ERRORS = (UserError, ModelError, DataError)
SOCKET_ROOM = 70  # bytes of a folder's name: 104 of a socket's on macOS, less multiprocessing's own
SHORT = "/tmp"
ANSWER = 10.0  # seconds for a launcher to answer
MESSAGE = 60.0  # seconds for the watchdog's message
# how gloo and NCCL report a peer that does not answer
LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed out")
NONDETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")
RESUMES = "interrupted; --resume auto continues from the last checkpoint"


@dataclass(frozen=True)
class DistInfo:
    """Ranks of this process.

    Attributes:
        rank: Global rank.
        world_size: Number of processes of the run.
        local_rank: Rank on this machine.
        launcher: torchrun, srun, mpirun or, for a single process, python.
        restarts: Number of restarts by torchrun or Slurm.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = "python"
    restarts: int = 0


class _Launcher(NamedTuple):
    name: str
    marks: tuple[str, ...]  # any of these variables shows that this launcher was used
    rank: str
    size: str
    local_rank: str


# In the order of precedence. OpenMPI and Hydra precede Slurm, whose variables they inherit. A Slurm
# step has its own number of tasks; a script that sbatch or salloc runs directly sees the job's too.
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


def dist_info_from_env(env: Mapping[str, str]) -> DistInfo:
    """Read the ranks from the environment variables of torchrun, mpirun or srun.

    Raises:
        UserError: A variable is missing, not a number, or contradicts another one.
    """
    launcher = next((x for x in _LAUNCHERS if any(mark in env for mark in x.marks)), None)
    restarts = _read(env, ["TORCHELASTIC_RESTART_COUNT"]) or _read(env, ["SLURM_RESTART_COUNT"])
    if launcher is None:
        return DistInfo(restarts=restarts or 0)
    variables = (launcher.rank, launcher.size, launcher.local_rank)
    rank, size, local_rank = (_read(env, [name]) for name in variables)
    if rank == 0 and size == 1:
        return DistInfo(restarts=restarts or 0)
    missing = [name for name in variables if name not in env]
    if missing:
        present = next(name for name in (*variables, *launcher.marks) if name in env)
        raise UserError(
            f"{' and '.join(missing)} not set although {present} is: start with torchrun, or "
            f"unset {present} to run a single process"
        )
    if not 0 <= rank < size or not 0 <= local_rank < size:
        raise UserError(
            f"{launcher.rank}={rank} and {launcher.local_rank}={local_rank} must lie within "
            f"0..{size - 1} ({launcher.size}={size})"
        )
    return DistInfo(rank, size, local_rank, launcher.name, restarts or 0)


def _read(env: Mapping[str, str], names: Iterable[str]) -> int | None:
    for name in names:
        if name in env:
            try:
                return int(env[name])
            except ValueError:
                raise UserError(f"{name}={env[name]!r} is not a number") from None
    return None


def rendezvous(info: DistInfo, env: Mapping[str, str]) -> tuple[str, int]:
    """Return address and port of the rendezvous.

    ``MASTER_ADDR`` and ``MASTER_PORT`` where set; under srun the first node and a port derived
    from the job id; under mpirun on one node the local machine.

    Raises:
        UserError: They are not set and cannot be derived.
    """
    address, port = env.get("MASTER_ADDR"), _read(env, ["MASTER_PORT"])
    if info.launcher == "srun":
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        address = address or env.get("SLURM_LAUNCH_NODE_IPADDR") or first_node(nodes)
        port = port or 20000 + (_read(env, ["SLURM_JOB_ID"]) or 0) % 20000
    elif info.launcher == "mpirun":
        local_size = _read(env, ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"])
        if local_size == info.world_size:
            address = address or "127.0.0.1"
        port = port or 29500
    if not address or port is None:
        raise UserError(
            f"rank {info.rank} of {info.world_size} does not know where to meet the others: set "
            f"MASTER_ADDR and MASTER_PORT to an address and a free port of the first machine"
        )
    return address, port


def first_node(nodelist: str) -> str | None:
    """Return the first host of a Slurm node list: ``gpu[03-05,9],x`` gives ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodelist)
    return match and match[1] + (match[2] or "")


def set_nccl_timeout(timeout: timedelta) -> timedelta:
    """Return the timeout of NCCL, by which the watchdog has ended the process with its own message.

    NCCL counts from when a collective is enqueued, the watchdog from the last progress. In between,
    a process that runs ahead of its GPU may wait for a few batches, each for up to ``timeout``; and
    the watchdog asks the other ranks where they are. The environment gets the same for the monitor
    of NCCL's thread, which would end the process after 8 minutes.
    """
    found = 3 * timeout + timedelta(seconds=MESSAGE)
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{found.total_seconds():.0f}")
    return found


@contextlib.contextmanager
def process_group(args: Namespace, env: Mapping[str, str] = os.environ):
    """Context manager of the process group; yields ``(info, device)``.

    Raises:
        UserError: The environment, the device or the rendezvous fails.
    """
    info = dist_info_from_env(env)
    if "TORCHELASTIC_RUN_ID" in env:
        stay_with_torchrun(info, env)
    if args.world_size not in (1, info.world_size):
        raise UserError(
            f"--world_size {args.world_size}, but {info.world_size} process(es) were started: "
            f"start them with torchrun, srun or mpirun"
        )
    device = select_device(args.device, info)
    if info.world_size == 1:
        yield info, device
        return
    init_method = args.dist_url
    if init_method == "env://":
        init_method = "tcp://{}:{}".format(*rendezvous(info, env))
        if info.launcher == "torchrun":
            init_method = "env://"  # torchrun may hold the store itself
    try:
        timeout = timedelta(seconds=args.dist_timeout)
        store, *_ = next(dist.rendezvous(init_method, info.rank, info.world_size, timeout=timeout))
        store.set_timeout(timeout)
        if info.restarts and env.get("GROUP_WORLD_SIZE") == "1":
            # after a restart, torchrun may keep its store with the addresses of dead processes
            store = dist.PrefixStore(f"start {info.restarts}", store)
        compare_world_sizes(info, store)
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            rank=info.rank,
            world_size=info.world_size,
            timeout=set_nccl_timeout(timeout) if device.type == "cuda" else timeout,
            store=dist.PrefixStore("group", store),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"rank {info.rank} of {info.world_size} could not meet the others at {init_method} "
            f"within --dist-timeout {args.dist_timeout:g} s: {str(error).splitlines()[0]}"
        ) from error
    yield info, device
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def compare_world_sizes(info: DistInfo, store: dist.Store) -> None:
    """Compare the number of processes that the ranks were started for, by the store where they met.

    Raises:
        UserError: That of a rank differs from rank 0's; both see it.
    """
    store.set(f"size of rank {info.rank}", str(info.world_size))
    for rank in range(1, info.world_size) if info.rank == 0 else [0]:
        size = int(store.get(f"size of rank {rank}"))
        if info.rank > 0:
            store.set(f"read by rank {info.rank}", "")
        if size != info.world_size:
            if info.rank == 0:  # which may hold the store: the other reads from it first
                with contextlib.suppress(RuntimeError):
                    store.wait([f"read by rank {rank}"], timedelta(seconds=ANSWER))
            raise UserError(
                f"rank {info.rank} was started as one of {info.world_size} processes, rank {rank} "
                f"as one of {size}: all must be given the same number"
            )


def stay_with_torchrun(info: DistInfo, env: Mapping[str, str]) -> None:
    """Let this process die with the torchrun that started it; nothing else would end it.

    Raises:
        UserError: torchrun has ended already.
    """
    die_with_parent(signal.SIGTERM)
    if info.world_size > 1 and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = rendezvous(info, env)  # torchrun has listened there since before this process
        try:
            socket.create_connection(address, timeout=ANSWER).close()
        except ConnectionRefusedError as error:
            raise UserError(f"torchrun, which started rank {info.rank}, is gone") from error
        except OSError:
            return  # hard to reach: the rendezvous itself will report it


def select_device(name: str | None, info: DistInfo | None = None) -> torch.device:
    """Return the device named by ``--device``, else CUDA if available, else the CPU.

    A GPU becomes the current one: streams, events and statistics without a device are its own.

    Args:
        name: Value of the flag, or None.
        info: Ranks; of several processes with CUDA, each gets the GPU of its local rank.

    Raises:
        UserError: The device is not available.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is not a device: {error}") from error
    if device.type == "meta":
        raise UserError("--device meta holds no values; choose cpu or cuda")
    if device.type != "cuda":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise UserError(f"--device {name} is not available: {reason}") from error
        return device
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(f"--device {name}: no CUDA device found; use --device cpu")
    ranked = info is not None and info.world_size > 1
    index = info.local_rank if ranked else device.index or 0
    if index >= count:
        what = f"local rank {index}" if ranked else f"--device {name}"
        raise UserError(f"{what} has no GPU: {count} found; each process needs one")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def run_program(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a program; an error that the user can fix is printed as one line.

    Args:
        command: The program; may return an exit status.
        interrupted: Message after Ctrl-C.

    Returns:
        The exit status: the program's own or 0, 1 after an error or where nobody reads the
        output to its end, 130 after an interrupt.
    """
    open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold any characters
    try:
        try:
            shorten_sockets()
            status = command() or 0
            sys.stdout.flush()
            return status
        except PeerError:
            return 1  # the rank that it happened to reports it
        except USER_ERRORS as error:
            return fail(last_message(error))
        except BrokenPipeError as error:
            if loader_died(error):
                return fail(loader_message(error))
            # else the interpreter would complain of what it cannot flush at its end
            silence()
            return 1
        except (ConnectionError, EOFError, RuntimeError) as error:
            return fail(loader_message(error))
        except KeyboardInterrupt:
            return fail(interrupted, 130)
    except RuntimeError as error:
        # PyTorch's signal handler may also raise while the connection's error is dealt with
        return fail(loader_message(error))
    finally:
        end_children()


def open_standard_streams() -> None:
    """Open those of the standard streams that are closed, to nowhere.

    Else a file that is opened later would get the number of one, and be written by others.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 until the end


def shorten_sockets() -> None:
    """Keep the sockets of loader workers in /tmp if the name of ``TMPDIR`` is too long for them.

    Raises:
        UserError: /tmp cannot be written.
    """
    variables = map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))
    given = tempfile.tempdir or next(filter(None, variables), "")
    if not given or len(os.fsencode(os.path.abspath(given))) <= SOCKET_ROOM:
        return
    before = tempfile.tempdir
    try:
        tempfile.tempdir = SHORT
        multiprocessing.util.get_temp_dir()  # creates its folder, once
    except OSError as error:
        raise UserError(
            f"TMPDIR {given} is too long for a socket, and {SHORT} cannot be written "
            f"({error.strerror}): set TMPDIR to a folder of at most {SOCKET_ROOM} bytes"
        ) from error
    finally:
        tempfile.tempdir = before


def last_message(error: BaseException) -> str:
    """Return the message of an error without the traceback that a loader worker adds."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return text


def end_children() -> None:
    """Kill the remaining loader workers, which ignore the usual signals."""
    children = multiprocessing.active_children()
    if children and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error
    for child in children:
        child.kill()


def loader_message(error: Exception) -> str:
    """Return the message for a dead loader worker, a lost rank, or an operator that
    ``--deterministic`` excludes; raise any other error."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if loader_died(error):
        return (
            f"a loader worker died ({reason}), possibly out of memory; "
            f"lower --num_workers. The last checkpoint is kept"
        )
    if peer_lost(error):
        return f"another process is lost or stuck ({reason[:200]})"
    if found := NONDETERMINISTIC.match(reason):
        return f"{found[1]} has no deterministic kernel on this device: leave --deterministic out"
    raise error


def loader_died(error: Exception) -> bool:
    """Return True if a loader worker was killed: PyTorch says so, or its connection broke."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any("/torch/utils/data/" in Path(file).as_posix() for file in files)


def peer_lost(error: Exception) -> bool:
    """Return True if another rank does not answer."""
    foreign = type(error).__module__ == "builtins" and LOST.search(str(error))
    return bool(foreign) or isinstance(error, dist.DistError)


def fail(message: str, status: int = 1) -> int:
    """Print an error of this rank, and return the exit status."""
    rank = os.environ.get("RANK")
    where = f" on rank {rank}" if rank else ""
    with contextlib.suppress(OSError, ValueError):  # nobody may read it
        print(printable(f"error{where}: {message}"), file=sys.stderr, flush=True)
    return status
