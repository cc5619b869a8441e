"""Measure a detector's speed: ``python -m object_detection.benchmark CONFIG``.

Images per second of the backbone, of the detector, and of a training step. The three take turns,
so that a change in the machine's load meets all of them, and medians are printed. A detector
without trained weights finds nothing, and then computes no masks: ``--checkpoint`` gives it some.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from object_detection import checkpoints, recipe, runtime
from training.launch import select_device
from training.parser import Parser

OBJECTS = 8


def random_sample(width: int, height: int, classes: int, generator: np.random.Generator):
    """Return a ``DetDataSample`` of an image with 8 random objects, boxes and masks."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    size = np.array([width, height])
    corners = generator.uniform(0, 0.5, (OBJECTS, 2)) * size
    boxes = np.concatenate([corners, corners + generator.uniform(0.1, 0.5, (OBJECTS, 2)) * size], 1)
    masks = np.zeros((OBJECTS, height, width), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(
        metainfo={
            "img_shape": (height, width),
            "ori_shape": (height, width),
            "pad_shape": (height, width),
            "batch_input_shape": (height, width),
            "scale_factor": (1.0, 1.0),
        }
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.from_numpy(generator.integers(0, classes, OBJECTS)),
        masks=BitmapMasks(masks, height, width),
    )
    return sample


def candidates(
    model: nn.Module, width: int, height: int, batch: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return functions that run backbone, detector or training step once, by name."""
    generator = np.random.default_rng(0)
    classes = runtime.number_of_classes(model)
    samples = [random_sample(width, height, classes, generator).to(device) for _ in range(batch)]
    images = torch.randn(batch, 3, height, width, device=device)

    @torch.no_grad()
    def backbone() -> None:
        model.eval().backbone(images)

    @torch.no_grad()
    def detector() -> None:
        model.eval().predict(images, samples)

    def training() -> None:
        losses, _ = model.parse_losses(model.train().loss(images, samples))
        losses.backward()
        model.zero_grad(set_to_none=True)

    return {"backbone": backbone, "detector": detector, "training step": training}


def measure(
    functions: dict[str, Callable[[], object]], steps: int, device: torch.device
) -> dict[str, float]:
    """Return the median seconds of each function over ``steps`` rounds, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for step in range(steps + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def benchmark(args: argparse.Namespace) -> None:
    """Print images per second of ``args.config``."""
    config = recipe.read_config(args.config, args.cfg_options)
    model = runtime.build_model(config, args.config)
    if args.checkpoint:
        checkpoints.load(model, checkpoints.read(args.checkpoint), args.checkpoint)
    device = select_device(args.device)
    functions = candidates(model.to(device), *args.size, args.batch_size, device)
    width, height = args.size
    with runtime.understood(f"{args.config} cannot take {width}x{height} pixels"):
        medians = measure(functions, args.steps, device)
    print(f"{device}, {args.batch_size} image(s) of {width}x{height} pixels, {args.steps} steps")
    for name, seconds in medians.items():
        print(f"{name:13}  {args.batch_size / seconds:8.2f} images/s")


def main(argv: list[str]) -> int:
    """Measure with the flags ``argv``; return the exit status."""
    parser = Parser(
        prog="python -m object_detection.benchmark", description=__doc__.splitlines()[0]
    )
    recipe.add_options(parser)
    recipe.add_size(parser)
    parser.add_argument("--checkpoint", help="file with trained weights")
    parser.add_argument("--batch-size", type=recipe.positive, default=1, help="images at once")
    parser.add_argument("--steps", type=recipe.positive, default=10, help="rounds")
    parser.add_argument("--device", help="cuda or cpu")
    return runtime.run(benchmark, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
