"""tools.export: programs compute what the model does, and errors name what is wrong."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, clean_env, start_python
from exporting import CLASSES, VIT, close, export, save, session_of, source_of, warm_up_ddp
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from validating import caller, refuses

from models.visformer import Stage
from tools.export import __main__ as program
from tools.export import formats
from tools.export.__main__ import get_parser, main
from tools.export.check import compare, speed
from tools.export.formats import pytorch
from tools.export.source import load_source
from utils import UserError

CONVIT = {"depth": 3, "local_up_to_layer": 2, "embed_dim": 32, "num_heads": 4, "img_size": 64}
# one of every kind, small enough to export in seconds
SMALL = {
    "visformer_tiny": ({"img_size": 32}, (32, 32)),
    "convit_tiny": (CONVIT, (64, 64)),
    "fastvit_sa12": ({}, (64, 96)),
    "vit_b_32_224": (VIT, (32, 32)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_onnx_computes_what_the_model_does(name, tmp_path, capsys):
    kwargs, size = SMALL[name]
    model = save(tmp_path / "in.pth", name, kwargs, size)
    out = tmp_path / "out.onnx"
    flags = ["--checkpoint", tmp_path / "in.pth", "--output", out, "--input-size", *size]
    assert export(*flags) == 0
    printed = capsys.readouterr()
    assert str(out) in printed.out and printed.err == ""
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
    short = {(32, 32): "0", (64, 64): "73", (64, 96): "0"}  # at 0.875
    assert about["short_side"] == short[size]
    assert about["preprocessing"] == "outside"


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True])
def test_shifted_windows_in_any_batch(fuse, tmp_path):
    torch.manual_seed(0)
    size = (128, 96)  # a map of 8x6: windows of 4 do not fill it, and half of the layers shift
    stages = (Stage(1, 16, 4, spatial_groups=8), Stage(2, 32, 2, num_heads=2, window=4))
    model = timm.create_model("swin_visformer_tiny_v2", stages=stages, img_size=size)
    model = warm_up_ddp(model, size)
    assert [block.attn.shift for block in model.stage3] == [2, 0]
    assert all(block.attn.windows(8, 6, torch.zeros(1)) is not None for block in model.stage3)
    source = source_of(model, size, exported=model.fuse() if fuse else model)
    formats.write("onnx", source, tmp_path / "out.onnx", formats.Job())
    session = session_of(tmp_path / "out.onnx")
    for batch in (1, 3):
        image = torch.randn(batch, 3, *size)
        with torch.no_grad():
            close(session.run(None, {"image": image.numpy()})[0], model(image))


@pytest.mark.slow
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
    with pytest.raises(Exception, match="uint8"):  # onnxruntime's words
        session.run(None, {"pixels": pixels.astype(np.float32)})


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("extra", "size", "mean", "short_side"),
    [
        ({}, 96, 0.5, 106),
        ({}, 32, 0.5, 0),
        ({"args": {"crop_pct": 1.0}, "arch": "vit_base_patch32_224"}, 96, 0.5, 96),
        ({"args": {"eval_crop_ratio": 1.0}, "model_name": "vit_base_patch32_224"}, 96, 0.485, 96),
    ],
)
def test_metadata_follows_the_weights(extra, size, mean, short_side, tmp_path):
    # timm's weights have timm's constants, those trained here have this repository's
    name, path = "vit_base_patch32_224", tmp_path / "timm.pth"
    kwargs = {**VIT, "img_size": 96, "num_classes": 3}
    model = timm.create_model(name, **kwargs)
    torch.save({"model": model.state_dict(), "model_kwargs": kwargs} | extra, path)
    flags = ["--model", name, "--checkpoint", str(path), "--input-size", str(size), "--output", "x"]
    about = load_source(get_parser().parse_args(flags), torch.device("cpu")).metadata
    assert json.loads(about["mean"])[0] == mean
    assert about["short_side"] == str(short_side)
    assert json.loads(about["classes"]) == []


@pytest.mark.slow
def test_models_without_fuse_and_their_speed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.export.check.MIN_TIME", 0.01)
    out = tmp_path / "o.pt2"
    flags = ["--model", "test_vit", "--num-classes", "4", "--output", str(out)]
    assert main([*flags, "--device", "cpu", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "fuse" in printed and "--checkpoint" in printed
    assert re.search(
        r"batch 2, .*: torch.export [\d.]+, torch eager [\d.]+ \(torch.export ", printed
    )
    assert "torch fused" not in printed
    files = {pytorch.METADATA_FILE: ""}
    program = torch.export.load(out, extra_files=files).module()
    assert program(torch.zeros(2, 3, 160, 160)).shape == (2, 4)
    assert json.loads(files[pytorch.METADATA_FILE])["model"] == "test_vit"


def test_branches_of_timms_models_are_folded():
    flags = ["--model", "mobileone_s0", "--input-size", "64", "--output", "x"]
    source = load_source(get_parser().parse_args(flags), torch.device("cpu"))
    eager, exported = (list(net.parameters()) for net in (source.eager, source.exported))
    assert sum(map(torch.numel, exported)) < sum(map(torch.numel, eager))
    compare(source.exported, source, batch=1)


def test_speed_is_measured_as_printed(monkeypatch):
    times = {"onnxruntime": [1.0, 2.0, 4.0], "torch eager": [2.0, 8.0, 4.0]}
    monkeypatch.setattr("tools.export.check.alternate", lambda *_: times)
    text = speed({"onnxruntime": lambda x: x}, source_of(nn.Conv2d(3, 1, 1)), 3)
    assert "onnxruntime 1.5, torch eager 0.8 (onnxruntime 2.00x)" in text


@pytest.mark.slow
def test_a_wrong_program_is_not_kept(vit, tmp_path, capsys, monkeypatch):
    _, path = vit
    out = tmp_path / "folder" / "out.pt2"
    out.parent.mkdir()
    out.write_bytes(b"what was there")
    capture = pytorch.capture

    def broken(source, job):
        program = capture(source, job)
        program.state_dict["head.bias"].add_(0.1)
        return program

    monkeypatch.setattr(pytorch, "capture", broken)
    assert export("--checkpoint", path, "--output", out) == 1
    assert capsys.readouterr().err.startswith("error: ")
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
        with pytest.raises(UserError, match="1e-04"):  # the tolerance
            compare(wrong, source, None)
    with pytest.raises(UserError, match=r"\(1, 3\).*\(1, 4\)"):
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
    assert f"{agreement.rounding:.1e}" in str(agreement)
    with pytest.raises(UserError, match=f"{agreement.rounding:.1e}"):
        compare(lambda x: 2 * x.mean((2, 3)), source_of(model), None)


OF_FILE = ["o.onnx", "--checkpoint", "vit.pth"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["out.txt"], ".onnx"),
        (["out.onnx", "--format", "aot"], ".pt2"),
        (["out.pt2", "--format", "onnx"], ".onnx"),
        (["none/out.onnx"], "none"),
        (["folder.onnx"], "folder.onnx"),
        (["out.pt2", "--opset", "20"], "--opset"),
        (["out.onnx"], "--model"),
        (["out.onnx", "--model", "test_vitt"], "test_vit,"),
        (["out.onnx", "--model", "test_vit.x"], "test_vit.x"),
        (["out.onnx", "--model", "test_vit", "--weights", "ema"], "test_vit"),
        (["out.onnx", "--checkpoint", "none.pth"], "none.pth"),
        (["out.onnx", "--checkpoint", "plain.pth"], "--model"),
        (["out.onnx", "--checkpoint", "vit.pth", "--model", "convit_tiny"], "vit_b_32_224"),
        (["out.onnx", "--checkpoint", "plain.pth", "--model", "visformer_net1"], "plain.pth"),
        (["out.onnx", "--checkpoint", "vit.pth", "--weights", "ema"], "model_ema"),
        (["out.onnx", "--checkpoint", "vit.pth", "--num-classes", "7"], "--num-classes 7"),
        (["out.onnx", "--model", "convit_tiny", "--input-size", "50"], "50"),
        (["out.onnx", "--model", "test_convnext", "--input-size", "1"], "--input-size 1x1"),
        (["o.onnx", "--model", "test_vit", "--device", "cudaa"], "cudaa"),
        (["o.onnx", "--model", "test_vit", "--device", "meta"], "--device meta"),
        ([f"{'o' * 300}.onnx", "--model", "test_vit"], "ooo.onnx"),
        (["vit.onnx", "--checkpoint", "vit.onnx"], "vit.onnx"),
    ],
)
def test_errors_name_what_is_wrong(words, named, vit, tmp_path, monkeypatch, capsys):
    model, _ = vit
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    refuses(caller(capsys, program, more=())("--output", *words), named)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_an_opset_without_a_conversion_is_named(vit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    call = caller(capsys, program, more=())
    status, _, errors = call("--output", "out.onnx", "--checkpoint", "vit.pth", "--opset", "3")
    assert status == 1
    assert errors.startswith("error: ") and "--opset 3" in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.pt2", "out.onnx"])
def test_a_full_disk_is_an_error(name, vit, tmp_path):
    _, path = vit
    (tmp_path / "folder").mkdir()
    out = tmp_path / "folder" / name
    words = [sys.executable, "-m", "tools.export", "--checkpoint", path, "--output", out]
    words += ["--device", "cpu", "--no-check"]
    limited = ["bash", "-c", 'ulimit -f 32; exec "$@"', "-", *map(str, words)]  # of 1024 bytes
    done = subprocess.run(
        limited, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ") and str(out) in done.stderr
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_an_export_that_is_stopped_leaves_nothing(number, status, vit, tmp_path):
    _, path = vit
    out = tmp_path / "folder" / "out.onnx"
    out.parent.mkdir()
    # the exporter stops where the folder is made and nothing is written yet
    script = f"""
import os, signal, sys, time
from tools.export.formats import onnx
from tools.export.__main__ import main
def write(*_):
    print(os.listdir({str(out.parent)!r}), flush=True)
    time.sleep(60)
onnx.capture = write
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.exit(main({["--checkpoint", str(path), "--output", str(out), "--device", "cpu"]!r}))
"""
    with start_python("-c", script) as process:
        while "unfinished-" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert list(out.parent.iterdir()) == []


def test_says_what_to_install(vit, tmp_path, monkeypatch, capsys):
    _, path = vit
    out = tmp_path / "out.onnx"
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert export("--checkpoint", path, "--output", out) == 1
            printed = capsys.readouterr().err
            assert package in printed and "pip install onnx onnxscript onnxruntime" in printed
    monkeypatch.setenv("CXX", "no-such-compiler")
    package = tmp_path / "out.pt2"
    assert export("--checkpoint", path, "--format", "aot", "--output", package) == 1
    assert "no-such-compiler" in capsys.readouterr().err
    if not torch.cuda.is_available():
        flags = ["--checkpoint", str(path), "--output", str(out), "--device", "cuda"]
        assert main(flags) == 1
        assert "--device cuda" in capsys.readouterr().err
    assert not out.exists()
    assert not package.exists()


def test_packages_leave_nothing_in_the_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "left").mkdir()
    text = "import os, pathlib\npathlib.Path(os.environ['TMPDIR'], '.ses').touch()\n"
    (tmp_path / "leaving.py").write_text(text)
    (tmp_path / "failing.py").write_text(f"{text}raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "left"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "left"))
    formats.import_package("leaving")
    with pytest.raises(ImportError):
        formats.import_package("failing")
    assert list((tmp_path / "left").iterdir()) == []
    assert os.environ["TMPDIR"] == str(tmp_path / "left")
