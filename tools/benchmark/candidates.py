"""Models of this repository and of its peers, and the configurations that they run in.

A configuration is ``eager``, or some of ``deploy``, ``channels_last``, ``checkpoint`` and
``compile`` joined by ``+``, applied in this order.
"""

import copy
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import nn

import engine
import models
from models import vit
from models.layers import set_fused_attention
from tools.benchmark import measure
from tools.flops import size_options
from training.compilation import compiled
from training.joined import join_kernels
from utils import UserError

# timm's names of models that have another name here
TRANSFORMS = ("deploy", "channels_last", "checkpoint", "compile")
CONFIGS = {
    "infer": ("eager", "channels_last", "deploy", "deploy+channels_last"),
    "train": ("eager", "channels_last"),
}


def default_configs(mode: str, device: str) -> list[str]:
    """Return the configurations to compare.

    Compilation takes longer than the whole measurement on a CPU: there it must be requested.
    """
    compiled = [name for name in CONFIGS[mode] if "channels_last" in name and device == "cuda"]
    return [*CONFIGS[mode], *(f"{name}+compile" for name in compiled)]


@dataclass(frozen=True)
class Peer:
    """An original repository, checked out in ``folder``; ``kwargs`` of its model functions."""

    folder: Path
    kwargs: dict

    @property
    def side(self) -> str:
        """Return the name of the folder."""
        return self.folder.resolve().name


@dataclass(frozen=True)
class Case:
    """One measurement."""

    mode: str  # infer or train
    model: str
    side: str  # implementation, see :func:`build`
    config: str
    batch: int
    dtype: str  # of inference models, and of training under autocast
    device: str  # cpu or cuda
    size: int | tuple[int, int]  # side of the images, or height and width
    peer: Peer | None = None
    tf32: bool = True  # on CUDA, multiply float32 in TF32

    @property
    def label(self) -> str:
        """Return side and configuration."""
        return f"{self.side} {self.config}"

    def step(self) -> Callable[[], None]:
        """Return a function that does one step.

        Inference is the forward pass alone. A training step is a forward pass, cross-entropy, the
        backward pass and fused AdamW, the same for all; the small kernels of ours are joined as
        ``main.py`` does.
        """
        engine.select_kernels(torch.device(self.device), self.tf32)
        train, dtype = self.mode == "train", getattr(torch, self.dtype)
        model = build(self.side, self.model, self.peer, self.size).train(train).to(self.device)
        if train and self.side in ("ours", "explicit") and "compile" not in self.config:
            join_kernels(model)
        model = configure(model if train else model.to(dtype), self.side, self.config)
        last = "channels_last" in self.config
        image = torch.randn(self.batch, 3, *models.height_and_width(self.size), device=self.device)
        image = image.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        if not train:
            image = image.to(dtype)
            return torch.inference_mode()(lambda: model(image))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        target = torch.randint(1000, (self.batch,), device=self.device)

        def update() -> None:
            optimizer.zero_grad()
            with torch.autocast(self.device, dtype, enabled=dtype is not torch.float32):
                loss = F.cross_entropy(model(image), target)
            loss.backward()
            optimizer.step()

        return update

    def peak(self) -> float:
        """Return the peak memory of this process in MiB after a few steps."""
        step = self.step()
        step()
        step()
        return measure.peak_memory(self.device)


def timm_entrypoint(name: str) -> Callable[..., nn.Module] | None:
    """Return timm's own function, also where this repository's replaces it, or None."""
    if not models.is_own_model(name):
        return timm.model_entrypoint(name)
    name = vit.NAMES.get(name, name)
    own = timm.models
    modules = (own.visformer, own.convit, own.fastvit, own.vision_transformer)
    return next((getattr(module, name) for module in modules if hasattr(module, name)), None)


@contextmanager
def _modules_of(folder: Path) -> Iterator[None]:
    """Import from ``folder`` first within the block; restore modules and timm's registry after."""
    tops = {path.stem for path in folder.iterdir() if path.suffix in ("", ".py")}
    hidden = {name: m for name, m in sys.modules.items() if name.split(".")[0] in tops}
    registry = timm.models._registry
    copies = {
        name: copy.copy(value)
        for name, value in vars(registry).items()
        if not name.startswith("__") and isinstance(value, dict | set)
    }
    for name in hidden:
        del sys.modules[name]
    try:
        with (
            mock.patch.multiple(registry, **copies),
            mock.patch.object(sys, "path", [str(folder), *sys.path]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(hidden)


def peer_entrypoint(folder: Path, name: str) -> Callable[..., nn.Module]:
    """Return the function ``name`` of a top-level module or package of an original repository.

    Modules that cannot be imported are named with the reason.
    """
    if not folder.is_dir():
        raise UserError(f"--peer-path {folder} is not a folder")
    files = sorted(path.stem for path in folder.glob("*.py"))
    packages = sorted(path.parent.name for path in folder.glob("*/__init__.py"))
    reasons = []
    with _modules_of(folder):
        for module in [*files, *packages]:
            sources = [folder / f"{module}.py", *folder.glob(f"{module}/*.py")]
            texts = (path.read_text(errors="replace") for path in sources if path.is_file())
            if not any(f"def {name}(" in text for text in texts):
                continue
            try:
                found = getattr(importlib.import_module(module), name, None)
            except Exception as error:  # foreign code may raise anything
                reasons.append(f"{module} cannot be imported: {type(error).__name__}: {error}")
                continue
            if callable(found):
                return found
    why = "; ".join(reasons) or f"no file defines {name}()"
    raise UserError(f"--peer-path {folder} does not have model {name}: {why}")


def equal_vit(name: str, **options) -> nn.Module:
    """Return timm's Vision Transformer with the width, depth and heads of the ConViT ``name``."""
    with torch.device("meta"):
        convit = timm.create_model(name)
    return timm.models.VisionTransformer(
        patch_size=convit.patch_size,
        embed_dim=convit.embed_dim,
        depth=len(convit.blocks),
        num_heads=convit.blocks[0].attn.num_heads,
        qkv_bias=False,
        **options,
    )


def build(
    side: str, name: str, peer: Peer | None = None, size: int | tuple[int, int] | None = None
) -> nn.Module:
    """Return the model ``name`` as ``side`` implements it, with random weights.

    ``side`` is ``ours``; ``timm``; ``explicit``, ours with attention written out; ``ViT``, a plain
    one of equal width; else the ``side`` of ``peer``.
    """
    options = size_options(name, size)
    if side in ("ours", "explicit"):
        model = timm.create_model(name, **options)
        set_fused_attention(model, side == "ours")
        return model
    if side == "ViT":
        return equal_vit(name, **options)
    if side == "timm":
        return timm_entrypoint(name)(**options)
    return peer_entrypoint(peer.folder, name)(**peer.kwargs)


def sides_of(name: str, peer: Peer | None) -> list[str]:
    """Return the implementations of ``name``: ours first, if it is ours, then the peers.

    V2 (not in timm) is compared with itself, its attention written out; a ConViT also with a
    plain Vision Transformer of its width, depth and heads.
    """
    candidates = {
        "ours": models.is_own_model(name),
        "timm": timm_entrypoint(name) is not None,
        "explicit": name.startswith("swin_visformer"),
        peer.side if peer else "": peer is not None,
        "ViT": name.startswith("convit"),
    }
    return [side for side, exists in candidates.items() if exists]


def is_possible(side: str, config: str, model: nn.Module) -> bool:
    """Return True if a model has a configuration: most peers can neither deploy nor recompute."""
    if "checkpoint" in config:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            return False
    return "deploy" not in config or (side != "explicit" and models.is_fusible(model))


def configure(model: nn.Module, side: str, config: str) -> nn.Module:
    """Return ``model`` in a configuration."""
    for transform in config.split("+"):
        if transform == "deploy":
            model = models.fused(model, side)
        elif transform == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        elif transform == "checkpoint":
            model.set_grad_checkpointing(True)
        elif transform == "compile":
            model = compiled(model, "inductor")
        elif transform != "eager":
            raise UserError(
                f"unknown {transform!r} in --configs {config}; choose eager, or some of "
                f"{', '.join(TRANSFORMS)} joined by +"
            )
    return model
