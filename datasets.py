"""Datasets, augmentation and loaders."""

import contextlib
import ctypes
import os
import random
import signal
import stat
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from samplers import Draw, EvalBatchSampler, RASampler, mix_seed

SMALL_SIZE = 32
EVAL_BATCH_FACTOR = 1.5
MAX_ASPECT = 8
# Pillow also reads formats that it recognises by guesswork, or by calling Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
GREY_OF_16_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # 0..65535 to 0..255


class DataError(RuntimeError):
    """The data cannot be used as given; the message names the path and what would be right."""


class CorruptImageError(DataError):
    """An image file cannot be decoded."""


@dataclass(frozen=True)
class DataSet:
    """What ``--data-set`` stands for.

    Attributes:
        open: ``(root, is_train, download) -> dataset`` of PIL images with ``classes``.
        default_path: Where the files lie if ``--data-path`` is not given, ``None`` if it must be.
        input_size: Size of the network's input if ``--input-size`` is not given.
        hflip: Probability of mirroring a training image.
    """

    open: Callable[[Path, bool, bool], Dataset]
    default_path: str | None
    input_size: int = 224
    hflip: float = 0.5


class Digits(Dataset):
    """The 1,797 handwritten digits that scikit-learn brings, 8x8 grey, as RGB images.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998. Of each
    class every fifth image is kept for validation (1,442 for training, 355 for validation).
    """

    def __init__(self, is_train: bool):
        from sklearn.datasets import load_digits  # optional: only this dataset needs it

        digits = load_digits()
        self.classes = [str(digit) for digit in range(10)]
        self.targets: list[int] = []
        self.images: list[np.ndarray] = []
        seen = [0] * 10
        for grey, target in zip(digits.images, digits.target.tolist(), strict=True):
            seen[target] += 1
            if (seen[target] % 5 != 0) == is_train:
                self.images.append(np.round(grey * (255 / 16)).astype(np.uint8))
                self.targets.append(target)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.targets[index]


def load_image(path: str | Path) -> Image.Image:
    """Decode an image file to RGB, 8 bits a channel.

    The format is told by the content, not by the name. Of several frames or pages the first
    counts. As in the published results, alpha is dropped, and neither the EXIF orientation nor a
    colour profile is applied. Grey of 16 bits is scaled to 8. Up to 179 million pixels (twice
    ``PIL.Image.MAX_IMAGE_PIXELS``) are decoded without a warning, more are an error.

    Raises:
        CorruptImageError: The file is missing, no regular file, truncated, no image, too large,
            or of a colour mode without a defined range; names the path and the reason.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
            raise OSError("not a regular file")
        if status.st_size == 0:
            raise OSError("empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF, palette transparency, many pixels
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                return _to_rgb(image)
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:  # on damaged files the decoders raise errors of any kind
        raise CorruptImageError(f"cannot decode image {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What ``error`` says, in one line and never empty, without the path."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; where Pillow would clip 16 bits to white, scale to 8 bits.

    Raises:
        ValueError: The values have no defined range.
    """
    if image.mode == "F":
        raise ValueError("mode F (floating point) has no defined range of values")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= 2**16:
            raise ValueError(
                f"mode I (32-bit integers) has no defined range of values: {low}..{high} is not"
                " within 0..65535"
            )
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF may have 12
        image = Image.fromarray(GREY_OF_16_BITS[values << max(0, 16 - bits)])
    return image.convert("RGB")


def open_image_folder(root: Path, is_train: bool, download: bool = False) -> ImageFolder:
    """ImageNet layout: ``train/CLASS/*`` and ``val/CLASS/*`` (or ``validation``).

    Raises:
        DataError: A folder is missing, a class has no image, or the two splits have
            different classes.
    """
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist (--data-path)")
    train = root / "train"
    val = next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)
    folder = train if is_train else val
    if folder is None or not folder.is_dir():
        wanted = "train/" if is_train else "val/ or validation/"
        raise DataError(f"{root} has no folder {wanted} (--data-path wants train/ and val/)")
    try:
        dataset = ImageFolder(str(folder), loader=load_image)
    except FileNotFoundError as error:  # no classes, or a class without images
        raise DataError(f"{folder}: {error}") from error
    other = val if is_train else train
    if other is not None and other.is_dir():
        others = {entry.name for entry in other.iterdir() if entry.is_dir()}
        if others != set(dataset.classes):
            lone = sorted(others ^ set(dataset.classes))
            raise DataError(
                f"{folder} and {other} have different classes: {', '.join(lone[:5])}"
                f"{', ...' if len(lone) > 5 else ''} in only one of them"
            )
    return dataset


def _open_cifar(cls: type[CIFAR10]) -> Callable[[Path, bool, bool], Dataset]:
    def open_cifar(root: Path, is_train: bool, download: bool) -> Dataset:
        try:
            return cls(str(root), train=is_train, download=download)
        except (RuntimeError, OSError) as error:
            hint = "" if download else "; --download fetches it"
            raise DataError(f"no {cls.__name__} in {root}: {error}{hint}") from error

    return open_cifar


def _open_digits(root: Path | None, is_train: bool, download: bool) -> Dataset:
    return Digits(is_train)


_FOLDER = DataSet(open_image_folder, default_path=None)
DATA_SETS = {
    "IMNET": _FOLDER,
    "IMNET100": _FOLDER,  # names of Visformer's command lines; classes are counted anyway
    "IMNET10": _FOLDER,
    "CIFAR": DataSet(_open_cifar(CIFAR100), default_path="./dataset"),
    "CIFAR10": DataSet(_open_cifar(CIFAR10), default_path="./dataset"),
    "CIFAR100": DataSet(_open_cifar(CIFAR100), default_path="./dataset"),
    "DIGITS": DataSet(_open_digits, default_path="", input_size=SMALL_SIZE, hflip=0.0),
}


def data_set_name(args: Namespace) -> str:
    """``--data-set``, or what its absence means: a folder if there is a path, else DIGITS."""
    return args.data_set or ("IMNET" if args.data_path else "DIGITS")


def input_size_of(args: Namespace) -> int:
    """``--input-size``, or the usual one of the dataset."""
    return args.input_size or DATA_SETS[data_set_name(args)].input_size


class Sample(NamedTuple):
    """One augmented image; ``image`` is None where the file is corrupt and skipped.

    ``corrupt`` has the message of each corrupt file met: ``cannot decode image PATH: WHY``.
    """

    image: torch.Tensor | None
    target: int
    corrupt: tuple[str, ...]


class Batch(NamedTuple):
    """Images ``B 3 H W``, targets ``B`` and the messages of the corrupt files met for them."""

    images: torch.Tensor
    targets: torch.Tensor
    corrupt: list[str]


class AugmentedDataset(Dataset):
    """Images under a transform whose random numbers depend on the draw alone.

    Args:
        images: Dataset of ``(PIL image, class)`` with ``classes`` and ``targets``.
        transform: PIL image to tensor ``3 H W``.
        seed: Seed of the run; with a :class:`Draw` as index, each draw has its own numbers.
        skip_corrupt: Instead of raising, replace a corrupt training image by the next sound
            one of its class, and leave a corrupt evaluation image out; both are reported.
        is_train: Whether these are training images.
    """

    def __init__(
        self,
        images: Dataset,
        transform: Callable[[Image.Image], torch.Tensor],
        is_train: bool,
        seed: int = 0,
        skip_corrupt: bool = False,
    ):
        self.images = images
        self.transform = transform
        self.is_train = is_train
        self.seed = seed
        self.skip_corrupt = skip_corrupt
        self.classes: Sequence[str] = images.classes
        self.targets = np.asarray(images.targets)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        (image, target), corrupt = self._read(int(index))
        if image is None:
            return Sample(None, target, corrupt)
        if not isinstance(index, Draw):
            return Sample(self.transform(image), target, corrupt)
        with random_numbers(mix_seed(self.seed, index.epoch, index, index.copy)):
            return Sample(self.transform(image), target, corrupt)

    def _read(self, index: int) -> tuple[tuple[Image.Image | None, int], tuple[str, ...]]:
        """The image of ``index``, or what stands for it, and the messages of corrupt files."""
        corrupt: tuple[str, ...] = ()
        for candidate in self._candidates(index):
            try:
                return self.images[candidate], corrupt
            except CorruptImageError as error:
                if not self.skip_corrupt:
                    raise
                corrupt += (str(error),)
        if self.is_train:
            name = self.classes[self.targets[index]]
            raise DataError(f"class {name} has no image that can be decoded")
        return (None, int(self.targets[index])), corrupt

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        if self.is_train and self.skip_corrupt:
            same = np.flatnonzero(self.targets == self.targets[index])
            start = int(np.searchsorted(same, index))
            yield from (int(same[(start + i) % len(same)]) for i in range(1, len(same)))


@contextlib.contextmanager
def random_numbers(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch's CPU generator; in the main process only for the block.

    A loader worker has no other use of random numbers, so there the state is not restored.
    """
    restore = get_worker_info() is None
    if restore:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if restore:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class CropLongSide:
    """Crop an image around its centre to at most 8 times its short side.

    Resizing 30000x10 pixels by the short side to 256 would make 768000x256 of them, 790 MB.
    Other images pass untouched.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        longest = MAX_ASPECT * min(image.size)
        if max(image.size) <= longest:
            return image
        size = [min(image.height, longest), min(image.width, longest)]
        return transforms.functional.center_crop(image, size)


class EnlargeTiny:
    """Repeat the pixels of an image of fewer than 5 pixels 4 times in each direction.

    Of so few, timm's random crop may take a part whose sides round to 0. Other images pass
    untouched.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.width * image.height >= 5:
            return image
        return image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST)


def build_transform(is_train: bool, args: Namespace) -> transforms.Compose:
    """DeiT's augmentation for training, resize and centre crop for evaluation.

    Inputs of at most 32 pixels are padded by 4 and cropped for training, and resized whole for
    evaluation. Before a resize by the short side, images longer than 8:1 are cropped to that.
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
        normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        return transforms.Compose([*resize, transforms.ToTensor(), normalize])

    standard = args.std_aug
    three_augment = args.ThreeAugment
    transform = create_transform(
        input_size=size,
        is_training=True,
        hflip=DATA_SETS[data_set_name(args)].hflip,
        color_jitter=None if standard else args.color_jitter,
        auto_augment=None if standard else "3a" if three_augment else args.aa,
        interpolation=args.train_interpolation,
        re_prob=0.0 if standard else args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
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
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    return (images * std + mean).clamp(0, 1)


def keep_posterize_possible(transform: transforms.Compose) -> None:
    """Let RandAugment's posterize keep at least one bit.

    At the highest magnitudes timm asks for 0 bits, which Pillow refuses.
    """
    for step in transform.transforms:
        for operation in getattr(step, "ops", ()):
            if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
                operation.level_fn = _AtLeastOneBit(operation.level_fn)


@dataclass(frozen=True)
class _AtLeastOneBit:
    level_fn: Callable

    def __call__(self, level: float, hparams: dict) -> tuple[int]:
        return (max(self.level_fn(level, hparams)[0], 1),)


def build_dataset(is_train: bool, args: Namespace) -> tuple[AugmentedDataset, int]:
    """The training or validation set under its transform, and the number of classes.

    Raises:
        DataError: The data is missing or inconsistent.
    """
    name = data_set_name(args)
    data_set = DATA_SETS[name]
    path = args.data_path or data_set.default_path
    if path is None:
        raise DataError(f"--data-set {name} needs --data-path")
    dataset = AugmentedDataset(
        data_set.open(Path(path), is_train, args.download),
        build_transform(is_train, args),
        is_train=is_train,
        seed=args.seed,
        skip_corrupt=args.on_corrupt == "skip",
    )
    return dataset, len(dataset.classes)


def collate(samples: list[Sample]) -> Batch:
    """Stack the sound samples; gather the messages of the corrupt files."""
    corrupt = [message for sample in samples for message in sample.corrupt]
    sound = [(sample.image, sample.target) for sample in samples if sample.image is not None]
    if not sound:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), corrupt)
    return Batch(*default_collate(sound), corrupt)


def die_with_parent(number: int) -> None:
    """Let the system send this process a signal when the one that started it ends (Linux)."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended meanwhile
            os.kill(os.getpid(), number)


def settle_worker(worker: int) -> None:
    """Leave signals to the process that this loader process works for, and die with it.

    A terminal, Slurm and torchrun send what asks a run to stop to all of its processes, and the
    step at hand needs its data still. Only that process itself may end this one.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it tells who sent a signal; macOS does not have it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    die_with_parent(signal.SIGKILL)


def _obey(parent: int) -> None:
    """End this process when its parent asks for it, and nobody else."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)


def _loader_options(args: Namespace) -> dict:
    return {
        "worker_init_fn": settle_worker,
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and torch.cuda.is_available(),
        "persistent_workers": args.num_workers > 0,
        "collate_fn": collate,
        # of its own, so that the number of workers does not change the run's random numbers
        "generator": torch.Generator(),
    }


def build_train_loader(
    dataset: AugmentedDataset, args: Namespace, num_replicas: int, rank: int
) -> DataLoader:
    """Loader of this rank's part of the training set; ``loader.sampler`` has ``set_epoch``.

    Raises:
        DataError: A batch is larger than a rank's part.
    """
    repeats = 3 if args.repeated_aug else 1
    sampler = RASampler(
        len(dataset), num_replicas, rank, args.batch_size, num_repeats=repeats, seed=args.seed
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
    dataset: AugmentedDataset, args: Namespace, num_replicas: int, rank: int
) -> DataLoader:
    """Loader of this rank's batches of the evaluation set."""
    batch_size = max(1, int(EVAL_BATCH_FACTOR * args.batch_size))
    sampler = EvalBatchSampler(len(dataset), batch_size, num_replicas, rank)
    return DataLoader(dataset, batch_sampler=sampler, **_loader_options(args))
