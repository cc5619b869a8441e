"""The benchmark: that it runs, compares equal functions, and leaves nothing behind."""

import csv
import re
import sys
import tempfile
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from conftest import call, error_of

import models
from tools import benchmark_loop
from tools.benchmark import __main__ as command
from tools.benchmark import backbone, saving
from tools.benchmark.candidates import (
    Case,
    build,
    configure,
    equal_vit,
    peer_entrypoint,
    sides_of,
    timm_entrypoint,
)
from tools.benchmark.measure import alternate, ratio
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
    """An original repository whose modules have the names of ours."""
    folder = tmp_path / "Original"
    folder.mkdir()
    (folder / "models.py").write_text(ORIGINAL)
    (folder / "helper.py").write_text("import utils\n")
    (folder / "utils.py").write_text("assert not hasattr(__import__('utils'), 'save_checkpoint')\n")
    return folder


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark(*flags) -> (status, output, errors)`` on the CPU, with a small matrix product."""
    monkeypatch.setitem(command.MATRIX, "cpu", 64)
    return lambda *flags: call(command.main, *flags, "--device", "cpu", *QUICK)


def test_inference_with_timm_and_an_original_as_peers(original, tmp_path, benchmark):
    before = dict(sys.modules)
    words = ["visformer_tiny", "--mode", "infer", "--input-size", 64, "--peer-path", original]
    words += ["--peer-args", "width=3", "img_size=64", "--csv", tmp_path / "out.csv"]
    words += ["--plot", tmp_path / "out.png", "--configs", "eager", "deploy+channels_last"]
    status, output, errors = benchmark(*words)
    assert status == 0, errors
    lines = output.splitlines()
    assert lines[-1].startswith("infer visformer_tiny ours/best peer ")
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
    drawn = (tmp_path / "out.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    again = ["--read", tmp_path / "out.csv", "--plot", tmp_path / "again.png"]
    status, _, errors = benchmark(*again, "--plot-accuracy", tmp_path / "accuracy.png")
    assert status == 0, errors
    assert (tmp_path / "again.png").read_bytes() == drawn
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert all(sys.modules[name] is module for name, module in before.items())
    assert timm.create_model("visformer_tiny").__module__ == "models.visformer"


def test_training_with_memory(benchmark, monkeypatch):
    batches = {"ours": 0.5, "timm": 1.0, "ViT": 2.0}
    monkeypatch.setattr(command, "peak", lambda case: 90 + case.batch * batches[case.side])
    words = ["convit_tiny", "--mode", "train", "--input-size", 32, "--configs", "eager", "--memory"]
    status, output, errors = benchmark(*words)
    assert status == 0, errors
    lines = output.splitlines()
    last = [line.removeprefix("train convit_tiny ") for line in lines[-4:]]
    assert last[0].startswith("ours/best peer ") and last[1].startswith("cost/ViT ")
    expected = ["memory per image ours/timm 0.50", "memory per image ours/ViT 0.25"]
    assert last[2:] == expected
    (row,) = (line for line in lines if " | ours | " in line)
    assert row.endswith(" | 91 | 0.50 |")


def test_a_model_that_is_timms_alone(benchmark):
    words = ["resnet18", "--mode", "infer", "--input-size", 32, "--configs", "eager"]
    status, output, errors = benchmark(*words)
    assert status == 0, errors
    assert " | resnet18 | " in output and " | timm | " in output and " | ours | " not in output


def test_memory_is_compared_with_the_best_case_of_a_peer():
    row = {"mode": "train", "model": "convit_tiny", "best": True}
    rows = [row | {"side": "ours", "per_image": 50.0}, row | {"side": "timm", "per_image": 100.0}]
    rows += [row | {"side": "timm", "per_image": 1.0, "best": False}]
    assert list(command.verdicts(rows)) == ["train convit_tiny memory per image ours/timm 0.50"]


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
    with pytest.raises(UserError, match=r"'nchw'.*deploy, channels_last"):
        configure(model, "ours", "deploy+nchw")


def test_every_round_measures_every_step():
    order = []
    steps = {label: lambda label=label: order.append(label) for label in "abc"}
    times = alternate(steps, "cpu", 3, 0.0)
    assert {label: len(values) for label, values in times.items()} == dict.fromkeys("abc", 3)
    assert "".join(order[-9:]) == "abcbcacab"
    assert ratio([1.0, 2.0, 4.0], [2.0, 2.0, 20.0]) == 2.0


def test_memory_grows_with_the_batch():
    case = Case("train", "convit_tiny", "ours", "eager", 2, "float32", "cpu", 224)
    added = command.peak(replace(case, batch=6)) - command.peak(case)
    assert 10 < added / 4 < 200


def test_bad_input(tmp_path, original):
    error = partial(error_of, command.main, "--mode", "infer", "--device", "cpu", *QUICK)
    assert re.search("'convit_bse'.*convit_base", error("convit_bse"))
    (tmp_path / "no.csv").write_text("mode,model\ninfer,convit_base\n")
    for file in ("no.csv", "absent.csv"):
        assert file in error("--read", tmp_path / file)
    for flag in ("--csv", "--plot"):
        assert f"{flag} {tmp_path}/none/x" in error("resnet50", flag, tmp_path / "none" / "x")
    assert "--peer-path /none" in error("visformer_tiny", "--peer-path", "/none")
    assert "convit_tiny" in error("convit_tiny", "--peer-path", original)
    assert re.search("'fast'.*deploy, channels_last", error("visformer_tiny", "--configs", "fast"))
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\ndef convit_tiny(): ...\n")
    with pytest.raises(UserError, match=r"broken.*ModuleNotFoundError.*nothing_of_this_name"):
        peer_entrypoint(tmp_path, "convit_tiny")
    assert models.ModelError is sys.modules["models"].ModelError


def test_a_process_that_fails_names_its_case():
    case = Case("infer", "visformer_tiny", "ours", "nchw", 1, "float32", "cpu", 224)
    with pytest.raises(UserError, match=r"infer visformer_tiny ours nchw: .*'nchw'"):
        command.peak(case)


def test_backbones_with_the_originals_attention():
    words = ["--device", "cpu", "--input-size", 64, 96, "--rounds", 1, "--min-time", 0.01]
    status, output, errors = call(backbone.main, "swin_visformer_tiny_v2", *words)
    assert status == 0, errors
    assert float(re.search(r"outputs differ by (\S+)", output)[1]) < 1e-9
    for kind in (*backbone.KINDS, "memory"):
        assert f"\n{kind} swin_visformer_tiny_v2 ours/original " in output
    assert "convit_tiny" in error_of(backbone.main, "convit_tiny", "--device", "cpu")


def test_the_cost_of_saving(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flags = ["--steps", 2, "--save-every-steps", 1, "--rounds", 1, "--device", "cpu"]
    words = ["test_vit", *flags, "--batch-size", 2, "--input-size", 32]
    status, output, errors = call(saving.main, *words)
    assert status == 0, errors
    first, last = output.splitlines()
    found = re.search(r"([\d.]+) \(([\d.]+) \w+ ([\d.]+)\)$", first)
    quotient, safe, bare = map(float, found.groups())
    assert quotient == pytest.approx(safe / bare, rel=0.01)
    assert first.startswith("test_vit ") and last.endswith("32 pixels, batch 2")
    assert not list(tmp_path.iterdir())  # the checkpoints are removed


def test_main_beside_a_plain_loop(image_folder):
    """Images of an epoch are counted on both sides, and too few are refused."""
    words = ["--data-path", image_folder, "--input-size", 32, "--batch-size", 4]
    words += ["--num_workers", 0, "--rounds", 1, "--images"]
    status, output, errors = call(benchmark_loop.main, *words, 8)
    assert status == 0, errors
    figures = [float(cell) for cell in output.splitlines()[-1].strip("| ").split(" | ")]
    assert len(figures) == 3 and figures[2] == pytest.approx(figures[1] / figures[0], rel=0.1)
    assert "--images 5000" in error_of(benchmark_loop.main, *words, 5000)
