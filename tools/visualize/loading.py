"""Models and images to visualize."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torchvision import transforms
from torchvision.transforms.functional import normalize

import datasets
import models
from models import DataConfig, size_text
from pipeline.images import DataError, load_image
from pipeline.sources.listing import list_images
from training.launch import DistInfo, select_device
from utils import UserError


class LoadedModel(NamedTuple):
    """A model in evaluation mode, in float32, and its preprocessing."""

    module: nn.Module  # on its device
    name: str  # model name and weights, the same for all checkpoints of a run
    label: str  # in titles
    epoch: int | None  # last one that the weights have seen, from 0; None if unknown or unfinished
    images: DataConfig  # preprocessing of its images
    resampled: bool = False  # position embeddings or tables have another size in the checkpoint

    @property
    def size(self) -> int | tuple[int, int]:
        """Side of the images in pixels, or height and width."""
        return self.images.size

    @property
    def network(self) -> str:
        """Description that checkpoints of one run share."""
        return f"{self.name}, {size_text(self.size)} pixels"

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize images ``B 3 H W`` in 0..1 and move them to the device."""
        images = images[:, : self.images.in_chans]
        normalized = normalize(images, self.images.mean, self.images.std)
        return normalized.to(next(self.module.parameters()).device)


def load_model(what: str, args: Namespace) -> LoadedModel:
    """Load a model from any source of :func:`models.load_model`; a name has random weights.

    UserError is raised for anything else, flags that do not apply, weights that are not finite, and
    models that cannot be read or built for ``--input-size``.
    """
    source = models.find_model(what, args.model, pretrained=args.pretrained)
    if args.pretrained and not source.pretrained:
        raise UserError(f"--pretrained applies to a model name, not to the checkpoint {what}")
    torch.manual_seed(args.seed)
    found = models.load_model(source, weights=args.weights, input_size=args.input_size)
    for name, value in found.model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{what}: {name} has values that are not finite")
    kind = ", EMA" if args.weights == "ema" else ""
    label = f"{Path(what).name}{kind}"
    if not source.checkpoint:
        label = "pretrained" if args.pretrained else "random weights"
    epoch = source.checkpoint.get("epoch")
    exif = getattr(args, "exif", None)  # of the kinds that read images
    model = LoadedModel(
        module=found.model.to(select_device(args.device, DistInfo())),
        name=f"{source.name}{kind}",
        label=f"{source.name}, {label}",
        epoch=epoch if isinstance(epoch, int) and not source.checkpoint.get("step") else None,
        images=found.data_config if exif is None else replace(found.data_config, exif=exif),
        resampled=bool(found.report and found.report.resampled),
    )
    models.check_input_size(model.module, model.label, model.images.size, model.images.in_chans)
    return model


def load_images(model: LoadedModel, paths: Sequence[str | Path]) -> torch.Tensor:
    """Load images as in evaluation, but not normalized: ``B 3 H W`` in 0..1.

    A folder stands for its first image.
    """
    files = [find_images(path, 1)[0] if Path(path).is_dir() else path for path in paths]
    transform = datasets.build_transform(False, Namespace(), model.images)
    steps = 2 if model.images.is_grey else 1  # that choose a channel and normalize
    view = transforms.Compose(transform.transforms[:-steps])
    return torch.stack(
        [view(load_image(file, model.images.exif, model.images.is_grey)) for file in files]
    )


def find_images(folder: str | Path, count: int) -> list[Path]:
    """Return ``count`` images spread evenly over all within ``folder``, sorted by path.

    DataError is raised if the folder does not exist, or has fewer images.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder")
    listing = list_images(folder)
    found = sorted(path for path in map(Path, listing.paths) if path.is_file())
    if len(found) < count:
        left_out = listing.left_out.note()
        raise DataError(f"{folder} has {len(found)} image(s), fewer than {count}{left_out}")
    return [found[index * len(found) // count] for index in range(count)]
