"""The nets and images that pictures are made of."""

import difflib
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision import transforms

import datasets
import models
from models.checkpoint.contents import num_classes_of, state_dict_of
from pipeline.images import DataError, load_image
from pipeline.sources.folder import list_images
from utils import UserError

EVAL_CROP_RATIO = 0.875  # main.py's default
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")


@dataclass(frozen=True)
class Subject:
    """A net in evaluation mode, in float32, and how it wants its images.

    Attributes:
        model: The net, on its device.
        name: Of the model.
        label: What titles call it.
        epoch: The last epoch that its weights have seen, from 0; None if not known, and in the
            middle of one.
        size: Height and width of its images, in pixels.
        crop_ratio: Share of the resized image's side that the centre crop keeps.
        mean, std: Of the normalisation.
        resampled: Whether position embeddings or tables are of another size than in the file.
    """

    model: nn.Module
    name: str
    label: str
    epoch: int | None
    size: int
    crop_ratio: float = EVAL_CROP_RATIO
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    resampled: bool = False

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return next(self.model.parameters()).device

    def normalized(self, pictures: torch.Tensor) -> torch.Tensor:
        """Images ``B 3 H W`` of values in 0..1 as the net wants them, on its device."""
        normalize = transforms.Normalize(self.mean, self.std)
        return normalize(pictures).to(self.device)


def device_of(args: Namespace) -> torch.device:
    """``--device``, or CUDA if present, else the CPU.

    Raises:
        UserError: It does not exist here.
    """
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch finds no CUDA device: use --device cpu")
    return torch.device(name)


def load_subject(what: str, args: Namespace) -> Subject:
    """The net of a checkpoint file, or the registered model of a name.

    Args:
        what: File or address of a checkpoint, or a name of ``timm.list_models()``.
        args: The flags ``model``, ``pretrained``, ``weights``, ``input_size``, ``device``.

    Raises:
        UserError: It is neither, a flag does not go with it, or weights are not finite.
        CheckpointError, ModelError: It cannot be read or built, or not for this size.
    """
    is_file = Path(what).exists() or what.startswith(("http://", "https://"))
    if not is_file and not timm.is_model(what):
        near = difflib.get_close_matches(what, timm.list_models(), n=3)
        hint = f"the nearest are {', '.join(near)}" if near else "timm.list_models() lists models"
        raise UserError(f"{what!r} is neither a checkpoint file nor a model; {hint}")
    subject = (_from_file if is_file else _from_name)(what, args)
    for name, value in subject.model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{what}: {name} has values that are not finite")
    models.check_input_size(subject.model, subject.label, subject.size)
    return subject


def _from_file(path: str, args: Namespace) -> Subject:
    if args.pretrained:
        raise UserError(f"--pretrained goes with the name of a model, not with {path}")
    checkpoint = models.read_checkpoint(path)
    name = args.model or checkpoint.get("model_name")
    if name is None:
        raise models.ModelError(f"{path} does not say which model it is: give --model NAME")
    ema = args.weights == "ema"
    saved = dict(checkpoint.get("model_kwargs") or {})
    if "num_classes" not in saved:
        saved["num_classes"] = num_classes_of(state_dict_of(checkpoint, path, ema)[0], name)
    required = {"num_classes": saved.pop("num_classes")}
    size = checkpoint.get("input_size") if args.input_size is None else args.input_size
    if size is not None:
        saved["img_size"] = size
    model, kwargs = models.build_model(name, required, saved)
    report = models.load_weights(model, checkpoint, path, ema=ema)
    flags = models.flags_of_run(checkpoint) or {}
    mean, std = models.normalization_of(checkpoint, model.pretrained_cfg)
    epoch = checkpoint.get("epoch")
    return Subject(
        model=model.to(device_of(args)).eval(),
        name=f"{name}{', EMA' if ema else ''}",
        label=f"{name}, {Path(path).name}{', EMA' if ema else ''}",
        epoch=epoch if isinstance(epoch, int) and not checkpoint.get("step") else None,
        size=_size(model, kwargs.get("img_size") if size is None else size),
        mean=mean,
        std=std,
        crop_ratio=flags.get("eval_crop_ratio") or EVAL_CROP_RATIO,
        resampled=bool(report.resampled),
    )


def _from_name(name: str, args: Namespace) -> Subject:
    if args.weights == "ema":
        raise UserError(f"--weights ema goes with a checkpoint, not with the model {name}")
    if args.model:
        raise UserError(f"--model {args.model} goes with a checkpoint, {name} is a model")
    optional: dict[str, Any] = {"img_size": args.input_size}
    if args.pretrained:
        try:
            model, kwargs = models.build_model(name, {"pretrained": True}, optional)
        except models.ModelError:
            raise
        except Exception as error:  # what fetches the weights raises errors of any kind
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise models.ModelError(f"no pretrained weights of {name}: {reason}") from error
    else:
        torch.manual_seed(args.seed)
        model, kwargs = models.build_model(name, {}, optional)
    mean, std = models.normalization_of({}, model.pretrained_cfg)
    return Subject(
        model=model.to(device_of(args)).eval(),
        name=name,
        label=f"{name}, {'pretrained' if args.pretrained else 'random weights'}",
        epoch=None,
        size=_size(model, kwargs.get("img_size") if args.input_size is None else args.input_size),
        mean=mean,
        std=std,
    )


def _size(model: nn.Module, size: int | Sequence[int] | None) -> int:
    """The size asked for, else the one that the model was made for."""
    if size is None:
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    return size if isinstance(size, int) else max(size)


@dataclass(frozen=True)
class Snapshot:
    """Numbers of a net by layer.

    Attributes:
        subject: The net.
        values: By the layer's name, one per head: ``h``.
    """

    subject: Subject
    values: dict[str, torch.Tensor]

    @property
    def epoch(self) -> int | None:
        """See :class:`Subject`."""
        return self.subject.epoch

    @property
    def net(self) -> str:
        """What checkpoints of one run have in common."""
        return f"{self.subject.name}, {self.subject.size} pixels"


def in_order(
    snapshots: Sequence[Snapshot], paths: Sequence[str]
) -> tuple[list[Snapshot], list[str]]:
    """Snapshots by their epochs, one for each, and notes of those that are left out.

    Raises:
        UserError: The epoch of one among several is not known, or they are of different nets.
    """
    if len(snapshots) == 1:
        return list(snapshots), []
    chosen: dict[int, tuple[Snapshot, str]] = {}
    notes = []
    for snapshot, path in zip(snapshots, paths, strict=True):
        epoch = snapshot.epoch
        if epoch is None:
            raise UserError(
                f"{path} does not say its epoch, by which several are ordered, or is of the middle "
                f"of one: give it alone"
            )
        if (snapshot.net, _shape(snapshot)) != (snapshots[0].net, _shape(snapshots[0])):
            raise UserError(
                f"{path} is of another net ({snapshot.net}) than {paths[0]} ({snapshots[0].net}): "
                f"give checkpoints of one, at one --input-size"
            )
        if epoch in chosen:
            notes.append(f"{path} left out: of epoch {epoch}, as {chosen[epoch][1]} is")
        else:
            chosen[epoch] = snapshot, path
    return [chosen[epoch][0] for epoch in sorted(chosen)], notes


def _shape(snapshot: Snapshot) -> dict[str, int]:
    return {name: len(values) for name, values in snapshot.values.items()}


def load_pictures(subject: Subject, paths: Sequence[str | Path]) -> torch.Tensor:
    """Images as the net sees them in evaluation, before normalisation: ``B 3 H W`` in 0..1.

    Args:
        subject: The net.
        paths: Image files; a folder stands for the first one within it.

    Raises:
        CorruptImageError: One cannot be decoded.
        DataError: A folder holds none.
    """
    files = [find_images(path, 1)[0] if Path(path).is_dir() else path for path in paths]
    flags = Namespace(input_size=subject.size, eval_crop_ratio=subject.crop_ratio)
    *steps, _ = datasets.build_transform(False, flags).transforms  # without the normalisation
    view = transforms.Compose(steps)
    return torch.stack([view(load_image(file)) for file in files])


def find_images(folder: str | Path, count: int) -> list[Path]:
    """``count`` images spread evenly over all within ``folder``, sorted by path.

    Raises:
        DataError: There is no folder, or it has fewer images.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder} is no folder")
    if count < 1:
        raise DataError(f"--count {count} must be 1 at least")
    paths = map(Path, list_images(root, suffixes=IMAGE_ENDINGS, hidden=True))
    found = sorted(path for path in paths if path.is_file())
    if len(found) < count:
        raise DataError(f"{folder} has {len(found)} image(s), and {count} are wanted")
    return [found[index * len(found) // count] for index in range(count)]
