"""Measure detection backbones beside the original's windowed attention.

``python -m tools.benchmark.backbone [NAME ...]``: the same net with the same weights, its attention
as here and as the original detector computes it, in turn, in one process; memory in processes of
their own. ``layers`` are the attention layers alone, each on its own map.
"""

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import nn

from models.detection_backbone import Backbone, VisionBackbone
from models.errors import ModelError
from models.layers.window import WindowAttention2d
from tools.benchmark.__main__ import machine
from tools.benchmark.measure import ROOT, alternate, ratio, resident_peak
from tools.benchmark.original import OriginalWindowAttention, as_original
from utils import UserError

NAMES = ("swin_visformer_small_v2", "swin_visformer_tiny_v2", "swin_visformer_small")
SIZES = {"cpu": (512, 640), "cuda": (800, 1344)}
SIDES = ("ours", "original")
KINDS = ("forward", "forward+backward", "layers forward", "layers forward+backward")


def build(name: str, side: str, device: str) -> Backbone:
    """The backbone ``name``, its attention ours or the original's, with statistics of a batch.

    Raises:
        UserError: It has no windows.
    """
    torch.manual_seed(0)
    backbone = VisionBackbone(name)
    if not any(isinstance(module, WindowAttention2d) for module in backbone.modules()):
        raise UserError(f"{name} has no windows to compare")
    if side == "original":
        as_original(backbone)
    backbone.to(device)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        backbone(torch.randn(2, 3, 256, 320, device=device))
    for norm in norms:
        norm.momentum = 0.1
    return backbone


def forward(model: nn.Module, image: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """One inference."""

    def step() -> None:
        with torch.inference_mode(), autocast(image, dtype):
            model(image)

    return step


def forward_backward(
    model: nn.Module, image: torch.Tensor, dtype: torch.dtype
) -> Callable[[], None]:
    """One forward and backward pass, without an optimizer."""

    def step() -> None:
        model.zero_grad()
        with autocast(image, dtype):
            maps = model(image)
        sum(x.float().square().mean() for x in maps).backward()

    return step


def autocast(image: torch.Tensor, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision, unless the type is float32."""
    return torch.autocast(image.device.type, dtype, enabled=dtype is not torch.float32)


class Layers(nn.Module):
    """The attention layers of a backbone, each on a map of its size, without one another."""

    def __init__(self, backbone: Backbone, image: torch.Tensor):
        super().__init__()
        self.maps, self.layers, hooks = [], nn.ModuleList(), []

        def keep(layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            self.layers.append(layer)
            self.maps.append(inputs[0].detach().clone(memory_format=torch.preserve_format))

        for module in backbone.modules():
            if isinstance(module, WindowAttention2d | OriginalWindowAttention):
                hooks.append(module.register_forward_pre_hook(keep))
        with torch.no_grad():
            backbone(image)
        for hook in hooks:
            hook.remove()

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """What every layer makes of its map; the image is not looked at."""
        return [
            layer(x.requires_grad_(self.training))
            for layer, x in zip(self.layers, self.maps, strict=True)
        ]


def difference(image: torch.Tensor, name: str) -> float:
    """Largest difference of the two sides' maps in float64, in deviations of a map."""
    image = image.cpu().double()
    ours = build(name, "ours", "cpu").double().eval()
    theirs = as_original(copy.deepcopy(ours))
    with torch.inference_mode():
        pairs = zip(ours.fuse()(image), theirs(image), strict=True)
        return max(((a - b).abs().max() / b.std()).item() for a, b in pairs)


def cases(args: argparse.Namespace, name: str) -> dict[str, dict[str, Callable[[], None]]]:
    """What is compared: by the kind of pass, the step of either side."""
    dtype = getattr(torch, args.dtype)
    image = torch.randn(args.batch_size, 3, *args.input_size, device=args.device)
    found: dict[str, dict[str, Callable[[], None]]] = {}
    for side in SIDES:
        nets = [build(name, side, args.device) for _ in range(4)]
        deploy = nets[0].fuse() if side == "ours" else nets[0].eval()
        layers = [Layers(net.eval(), image) for net in nets[2:]]
        steps = (
            forward(deploy, image, dtype),
            forward_backward(nets[1], image, dtype),
            forward(layers[0].eval(), image, dtype),
            forward_backward(layers[1].train(), image, dtype),
        )
        for kind, step in zip(KINDS, steps, strict=True):
            found.setdefault(kind, {})[side] = step
    return found


def peak(args: argparse.Namespace, name: str, side: str) -> float:
    """MiB that a forward and backward pass takes beyond what is there before it."""
    image = torch.randn(args.batch_size, 3, *args.input_size, device=args.device)
    backbone = build(name, side, args.device)
    step = forward_backward(backbone, image, getattr(torch, args.dtype))
    if args.device == "cuda":
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident_peak()
    step()
    return resident_peak() - before


def peak_in_process_of_its_own(args: argparse.Namespace, name: str, side: str) -> float:
    """:func:`peak` of a fresh process."""
    words = ["-m", "tools.benchmark.backbone", name, "--peak", side, "--device", args.device]
    words += ["--batch-size", str(args.batch_size), "--dtype", args.dtype]
    words += ["--input-size", *map(str, args.input_size)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name} {side}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, name: str) -> None:
    """Measure one backbone and print a line for every kind of pass."""
    image = torch.randn(1, 3, *args.input_size, device=args.device)
    print(f"{name}: outputs differ by {difference(image, name):.1e}", flush=True)
    for kind, steps in cases(args, name).items():
        times = alternate(steps, args.device, args.rounds, args.min_time)
        rates = [args.batch_size / statistics.median(times[side]) for side in SIDES]
        print(
            f"{kind} {name} ours/original {ratio(times['ours'], times['original']):.2f} "
            f"({rates[0]:.2f} and {rates[1]:.2f} images/s)",
            flush=True,
        )
    peaks = [peak_in_process_of_its_own(args, name, side) for side in SIDES]
    print(
        f"memory {name} ours/original {peaks[0] / peaks[1]:.2f} "
        f"({peaks[0]:.0f} and {peaks[1]:.0f} MiB)",
        flush=True,
    )


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        "tools.benchmark.backbone", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"models with windows; if none, {NAMES}")
    add("--batch-size", type=int, default=1)
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--device", choices=["cpu", "cuda"], help="cuda if present, if not given")
    add("--input-size", type=int, nargs=2, metavar="PIXELS", help="height and width")
    add("--rounds", type=int, default=10, help="measurements of each; the median counts")
    add("--min-time", type=float, default=0.5, help="seconds of a measurement")
    add("--peak", choices=SIDES, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    args = get_parser().parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.input_size = args.input_size or SIZES[args.device]
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda, but PyTorch finds no CUDA device")
        if args.peak:
            print(peak(args, args.names[0], args.peak))
            return 0
        for name in args.names or NAMES:
            compare(args, name)
        print(machine(args.device), "x".join(map(str, args.input_size)), args.dtype, sep=", ")
    except (UserError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
