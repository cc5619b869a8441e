"""The benchmark: that it runs, compares equal functions, and leaves nothing behind."""

import csv
import re
import sys

import pytest
import timm
import torch
from conftest import run_python

import models
from tools.benchmark.__main__ import main as benchmark
from tools.benchmark.__main__ import verdicts
from tools.benchmark.backbone import KINDS
from tools.benchmark.backbone import main as backbone_benchmark
from tools.benchmark.candidates import (
    build,
    configure,
    equal_vit,
    peer_entrypoint,
    sides_of,
    timm_entrypoint,
)
from tools.benchmark.measure import Case, alternate, memory, ratio
from tools.flops import our_models
from utils import UserError

QUICK = ["--rounds", "1", "--min-time", "0.01", "--batch-size", "2"]
ORIGINAL = """
import helper
from timm.models.visformer import visformer_tiny as timms
from timm.models import register_model

@register_model
def visformer_tiny(width=None, **kwargs):
    assert width == 3
    return timms(**kwargs)
"""


@pytest.fixture
def original(tmp_path):
    """An original repository, whose modules are called as ours are."""
    folder = tmp_path / "Original"
    folder.mkdir()
    (folder / "models.py").write_text(ORIGINAL)
    (folder / "helper.py").write_text("import utils\n")
    (folder / "utils.py").write_text("assert not hasattr(__import__('utils'), 'save_checkpoint')\n")
    return folder


def test_inference_beside_timm_and_an_original(original, tmp_path, capsys):
    before = dict(sys.modules)
    words = ["visformer_tiny", "--mode", "infer", "--device", "cpu", "--peer-path", str(original)]
    words += ["--peer-args", "width=3", "--csv", str(tmp_path / "out.csv")]
    words += ["--plot", str(tmp_path / "out.png"), "--configs", "eager", "deploy+channels_last"]
    assert benchmark([*words, *QUICK]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[-1].startswith("infer visformer_tiny ours/best peer ")
    with open(tmp_path / "out.csv") as file:
        rows = list(csv.DictReader(file))
    sides = [(row["side"], row["config"]) for row in rows]
    assert sides == [
        ("ours", "eager"),
        ("ours", "deploy+channels_last"),
        ("timm", "eager"),
        ("Original", "eager"),
    ]
    assert all(float(row["rate"]) > 0 and float(row["share"]) > 0 for row in rows)
    assert float(rows[2]["difference"]) < 1e-9
    assert float(rows[3]["difference"]) < 1e-9
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert all(sys.modules[name] is module for name, module in before.items())
    assert timm.create_model("visformer_tiny").__module__ == "models.visformer"


def test_training(capsys):
    words = ["convit_tiny", "--mode", "train", "--device", "cpu", "--input-size", "64"]
    assert benchmark([*words, "--configs", "eager", *QUICK]) == 0
    output = capsys.readouterr().out
    assert "train convit_tiny ours/best peer " in output
    assert "train convit_tiny cost/ViT " in output


def test_memory_is_set_beside_the_peer_s():
    row = {"mode": "train", "model": "convit_tiny", "best": True}
    rows = [row | {"side": "ours", "per_image": 50.0}, row | {"side": "timm", "per_image": 100.0}]
    rows += [row | {"side": "timm", "per_image": 1.0, "best": False}]
    assert list(verdicts(rows)) == ["train convit_tiny memory per image ours/timm 0.50"]


def test_every_model_of_timms_has_it_as_a_peer():
    for name in our_models():
        assert (timm_entrypoint(name) is None) == (
            "_net" in name or "plus" in name or "swin" in name
        )
        sides = sides_of(name, None)
        assert sides[0] == "ours"
        assert ("explicit" in sides) == name.startswith("swin")
    theirs = build("timm", "vit_b_32_224")
    assert type(theirs) is timm.models.VisionTransformer
    assert type(build("timm", "fastvit_t8")) is timm.models.fastvit.FastVit
    explicit = build("explicit", "swin_visformer_tiny_v2")
    assert not explicit.stage3[0].attn.fused_attn


def test_vit_of_equal_width():
    vit, convit = equal_vit("convit_small"), timm.create_model("convit_small")
    sizes = [sum(p.numel() for p in model.blocks.parameters()) for model in (vit, convit)]
    extra = sum(b.attn.pos_proj.weight.numel() + 2 * 9 for b in convit.blocks[:10])
    assert sizes[0] + extra == sizes[1]


def test_configurations():
    model = configure(build("ours", "visformer_tiny"), "ours", "deploy+channels_last")
    assert isinstance(model.stage1[0].norm2, torch.nn.Identity)
    assert model.stage1[0].mlp.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    theirs = configure(build("timm", "fastvit_t8"), "timm", "deploy")
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in theirs.stem.modules())
    assert configure(build("ours", "convit_tiny"), "ours", "checkpoint").grad_checkpointing
    with pytest.raises(UserError, match="'nchw' is not eager, nor one of deploy, channels"):
        configure(model, "ours", "deploy+nchw")


def test_alternation_measures_every_step_in_every_round():
    order = []
    steps = {label: lambda label=label: order.append(label) for label in "abc"}
    times = alternate(steps, "cpu", 3, 0.0)
    assert {label: len(values) for label, values in times.items()} == dict.fromkeys("abc", 3)
    assert "".join(order[-9:]) == "abcbcacab"
    assert ratio([1.0, 2.0, 4.0], [2.0, 2.0, 20.0]) == 2.0


def test_memory_grows_with_the_batch():
    case = Case("train", "convit_tiny", "ours", "eager", 4, "float32", "cpu", 224)
    peak, per_image = memory(case, None)
    assert 200 < peak < 2000
    assert 10 < per_image < 200


def test_bad_input(tmp_path, capsys, original):
    def error(*words):
        assert benchmark([*words, "--device", "cpu", "--mode", "infer", *QUICK]) == 1
        return capsys.readouterr().err

    assert "'resnet50' is none of convit_base, " in error("resnet50")
    assert "/none is not a folder" in error("visformer_tiny", "--peer-path", "/none")
    assert "no file defines convit_tiny()" in error("convit_tiny", "--peer-path", str(original))
    assert "'fast' is not eager" in error("visformer_tiny", "--configs", "fast")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\ndef convit_tiny(): ...\n")
    with pytest.raises(UserError, match="broken cannot be imported: ModuleNotFoundError"):
        peer_entrypoint(tmp_path, "convit_tiny")
    with pytest.raises(UserError, match="'nchw' is not eager"):
        memory(Case("infer", "visformer_tiny", "ours", "nchw", 1, "float32", "cpu", 224), None)
    assert models.ModelError is sys.modules["models"].ModelError


def test_runs_as_a_module():
    done = run_python("-m", "tools.benchmark", "nothing")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'nothing' is none of")


def test_backbones_beside_the_originals_attention(capsys):
    words = ["swin_visformer_tiny_v2", "--device", "cpu", "--input-size", "64", "96"]
    assert backbone_benchmark([*words, "--rounds", "1", "--min-time", "0.01"]) == 0
    output = capsys.readouterr().out
    assert float(re.search(r"outputs differ by (\S+)", output)[1]) < 1e-9
    for kind in (*KINDS, "memory"):
        assert f"\n{kind} swin_visformer_tiny_v2 ours/original " in output
    assert backbone_benchmark(["convit_tiny", "--device", "cpu"]) == 1
    assert "convit_tiny has no windows to compare" in capsys.readouterr().err


def test_the_price_of_saving(tmp_path):
    flags = ["--steps", 2, "--save-every-steps", 1, "--rounds", 1, "--batch-size", 2]
    done = run_python(
        "-m", "tools.benchmark.saving", *flags, "--input-size", 32, TMPDIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert re.match(
        r"visformer_tiny 1 process\(es\), a checkpoint every 1 of 2 steps: with/without steps per "
        r"second \d\.\d{3} \(\d+\.\d\d and \d+\.\d\d\)$",
        first,
    )
    assert last.endswith("32 pixels, batch 2")
    assert not list(tmp_path.iterdir())  # its checkpoints went with it
