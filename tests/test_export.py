"""Programs for deployment: that they compute what the model does, and say what they are."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import ROOT, clean_env
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

import datasets
import models
from configs import parse_args
from models.visformer import Stage
from tools.export import formats
from tools.export.__main__ import main
from tools.export.check import compare, speed
from tools.export.source import ExportError, Source

PAGE = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox"]
VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
CONVIT = {"depth": 3, "local_up_to_layer": 2, "embed_dim": 32, "num_heads": 4, "img_size": 64}
# one of every kind, small enough to export in seconds
SMALL = {
    "visformer_tiny": ({"img_size": 32}, (32, 32)),
    "convit_tiny": (CONVIT, (64, 64)),
    "fastvit_sa12": ({}, (64, 96)),
    "vit_b_32_224": (VIT, (32, 32)),
}


def settle(model, size):
    """Statistics as after training: without them, deep nets amplify rounding."""
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
    model = settle(timm.create_model(name, **kwargs), size)
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


@pytest.fixture
def vit(tmp_path):
    """A tiny Vision Transformer, and its checkpoint."""
    path = tmp_path / "vit.pth"
    return save(path, "vit_b_32_224", VIT, (32, 32)), path


def export(*words):
    return main([*map(str, words), "--device", "cpu", "--no-benchmark"])


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def close(found, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-4 * scale)


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
    model = settle(model, size)
    assert [block.attn.shift for block in model.stage3] == [2, 0]
    assert all(block.attn.windows(8, 6, torch.zeros(1)) is not None for block in model.stage3)
    source = source_of(model, size, net=model.fuse() if fuse else model)
    formats.write("onnx", tmp_path / "out.onnx", source, None, None)
    session = session_of(tmp_path / "out.onnx")
    for batch in (1, 3):
        image = torch.randn(batch, 3, *size)
        with torch.no_grad():
            close(session.run(None, {"image": image.numpy()})[0], model(image))


def source_of(model, size=(32, 32), **options):
    """A source without a checkpoint."""
    model = model.eval().requires_grad_(False)
    fields = {"eager": model, "net": model, "name": "model", "size": size, "classes": ()}
    fields |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "short_side": 0}
    return Source(**fields | {"preprocessing": False, "notes": ()} | options)


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


NO_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)


@pytest.mark.parametrize("format_name", ["exported", pytest.param("aot", marks=NO_COMPILER)])
def test_programs_of_pytorch(format_name, vit, tmp_path, monkeypatch):
    model, path = vit
    output = {"exported": "model.pt2", "aot": "compiled.pt2"}[format_name]
    folder = tmp_path / "output" / "cifar10"
    folder.mkdir(parents=True)
    assert export("--checkpoint", path, "--format", format_name, "--output", folder / output) == 0
    monkeypatch.chdir(tmp_path)
    heading = {"exported": "## A `torch.export` program", "aot": "## An AOTInductor package"}
    names = {}
    exec(python_block(heading[format_name]), names)
    assert json.loads(names["about"]["classes"]) == CLASSES
    program = names["package"] if format_name == "aot" else names["program"].module()
    for batch in (1, 3):
        image = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            close(program(image), model(image))
    with torch.no_grad():
        close(names["logits"], model(torch.zeros(1, 3, 32, 32)))


def python_block(heading):
    """The first block of Python behind a heading of the page."""
    behind = PAGE[PAGE.index(heading) :]
    return re.search(r"```python\n(.*?)```", behind, re.DOTALL)[1]


@pytest.mark.parametrize(("size", "names"), [(32, CLASSES), (64, [])])
def test_the_page_serves_images(size, names, tmp_path, cifar):
    kwargs = VIT | {"img_size": size}
    path = tmp_path / "served.pth"
    model = save(path, "vit_b_32_224", kwargs, (size, size), classes=names)
    out = tmp_path / "served.onnx"
    assert export("--checkpoint", path, "--output", out, "--with-preprocessing") == 0
    script = tmp_path / "serve.py"
    script.write_text(python_block("## Serve with ONNX Runtime"))
    (tmp_path / "torch.py").write_text("raise ImportError('PyTorch is not needed')\n")
    source = next((cifar / "val").rglob("*.*"))
    photograph = tmp_path / "photograph.png"  # oblong, so that the crop is of its middle
    Image.open(source).convert("RGB").resize((150, 101)).save(photograph)
    process = subprocess.Popen(
        [sys.executable, str(script), str(out), "0"],
        cwd=tmp_path,
        env=clean_env(PYTHONPATH=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = process.stdout.readline().strip()
        with urllib.request.urlopen(address, photograph.read_bytes(), timeout=60) as answer:
            found = json.loads(answer.read())
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            urllib.request.urlopen(address, b"no image", timeout=60)
        assert "cannot identify image" in refused.value.read().decode()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    args, _ = parse_args(["--input-size", str(size)])
    transform = datasets.build_transform(False, args)
    image = transform(Image.open(photograph).convert("RGB"))
    with torch.no_grad():
        odds = model(image[None]).softmax(1)[0]
    names = names or list(map(str, range(len(CLASSES))))
    expected = {names[i]: odds[i].item() for i in odds.argsort(descending=True)[:5]}
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=2e-3)


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
        with pytest.raises(ExportError, match="the program is wrong"):
            compare(wrong, source, None)
    with pytest.raises(ExportError, match=r"output is \(1, 3\), not \(1, 4\)"):
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
    with pytest.raises(ExportError, match="the program is wrong"):
        compare(lambda x: 2 * x.mean((2, 3)), source_of(model), None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "out.txt"], "must end in .onnx or .pt2"),
        (["--output", "out.onnx", "--format", "aot"], "written to a .pt2 file, not to out.onnx"),
        (["--output", "out.pt2", "--format", "onnx"], "written to a .onnx file, not to out.pt2"),
        (["--output", "none/out.onnx"], "there is no folder none"),
        (["--output", "folder.onnx"], "folder.onnx is a folder"),
        (["--output", "out.pt2", "--opset", "20"], "--opset is for ONNX"),
        (["--output", "out.onnx"], "give --model NAME"),
        (["--output", "out.onnx", "--model", "test_vitt"], "the nearest are"),
        (["--output", "out.onnx", "--model", "test_vit", "--weights", "ema"], "needs --checkpoint"),
        (["--output", "out.onnx", "--checkpoint", "none.pth"], "cannot read checkpoint none.pth"),
        (["--output", "out.onnx", "--checkpoint", "plain.pth"], "does not say which model it is"),
        (
            ["--output", "out.onnx", "--checkpoint", "vit.pth", "--model", "convit_tiny"],
            "--model convit_tiny, but vit.pth is of vit_b_32_224",
        ),
        (
            ["--output", "out.onnx", "--checkpoint", "plain.pth", "--model", "visformer_tiny"],
            "does not fit the model",
        ),
        (["--output", "out.onnx", "--checkpoint", "vit.pth", "--weights", "ema"], "model_ema"),
        (["--output", "out.onnx", "--checkpoint", "vit.pth", "--num-classes", "7"], "has 6"),
        (["--output", "out.onnx", "--model", "convit_tiny", "--input-size", "50"], "multiples"),
        (
            ["--output", "out.onnx", "--model", "test_convnext", "--input-size", "1"],
            "cannot take --input-size 1x1",
        ),
        (["--output", "o.onnx", "--model", "test_vit", "--device", "cudaa"], "is not a device"),
        (
            ["--output", "o.onnx", "--checkpoint", "vit.pth", "--opset", "3"],
            "conversion to --opset 3",
        ),
    ],
)
def test_says_what_is_wrong(words, message, vit, tmp_path, monkeypatch, capsys):
    model, _ = vit
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(words) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == before


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
    assert done.stderr.startswith(f"error: cannot write {out}: File too large")
    assert list((tmp_path / "folder").iterdir()) == []


def test_says_what_to_install(vit, tmp_path, monkeypatch, capsys):
    _, path = vit
    out = tmp_path / "out.onnx"
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert export("--checkpoint", path, "--output", out) == 1
            printed = capsys.readouterr().err
            assert f"needs {package}: pip install onnx onnxscript onnxruntime" in printed
    monkeypatch.setenv("CXX", "no-such-compiler")
    package = tmp_path / "out.pt2"
    assert export("--checkpoint", path, "--format", "aot", "--output", package) == 1
    assert "no-such-compiler is not here" in capsys.readouterr().err
    if not torch.cuda.is_available():
        flags = ["--checkpoint", str(path), "--output", str(out), "--device", "cuda"]
        assert main(flags) == 1
        assert "use --device cpu" in capsys.readouterr().err
    assert not out.exists()
    assert not package.exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Lists of the hub's entrypoints, as if this repository had come from GitHub."""
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *args, **kwargs: str(ROOT))
    monkeypatch.chdir(tmp_path)
    return torch.hub


def test_hub_has_every_model(hub):
    names = hub.list("someone/visformer")
    module = {n: timm.models.model_entrypoint(n).__module__ for n in timm.list_models()}
    assert names == sorted(n for n, m in module.items() if m.startswith("models."))
    text = hub.help("someone/visformer", "visformer_tiny")
    assert text.startswith("Visformer-Ti: 10.3 M parameters")
    assert "checkpoint: File or http(s) address" in text


def test_hub_loads_models_and_weights(hub, tmp_path):
    source = save(tmp_path / "in.pth", "vit_b_32_224", VIT, (32, 32))
    with torch.device("meta"):
        model = hub.load(str(ROOT), "visformer_tiny", source="local", num_classes=3)
    assert type(model) is models.visformer.Visformer
    assert model.head.out_features == 3
    model = hub.load(str(ROOT), "vit_b_32_224", source="local", checkpoint=tmp_path / "in.pth")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), source(x))
    with pytest.raises(TypeError, match="drop_path_ratee"):
        hub.load(str(ROOT), "visformer_tiny", source="local", drop_path_ratee=0.1)
    with pytest.raises(models.CheckpointError, match="does not fit"):
        hub.load(str(ROOT), "visformer_tiny", source="local", checkpoint=tmp_path / "in.pth")


def test_hub_leaves_other_packages_called_models_alone(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "visformer.py").write_text("OTHER = True\n")
    save(tmp_path / "in.pth", "vit_b_32_224", VIT, (32, 32))
    code = f"""
import models, models.visformer, sys, torch
mine = dict(sys.modules)
model = torch.hub.load({str(ROOT)!r}, "vit_b_32_224", source="local", checkpoint="in.pth")
assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, {len(CLASSES)})
assert sys.modules["models"] is models and sys.modules["models.visformer"].OTHER
assert not [name for name in sys.modules if name.startswith("models.") and name not in mine]
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=clean_env(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
