"""What the programs in this folder share: a model on the device, and bytes of operators."""

import argparse
import os
import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import models

DEVICE = torch.device("cuda", 0)
FREE = ("empty", "detach", "aten.alias", "_unsafe_view")  # move nothing, and are no views either


def get_parser(description: str) -> argparse.ArgumentParser:
    """Parser of the flags of all programs on models."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="float16", help="float16, bfloat16 or float32")
    parser.add_argument("--input-size", type=int, default=224)
    return parser


def finish():
    """End the process, without the ends of PyTorch's threads, which may abort on the stand-in."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_device(name, args):
    """A model on the device, its precision, and a batch of images."""
    size, half = args.input_size, args.dtype != "float32"
    model, _ = models.build_model(
        name, {"num_classes": 1000}, {"img_size": size, "drop_path_rate": 0.1}
    )
    last = getattr(model, "channels_last", False)
    layout = torch.channels_last if last else torch.contiguous_format
    precision = engine.Precision(DEVICE, getattr(torch, args.dtype) if half else None, layout)
    precision.place(model)
    images = torch.zeros(
        *(args.batch_size, 3, size, size), device=DEVICE, dtype=getattr(torch, args.dtype)
    )
    return model, precision, images.to(memory_format=layout)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of operands by operator, and of those with one of float64.

    Attributes:
        bytes, calls: By operator.
        casts: Calls that change the dtype alone.
        double: Bytes of operators with an operand of float64.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self.calls, self.casts, self.double = Counter(), Counter(), 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = str(function).removeprefix("aten.")
        if function.is_view or any(word in str(function) for word in FREE):
            return result
        tensors = [
            leaf
            for leaf in tree_leaves((arguments, options, result))
            if isinstance(leaf, torch.Tensor) and leaf.is_cuda
        ]
        # an expanded tensor is no larger than its memory
        moved = sum(
            min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
            for tensor in tensors
        )
        self.bytes[name] += moved
        self.calls[name] += 1
        self.casts += name.startswith("_to_copy") and len({tensor.dtype for tensor in tensors}) > 1
        if any(tensor.dtype is torch.float64 for tensor in tensors):
            self.double += moved
        return result
