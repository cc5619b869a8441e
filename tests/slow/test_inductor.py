"""Inductor's code for the CPU."""

import copy
import shutil
import signal

import pytest
import timm
import torch
from conftest import read_log, run_main, same_run
from small_models import relative
from torch._dynamo.utils import counters

from models import fastvit
from models.visformer import Stage
from training.compilation import compiled

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
# a block of every kind, as every kernel takes the C++ compiler a second
NETS = {
    "visformer_tiny": {"stages": [Stage(1, 8, 4, None, 2.0, 8), Stage(1, 16, 2, 2)]},
    "swin_visformer_tiny_v2": {
        "stages": [Stage(2, 8, 4, 2, window=2)],
        "init_channels": None,
    },
    "convit_tiny": {"depth": 2, "local_up_to_layer": 1, "num_heads": 2, "embed_dim": 8},
    "fastvit_sa12": {"stages": [fastvit.Stage(1, 32), fastvit.Stage(1, 32, 4.0, "attention")]},
}
RUN = [
    *("--model", "test_vit", "--input-size", 32, "--batch-size", 2, "--num_workers", 0),
    *("--epochs", 2, "--warmup-epochs", 1, "--model-ema-decay", 0.9, "--log-interval", 1),
    *("--device", "cpu", "--accum-iter", 2, "--clip-grad", 1, "--drop", 0.1, "--drop-path", 0),
    *("--grad-checkpointing", "--compile", "--compile-blocks", "--compile-mode", "default"),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("name", NETS)
def test_a_net_infers_as_in_eager_mode(name):
    size = {} if name.startswith("fastvit") else {"img_size": 32}
    plain = timm.create_model(name, num_classes=10, **size, **NETS[name]).eval()
    net, x = compiled(copy.deepcopy(plain), "inductor"), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert relative(net(x), plain(x)) < 1e-4
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_stopped_run_of_compiled_blocks_resumes_bitwise(images, tmp_path):
    run = [*RUN, "--data-path", images, "--output_dir"]
    assert run_main(*run, tmp_path / "whole")[0] == 0  # PyTorch warns where CUDA is missing
    torch._dynamo.reset()
    stop = {"line": "epoch 1 step", "act": signal.SIGTERM}
    assert run_main(*run, tmp_path / "parts", **stop)[0] == 0
    assert len(read_log(tmp_path / "parts")) == 1
    torch._dynamo.reset()
    assert run_main(*run, tmp_path / "parts", "--resume", "auto")[0] == 0
    assert same_run(tmp_path / "parts", tmp_path / "whole")
    assert not counters["graph_break"]
