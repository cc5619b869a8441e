"""What cannot be exported or written: clear errors, and nothing left behind."""

import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, clean_env, start_python
from exporting import export

from tools.export.__main__ import main


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
        (["--output", "out.onnx", "--model", "test_vit.x"], "there is no model 'test_vit.x'"),
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
        (["--output", "o.onnx", "--model", "test_vit", "--device", "meta"], "for cpu or cuda"),
        (["--output", f"{'o' * 300}.onnx", "--model", "test_vit"], "cannot be written: File name"),
        (["--output", "vit.onnx", "--checkpoint", "vit.onnx"], "would overwrite what is read"),
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
from tools.export import formats
from tools.export.__main__ import main
def write(*_):
    print(os.listdir({str(out.parent)!r}), flush=True)
    time.sleep(60)
formats.write_onnx = write
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
