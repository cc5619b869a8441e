"""Programs for deployment: that they compute what the model does."""

import copy
import json
import re

import numpy as np
import pytest
import timm
import torch
from exporting import CLASSES, VIT, close, export, save, session_of, source_of, warm_up_ddp
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from models.visformer import Stage
from tools.export import formats
from tools.export.__main__ import main
from tools.export.check import compare, speed
from utils import UserError

CONVIT = {"depth": 3, "local_up_to_layer": 2, "embed_dim": 32, "num_heads": 4, "img_size": 64}
# one of every kind, small enough to export in seconds
SMALL = {
    "visformer_tiny": ({"img_size": 32}, (32, 32)),
    "convit_tiny": (CONVIT, (64, 64)),
    "fastvit_sa12": ({}, (64, 96)),
    "vit_b_32_224": (VIT, (32, 32)),
}


@pytest.mark.parametrize("name", SMALL)
def test_onnx_computes_what_the_model_does(name, tmp_path, capsys):
    kwargs, size = SMALL[name]
    model = save(tmp_path / "in.pth", name, kwargs, size)
    out = tmp_path / "out.onnx"
    flags = ["--checkpoint", tmp_path / "in.pth", "--output", out, "--input-size", *size]
    assert export(*flags) == 0
    printed = capsys.readouterr()
    assert "onnxruntime agrees with torch: at batch 1 and 3 within" in printed.out
    assert printed.err == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pth", "out.onnx"]
    session = session_of(out)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.shape, given.shape) == (["batch", 3, *size], ["batch", len(CLASSES)])
    for batch in (1, 2, 5):
        image = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            close(session.run(["logits"], {"image": image.numpy()})[0], model(image))
    about = session.get_modelmeta().custom_metadata_map
    assert (about["project"], about["model"]) == ("visformer", name)
    assert json.loads(about["classes"]) == CLASSES
    assert json.loads(about["input_size"]) == list(size)
    short = {(32, 32): "0", (64, 64): "73", (64, 96): "109"}  # at 0.875, both sides of it fit
    assert about["short_side"] == short[size]
    assert about["preprocessing"] == "outside"


@pytest.mark.parametrize("fuse", [False, True])
def test_shifted_windows_in_any_batch(fuse, tmp_path):
    torch.manual_seed(0)
    size = (128, 96)  # a map of 8x6: windows of 4 do not fill it, and half of the layers shift
    stages = (Stage(1, 16, 4, spatial_groups=8), Stage(2, 32, 2, num_heads=2, window=4))
    model = timm.create_model("swin_visformer_tiny_v2", stages=stages, img_size=size)
    model = warm_up_ddp(model, size)
    assert [block.attn.shift for block in model.stage3] == [2, 0]
    assert all(block.attn.windows(8, 6, torch.zeros(1)) is not None for block in model.stage3)
    source = source_of(model, size, net=model.fuse() if fuse else model)
    formats.write("onnx", tmp_path / "out.onnx", source, None, None)
    session = session_of(tmp_path / "out.onnx")
    for batch in (1, 3):
        image = torch.randn(batch, 3, *size)
        with torch.no_grad():
            close(session.run(None, {"image": image.numpy()})[0], model(image))


def test_preprocessing_is_inside(vit, tmp_path):
    model, path = vit
    out = tmp_path / "pixels.onnx"
    assert export("--checkpoint", path, "--with-preprocessing", "--output", out) == 0
    session = session_of(out)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    mean, std = (torch.tensor(v).double() for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    image = (torch.from_numpy(pixels).double() / 255 - mean) / std
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(image.permute(0, 3, 1, 2)).float()
    close(session.run(None, {"pixels": pixels})[0], expected)
    assert session.get_modelmeta().custom_metadata_map["preprocessing"] == "inside"
    with pytest.raises(Exception, match="uint8"):
        session.run(None, {"pixels": pixels.astype(np.float32)})


def test_static_batch_and_average(vit, tmp_path):
    _, path = vit
    torch.manual_seed(1)
    average = timm.create_model("vit_b_32_224", num_classes=len(CLASSES), **VIT).eval()
    content = torch.load(path, weights_only=True)
    torch.save(content | {"model_ema": average.state_dict()}, path)
    out = tmp_path / "out.onnx"
    flags = ["--checkpoint", path, "--weights", "ema", "--batch-size", 2, "--no-fuse"]
    assert export(*flags, "--opset", 19, "--output", out) == 0
    session = session_of(out)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(session.run(None, {"image": image.numpy()})[0], average(image))
    with pytest.raises(Exception, match="dimension"):
        session.run(None, {"image": image[:1].numpy()})
    assert session.get_inputs()[0].shape == [2, 3, 32, 32]


def test_classes_are_counted_in_the_weights_that_are_taken(tmp_path):
    name, path, out = "vit_b_32_224", tmp_path / "in.pth", tmp_path / "out.pt2"
    raw, average = (timm.create_model(name, num_classes=n, **VIT).state_dict() for n in (7, 3))
    kinds = {"model": raw, "model_ema": average}
    torch.save(kinds | {"model_name": name, "model_kwargs": VIT, "input_size": 32}, path)
    for weights, classes in (("model", 7), ("ema", 3)):
        assert export("--checkpoint", path, "--weights", weights, "--output", out) == 0
        program = torch.export.load(out).module()
        assert program(torch.zeros(1, 3, 32, 32)).shape == (1, classes)


def test_metadata_follows_the_weights(vit, tmp_path):
    # what timm trained has timm's constants, what was trained here those of this repository
    name = "vit_base_patch32_224"
    torch.manual_seed(0)
    kwargs = {**VIT, "img_size": 96, "num_classes": 3}
    model = timm.create_model(name, **kwargs)
    path, out = tmp_path / "timm.pth", tmp_path / "out.pt2"
    content = {"model": model.state_dict(), "model_kwargs": kwargs}
    flags = ["--model", name, "--checkpoint", path, "--input-size", 96, "--output", out]
    flags_of_timm = {"args": {"crop_pct": 1.0}, "arch": name}
    ours = {"args": {"eval_crop_ratio": 1.0}, "model_name": name}
    for extra, mean, short in (
        ({}, 0.5, 109),
        (flags_of_timm, 0.5, 109),
        (ours, 0.485, 96),
    ):
        torch.save(content | extra, path)
        assert export(*flags) == 0
        files = {formats.METADATA_FILE: ""}
        torch.export.load(out, extra_files=files)
        about = json.loads(files[formats.METADATA_FILE])
        assert json.loads(about["mean"])[0] == mean
        assert about["short_side"] == str(short)
        assert json.loads(about["classes"]) == []


def test_models_without_fuse_and_their_speed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.export.check.MIN_TIME", 0.01)
    flags = ["--model", "test_vit", "--num-classes", "4", "--output", str(tmp_path / "o.pt2")]
    assert main([*flags, "--device", "cpu", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "test_vit has no fuse(): exported as it is" in printed
    assert "no --checkpoint: test_vit has random weights" in printed
    rate = r"images/s at batch 2, \d+ thread\(s\): torch.export [\d.]+, torch eager [\d.]+ \(tor"
    assert re.search(rate, printed)
    assert "torch fused" not in printed


def test_speed_is_measured_as_printed(monkeypatch):
    times = {"onnxruntime": [1.0, 2.0, 4.0], "torch eager": [2.0, 8.0, 4.0]}
    monkeypatch.setattr("tools.export.check.alternate", lambda *_: times)
    text = speed(lambda x: x, "onnxruntime", source_of(nn.Conv2d(3, 1, 1)), 3)
    assert "onnxruntime 1.5, torch eager 0.8 (onnxruntime 2.00x)" in text


def test_a_wrong_program_is_not_kept(vit, tmp_path, capsys, monkeypatch):
    _, path = vit
    out = tmp_path / "folder" / "out.pt2"
    out.parent.mkdir()
    out.write_bytes(b"what was there")
    capture = formats.capture

    def broken(source, batch):
        program = capture(source, batch)
        program.state_dict["head.bias"].add_(0.1)
        return program

    monkeypatch.setattr(formats, "capture", broken)
    assert export("--checkpoint", path, "--output", out) == 1
    assert "the program is wrong: " in capsys.readouterr().err
    assert [p.name for p in out.parent.iterdir()] == ["out.pt2"]
    assert out.read_bytes() == b"what was there"
    assert export("--checkpoint", path, "--output", out, "--no-check") == 0
    assert out.read_bytes() != b"what was there"


def test_the_comparison_knows_rounding():
    model = nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten())
    source = source_of(model)
    assert compare(model, source, None).difference == 0.0
    off = compare(lambda x: model(x) * (1 + 5e-5), source, 2)
    assert off.rounding is None
    assert off.difference == pytest.approx(5e-5, rel=0.01)
    wrongs = (lambda x: model(x) * (1 + 3e-4), lambda x: model(x) * torch.nan)
    wrongs += (lambda x: model(x) * (torch.nan if len(x) == 1 else 1),)
    for wrong in wrongs:
        with pytest.raises(UserError, match="the program is wrong"):
            compare(wrong, source, None)
    with pytest.raises(UserError, match=r"output is \(1, 3\), not \(1, 4\)"):
        compare(lambda x: model(x)[:, :3], source, None)

    class Amplifies(nn.Module):
        """Adds and takes away a large number, which float32 rounds by parts in 1e3."""

        def forward(self, x):
            return (x.mean((2, 3)) + 3e4) - 3e4

    model = Amplifies()
    model.unused = nn.Parameter(torch.zeros(1))
    agreement = compare(lambda x: x.double().mean((2, 3)), source_of(model), None)
    assert agreement.difference == pytest.approx(agreement.rounding, rel=0.1)
    assert agreement.rounding > 1e-3
    assert "float32 itself is within" in str(agreement)
    with pytest.raises(UserError, match="the program is wrong"):
        compare(lambda x: 2 * x.mean((2, 3)), source_of(model), None)
