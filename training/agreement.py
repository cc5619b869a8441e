"""Agreement of ranks: a run starts only if all have the same code, flags, images and weights."""

import hashlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from datasets import LoadedDataset
from models import ModelSource
from training.network import Network
from utils import PeerError, UserError, all_or_none, gather

ROOT = Path(os.path.abspath(__file__)).parents[1]
SHOWN = 300  # characters of a value in a message
# They decide weights, images or sampling. Other builds of the same version count as others: their
# kernels round differently, and averaged gradients would hide it.
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")
# Flags that a rank or a machine may have of its own: which device and how many loader workers,
# neither of which changes a sample; where the images are, which are compared themselves; and how
# the ranks found each other, which they have by now. Paths of weights are not among them: those
# are named alike everywhere, and their contents are compared in addition.
OWN = {"local_rank", "device", "num_workers", "pin_mem"}
OWN |= {"data_path", "labels", "val_path", "shard_cache", "download", "dist_url", "world_size"}

Facts = Mapping[str, Callable[[], Iterable[str]]]  # what is compared: its lines, in order


def agree(facts: Facts, group: dist.ProcessGroup | None) -> None:
    """Compare facts over all ranks, by digests; a single process computes none.

    Raises:
        UserError: This is the first rank that differs from rank 0. Names the first fact and line
            that differ, as they are on both.
        PeerError: Another rank differs.
    """
    if group is None:
        return
    mine = all_or_none(lambda: {what: digest(lines()) for what, lines in facts.items()}, group)
    everyone = gather(mine, group)
    for what, lines in facts.items():
        counts = [theirs[what] for theirs in everyone]
        other = next((rank for rank, count in enumerate(counts) if count != counts[0]), 0)
        if other:
            _report(what, list(lines()), [count for count, _ in counts], other, group)


def digest(lines: Iterable[str]) -> tuple[int, str]:
    """Return the number of lines and their SHA-256."""
    found, count = hashlib.sha256(), 0
    for line in lines:
        found.update(f"{line}\n".encode("utf-8", "surrogateescape"))
        count += 1
    return count, found.hexdigest()


def _report(
    what: str, lines: Sequence[str], counts: Sequence[int], other: int, group: dist.ProcessGroup
) -> None:
    """Raise the error about the first line that rank ``other`` has differently than rank 0."""
    low, high = 0, max(counts[0], counts[other])
    while high - low > 1:  # bisect: no message grows with the dataset
        middle = (low + high) // 2
        parts = gather(digest(lines[low:middle]), group)
        low, high = (middle, high) if parts[0] == parts[other] else (low, middle)
    own = lines[low] if low < len(lines) else "no more"
    shown = gather(own if len(own) <= SHOWN else f"{own[:SHOWN]}...", group)
    if dist.get_rank() != other:
        raise PeerError(f"rank {other} differs")
    sizes = [f" ({counts[rank]} in all)" * (counts[0] != counts[other]) for rank in (other, 0)]
    raise UserError(
        f"the ranks differ in their {what}: rank {other} has {shown[other]}{sizes[0]}, rank 0 has "
        f"{shown[0]}{sizes[1]}; they must be the same on all ranks"
    )


def start_facts(args: Namespace, device: torch.device) -> Facts:
    """Return what is compared before anything is read or written: code and flags."""
    return {
        "packages": lambda: (f"{name} {version(name)}" for name in PACKAGES),
        "code": lambda: source_files(ROOT),
        "flags": lambda: flag_lines(args),
        "devices": lambda: [f"--device {device.type}"],
    }


def source_files(root: Path) -> Iterator[str]:
    """Yield path and digest of the source files of ``root`` that are loaded."""
    loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    paths = (os.path.abspath(file) for file in loaded if file and file.endswith(".py"))
    names = {path.removeprefix(f"{root}/") for path in paths if path.startswith(f"{root}/")}
    for name in sorted(names):
        if "site-packages" in name or not (root / name).is_file():  # of an environment within
            continue
        yield file_line(root / name, name)


def file_line(path: Path, name: str) -> str:
    """Return the line of a file that is called ``name`` on all ranks: its digest."""
    with path.open("rb") as file:
        return f"{name} of SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


def flag_lines(args: Namespace) -> Iterator[str]:
    """Yield the flags that must agree, as on a command line."""
    for name, value in vars(args).items():
        if name == "output_dir":  # rank 0 writes to its own; that there is one decides what all do
            value = "FOLDER" if value else "none"
        if name not in OWN:
            yield f"--{name.replace('_', '-')} {value}"


def label_facts(args: Namespace) -> Facts:
    """Return what is compared of the table ``--labels``: its content."""
    if args.labels is None:
        return {}
    return {"labels": lambda: [file_line(Path(args.labels), "--labels")]}


def image_facts(split: str, dataset: LoadedDataset) -> Facts:
    """Return what is compared of a split of a dataset: class names, and names, classes and sizes
    of the images, from the listing of the source."""
    source = dataset.source
    return {
        f"{split} classes": lambda: map(str, source.classes),
        f"{split} images": lambda: (
            f"{name} of class {target}"
            for name, target in zip(source.listing(), source.targets.tolist(), strict=True)
        ),
    }


def model_facts(source: ModelSource, network: Network) -> Facts:
    """Return what is compared of a model: its constructor's arguments, its parameters and buffers,
    and the file that it continues from, with optimizer and progress of a run.

    Published weights are compared by value. Random ones are compared by shape: processors may
    round them differently, and rank 0 sends its own to all.
    """
    state = network.model.state_dict()
    if not source.pretrained or network.kwargs["num_classes"] != source.num_classes:
        state = {key: [str(value.dtype), *value.shape] for key, value in state.items()}
    return {
        "model": lambda: contents({"name": network.name} | network.kwargs),
        "weights": lambda: contents(state),
        "checkpoint": lambda: contents(source.checkpoint),
    }


def contents(value: Any, name: str = "") -> Iterator[str]:
    """Yield the lines of nested plain values and tensors: tensors by shape, type and digest."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from contents(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from contents(item, f"{name}[{number}]")
    elif isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        yield f"{name} {kind} of SHA-256 {hashlib.sha256(plain.numpy()).hexdigest()[:12]}"
    else:
        yield f"{name} {value!r}"
