"""Layers of fused models: a convolution or projection and its activation in one pass.

On the CPU in float32 they call oneDNN as torch.compile does: weights are reordered once instead
of in every forward, and the activation is applied to results still in the cache. Elsewhere, and
while a graph is captured, they run the plain layer followed by its activation.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Proxy

from .tracing import is_captured, one_node

ACTIVATIONS = {nn.ReLU: "relu", nn.GELU: "gelu", nn.Identity: "none"}


def _onednn() -> bool:
    ops = torch.ops.mkldnn
    names = ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(ops, name) for name in names)


class _Packed:
    """Base of both layers: the activation, and the weight reordered in the first forward."""

    @classmethod
    def of(cls, layer: nn.Module, act: nn.Module | None = None) -> nn.Module:
        """Return a layer with the parameters of ``layer``, followed by ``act``."""
        packed = cls.__new__(cls)
        packed.__dict__ = dict(layer.__dict__)
        packed._modules = {}
        packed.act = act or nn.Identity()
        packed.kind = ACTIVATIONS.get(type(packed.act))
        packed._kept = None
        return packed

    def _algorithm(self) -> str:
        return getattr(self.act, "approximate", "none") if self.kind == "gelu" else ""

    def _applies(self, x: torch.Tensor) -> bool:
        return (
            self.kind is not None
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not is_captured()
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.enabled
            and _onednn()
        )

    def _packed_weight(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._pack(x))
        return self._kept[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}


class PackedConv2d(_Packed, nn.Conv2d):
    """Convolution, then an activation. Made by :meth:`of`.

    Shapes are those of ``torch.nn.Conv2d``.
    """

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.contiguous(memory_format=torch.channels_last)
        return torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight.to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, x.shape
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B D H' W'``."""
        if not torch.jit.is_scripting():
            if isinstance(x, Proxy):
                return one_node(self, x)
            is_plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
            if is_plain and self._applies(x):
                return self._pointwise(x)
        return self.act(self._conv_forward(x, self.weight, self.bias))

    def _pointwise(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x.contiguous(memory_format=torch.channels_last),
            self._packed_weight(x),
            self.bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            self.kind,
            [],
            self._algorithm(),
        )


class PackedLinear(_Packed, nn.Linear):
    """Linear projection, then an activation. Made by :meth:`of`.

    Shapes are those of ``torch.nn.Linear``.
    """

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``... C -> ... D``."""
        if not torch.jit.is_scripting():
            if isinstance(x, Proxy):
                return one_node(self, x)
            if self._applies(x):
                return self._pointwise(x)
        return self.act(F.linear(x, self.weight, self.bias))

    def _pointwise(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            x, self._packed_weight(x), self.bias, self.kind, [], self._algorithm()
        )
