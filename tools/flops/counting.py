"""What runs in a forward pass, counted: multiply-accumulates, activations, by module."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import models
from models.checkpoint.contents import num_classes_of, state_dict_of
from models.layers import set_fused_attention
from models.layers.fuse import Fusible

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
class Row:
    """What a part of a model costs.

    Attributes:
        name: Of the part.
        parameters, macs, activations: Exact counts.
        shape: Of its last module's output, empty if there is none.
    """

    name: str
    parameters: int = 0
    macs: int = 0
    activations: int = 0
    shape: tuple[int, ...] = ()

    @property
    def cost(self) -> Cost:
        """The counts in millions and billions."""
        return Cost(self.parameters / 1e6, self.macs / 1e9, self.activations / 1e6)


@dataclass(frozen=True)
class Call:
    """One call of a module: multiply-accumulates and activations within, and the output's shape."""

    macs: int
    activations: int
    shape: tuple[int, ...]


def our_models() -> list[str]:
    """Names that are registered by this repository, family by family."""

    def module(name: str) -> str:
        return timm.models.model_entrypoint(name).__module__

    return sorted((n for n in timm.list_models() if module(n).startswith("models.")), key=module)


def size_options(name: str, size: int | tuple[int, int] | None) -> dict[str, int | tuple]:
    """Keyword arguments of a model of ours, or timm's of that name, for images of a size."""
    native = timm.get_pretrained_cfg(name).input_size[-1]
    if size in (None, native, (native, native)) or name.startswith("fastvit"):
        return {}
    return {"img_size": size}


def attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args, **kwargs
) -> int:
    """FLOPs of a fused kernel on ``... N d``, ``... M d``, ``... M e``: ``2 N M (d + e)`` each."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


class Counter(TorchFunctionMode):
    """Counts what runs within, whole and by module.

    Attributes:
        calls: What ran in every module that was called, by its name.
        within: Names of the modules in whose calls a module was called, by its name.
        activations: Elements of the outputs of convolutions and linear layers.
        image: Shape of the images that were given.
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
        formulas.pop(None, None)  # what this version of PyTorch has not
        self.flops = FlopCounterMode(display=False, custom_mapping=formulas)
        self.activations = 0
        self.image: tuple[int, ...] = ()
        self.calls: dict[str, Call] = {}
        self.within: dict[str, set[str]] = {}
        self._begun: list[tuple[str, int, int]] = []
        self._model = model
        self._hooks = []

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far."""
        return self.flops.get_total_flops() // 2

    def __enter__(self) -> "Counter":
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._begin(name)))
            self._hooks.append(module.register_forward_hook(self._end(name)))
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
        """FLOPs of a layer of an inference net on the CPU, which no function of PyTorch's runs."""
        count = math.prod(out_shape)
        self.activations += count
        linear = len(weight) == 2
        return 2 * count * (weight[1] if linear else math.prod(weight) // out_shape[1])

    def _begin(self, name: str) -> Callable[..., None]:
        def begin(module: nn.Module, inputs: tuple) -> None:
            self.within.setdefault(name, set()).update(outer for outer, *_ in self._begun)
            self._begun.append((name, self.macs, self.activations))

        return begin

    def _end(self, name: str) -> Callable[..., None]:
        def end(module: nn.Module, inputs: tuple, out: Any) -> None:
            _, macs, activations = self._begun.pop()
            while isinstance(out, list | tuple) and out:
                out = out[0]
            shape = tuple(out.shape) if torch.is_tensor(out) else ()
            before = self.calls.get(name, Call(0, 0, ()))
            self.calls[name] = Call(
                before.macs + self.macs - macs,
                before.activations + self.activations - activations,
                shape,
            )

        return end


@torch.no_grad()
def trace(model: nn.Module, size: tuple[int, int], batch: int = 1) -> Counter:
    """Run ``model`` on ``batch`` images of a height and width, where it is, and count."""
    device = next(model.parameters()).device
    channels = getattr(model, "in_chans", model.pretrained_cfg["input_size"][0])
    image = torch.zeros(batch, channels, *size, device=device)
    with Counter(model) as counter:
        model(image)
    counter.image = tuple(image.shape)
    return counter


@dataclass(frozen=True)
class Request:
    """What to count.

    Attributes:
        name: Any name of timm's.
        size: Height and width of the images, the native ones if not given.
        batch: Images.
        fuse: Count the inference net.
        fused_attention: Count attention as it runs, instead of written out.
        checkpoint: File that the model is built for.
    """

    name: str
    size: tuple[int, int] | None = None
    batch: int = 1
    fuse: bool = False
    fused_attention: bool = True
    checkpoint: str | None = None

    def build(self, device: str) -> tuple[nn.Module, tuple[int, int]]:
        """The model on a device, and the size of its images."""
        required, size = {}, self.size
        content = models.read_checkpoint(self.checkpoint) if self.checkpoint else {}
        if content:
            required = dict(content.get("model_kwargs") or {})
            state, _ = state_dict_of(content, self.checkpoint)
            required.setdefault("num_classes", num_classes_of(state, self.name))
            side = content.get("input_size")
            size = size or (side and (side, side))
        native = models.pretrained_config(self.name)
        native = tuple(native.input_size[-2:]) if native else None
        optional = {} if size in (None, native) else {"img_size": size}
        if self.size is not None:
            required.pop("img_size", None)
        with torch.device("cpu" if content else device):
            model, _ = models.build_model(self.name, required, optional)
        if content:
            models.load_weights(model, content, self.checkpoint)
        model = model.to(device).eval().requires_grad_(False)
        set_fused_attention(model, self.fused_attention)
        if self.fuse:
            if not isinstance(model, Fusible):
                raise models.ModelError(f"--fuse: {self.name} has no fuse(); leave it out")
            model = model.fuse()
        return model, size or native


def run(request: Request) -> tuple[nn.Module, Counter]:
    """Build and run a model, on the meta device where it can be, else on the CPU.

    Raises:
        ModelError: The name is unknown, or the model does not take the size.
        CheckpointError: The checkpoint is unreadable, or of another model.
    """
    try:
        model, size = request.build("meta")
        return model, trace(model, size, request.batch)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if isinstance(error, models.ModelError | models.CheckpointError):
            raise
    model, size = request.build("cpu")
    try:
        return model, trace(model, size, request.batch)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = "x".join(map(str, size))
        raise models.ModelError(f"{request.name} cannot take images of {text}: {reason}") from error


def count(name: str, size: int | None = None, fused_attention: bool = True) -> Cost:
    """What the model costs for an image.

    Args:
        name: Registered name.
        size: Height and width of the image, the native ones if not given.
        fused_attention: Count attention as it runs, instead of written out.
    """
    request = Request(name, size and (size, size), fused_attention=fused_attention)
    return total(*run(request)).cost


def total(model: nn.Module, counter: Counter) -> Row:
    """The whole model."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Row("total", parameters, counter.macs, counter.activations, counter.calls[""].shape)
