"""Datasets by name, their augmentation, and loaders."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from torch.utils.data import DataLoader
from torchvision import transforms

from pipeline.fast import FastDataset, RawBatch, take_apart
from pipeline.images import NORMALIZATION, CropLongSide, DataError, EnlargeTiny
from pipeline.prefetch import BatchFinalizer, Prefetcher, ToDevice
from pipeline.reference import AugmentedDataset, Batch
from pipeline.sources.base import Pixels, Source
from pipeline.sources.cifar import open_cifar10, open_cifar100, open_digits
from pipeline.sources.download import Cache
from pipeline.sources.fine_grained import (
    open_cars,
    open_flowers,
    open_inat,
    open_inat2021,
    open_pets,
)
from pipeline.sources.folder import open_image_folder
from pipeline.sources.hf_datasets import open_hub
from pipeline.sources.shards import open_shards
from pipeline.sources.subset import share_of
from pipeline.workers import worker_init_fn
from samplers import EvalBatchSampler, RASampler

SMALL_SIZE = 32
EVAL_BATCH_FACTOR = 1.5
CPU = torch.device("cpu")
HUB = "hfds/"  # begins names of the Hugging Face Hub, as in timm


@dataclass(frozen=True)
class DataSet:
    """What ``--data-set`` stands for.

    Attributes:
        open: Makes of the flags and ``is_train`` the images.
        input_size: Size of the network's input if ``--input-size`` is not given.
        hflip: Probability of mirroring a training image.
    """

    open: Callable[[Namespace, bool], Source]
    input_size: int = 224
    hflip: float = 0.5


def _at_path(
    open_folder: Callable[..., Source], default: str | None = None, **options: Any
) -> Callable[[Namespace, bool], Source]:
    """Opens what lies at ``--data-path``, or at ``default`` if it is not given."""

    def open_source(args: Namespace, is_train: bool) -> Source:
        path = args.data_path or default
        if path is None:
            raise DataError(f"--data-set {data_set_name(args)} needs --data-path")
        return open_folder(Path(path), is_train, args.download, **options)

    return open_source


def _open_inat(args: Namespace, is_train: bool, opener: Callable[..., Source]) -> Source:
    return _at_path(opener, category=args.inat_category)(args, is_train)


def _open_wds(args: Namespace, is_train: bool) -> Source:
    if args.data_path is None:
        raise DataError("--data-set WDS needs --data-path, a folder or pattern of shards")
    cache = Cache(Path(args.shard_cache)) if args.shard_cache else None
    return open_shards(args.data_path, is_train, args.val_path, cache)


def _open_hub(args: Namespace, is_train: bool) -> Source:
    name = data_set_name(args).removeprefix(HUB)
    root = Path(args.data_path) if args.data_path else None
    return open_hub(name, root, is_train, args.download, args.input_key, args.target_key)


_FOLDER = DataSet(_at_path(open_image_folder))
_CIFAR100 = DataSet(_at_path(open_cifar100, "./dataset"))
DATA_SETS = {
    "IMNET": _FOLDER,
    "IMNET100": _FOLDER,  # names of Visformer's command lines; classes are counted anyway
    "IMNET10": _FOLDER,
    "CIFAR": _CIFAR100,
    "CIFAR10": DataSet(_at_path(open_cifar10, "./dataset")),
    "CIFAR100": _CIFAR100,
    "DIGITS": DataSet(_at_path(open_digits, ""), input_size=SMALL_SIZE, hflip=0.0),
    "INAT": DataSet(partial(_open_inat, opener=open_inat)),
    "INAT19": DataSet(partial(_open_inat, opener=partial(open_inat, year=2019))),
    "INAT2021": DataSet(partial(_open_inat, opener=open_inat2021)),
    "INAT2021_MINI": DataSet(partial(_open_inat, opener=partial(open_inat2021, mini=True))),
    "FLOWERS": DataSet(_at_path(open_flowers, "./dataset")),
    "CARS": DataSet(_at_path(open_cars, "./dataset")),
    "PETS": DataSet(_at_path(open_pets, "./dataset")),
    "WDS": DataSet(_open_wds),
}


def data_set_named(name: str) -> DataSet:
    """What ``name`` stands for.

    Raises:
        ValueError: It stands for nothing.
    """
    if name.startswith(HUB) and name != HUB:
        return DataSet(_open_hub)
    if name not in DATA_SETS:
        raise ValueError(f"{name!r} is none of {', '.join(DATA_SETS)} and {HUB}NAME")
    return DATA_SETS[name]


def data_set_name(args: Namespace) -> str:
    """``--data-set``, or what its absence means: a folder if there is a path, else DIGITS."""
    return args.data_set or ("IMNET" if args.data_path else "DIGITS")


def input_size_of(args: Namespace) -> int:
    """``--input-size``, or the usual one of the dataset."""
    return args.input_size or data_set_named(data_set_name(args)).input_size


def build_transform(is_train: bool, args: Namespace) -> transforms.Compose:
    """DeiT's augmentation for training, resize and centre crop for evaluation.

    Inputs of at most 32 pixels are padded by 4 and cropped for training, and resized whole for
    evaluation. Before a resize by the short side, images longer than 8:1 are cropped to that.

    Raises:
        DataError: There is no such policy of augmentation.
    """
    size = input_size_of(args)
    small = size <= SMALL_SIZE
    if not is_train:
        bicubic = transforms.InterpolationMode.BICUBIC
        if small:
            resize = [transforms.Resize((size, size), interpolation=bicubic)]
        else:
            resize = [
                CropLongSide(),
                transforms.Resize(int(size / args.eval_crop_ratio), interpolation=bicubic),
                transforms.CenterCrop(size),
            ]
        normalize = transforms.Normalize(*NORMALIZATION)
        return transforms.Compose([*resize, transforms.ToTensor(), normalize])

    standard = args.std_aug
    three_augment = args.ThreeAugment
    policy = None if standard else "3a" if three_augment else args.aa
    try:
        transform = create_transform(
            input_size=size,
            is_training=True,
            hflip=data_set_named(data_set_name(args)).hflip,
            color_jitter=None if standard else args.color_jitter,
            auto_augment=policy,
            interpolation=args.train_interpolation,
            re_prob=0.0 if standard else args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, ValueError) as error:  # of the parts of a policy's name
        raise DataError(
            f"--aa {policy} is none of timm's policies, such as rand-m9-mstd0.5-inc1, original, "
            f"v0 or augmix-m5-w4: {error}"
        ) from error
    if small:
        crop = [transforms.Resize((size, size)), transforms.RandomCrop(size, padding=4)]
        transform.transforms[0:1] = crop
    elif args.src:
        crop = transforms.RandomCrop(size, padding=4, padding_mode="reflect")
        resize = transforms.Resize(size, interpolation=3)
        transform.transforms[0:1] = [CropLongSide(), resize, crop]
    else:
        transform.transforms.insert(0, EnlargeTiny())
    keep_posterize_possible(transform)
    return transform


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation of images ``B 3 H W``, to values in 0..1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATION)
    return (images * std + mean).clamp(0, 1)


def keep_posterize_possible(transform: transforms.Compose) -> None:
    """Let the posterize of RandAugment or AutoAugment keep at least one bit.

    At the highest magnitudes timm asks for 0 bits, which Pillow refuses.
    """
    for step in transform.transforms:
        for operation in chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
                operation.level_fn = _AtLeastOneBit(operation.level_fn)


@dataclass(frozen=True)
class _AtLeastOneBit:
    level_fn: Callable

    def __call__(self, level: float, hparams: dict) -> tuple[int]:
        return (max(self.level_fn(level, hparams)[0], 1),)


LoadedDataset = FastDataset | AugmentedDataset


def is_augmented_on_device(args: Namespace, device: torch.device) -> bool:
    """``--augment-on``, or what suits the device."""
    if args.augment_on == "auto":
        return device.type == "cuda"
    return args.augment_on == "device"


def fits(pixels: int, device: torch.device) -> bool:
    """Whether images of so many pixels take at most a tenth of the memory that is free."""
    if device.type != "cuda":
        return True  # they are in memory already
    free, _ = torch.cuda.mem_get_info(device)
    return 3 * pixels <= free / 10


def build_dataset(
    is_train: bool, args: Namespace, device: torch.device = CPU
) -> tuple[LoadedDataset, int]:
    """The training or validation set under its transform, and the number of classes.

    Args:
        is_train: Which.
        args: The flags.
        device: Of the training.

    Raises:
        DataError: The data is missing or inconsistent, or flags are.
    """
    source = data_set_named(data_set_name(args)).open(args, is_train)
    if is_train:
        source = share_of(source, args.sampling_ratio)
    transform = build_transform(is_train, args)
    options = {"seed": args.seed, "skip_corrupt": args.on_corrupt == "skip"}
    if args.loader == "timm":
        return AugmentedDataset(source, transform, is_train, **options), len(source.classes)
    size = input_size_of(args)
    on_device = is_augmented_on_device(args, device)
    if args.decode_on_device and not on_device:
        raise DataError("--decode-on-device needs --augment-on device")
    resident = on_device and size <= SMALL_SIZE and isinstance(source, Pixels)
    resident = resident and not take_apart(transform, size).others  # these are for PIL images
    if resident and (resident := fits(len(source) * size * size, device)):
        source = resized(source, transform.transforms[0], size)
    options["augment"] = not on_device
    options |= {"resident": resident, "decode": not args.decode_on_device}
    return FastDataset(source, transform, is_train, size, **options), len(source.classes)


def resized(source: Pixels, resize: transforms.Resize, size: int) -> Pixels:
    """A source whose images are resized once and for all."""
    if source.pixels.shape[1:3] == (size, size):
        return source
    images = [np.asarray(resize(source.open(index))) for index in range(len(source))]
    return Pixels(np.stack(images), source.targets, source.classes)


def _loader_options(args: Namespace) -> dict:
    return {
        "worker_init_fn": worker_init_fn,
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and torch.cuda.is_available(),
        "persistent_workers": args.num_workers > 0,
        "collate_fn": as_it_is,
        # of its own, so that the number of workers does not change the run's random numbers
        "generator": torch.Generator(),
    }


def as_it_is(batch: Batch | RawBatch) -> Batch | RawBatch:
    """What a dataset made of the indices of a batch."""
    return batch


def build_train_loader(
    dataset: LoadedDataset, args: Namespace, num_replicas: int, rank: int
) -> DataLoader:
    """Loader of this rank's part of the training set; ``loader.sampler`` has ``set_epoch``.

    Raises:
        DataError: A batch is larger than a rank's part.
    """
    repeats = 3 if args.repeated_aug else 1
    sampler = RASampler(
        len(dataset),
        num_replicas,
        rank,
        args.batch_size,
        num_repeats=repeats,
        seed=args.seed,
        shards=dataset.source.shards,
    )
    if args.batch_size > len(sampler):
        raise DataError(
            f"--batch-size {args.batch_size} is larger than the training set: {len(dataset)} images"
            f" over {num_replicas} process(es) leave {len(sampler)} each"
        )
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=sampler,
        drop_last=True,
        **_loader_options(args),
    )


def build_eval_loader(
    dataset: LoadedDataset, args: Namespace, num_replicas: int, rank: int
) -> DataLoader:
    """Loader of this rank's batches of the evaluation set."""
    batch_size = max(1, int(EVAL_BATCH_FACTOR * args.batch_size))
    sampler = EvalBatchSampler(len(dataset), batch_size, num_replicas, rank)
    return DataLoader(dataset, batch_sampler=sampler, **_loader_options(args))


def build_prefetcher(
    loader: DataLoader,
    args: Namespace,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Prefetcher:
    """Batches of a loader of these functions as the network takes them.

    Args:
        loader: Of the training or evaluation set.
        args: The flags.
        device: Of the network.
        dtype, memory_format: Of the images.
    """
    dataset = loader.dataset
    if isinstance(dataset, AugmentedDataset):
        return Prefetcher(loader, ToDevice(device, dtype, memory_format), device)
    resident = torch.from_numpy(dataset.source.pixels) if dataset.resident else None
    finish = BatchFinalizer(dataset.recipe, device, dtype, memory_format, args.remode, resident)
    return Prefetcher(loader, finish, device)
