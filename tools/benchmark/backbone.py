"""Compare the speed of detection backbones with that of the original's windowed attention.

``python -m tools.benchmark.backbone [NAME ...]``: the same model with the same weights, its
attention as here and as the original detector computes it, in turn, in one process; memory in
separate processes. ``layers`` are the attention layers alone, each on its own feature map.

The original (Danczs/Visformer, ObjectDetection) cuts windows and heads by copies, writes out the
product of queries and keys, gathers the bias in every block, and makes the mask in every forward
pass.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.optim.swa_utils import update_bn

import engine
import models
from models.detection_backbone import Backbone, VisionBackbone
from models.layers import set_recompute_activations
from models.layers.window import WindowAttention2d
from tools import cli
from tools.benchmark import measure
from training import launch
from training.parser import PIXELS, Parser, add_input_size
from utils import UserError

NAMES = ("swin_visformer_small_v2", "swin_visformer_tiny_v2", "swin_visformer_small")
SIZES = {"cpu": (512, 640), "cuda": (800, 1344)}
SIDES = ("ours", "original")
KINDS = ("forward", "forward+backward", "layers forward", "layers forward+backward")


def _cut(x: torch.Tensor, window: int) -> torch.Tensor:
    return rearrange(x, "b c (y h) (x w) -> (b y x) c h w", h=window, w=window).contiguous()


def _mask(height: int, width: int, window: int, device: torch.device) -> torch.Tensor:
    """Return the mask ``W N N`` of a padded feature map: -100 across regions."""
    region, shift = torch.zeros(1, 1, height, width, device=device), window // 2
    parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in parts for c in parts):
        region[:, :, rows, columns] = number
    region = _cut(region, window).flatten(1)
    return -100.0 * (region.unsqueeze(1) != region.unsqueeze(2))


def original_attention(
    layer: WindowAttention2d, x: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention within windows, ``(B W) C w w -> (B W) C w w``; ``mask`` is ``W N N``."""
    qkv = rearrange(layer.qkv(x), "b (t n d) h w -> t b n (h w) d", t=3, n=layer.num_heads)
    q, k, v = qkv.unbind(0)
    scores = (q * layer.scale) @ (k.transpose(-2, -1) * layer.scale)
    index = layer.relative_position_index
    bias = layer.relative_position_bias_table[index.view(-1)].view(*index.shape, -1)
    scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
    if mask is not None:
        shape = scores.shape
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[None, :, None]).view(shape)
    x = scores.softmax(-1) @ v
    return layer.proj(rearrange(x, "b n (h w) d -> b (n d) h w", h=layer.window))


def original_forward(
    layer: WindowAttention2d, masks: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """``B C H W -> B C H W``; ``masks`` has the ``mask`` of the stage."""
    (height, width), window, shift = x.shape[-2:], layer.window, layer.shift
    x = F.pad(x, (0, -width % window, 0, -height % window))
    if shift:
        x = torch.roll(x, (-shift, -shift), dims=(2, 3))
    rows, batch = x.shape[-2] // window, len(x)
    x = original_attention(layer, _cut(x, window), masks["mask"] if shift else None)
    x = rearrange(x, "(b y x) c h w -> b c (y h) (x w)", b=batch, y=rows).contiguous()
    if shift:
        x = torch.roll(x, (shift, shift), dims=(2, 3))
    return x[:, :, :height, :width].contiguous()


def as_original(backbone: Backbone) -> Backbone:
    """Replace the attention of ``backbone`` in place; its function stays the same."""
    for stage in backbone.net.children():
        layers = [module for module in stage.modules() if isinstance(module, WindowAttention2d)]
        masks: dict[str, torch.Tensor] = {}
        for layer in layers:
            layer.forward = functools.partial(original_forward, layer, masks)
        if layers:

            def make_mask(_, inputs, masks=masks, window=layers[0].window) -> None:
                height, width = (size + -size % window for size in inputs[0].shape[-2:])
                masks["mask"] = _mask(height, width, window, inputs[0].device)

            stage.register_forward_pre_hook(make_mask)
    backbone.net.channels_last = False
    set_recompute_activations(backbone, False)
    return backbone.to(memory_format=torch.contiguous_format)


def build(name: str, device: str) -> Backbone:
    """Return the backbone ``name``, which must have windows, with statistics of a batch."""
    torch.manual_seed(0)
    backbone = VisionBackbone(name).to(device)
    if not any(isinstance(module, WindowAttention2d) for module in backbone.modules()):
        raise UserError(f"{name} does not have windowed attention")
    update_bn([torch.randn(2, 3, 256, 320)], backbone, device)
    return backbone


def copy_of(backbone: Backbone, side: str) -> Backbone:
    """Return a copy, with our or the original's attention."""
    backbone = copy.deepcopy(backbone)
    return as_original(backbone) if side == "original" else backbone


def step_of(
    model: nn.Module, image: torch.Tensor, dtype: torch.dtype, backward: bool
) -> Callable[[], None]:
    """Return a function that infers once, or does one forward and backward pass."""

    def step() -> None:
        model.zero_grad()
        mixed = torch.autocast(image.device.type, dtype, enabled=dtype is not torch.float32)
        with torch.inference_mode(not backward), mixed:
            maps = model(image)
        if backward:
            sum(x.float().square().mean() for x in maps).backward()

    return step


class Layers(nn.Module):
    """The attention layers of a backbone, each on its input for ``image``, independently."""

    def __init__(self, backbone: Backbone, image: torch.Tensor):
        super().__init__()
        self.maps, self.layers = [], nn.ModuleList()

        def keep(layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            self.layers.append(layer)
            self.maps.append(inputs[0].detach().clone(memory_format=torch.preserve_format))

        layers = [module for module in backbone.modules() if isinstance(module, WindowAttention2d)]
        hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
        with torch.no_grad():
            backbone(image)
        for hook in hooks:
            hook.remove()

    def forward(self, _: torch.Tensor) -> list[torch.Tensor]:
        """Return the output of every layer."""
        return [
            layer(x.requires_grad_(self.training))
            for layer, x in zip(self.layers, self.maps, strict=True)
        ]


def difference(backbone: Backbone, image: torch.Tensor) -> float:
    """Return the largest difference of the feature maps in float64, in standard deviations."""
    ours, theirs = (copy_of(backbone, side).cpu().double().eval() for side in SIDES)
    image = image.cpu().double()
    with torch.inference_mode():
        pairs = zip(ours.fuse()(image), theirs(image), strict=True)
        return max(((a - b).abs().max() / b.std()).item() for a, b in pairs)


def steps_of(
    args: argparse.Namespace, backbone: Backbone, side: str
) -> dict[str, Callable[[], None]]:
    """Return the steps of the kinds of pass."""
    image = torch.randn(args.batch_size, 3, *args.input_size, device=args.device)
    inferred, trained, *rest = (copy_of(backbone, side) for _ in range(4))
    inferred = inferred.fuse() if side == "ours" else inferred.eval()
    first, second = (Layers(part.eval(), image) for part in rest)
    models = zip(KINDS, (inferred, trained, first.eval(), second.train()), strict=True)
    dtype = getattr(torch, args.dtype)
    return {kind: step_of(model, image, dtype, "backward" in kind) for kind, model in models}


def added_memory(args: argparse.Namespace, name: str, side: str) -> float:
    """Return the MiB that a forward and backward pass adds to this process."""
    engine.select_kernels(torch.device(args.device), args.tf32)
    image = torch.randn(args.batch_size, 3, *args.input_size, device=args.device)
    backbone = copy_of(build(name, args.device), side)
    step = step_of(backbone, image, getattr(torch, args.dtype), backward=True)
    if args.device == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
    before = measure.peak_memory(args.device)
    step()
    return measure.peak_memory(args.device) - before


def compare(args: argparse.Namespace, name: str) -> None:
    """Measure one backbone, and print a line for every kind of pass and for memory."""

    def report(kind: str, quotient: float, both: Iterable[str], unit: str) -> None:
        both = " and ".join(both)
        print(f"{kind} {name} ours/original {quotient:.2f} ({both} {unit})", flush=True)

    engine.select_kernels(torch.device(args.device), args.tf32)
    image = torch.randn(1, 3, *args.input_size, device=args.device)
    backbone = build(name, args.device)
    print(f"{name}: outputs differ by {difference(backbone, image):.1e}", flush=True)
    sides = {side: steps_of(args, backbone, side) for side in SIDES}
    for kind in KINDS:
        steps = {side: steps[kind] for side, steps in sides.items()}
        times = measure.alternate(steps, args.device, args.rounds, args.min_time)
        rates = [f"{args.batch_size / time:.2f}" for time in measure.medians(times).values()]
        report(kind, measure.ratio(times["ours"], times["original"]), rates, "images/s")
    ours, original = (
        measure.in_fresh_process(f"{name} {side}", added_memory, args, name, side) for side in SIDES
    )
    report("memory", ours / original, [f"{ours:.0f}", f"{original:.0f}"], "MiB")


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``."""
    parser = Parser("python -m tools.benchmark.backbone", description=__doc__.splitlines()[0])
    add = parser.add_argument
    default = ", ".join(NAMES)
    add("names", nargs="*", metavar="NAME", help=f"models with windows; default: {default}")
    measure.add_flags(parser, batch_size=1, rounds=10, timing=True)
    add_input_size(parser, help=f"{PIXELS}; default: 512 640 on the CPU, 800 1344 on CUDA")
    args = parser.parse_args(argv)
    args.device = launch.select_device(args.device).type
    args.input_size = models.height_and_width(args.input_size or SIZES[args.device])
    for name in args.names or NAMES:
        compare(args, name)
    print(measure.machine(args.device), "x".join(map(str, args.input_size)), args.dtype, sep=", ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
