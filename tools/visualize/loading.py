"""Models and images to visualize."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

import datasets
import models
from pipeline.images import DataError, load_image
from pipeline.sources.folder import list_images
from tools import networks
from training.launch import DistInfo, select_device
from utils import UserError

ENDINGS = (*IMG_EXTENSIONS, ".gif")


class LoadedModel(NamedTuple):
    """A model in evaluation mode, in float32, and its preprocessing."""

    module: nn.Module  # on its device
    name: str  # model name and weights, the same for all checkpoints of a run
    label: str  # in titles
    epoch: int | None  # last one that the weights have seen, from 0; None if unknown or unfinished
    size: int  # height and width of the images in pixels
    crop_ratio: float  # fraction of the resized image that the centre crop keeps
    normalize: transforms.Normalize  # for images in 0..1
    resampled: bool = False  # position embeddings or tables have another size in the checkpoint

    @property
    def network(self) -> str:
        """Description that checkpoints of one run share."""
        return f"{self.name}, {self.size} pixels"

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize images ``B 3 H W`` in 0..1 and move them to the device."""
        return self.normalize(images).to(next(self.module.parameters()).device)


def load_model(what: str, args: Namespace) -> LoadedModel:
    """Load a checkpoint (file or URL), or build the registered model of a name.

    UserError is raised for anything else, flags that do not apply, weights that are not finite, and
    models that cannot be read or built for ``--input-size``.
    """
    source = _source(what, args)
    torch.manual_seed(args.seed)
    size = args.input_size or (source.input_size if source.checkpoint else None)
    module, kwargs = source.build_with_kwargs(size)
    report = source.load(module, args.weights)
    for name, value in module.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{what}: {name} has values that are not finite")
    size = size or kwargs.get("img_size") or module.pretrained_cfg["input_size"][1:]
    kind = ", EMA" if args.weights == "ema" else ""
    label = f"{Path(what).name}{kind}"
    if not source.checkpoint:
        label = "pretrained" if args.pretrained else "random weights"
    epoch = source.checkpoint.get("epoch")
    model = LoadedModel(
        module=module.to(select_device(args.device, DistInfo())).eval(),
        name=f"{source.name}{kind}",
        label=f"{source.name}, {label}",
        epoch=epoch if isinstance(epoch, int) and not source.checkpoint.get("step") else None,
        size=size if isinstance(size, int) else max(size),
        crop_ratio=source.crop_ratio,
        normalize=transforms.Normalize(*source.normalization(module)),
        resampled=bool(report and report.resampled),
    )
    models.check_input_size(model.module, model.label, model.size)
    return model


def _source(what: str, args: Namespace) -> networks.ModelSource:
    if Path(what).exists() or what.startswith(("http://", "https://")):
        if args.pretrained:
            raise UserError(f"--pretrained applies to a model name, not to the checkpoint {what}")
        return networks.from_checkpoint(what, args.model)
    try:
        source = networks.from_name(what, args.pretrained)
    except models.ModelError as error:
        raise UserError(f"{what} is not a checkpoint file, and {error}") from error
    if args.weights == "ema":
        raise UserError(f"--weights ema applies to a checkpoint, not to the model name {what}")
    if args.model:
        raise UserError(f"--model {args.model} applies to a checkpoint, and {what} is a model name")
    return source


def load_images(model: LoadedModel, paths: Sequence[str | Path]) -> torch.Tensor:
    """Load images as in evaluation, but not normalized: ``B 3 H W`` in 0..1.

    A folder stands for its first image.
    """
    files = [find_images(path, 1)[0] if Path(path).is_dir() else path for path in paths]
    flags = Namespace(input_size=model.size, eval_crop_ratio=model.crop_ratio)
    view = transforms.Compose(datasets.build_transform(False, flags).transforms[:-1])
    return torch.stack([view(load_image(file)) for file in files])


def find_images(folder: str | Path, count: int) -> list[Path]:
    """Return ``count`` images spread evenly over all within ``folder``, sorted by path.

    DataError is raised if the folder does not exist, or has fewer images.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder")
    paths = map(Path, list_images(folder, suffixes=ENDINGS, hidden=True))
    found = sorted(path for path in paths if path.is_file())
    if len(found) < count:
        raise DataError(f"{folder} has {len(found)} image(s), fewer than {count}")
    return [found[index * len(found) // count] for index in range(count)]
