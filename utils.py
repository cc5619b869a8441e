"""Processes, random numbers, saving and logging of a run."""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from configs import LaunchError, Place, find_place, rendezvous
from models import CheckpointError
from pipeline.finish import Feed
from pipeline.workers import die_with_parent

ANSWER = 10.0  # seconds for a launcher to answer
RESUMES = "interrupted; --resume auto continues from the last checkpoint"
T = TypeVar("T")


class ElsewhereError(RuntimeError):
    """Another process of the run failed."""


def log(message: str) -> None:
    """Print on the first process only."""
    if is_main_process():
        print(message, flush=True)


@contextlib.contextmanager
def process_group(args: Namespace, env: Mapping[str, str] = os.environ):
    """Join the run's processes for the block; yields ``(place, device)``.

    Raises:
        LaunchError: The environment, the device or the meeting of the processes fails.
    """
    place = find_place(env)
    if "TORCHELASTIC_RUN_ID" in env:
        stay_with_torchrun(place, env)
    if args.world_size not in (1, place.world_size):
        raise LaunchError(
            f"--world_size {args.world_size}, but {place.world_size} process(es) were started: "
            f"start them with torchrun, srun or mpirun"
        )
    device = select_device(args.device, place)
    if place.world_size == 1:
        yield place, device
        return
    init_method = args.dist_url
    if init_method == "env://":
        init_method = "tcp://{}:{}".format(*rendezvous(place, env))
        if place.launcher == "torchrun":
            init_method = "env://"  # torchrun may hold the store itself
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        timeout = timedelta(seconds=args.dist_timeout)
        where = {"init_method": init_method}
        if place.restarts and env.get("GROUP_WORLD_SIZE") == "1":
            # torchrun may keep its store when it starts again, with the addresses of the dead
            store, *_ = next(dist.rendezvous(init_method, place.rank, place.world_size))
            where = {"store": dist.PrefixStore(f"start {place.restarts}", store)}
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            **where,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"rank {place.rank} of {place.world_size} could not meet the others at {init_method} "
            f"within --dist-timeout {args.dist_timeout:g} s: {str(error).splitlines()[0]}"
        ) from error
    yield place, device
    dist.destroy_process_group()  # not after an error: others may be gone, and this would wait


def stay_with_torchrun(place: Place, env: Mapping[str, str]) -> None:
    """End with the torchrun that started this process: without it, nobody else would do it.

    Raises:
        LaunchError: It has ended already.
    """
    die_with_parent(signal.SIGTERM)
    if place.world_size > 1 and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = rendezvous(place, env)  # where torchrun has listened since before this process
        try:
            socket.create_connection(address, timeout=ANSWER).close()
        except ConnectionRefusedError as error:
            raise LaunchError(f"torchrun, which started rank {place.rank}, is gone") from error
        except OSError:
            return  # an address that is hard to reach: the meeting itself will tell


def select_device(name: str | None, place: Place) -> torch.device:
    """``--device``, or CUDA if present, else the CPU; under CUDA the local rank's own GPU.

    Raises:
        LaunchError: The device does not exist here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LaunchError(f"--device {name!r} is not a device: {error}") from error
    if device.type == "meta":
        raise LaunchError("--device meta holds no values: cpu or cuda")
    if device.type != "cuda":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise LaunchError(f"--device {name} is not here: {reason}") from error
        return device
    count = torch.cuda.device_count()
    if count == 0:
        raise LaunchError(f"--device {name}: no CUDA device here; use --device cpu")
    index = place.local_rank if place.world_size > 1 else device.index or 0
    if index >= count:
        raise LaunchError(
            f"local rank {index} has no GPU: {count} here; start at most {count} processes"
        )
    return torch.device("cuda", index)


def is_main_process() -> bool:
    """Whether this process is the first one, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def sum_over_processes(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sum of a tensor over all processes, which communicate through ``device``."""
    if not dist.is_initialized():
        return tensor
    total = tensor.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def control_group(timeout: float) -> dist.ProcessGroup | None:
    """A group of all processes that talk over the CPU, beside the gradients; None for one."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def all_or_none(call: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What ``call`` returns on this process, if it fails on none.

    Raises:
        ElsewhereError: It failed on another process, which raises the error itself.
    """
    if group is None:
        return call()
    failed, result = None, None
    try:
        result = call()
    except Exception as error:  # of any kind: the others must not wait for this process
        failed = error
    count = torch.tensor(int(failed is not None))
    dist.all_reduce(count, group=group)
    if failed is not None:
        raise failed
    if count:
        raise ElsewhereError("another process failed")
    return result


def from_first(value: Any, group: dist.ProcessGroup | None) -> Any:
    """The first process's ``value``, on every process."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def gather_lines(lines: Sequence[str], group: dist.ProcessGroup | None) -> list[str]:
    """The lines of all processes."""
    if group is None:
        return list(lines)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(lines), group=group)
    return [line for part in gathered for line in part]


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers (BatchNorm's statistics differ by process)."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def last_message(error: BaseException) -> str:
    """The message of an error, without the traceback that a loader process wraps around it."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return text


def exit_status(
    command: Callable[[], int | None],
    expected: tuple[type[Exception], ...],
    interrupted: str = "interrupted",
) -> int:
    """Run a program; what a user can mend is printed as one line.

    Args:
        command: The program, which may return a status.
        expected: Errors whose message says what is wrong and what would be right.
        interrupted: What is said after Ctrl-C.

    Returns:
        The program's status or 0, or after an error 1, or 130 after an interrupt.
    """
    try:
        try:
            return command() or 0
        except ElsewhereError:
            return 1  # the process that it happened to says what it is
        except expected as error:
            return fail(last_message(error))
        except (ConnectionError, EOFError, RuntimeError) as error:
            return fail(loader_message(error))
        except KeyboardInterrupt:
            return fail(interrupted, 130)
    except RuntimeError as error:
        # PyTorch's signal handler may also raise while the connection's error is dealt with
        return fail(loader_message(error))
    finally:
        end_children()


def end_children() -> None:
    """Kill the loader processes that are left: they ignore what would ask them to end."""
    children = multiprocessing.active_children()
    if children and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error
    for child in children:
        child.kill()


def loader_message(error: Exception) -> str:
    """What to say of a dead loader process; raises any other error."""
    if not loader_died(error):
        raise error
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"a loader process died ({reason}): it may have run out of memory; "
        f"lower --num_workers. The last checkpoint is kept"
    )


def loader_died(error: Exception) -> bool:
    """Whether a process of the loader was killed: PyTorch says so, or its connection broke."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any("/torch/utils/data/" in Path(file).as_posix() for file in files)


def fail(message: str, status: int = 1) -> int:
    """Print an error of this process, and return the exit status."""
    rank = os.environ.get("RANK")
    print(f"error{f' on rank {rank}' if rank else ''}: {message}", file=sys.stderr, flush=True)
    return status


def restore_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str
) -> None:
    """Load an optimizer's state, strictly; its options, learning rate apart, are not loaded.

    They are those of the flags, which may have changed.

    Raises:
        CheckpointError: Groups or shapes differ from the optimizer's.
    """
    loaded = ("params", "lr")  # the plateau schedule keeps its state in the latter
    options = [{k: v for k, v in g.items() if k not in loaded} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(state))
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{source}: the optimizer's state does not fit: {error}; --opt, --linear-probe, "
            f"--freeze-stages and --layer-decay must be those of the checkpoint, or start from its "
            f"weights by --finetune"
        ) from error
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{source}: the optimizer's {key} of shape {tuple(value.shape)} meets a "
                    f"parameter of shape {tuple(parameter.shape)}; --opt and the model's layout "
                    f"must be those of the checkpoint"
                )


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) from the combination of ``numbers``."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64).item()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of this process's random numbers, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on with the random numbers of :func:`random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Progress:
    """Iterates over a training loader and shows how far it is, on the first process.

    On a terminal it is a bar, elsewhere a line per report.

    Args:
        loader: The training loader.
        epoch: Number of this epoch, from 0.
        epochs: Number of the first epoch that will not be trained.
        world_size: Processes, all as fast as this one.
        done: Steps of the epoch that the loader does not bring any more.
        waiting: Told True before every batch and False after it.
    """

    def __init__(
        self,
        loader: Feed,
        epoch: int,
        epochs: int,
        world_size: int,
        done: int = 0,
        waiting: Callable[[bool], None] = lambda begins: None,
    ):
        self.loader, self.epoch, self.epochs, self.world_size = loader, epoch, epochs, world_size
        self.steps, self.done, self.waiting = done + len(loader), done, waiting
        self.bar = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        shown = is_main_process() and sys.stderr.isatty()
        options = {"leave": False, "disable": not shown, "dynamic_ncols": True}
        sizes = {"initial": self.done, "total": self.steps}
        self.bar = tqdm(self.loader, f"epoch {self.epoch}", **sizes, **options)
        self.waiting(True)
        for batch in self.bar:
            self.waiting(False)
            yield batch
            self.waiting(True)
        self.waiting(False)

    def report(self, step: int, loss: float, lr: float, rate: float) -> None:
        """Show ``step`` steps done, the mean loss, the learning rate and images per second."""
        steps_left = self.steps - step + self.steps * (self.epochs - self.epoch - 1)
        eta = timedelta(seconds=int(steps_left * self.loader.batch_size / rate))
        rate *= self.world_size
        text = f"loss {loss:.4f} lr {lr:.3g} {rate:.0f} images/s eta {eta}"
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(text)
        if step == self.steps or self.bar is None or self.bar.disable:
            log(f"epoch {self.epoch} step {step}/{self.steps} {text}")
