"""Models, checkpoints and helpers for tests of tools.export."""

import re

import onnxruntime
import timm
import torch
from conftest import ROOT
from torch import nn

from models import DataConfig
from tools.export.__main__ import main
from tools.export.source import ExportSource

PAGE = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox"]
VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}


def warm_up_ddp(model, size):
    """Statistics as after training: without them, deep models amplify rounding."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(8, 3, *size))
    return model.eval()


def save(path, name, kwargs, size, **extra):
    """A checkpoint as training writes it; returns the model."""
    torch.manual_seed(0)
    kwargs = {"num_classes": len(CLASSES), **kwargs}
    model = warm_up_ddp(timm.create_model(name, **kwargs), size)
    content = {
        "model": model.state_dict(),
        "model_name": name,
        "model_kwargs": kwargs,
        "input_size": size[0],
        "classes": CLASSES,
        "args": {"eval_crop_ratio": 0.875},
    }
    torch.save(content | extra, path)
    return model


def export(*words):
    return main([*map(str, words), "--device", "cpu", "--no-benchmark"])


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def close(found, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-4 * scale)


def source_of(model, size=(32, 32), **options):
    model = model.eval().requires_grad_(False)
    fields = {"eager": model, "exported": model, "name": "model", "classes": ()}
    fields |= {"images": DataConfig(size, mean=(0.5,) * 3, std=(0.5,) * 3), "preprocessing": False}
    return ExportSource(**fields | options)


def python_block(heading):
    """The first block of Python behind a heading of the page."""
    behind = PAGE[PAGE.index(heading) :]
    return re.search(r"```python\n(.*?)```", behind, re.DOTALL)[1]
