"""Count a detector's parameters and operations: ``python -m object_detection.flops CONFIG``.

As in published tables, a FLOP is a multiply-accumulate, and an image has 1000 proposals, of which
every box head takes all and every mask head the first 100. mmengine's ``get_model_complexity_info``
gives all of them to the mask heads of Cascade Mask R-CNN, and computes for minutes.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.layers import set_fused_attention
from object_detection import runtime
from training.parser import Parser, positive

PROPOSALS, MASKS = 1000, 100


def count(model: nn.Module, width: int, height: int) -> dict[str, float]:
    """Return the multiply-accumulates of each part of a two-stage detector, on the meta device.

    Args:
        model: Detector; moved to the meta device in place.
        width, height: Image size in pixels.
    """
    model.eval().to("meta")
    set_fused_attention(model, False)  # not every fused kernel is counted
    image = torch.zeros(1, 3, height, width, device="meta")
    backbone, maps = _counted(model.backbone, image)
    neck, levels = _counted(model.neck, maps)
    rpn_head, _ = _counted(model.rpn_head, levels)
    roi_head = sum(_counted(head, rois)[0] for head, rois in _heads(model.roi_head))
    return {"backbone": backbone, "neck": neck, "rpn_head": rpn_head, "roi_head": roi_head}


@torch.no_grad()
def _counted(part: Callable[..., Any], *inputs: Any) -> tuple[float, Any]:
    with FlopCounterMode(display=False) as counter:
        outputs = part(*inputs)
    return counter.get_total_flops() / 2, outputs


def _heads(roi_head: nn.Module) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Yield the box and mask heads of all stages, with features of their input size."""
    for kind, number in (("bbox", PROPOSALS), ("mask", MASKS)):
        heads = getattr(roi_head, f"{kind}_head", None) or []
        extractors = getattr(roi_head, f"{kind}_roi_extractor", None) or []
        if not isinstance(heads, nn.ModuleList):
            heads, extractors = [heads], [extractors]
        for head, extractor in zip(heads, extractors, strict=True):
            size = extractor.roi_layers[0].output_size
            yield head, torch.zeros(number, extractor.out_channels, *size, device="meta")


def flops(args: argparse.Namespace) -> None:
    """Print parameters and operations of ``args.config``, in total and by part."""
    config = runtime.read_config(args.config, args.cfg_options)
    model = runtime.build_model(config, args.config)
    divisor = config.model.get("data_preprocessor", {}).get("pad_size_divisor", 1)
    width, height = (-(-side // divisor) * divisor for side in args.size)
    with runtime.understood(f"{args.config} cannot take {width}x{height} pixels"):
        counts = count(model, width, height)
    lines = {"detector": (model, sum(counts.values()))}
    lines |= {name: (getattr(model, name), number) for name, number in counts.items()}
    print(f"image of {width}x{height} pixels, {PROPOSALS} proposals, {MASKS} masks")
    for name, (part, number) in lines.items():
        parameters = sum(parameter.numel() for parameter in part.parameters())
        print(f"{name:8}  {parameters / 1e6:6.2f} M parameters  {number / 1e9:7.2f} GFLOPs")


def main(argv: list[str]) -> int:
    """Count with the flags ``argv``; return the exit status."""
    parser = Parser(
        prog="python -m object_detection.flops",
        description="Count a detector's parameters and operations.",
    )
    runtime.add_options(parser)
    size = {"nargs": 2, "type": positive, "metavar": ("WIDTH", "HEIGHT"), "default": (1280, 800)}
    parser.add_argument("--size", **size, help="width and height of the image in pixels")
    return runtime.run(flops, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
