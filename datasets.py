"""Datasets by name, with their augmentation and data loaders."""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision import transforms

from models import DataConfig, size_text
from models.data_config import SMALL_SIZE
from pipeline.augmentation import CROP_MODES, Augmentation
from pipeline.fast import FastDataset, RawBatch
from pipeline.images import DataError
from pipeline.prefetch import BatchFinalizer, Prefetcher, to_device
from pipeline.reference import AugmentedDataset, Batch
from pipeline.sources.base import Source
from pipeline.sources.named import data_set_name, data_set_named, is_image_folder
from pipeline.sources.split import HoldOut
from pipeline.sources.subset import share_of
from pipeline.workers import worker_init_fn
from samplers import EvalBatchSampler, RASampler
from utils import log

EVAL_BATCH_FACTOR = 1.5
CPU = torch.device("cpu")


def input_size_of(args: Namespace) -> int | tuple[int, int]:
    """Return ``--input-size``; if not given, that of the dataset."""
    return args.input_size or data_set_named(data_set_name(args)).input_size


def choose_images(
    args: Namespace,
    own: DataConfig | None = None,
    source: str = "",
    warn: Callable[[str], None] = log,
) -> DataConfig:
    """Return the preprocessing of images: that of the weights, changed by the flags.

    A model without weights gets the dataset's input size, ImageNet's normalization, and a crop of
    0.875 in evaluation.

    Args:
        args: ``--input-size``, ``--eval-crop-ratio``, ``--interpolation``, ``--exif`` and, without
            weights, ``--in-chans``, None or empty if not given.
        own: Preprocessing that the weights were trained with, of the channels of the model; None
            without weights.
        source: Name of the weights, for warnings.
        warn: Receives a warning for a flag that differs from it.
    """
    size, ratio, filtered = args.input_size, args.eval_crop_ratio, args.interpolation
    changed = {"interpolation": filtered} if filtered else {}
    changed |= {} if args.exif is None else {"exif": args.exif}
    if own is None:
        found = DataConfig().with_channels(args.in_chans)
        found = replace(found.at_size(input_size_of(args)), **changed)
        return found if ratio is None else found.with_crop(ratio)
    found = replace(own.at_size(size or own.input_size), **changed)
    if found.interpolation != own.interpolation:
        warn(f"warning: --interpolation {filtered}, but {source} expects {own.interpolation}")
    if found.exif != own.exif:
        flag, how = ("--exif", "without") if found.exif else ("--no-exif", "with")
        warn(f"warning: {flag}, but {source} was trained {how} the EXIF orientation")
    if found.input_size != own.input_size:
        expected = size_text(own.input_size)
        warn(f"warning: --input-size {size_text(size)}, but {source} expects {expected}")
    if ratio is None:
        return found
    cropped = found.with_crop(ratio)
    if cropped.crop_mode != "center":
        side = size_text(found.input_size)
        warn(
            f"warning: --eval-crop-ratio {ratio:g} has no effect: images of {side} are not cropped"
        )
    elif cropped != found:
        mode = "" if found.crop_mode == "center" else f" ({found.crop_mode})"
        warn(f"warning: --eval-crop-ratio {ratio:g}, but {source} expects {found.crop_pct:g}{mode}")
    return cropped


def build_augmentation(
    is_train: bool, args: Namespace, images: DataConfig | None = None
) -> Augmentation:
    """Return the augmentation of the flags: DeiT's for training, resize and crop for evaluation.

    Inputs of at most 32 pixels are padded and cropped for training, unless ``--train-crop-mode``
    is given.

    Args:
        is_train: Augment for training (else for evaluation).
        args: The flags.
        images: Preprocessing; default: that of :func:`choose_images` without weights.
    """
    images = images or choose_images(args)
    if not is_train:
        return Augmentation.for_evaluation(images)
    small = max(images.input_size) <= SMALL_SIZE
    usual = "padded" if small else "reflected" if args.src else "rrc"
    hflip = data_set_named(data_set_name(args)).hflip
    plain = Augmentation(
        images.size,
        CROP_MODES.get(args.train_crop_mode or usual, usual),
        interpolation=args.train_interpolation,
        hflip=hflip if args.hflip is None else args.hflip,
        vflip=args.vflip,
        scale=tuple(args.scale) if args.scale else None,
        ratio=tuple(args.ratio) if args.ratio else None,
        mean=images.mean,
        std=images.std,
    )
    if args.std_aug:
        return plain
    return replace(
        plain,
        policy="3a" if args.ThreeAugment else args.aa,
        color_jitter=args.color_jitter,
        erase_prob=args.reprob,
        erase_mode=args.remode,
        erase_count=args.recount,
    )


def build_transform(
    is_train: bool, args: Namespace, images: DataConfig | None = None
) -> transforms.Compose:
    """Return the reference transform of :func:`build_augmentation`: PIL image to ``C H W``.

    Raises:
        DataError: timm does not know the policy ``--aa``.
    """
    return build_augmentation(is_train, args, images).compose()


def denormalize(images: torch.Tensor, config: DataConfig | None = None) -> torch.Tensor:
    """Undo the normalization of images ``B C H W``; returns values in 0..1.

    Args:
        images: Normalized images.
        config: Their mean and std; default: ImageNet's.
    """
    config = config or DataConfig()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    return (images * std + mean).clamp(0, 1)


LoadedDataset = FastDataset | AugmentedDataset


def build_dataset(
    is_train: bool,
    args: Namespace,
    device: torch.device = CPU,
    images: DataConfig | None = None,
    classes: tuple[Sequence[str], str] | None = None,
) -> tuple[LoadedDataset, int]:
    """Return a split of the dataset under its augmentation, and the number of classes.

    Args:
        is_train: Build the training split (else validation).
        args: The flags.
        device: Device of the model.
        images: Preprocessing; see :func:`build_augmentation`.
        classes: Class names of a model to evaluate, by which images are numbered if both have
            names, and its name for messages.

    Raises:
        DataError: Data is missing or inconsistent, or flags are.
    """
    name = data_set_name(args)
    if (own := HoldOut.of(vars(args)) or args.labels) and not is_image_folder(args):
        flag = own if isinstance(own, HoldOut) else f"--labels {own}"
        where = f"--data-set {name} has a validation set" if args.data_path else "give --data-path"
        raise DataError(f"{flag} is for image folders: {where}")
    source = data_set_named(name).open(args, is_train)
    if classes is not None and not _by_position(source.classes, classes[0]):
        source = source.in_classes(classes[0], "the evaluation set", classes[1])
    if is_train:
        source = share_of(source, args.sampling_ratio)
    return augmented(source, is_train, args, device, images), len(source.classes)


def _by_position(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return True for as many classes, of which one or the other have numbers, not names."""
    numbers = [str(number) for number in range(len(names))]
    return len(names) == len(others) and numbers in (list(map(str, names)), list(others))


def augmented(
    source: Source,
    is_train: bool,
    args: Namespace,
    device: torch.device = CPU,
    images: DataConfig | None = None,
) -> LoadedDataset:
    """Return the dataset of a source for the flags' ``--loader``; see :func:`build_dataset`.

    Raises:
        DataError: Flags are inconsistent.
    """
    images = images or choose_images(args)
    source = source.decoded_as(images.exif, images.is_grey)
    augmentation = build_augmentation(is_train, args, images)
    options = {"seed": args.seed, "skip_corrupt": args.on_corrupt == "skip"}
    if args.loader == "timm":
        return AugmentedDataset(source, augmentation, is_train, **options)
    on_device = device.type == "cuda" if args.augment_on == "auto" else args.augment_on == "device"
    if args.decode_on_device and not on_device:
        raise DataError("--decode-on-device needs --augment-on device")
    pixels = len(source) * math.prod(augmentation.shape)
    return FastDataset(
        source,
        augmentation,
        is_train,
        augment=not on_device,
        resident=on_device and _fits(pixels, device),
        decode=not args.decode_on_device,
        **options,
    )


def _fits(pixels: int, device: torch.device) -> bool:
    """Return True if images of so many pixels take at most a tenth of the free memory."""
    if device.type != "cuda":
        return True  # they are in memory already
    free, _ = torch.cuda.mem_get_info(device)
    return 3 * pixels <= free / 10


def loader_options(args: Namespace) -> dict[str, Any]:
    """Return the options that all data loaders share."""
    return {
        "worker_init_fn": worker_init_fn,
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and torch.cuda.is_available(),
        "persistent_workers": args.num_workers > 0,
        "collate_fn": identity,
        # a separate one, so that the number of workers does not change the run's random numbers
        "generator": torch.Generator(),
    }


def identity(batch: Batch | RawBatch) -> Batch | RawBatch:
    """Return a batch as it is: datasets collate their batches themselves."""
    return batch


def build_train_loader(
    dataset: LoadedDataset,
    args: Namespace,
    num_replicas: int,
    rank: int,
    sampler: RASampler | None = None,
) -> DataLoader:
    """Return the loader of this rank's part of the training set.

    Its ``sampler`` has ``set_epoch``; a given one is of another loader of the same images.

    Raises:
        DataError: ``--batch-size`` is larger than a rank's part.
    """
    if sampler is None:
        sampler = RASampler(
            len(dataset),
            num_replicas,
            rank,
            args.batch_size,
            num_repeats=3 if args.repeated_aug else 1,
            seed=args.seed,
            shards=dataset.source.shards,
            targets=dataset.source.targets if args.balanced_sampling else None,
        )
        if args.batch_size > len(sampler):
            pairs = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax
            most = len(sampler) // 2 * 2 if pairs else len(sampler)
            advice = f"--batch-size {most}" if most else "--mixup 0 --cutmix 0 --batch-size 1"
            raise DataError(
                f"--batch-size {args.batch_size} is larger than the training set: {len(dataset)} "
                f"images over {num_replicas} process(es) leave {len(sampler)} each: give {advice}"
            )
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=sampler,
        drop_last=True,
        **loader_options(args),
    )


def build_eval_loader(
    dataset: LoadedDataset, args: Namespace, num_replicas: int, rank: int
) -> DataLoader:
    """Return the loader of this rank's part of the evaluation set."""
    batch_size = max(1, int(EVAL_BATCH_FACTOR * args.batch_size))
    sampler = EvalBatchSampler(len(dataset), batch_size, num_replicas, rank)
    return DataLoader(dataset, batch_sampler=sampler, **loader_options(args))


def build_prefetcher(
    loader: DataLoader,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Prefetcher:
    """Return an iterable of a loader's batches on the device, ready for the model.

    Args:
        loader: Loader of :func:`build_train_loader` or :func:`build_eval_loader`.
        device: Target device.
        dtype, memory_format: Type and layout of the images.
    """
    placement = (device, dtype, memory_format)
    if isinstance(loader.dataset, AugmentedDataset):
        return Prefetcher(loader, lambda batch: to_device(batch, *placement), device)
    return Prefetcher(loader, BatchFinalizer(loader.dataset, *placement), device)
