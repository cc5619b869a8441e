"""Structural reparameterisation: branches for training, one convolution for inference.

A convolution followed by BatchNorm is linear at inference, and so is a sum of such branches: one
kernel replaces them (RepVGG, arXiv 2101.03697; MobileOne, arXiv 2206.04040). The layers are those
of FastViT (arXiv 2303.14189, section 3).
"""

from collections import OrderedDict

import torch
import torch.fx
from timm.layers import SEModule
from torch import nn

from .fuse import norm_constants, pack


def conv_norm(
    in_chans: int, out_chans: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size (divides it by ``stride``), and BatchNorm."""
    conv = nn.Conv2d(
        in_chans, out_chans, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
    )
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_chans)))


@torch.fx.wrap
def lowered(x: torch.Tensor) -> torch.Tensor:
    """Cast ``x`` once, where autocast would do so for each of the convolutions that get it."""
    if not torch.jit.is_scripting():
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return x.to(torch.get_autocast_dtype(kind))
    return x


def identity_kernel(channels: int, groups: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """Kernel of the identity as a convolution, ``C C/groups size size``."""
    width = channels // groups
    kernel = torch.zeros(channels, width, size, size, dtype=like.dtype, device=like.device)
    index = torch.arange(channels, device=like.device)
    kernel[index, index % width, size // 2, size // 2] = 1.0
    return kernel


def fuse_norm(
    weight: torch.Tensor, norm: nn.BatchNorm2d, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold BatchNorm into the convolution without bias before it.

    Args:
        weight: Kernel of odd sides, ``O I k k``.
        norm: Normalises with its running statistics.
        size: Side of the fused kernel, at least k; a smaller kernel is padded with zeros.

    Returns:
        Kernel ``O I size size`` and bias ``O``.
    """
    factor, offset = norm_constants(norm)
    margin = (size - weight.shape[-1]) // 2
    fused = nn.functional.pad(weight * factor[:, None, None, None], [margin] * 4)
    return fused.to(weight.dtype), offset.to(weight.dtype)


class ReparamModule(nn.Module):
    """Module whose branches add up to one convolution, ``reparam_conv``.

    Subclasses name their branches, apply them, and compute the kernel they add up to.

    Args:
        in_chans, out_chans: Channels of the input and the output.
        kernel_size: Side of the largest kernel, odd.
        stride, groups: Of all convolutions.
        inference_mode: Build the one convolution instead of the branches.
    """

    branches: tuple[str, ...] = ()

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        inference_mode: bool = False,
    ):
        super().__init__()
        self.geometry = {
            "in_channels": in_chans,
            "out_channels": out_chans,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": kernel_size // 2,
            "groups": groups,
        }
        self.reparam_conv = nn.Conv2d(**self.geometry) if inference_mode else None
        for name in self.branches:
            setattr(self, name, None)

    def forward_branches(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the branches, ``B C H W -> B D H/stride W/stride``."""
        raise NotImplementedError

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Kernel ``D C/groups k k`` and bias ``D`` of the sum of the branches."""
        weights, biases = zip(*self.branch_kernels().values(), strict=True)
        return sum(weights[1:], weights[0]), sum(biases[1:], biases[0])

    def branch_kernels(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Kernel ``D C/groups k k`` and bias ``D`` of every branch; their sum is :meth:`kernel`."""
        raise NotImplementedError

    def fuse_(self) -> None:
        """See :class:`models.layers.fuse.Fusible`."""
        self.reparam_conv = pack(self.reparam_conv)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Replace the branches by one convolution; a second call does nothing.

        The convolution computes the function of the branches in evaluation. It includes their
        running statistics, which training no longer updates.
        """
        if self.reparam_conv is not None:
            return
        weight, bias = self.kernel()
        conv = nn.Conv2d(**self.geometry, device="meta")
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        for name in self.branches:
            setattr(self, name, None)
        self.reparam_conv = conv.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B D H/stride W/stride``."""
        return self.forward_branches(x) if self.reparam_conv is None else self.reparam_conv(x)


class _ActivatedConv(ReparamModule):
    """Branches, then squeeze and excitation of their sum, then GELU; either may be left out."""

    se: nn.Module
    act: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B D H/stride W/stride``."""
        return self.act(self.se(super().forward(x)))

    def fuse_(self) -> None:
        """Join convolution and activation (see :class:`models.layers.fuse.Fusible`)."""
        if isinstance(self.se, nn.Identity):
            self.reparam_conv, self.act = pack(self.reparam_conv, self.act), nn.Identity()


class ReparamConv(_ActivatedConv):
    """MobileOne block: sum of convolutions, a 1x1 one and BatchNorm alone; SE; GELU.

    MobileOne, arXiv 2206.04040, section 3.2. BatchNorm alone is a branch if input and output have
    the same shape, the 1x1 convolution if ``kernel_size`` is larger than 1.

    Args:
        in_chans, out_chans, kernel_size, stride, groups, inference_mode: See
            :class:`ReparamModule`.
        num_convs: Number of branches with the full kernel.
        use_scale: Add the 1x1 branch.
        use_se: Squeeze and excitation (arXiv 1709.01507) of the sum, with channels / 16.
        use_act: GELU at the end.
    """

    branches = ("conv_kxk", "conv_scale", "identity")

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        inference_mode: bool = False,
        num_convs: int = 1,
        use_scale: bool = True,
        use_se: bool = False,
        use_act: bool = True,
    ):
        super().__init__(in_chans, out_chans, kernel_size, stride, groups, inference_mode)
        self.se = SEModule(out_chans, rd_divisor=1) if use_se else nn.Identity()
        self.act = nn.GELU() if use_act else nn.Identity()
        if inference_mode:
            return
        self.conv_kxk = nn.ModuleList(
            conv_norm(in_chans, out_chans, kernel_size, stride, groups) for _ in range(num_convs)
        )
        if use_scale and kernel_size > 1:
            self.conv_scale = conv_norm(in_chans, out_chans, 1, groups=groups)
        if in_chans == out_chans and stride == 1:
            self.identity = nn.BatchNorm2d(in_chans)

    def drop_extra_branches_(self) -> None:
        """Keep only one convolution with the full kernel; call before training."""
        self.conv_kxk = self.conv_kxk[:1]
        self.conv_scale = self.identity = None

    def forward_branches(self, x: torch.Tensor) -> torch.Tensor:
        shared = lowered(x)
        outputs = [conv(shared) for conv in self.conv_kxk]
        if self.conv_scale is not None:
            # sliced, not strided: on the CPU, PyTorch 2.15 corrupts memory in the backward of
            # a strided 1x1 convolution on 3 channels in channels_last
            stride = self.geometry["stride"]
            part = shared[..., ::stride, ::stride] if stride > 1 else shared
            outputs.append(self.conv_scale(part))
        if self.identity is not None:
            outputs.append(self.identity(x))
        return sum(outputs[1:], outputs[0])

    def branch_kernels(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        size = self.geometry["kernel_size"]
        convs = {f"conv_kxk.{index}": conv for index, conv in enumerate(self.conv_kxk)}
        if self.conv_scale is not None:
            convs["conv_scale"] = self.conv_scale
        parts = {name: fuse_norm(conv.conv.weight, conv.bn, size) for name, conv in convs.items()}
        if self.identity is not None:
            channels, groups = self.geometry["in_channels"], self.geometry["groups"]
            eye = identity_kernel(channels, groups, size, self.identity.weight)
            parts["identity"] = fuse_norm(eye, self.identity, size)
        return parts


class LargeKernelConv(_ActivatedConv):
    """Large-kernel convolution plus a 3x3 one (section 3.3; RepLKNet, arXiv 2203.06717).

    Args:
        in_chans, out_chans, kernel_size, stride, groups, inference_mode: See
            :class:`ReparamModule`.
        use_se: Squeeze and excitation of the sum, with channels / 4.
        use_act: GELU at the end. The released code of FastViT computes one and discards it, and
            its weights were trained that way; those of MobileCLIP were trained with it.
    """

    branches = ("large_conv", "small_conv")

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        inference_mode: bool = False,
        use_se: bool = False,
        use_act: bool = False,
    ):
        super().__init__(in_chans, out_chans, kernel_size, stride, groups, inference_mode)
        self.se = SEModule(out_chans, rd_ratio=0.25) if use_se else nn.Identity()
        self.act = nn.GELU() if use_act else nn.Identity()
        if not inference_mode:
            self.large_conv = conv_norm(in_chans, out_chans, kernel_size, stride, groups)
            self.small_conv = conv_norm(in_chans, out_chans, 3, stride, groups)

    def drop_extra_branches_(self) -> None:
        """Keep only the large convolution; call before training."""
        self.small_conv = None

    def forward_branches(self, x: torch.Tensor) -> torch.Tensor:
        x = lowered(x)
        large = self.large_conv(x)
        return large if self.small_conv is None else large + self.small_conv(x)

    def branch_kernels(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        size = self.geometry["kernel_size"]
        convs = {"large_conv": self.large_conv, "small_conv": self.small_conv}
        return {
            name: fuse_norm(conv.conv.weight, conv.bn, size)
            for name, conv in convs.items()
            if conv is not None
        }


class LayerScale2d(nn.Module):
    """Learned factor per channel (CaiT, arXiv 2103.17239), ``gamma`` of ``C 1 1``."""

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), init_value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B C H W -> B C H W``."""
        return x * self.gamma


def layer_scale(dim: int, init_value: float | None) -> nn.Module:
    """Return a layer scale, or the identity for 0 and ``None``."""
    return LayerScale2d(dim, init_value) if init_value else nn.Identity()


class RepMixer(ReparamModule):
    """Token mixer without attention: ``x + scale (mixer(x) - norm(x))`` (section 3.1).

    ``mixer`` is depthwise and has no activation, so that all of it, the skip connection included,
    is one depthwise convolution at inference.

    Args:
        dim: Channels.
        kernel_size: Side of the depthwise kernel.
        layer_scale_init_value: Initial scale, 0 or ``None`` for none.
        inference_mode: See :class:`ReparamModule`.
    """

    branches = ("norm", "mixer", "layer_scale")

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        layer_scale_init_value: float | None = 1e-5,
        inference_mode: bool = False,
    ):
        super().__init__(dim, dim, kernel_size, groups=dim, inference_mode=inference_mode)
        if inference_mode:
            return
        conv = {"groups": dim, "use_act": False}
        self.norm = ReparamConv(dim, dim, kernel_size, **conv, num_convs=0, use_scale=False)
        self.mixer = ReparamConv(dim, dim, kernel_size, **conv)
        self.layer_scale = layer_scale(dim, layer_scale_init_value)

    def forward_branches(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer_scale(self.mixer(x) - self.norm(x))

    def branch_kernels(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        dim, size = self.geometry["in_channels"], self.geometry["kernel_size"]
        parts = {f"mixer.{name}": part for name, part in self.mixer.branch_kernels().items()}
        weight, bias = self.norm.kernel()
        parts["-norm"] = -weight, -bias
        if isinstance(self.layer_scale, LayerScale2d):
            gamma = self.layer_scale.gamma.flatten()
            parts = {
                name: (w * gamma[:, None, None, None], b * gamma) for name, (w, b) in parts.items()
            }
        return {"skip": (identity_kernel(dim, dim, size, weight), torch.zeros_like(bias)), **parts}


class RepConditionalPosEnc(ReparamModule):
    """Conditional position encoding (arXiv 2102.10882): ``x`` plus a depthwise convolution of it.

    Args:
        dim: Channels.
        kernel_size: Side of the depthwise kernel.
        inference_mode: See :class:`ReparamModule`.
    """

    branches = ("pos_enc",)

    def __init__(self, dim: int, kernel_size: int = 7, inference_mode: bool = False):
        super().__init__(dim, dim, kernel_size, groups=dim, inference_mode=inference_mode)
        if not inference_mode:
            self.pos_enc = nn.Conv2d(**self.geometry)

    def forward_branches(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.pos_enc(x)

    def branch_kernels(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        weight, bias = self.pos_enc.weight, self.pos_enc.bias
        eye = identity_kernel(weight.shape[0], weight.shape[0], weight.shape[-1], weight)
        return {"skip": (eye, torch.zeros_like(bias)), "pos_enc": (weight, bias)}


def reparameterize(module: nn.Module) -> None:
    """Reparameterise every :class:`ReparamModule` within ``module``, in place."""
    if isinstance(module, ReparamModule):
        module.reparameterize()
        return
    for child in module.children():
        reparameterize(child)
