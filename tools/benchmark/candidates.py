"""What is measured: a model of ours or of a peer, and the configuration that it runs in.

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
from types import ModuleType

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from models.layers import set_fused_attention
from tools.flops import size_options
from utils import UserError

# implementations of our names that timm has under another
TIMM_NAMES = {
    f"vit_{short}_{patch}_{size}": f"vit_{long}_patch{patch}_{size}"
    for short, long in (("b", "base"), ("l", "large"))
    for patch in (16, 32)
    for size in (224, 384)
}
TRANSFORMS = ("deploy", "channels_last", "checkpoint", "compile")
CONFIGS = {
    "infer": ("eager", "channels_last", "deploy", "deploy+channels_last"),
    "train": ("eager", "channels_last"),
}
# on the CPU, compilation takes longer than all of the measurement: there it is to be asked for
CUDA_CONFIGS = {
    "infer": (*CONFIGS["infer"], "channels_last+compile", "deploy+channels_last+compile"),
    "train": (*CONFIGS["train"], "channels_last+compile"),
}


def timm_entrypoint(name: str) -> Callable[..., nn.Module] | None:
    """timm's own function of that name, which ours hides in the registry; None if there is none."""
    name = TIMM_NAMES.get(name, name)
    for family in ("visformer", "convit", "fastvit", "vision_transformer"):
        module = importlib.import_module(f"timm.models.{family}")
        if name in getattr(module, "__all__", ()) or hasattr(module, name):
            return getattr(module, name)
    return None


@contextmanager
def _modules_of(folder: Path) -> Iterator[None]:
    """Let imports find the files of ``folder`` first; afterwards everything is as it was."""
    tops = {path.stem for path in folder.iterdir() if path.suffix in ("", ".py")}
    hidden = {name: m for name, m in sys.modules.items() if name.split(".")[0] in tops}
    registry = timm.models._registry
    registered = {
        key: copy.copy(value)
        for key, value in vars(registry).items()
        if not key.startswith("__") and isinstance(value, dict | set)
    }
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(hidden)
        for key, value in registered.items():
            vars(registry)[key].clear()
            vars(registry)[key].update(value)


def _find(module: ModuleType, name: str) -> Callable[..., nn.Module] | None:
    found = getattr(module, name, None)
    return found if callable(found) else None


def peer_entrypoint(folder: Path, name: str) -> Callable[[], nn.Module]:
    """The function ``name`` of an original repository: of a file at its top, or of ``models``.

    Raises:
        UserError: There is no such folder, or none of its files has the function; files
            that cannot be imported are named with the reason.
    """
    if not folder.is_dir():
        raise UserError(f"--peer-path {folder} is not a folder")
    files = sorted(path.stem for path in folder.glob("*.py"))
    packages = sorted(path.parent.name for path in folder.glob("*/__init__.py"))
    reasons = []
    pattern = f"def {name}("
    with _modules_of(folder):
        for module in [*files, *packages]:
            sources = [folder / f"{module}.py", *folder.glob(f"{module}/*.py")]
            if not any(pattern in s.read_text(errors="replace") for s in sources if s.is_file()):
                continue
            try:
                found = _find(importlib.import_module(module), name)
            except Exception as error:  # whatever a stranger's file raises
                reasons.append(f"{module} cannot be imported: {type(error).__name__}: {error}")
                continue
            if found is not None:
                return found
    why = "; ".join(reasons) or f"no file defines {name}()"
    raise UserError(f"--peer-path {folder} has no model {name}: {why}")


def equal_vit(name: str, **options) -> nn.Module:
    """timm's Vision Transformer as wide and deep, with as many heads, as the ConViT ``name``."""
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


@dataclass(frozen=True)
class Peer:
    """An original repository.

    Attributes:
        folder: Where it is checked out.
        kwargs: What its model functions are called with.
    """

    folder: Path
    kwargs: dict

    @property
    def side(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name


def build(side: str, name: str, peer: Peer | None = None, size: int | None = None) -> nn.Module:
    """The model ``name`` as ``side`` implements it, with random weights.

    Args:
        side: ``ours``; ``timm``; ``explicit``, ours with the attention written out; ``ViT``, a
            plain one of equal width; else the ``side`` of ``peer``.
        name: Registered name.
        peer: Original repository.
        size: Height and width of images, the model's own if not given.
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
    """Who implements ``name``: ours first, then the peers.

    V2, which timm has not, has its own written-out attention as a peer; a ConViT also stands
    beside a plain Vision Transformer of its width, depth and heads.
    """
    sides = ["ours"]
    if timm_entrypoint(name) is not None:
        sides.append("timm")
    if name.startswith("swin_visformer"):
        sides.append("explicit")
    if peer is not None:
        sides.append(peer.side)
    if name.startswith("convit"):
        sides.append("ViT")
    return sides


def makes_sense(side: str, config: str, model: nn.Module) -> bool:
    """Whether a configuration is to be had: most peers have nothing to deploy or recompute."""
    if "checkpoint" in config:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            return False
    if "deploy" not in config or side == "ours":
        return True
    foldable = ("reparameterize", "fuse", "switch_to_deploy")
    return side != "explicit" and any(hasattr(m, f) for m in model.modules() for f in foldable)


def configure(model: nn.Module, side: str, config: str) -> nn.Module:
    """``model`` or what is made of it in a configuration.

    Raises:
        UserError: The configuration is unknown, or not for this model.
    """
    for transform in config.split("+"):
        if transform == "deploy" and side == "ours":
            model = model.fuse()
        elif transform == "deploy":
            model = reparameterize_model(model.eval())
        elif transform == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        elif transform == "checkpoint":
            model.set_grad_checkpointing(True)
        elif transform == "compile":
            model = torch.compile(model, dynamic=False)
        elif transform != "eager":
            raise UserError(
                f"configuration {config!r}: {transform!r} is not eager, nor one of "
                f"{', '.join(TRANSFORMS)}"
            )
    return model
