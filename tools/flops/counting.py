"""Multiply-accumulates and activations of a forward pass, counted as it runs, by module."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import models
from models import ModelSource
from models.layers import set_fused_attention

LAYERS = {
    F.linear,
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}


class Cost(NamedTuple):
    """Parameters in millions, GMACs, activations in millions."""

    parameters: float
    gmacs: float
    activations: float


@dataclass
class PartCost:
    """Exact counts of a part of a model."""

    name: str
    parameters: int = 0
    macs: int = 0
    activations: int = 0
    shape: tuple[int, ...] = ()  # of the output of its last module

    @property
    def cost(self) -> Cost:
        """Return the counts in millions and billions."""
        return Cost(self.parameters / 1e6, self.macs / 1e9, self.activations / 1e6)


def our_models() -> list[str]:
    """Return the models registered by this repository, family by family."""

    def module(name: str) -> str:
        return timm.models.model_entrypoint(name).__module__

    return sorted(filter(models.is_own_model, timm.list_models()), key=module)


def size_options(name: str, size: int | tuple[int, int] | None) -> dict[str, int | tuple]:
    """Return the keyword arguments of our or timm's model of a name, for an image size."""
    config = timm.get_pretrained_cfg(name)
    native = config.input_size[-1]
    if size in (None, native, (native, native)) or not config.fixed_input_size:
        return {}
    return {"img_size": size}


def attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args, **kwargs
) -> int:
    """Return the FLOPs of fused attention on ``... N d``, ``... M d``, ``... M e``: 2NM(d + e)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


class ForwardCounter(TorchFunctionMode):
    """Count the operations inside a context, in total and by module.

    Attributes:
        calls: Cost of every module that was called, by its name, without parameters.
        within: Modules in whose calls a module was called, by its name.
        activations: Elements of the outputs of convolutions and linear layers.
        image: Shape of the images.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        formulas = {
            getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None): (
                attention_flops
            ),
            getattr(torch.ops.mkldnn, "_linear_pointwise", None): self._packed,
            getattr(torch.ops.mkldnn, "_convolution_pointwise", None): self._packed,
        }
        formulas.pop(None, None)  # not in this version of PyTorch
        self.flops = FlopCounterMode(display=False, custom_mapping=formulas)
        self.activations = 0
        self.image: tuple[int, ...] = ()
        self.calls: dict[str, PartCost] = {}
        self.within: dict[str, set[str]] = {}
        self._running: list[tuple[str, int, int]] = []
        self._model = model
        self._hooks = []

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far."""
        return self.flops.get_total_flops() // 2

    def __enter__(self) -> "ForwardCounter":
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(partial(self._begin, name)))
            self._hooks.append(module.register_forward_hook(partial(self._end, name)))
        self.flops.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.flops.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in LAYERS:
            self.activations += out.numel()
        return out

    def _packed(
        self, x: Sequence[int], weight: Sequence[int], *args, out_shape: Sequence[int], **kwargs
    ) -> int:
        """Return the FLOPs of a packed layer of a fused model, which no torch function runs."""
        count = math.prod(out_shape)
        self.activations += count
        linear = len(weight) == 2
        return 2 * count * (weight[1] if linear else math.prod(weight) // out_shape[1])

    def _begin(self, name: str, module: nn.Module, inputs: tuple) -> None:
        self.within.setdefault(name, set()).update(outer for outer, *_ in self._running)
        self._running.append((name, self.macs, self.activations))

    def _end(self, name: str, module: nn.Module, inputs: tuple, out: Any) -> None:
        _, macs, activations = self._running.pop()
        while isinstance(out, list | tuple) and out:
            out = out[0]
        call = self.calls.setdefault(name, PartCost(name))
        call.macs += self.macs - macs
        call.activations += self.activations - activations
        call.shape = tuple(out.shape) if torch.is_tensor(out) else ()


def channels_of(model: nn.Module) -> int:
    """Return the number of channels of a model's images."""
    return getattr(model, "in_chans", model.pretrained_cfg["input_size"][0])


@torch.no_grad()
def trace(model: nn.Module, size: tuple[int, int], batch: int = 1) -> ForwardCounter:
    """Run ``model`` on ``batch`` images of a height and width, and count."""
    device = next(model.parameters()).device
    image = torch.zeros(batch, channels_of(model), *size, device=device)
    with ForwardCounter(model) as counter:
        model(image)
    counter.image = tuple(image.shape)
    return counter


@dataclass(frozen=True)
class Request:
    """A model to count."""

    name: str
    size: int | tuple[int, int] | None = None  # by default the checkpoint's or the native one
    batch: int = 1
    fuse: bool = False  # count the fused model
    fused_attention: bool = True  # count attention as it runs, instead of written out
    source: ModelSource | None = None  # by default, random weights of the name

    def build(self, device: str) -> tuple[nn.Module, tuple[int, int]]:
        """Build the model on a device; also return the image size."""
        source = self.source or models.find_model(self.name)
        device_of_build = "cpu" if source.has_weights else device
        images = source.data_config
        size = images.size if self.size is None else images.at_size(self.size).size
        is_native = size == images.size and not source.has_weights
        with torch.device(device_of_build):
            model = source.build(None if is_native else size)
        source.load(model)
        model = model.to(device).eval().requires_grad_(False)
        set_fused_attention(model, self.fused_attention)
        if self.fuse:
            model = models.fused(model, self.name)
        return model, models.height_and_width(size)


def run(request: Request) -> tuple[nn.Module, ForwardCounter]:
    """Build and run a model, on the meta device if it can be, else on the CPU."""
    try:
        model, size = request.build("meta")
        return model, trace(model, size, request.batch)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if isinstance(error, models.ModelError):
            raise
    model, size = request.build("cpu")
    models.check_input_size(model, request.name, size, channels_of(model))
    return model, trace(model, size, request.batch)


def count(
    name: str, size: int | tuple[int, int] | None = None, fused_attention: bool = True
) -> Cost:
    """Return the cost of a model for one image, as :class:`Request` says."""
    request = Request(name, size, fused_attention=fused_attention)
    return total(*run(request)).cost


def total(model: nn.Module, counter: ForwardCounter) -> PartCost:
    """Return the cost of the whole model."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return PartCost("total", parameters, counter.macs, counter.activations, counter.calls[""].shape)
