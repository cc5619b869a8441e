"""Processes, random numbers, saving and logging of a run."""

import contextlib
import json
import os
import random
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from configs import LaunchError, Place, find_place, rendezvous
from models import CheckpointError

CHECKPOINT = "checkpoint.pth"
BEST = "best.pth"
LOG = "log.txt"


class OutputError(RuntimeError):
    """The output folder cannot be written."""


def log(message: str) -> None:
    """Print on the first process only."""
    if is_main_process():
        print(message, flush=True)


# --- processes ------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(args: Namespace, env: Mapping[str, str] = os.environ):
    """Join the run's processes for the block; yields ``(place, device)``.

    Raises:
        LaunchError: The environment, the device or the meeting of the processes fails.
    """
    place = find_place(env)
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
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            init_method=init_method,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=args.dist_timeout),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"rank {place.rank} of {place.world_size} could not meet the others at {init_method} "
            f"within --dist-timeout {args.dist_timeout:g} s: {str(error).splitlines()[0]}"
        ) from error
    yield place, device
    dist.destroy_process_group()  # not after an error: others may be gone, and this would wait


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
    if device.type != "cuda":
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


def exit_status(command: Callable[[], None], expected: tuple[type[Exception], ...]) -> int:
    """Run a program; what a user can mend is printed as one line.

    Args:
        command: The program.
        expected: Errors whose message says what is wrong and what would be right.

    Returns:
        0, or after an error 1, or 130 after an interrupt.
    """
    try:
        try:
            command()
        except expected as error:
            return fail(last_message(error))
        except (ConnectionError, EOFError, RuntimeError) as error:
            return fail(_loader_message(error))
        except KeyboardInterrupt:
            return fail("interrupted; --resume auto continues from the last checkpoint", 130)
    except RuntimeError as error:
        # PyTorch's signal handler may also raise while the connection's error is dealt with
        return fail(_loader_message(error))
    return 0


def _loader_message(error: Exception) -> str:
    if not loader_died(error):
        raise error
    return (
        f"a loader process died ({str(error).splitlines()[0]}): it may have run out of memory; "
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
    """Load an optimizer's state, strictly.

    Raises:
        CheckpointError: Groups or shapes differ from the optimizer's.
    """
    try:
        optimizer.load_state_dict(dict(state))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: the optimizer's state does not fit: {error}") from error
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


# --- output ---------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """``value`` as tensors and plain Python types, which load with ``weights_only=True``."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | bytes | bool | int | float | torch.Tensor):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


class _KeepsError:
    """A file that remembers why writing failed; torch.save reports only that it did."""

    def __init__(self, file: Any):
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, and rename it to ``path``.

    Until the rename the previous file stays whole.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    temporary, target = None, None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary, target = Path(file.name), _KeepsError(file)
            write(target)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = (target and target.error) or error
        reason = getattr(cause, "strerror", None) or cause
        raise OutputError(
            f"cannot write {path}: {reason}; what was there before is unchanged"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint of plain types and tensors, whole or not at all."""
    content = plain(state)
    write_atomically(path, lambda file: torch.save(content, file))


class Output:
    """The output folder of a run: checkpoints, ``log.txt``, ``args.yaml``, TensorBoard events.

    Only the first process writes. Without a folder nothing is written.

    Args:
        folder: ``--output_dir``, or an empty string.
        args: What to write into ``args.yaml``, if anything.
        start_epoch: Lines and events of this and later epochs, left by an interrupted run,
            are removed.

    Raises:
        OutputError: The folder cannot be made or written.
    """

    def __init__(self, folder: str, args: Namespace | None = None, start_epoch: int = 0):
        self.folder = Path(folder) if folder else None
        self.writer = None
        if not self.folder or not is_main_process():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make --output_dir {folder}: {error.strerror}") from error
        content = yaml.safe_dump(plain(vars(args)), sort_keys=False)
        write_atomically(self.folder / "args.yaml", lambda file: file.write(content.encode()))
        self._drop_lines_from(start_epoch)
        self.writer = SummaryWriter(str(self.folder), purge_step=start_epoch)

    def _drop_lines_from(self, epoch: int) -> None:
        path = self.folder / LOG
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _epoch_of(line) < epoch]
        if kept != lines:
            write_atomically(path, lambda file: file.write("".join(kept).encode()))

    def log_epoch(self, stats: Mapping[str, float], epoch: int) -> None:
        """Append a line to ``log.txt`` and the numbers to TensorBoard."""
        if self.writer is None:
            return
        try:
            with (self.folder / LOG).open("a") as file:
                file.write(json.dumps(stats) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.folder / LOG}: {error.strerror}") from error
        for name, value in stats.items():
            if name not in ("epoch", "n_parameters"):
                self.writer.add_scalar(name.replace("_", "/", 1), value, epoch)
        self.writer.flush()

    def add_images(self, name: str, images: torch.Tensor) -> None:
        """Write a picture ``3 H W`` of values in 0..1 to TensorBoard."""
        if self.writer is not None:
            self.writer.add_image(name, images)

    def save(self, state: Callable[[], Mapping[str, Any]], best: bool) -> None:
        """Write ``checkpoint.pth`` and, if ``best``, ``best.pth``."""
        if self.writer is not None:
            content = state()
            save_checkpoint(content, self.folder / CHECKPOINT)
            if best:
                save_checkpoint(content, self.folder / BEST)

    def close(self) -> None:
        """Close the TensorBoard events."""
        if self.writer is not None:
            self.writer.close()


class Progress:
    """Iterates over a training loader and shows how far it is, on the first process.

    On a terminal it is a bar, elsewhere a line per report.

    Args:
        loader: The training loader.
        epoch: Number of this epoch, from 0.
        epochs: Number of the first epoch that will not be trained.
        world_size: Processes, all as fast as this one.
    """

    def __init__(self, loader: DataLoader, epoch: int, epochs: int, world_size: int):
        self.loader, self.epoch, self.epochs, self.world_size = loader, epoch, epochs, world_size
        self.bar = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        shown = is_main_process() and sys.stderr.isatty()
        self.bar = tqdm(
            self.loader, f"epoch {self.epoch}", leave=False, disable=not shown, dynamic_ncols=True
        )
        return iter(self.bar)

    def report(self, step: int, loss: float, lr: float, rate: float) -> None:
        """Show ``step`` steps done, the mean loss, the learning rate and images per second."""
        steps_left = len(self) - step + len(self) * (self.epochs - self.epoch - 1)
        eta = timedelta(seconds=int(steps_left * self.loader.batch_size / rate))
        rate *= self.world_size
        text = f"loss {loss:.4f} lr {lr:.3g} {rate:.0f} images/s eta {eta}"
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(text)
        if step == len(self) or self.bar is None or self.bar.disable:
            log(f"epoch {self.epoch} step {step}/{len(self)} {text}")


def _epoch_of(line: str) -> float:
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError):
        return float("inf")  # a line cut short
