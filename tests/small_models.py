"""Small models of every registered name, and weights as after training."""

from functools import cache

import timm
import torch
from torch import nn

from models import fastvit
from tools.flops import our_models

NAMES = our_models()


def meta(name, **kwargs):
    """The model without memory: shapes alone."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


@cache
def shrunk(name):
    """Keyword arguments that leave a model every kind of layer it has, for 64x64 pixels."""
    family, variant = name.split("_")[:2]
    if family == "vit":
        heads = 12 if variant.startswith("b") else 16
        return {"img_size": 64, "depth": 2, "num_heads": heads, "embed_dim": 4 * heads}
    if family == "convit":
        heads = 9 if variant == "small" else 4
        width = {"num_heads": heads, "embed_dim": 4 * heads}
        return {"img_size": 64, "depth": 3, "local_up_to_layer": 2, **width}
    if family == "fastvit":
        attends = variant.startswith(("sa", "ma", "mci"))
        last = {"mixer": "attention", "position_encoding": True} if attends else {}
        last["patch_se"] = variant in ("mci0", "mci1", "mci2")
        stages = [(1, 16), (2, 32), (1, 32)]
        return {"stages": (*(fastvit.Stage(*s) for s in stages), fastvit.Stage(2, 64, **last))}
    stages = [  # windows are smaller than the maps, so that they shift
        stage._replace(depth=min(stage.depth, 2), dim=stage.dim // 4, window=stage.window and 2)
        for stage in meta(name).stages
    ]
    return {"img_size": 64, "stages": stages}


def small(name, **kwargs):
    """A small model of ``name`` with 10 classes, always of the same weights, for evaluation."""
    kwargs = shrunk(name) | {"num_classes": 10} | kwargs
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def stir(model):
    """Statistics and affines as after training, and weights that keep activations small."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            deviation = 0.5 / module.weight[0].numel() ** 0.5
            nn.init.normal_(module.weight, 0, deviation, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
            module.weight.data[::4] *= -1
        if hasattr(module, "gamma"):
            nn.init.uniform_(module.gamma, 0.1, 0.9, generator=generator)
    return model.eval()


def blocks_of(model):
    """The residual blocks, in order."""
    return [
        module for module in model.modules() if type(module).__name__.endswith(("Block", "Block2d"))
    ]


def attention_layers(model):
    return [module for module in model.modules() if hasattr(module, "fused_attn")]


def relative(value, expected):
    """The largest error, in multiples of the largest expected value."""
    return ((value - expected).abs().max() / expected.abs().max()).item()
