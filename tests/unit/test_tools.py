"""tools.convert_checkpoint, and what all tools share: models, tables, flags."""

import argparse
import csv
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from conftest import ROOT
from validating import caller, random_vit, refuses, save

import models
from tools import convert_checkpoint, tables
from training.files import OutputError
from training.flags import parse_args
from training.parser import positive


@pytest.fixture
def convert(capsys):
    return caller(capsys, convert_checkpoint, more=())


def test_convert_checkpoint(tmp_path, convert):
    average = timm.create_model("visformer_tiny", num_classes=3)
    original = {k.replace("norm.", "norm.bn."): v for k, v in average.state_dict().items()}
    content = {"model": {k: torch.zeros_like(v) for k, v in original.items()}}
    torch.save(content | {"model_ema": original}, tmp_path / "in.pth")
    ours = tmp_path / "ours.safetensors"
    flags = ["--model", "visformer_tiny", "--ema", "--qk-scale-factor", "-0.5"]
    status, output, _ = convert(tmp_path / "in.pth", ours, *flags)
    assert (status, "renamed" in output, str(ours) in output) == (0, True, True)
    with safetensors.safe_open(ours, "pt") as file:
        metadata = file.metadata()
    assert metadata["model_name"] == "visformer_tiny"
    assert json.loads(metadata["model_kwargs"])["qk_scale_factor"] == -0.5
    loaded = timm.create_model("visformer_tiny", num_classes=3)
    models.load_checkpoint(loaded, ours)
    assert loaded.qk_scale_factor == -0.5
    assert torch.equal(loaded.head.weight, average.head.weight)

    plain = tmp_path / "timm.safetensors"
    assert convert(ours, plain, "--to", "timm")[0] == 0
    assert safetensors.torch.load_file(plain).keys() == average.state_dict().keys()
    theirs = timm.models.visformer.visformer_tiny(num_classes=3)
    theirs.load_state_dict(safetensors.torch.load_file(plain))
    back = tmp_path / "back.pth"
    assert convert(plain, back, "--model", "visformer_tiny")[0] == 0
    assert torch.load(back, weights_only=True)["model_name"] == "visformer_tiny"


def test_preprocessing_of_a_run_is_kept(tmp_path, convert):
    model = random_vit(2)
    more = {"input_size": 48, "args": {"eval_crop_ratio": 0.9, "lr": 1.0}}
    source = save(tmp_path / "in.pth", model, classes=["cat", "dog"], **more)
    for suffix in ("pth", "safetensors"):
        out = tmp_path / f"out.{suffix}"
        assert convert(source, out)[0] == 0

        found = models.find_model(str(out))
        assert found.classes == ("cat", "dog")
        assert found.data_config == models.DataConfig((48, 48), crop_pct=0.9)
    foreign = tmp_path / "foreign.safetensors"  # metadata may hold anything
    safetensors.torch.save_file(model.state_dict(), foreign, metadata={"classes": "cat, dog"})
    with pytest.raises(models.CheckpointError, match=str(foreign)):
        models.find_model(str(foreign), "test_vit")


def test_convert_for_detection(tmp_path, convert):
    source = timm.create_model("swin_visformer_tiny_v2", num_classes=3, qk_scale_factor=-0.5)
    path = tmp_path / "classifier.pth"
    torch.save({"model": source.state_dict(), "qk_scale_factor": -0.5}, path)
    for name in ("detector.pth", "detector.safetensors"):
        flags = ["--model", "swin_visformer_tiny_v2", "--to", "detection"]
        status, output, _ = convert(path, tmp_path / name, *flags)
        assert (status, "norm0, norm1" in output) == (0, True)
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / name)}
    backbone = models.VisionBackbone("swin_visformer_tiny_v2", init_cfg=init_cfg)
    report = backbone.init_weights()
    assert {key.split(".")[0] for key in report.missing} == {"norm0", "norm1", "norm2", "norm3"}
    assert report.unexpected == ()
    assert backbone.qk_scale_factor == -0.5
    own = source.state_dict()
    assert all(
        torch.equal(value, own[key.removeprefix("net.")])
        for key, value in backbone.state_dict().items()
        if key.startswith("net.")
    )
    first, second = (
        models.read_checkpoint(tmp_path / f"detector.{s}") for s in ("pth", "safetensors")
    )
    assert first["model_name"] == second["model_name"] == "swin_visformer_tiny_v2"
    assert first["model_kwargs"] == second["model_kwargs"] == {"qk_scale_factor": -0.5}
    one, other = first["state_dict"], second["state_dict"]
    assert all(key.startswith("backbone.net.") for key in one)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("none.pth out.pth", ["none.pth", "No such file"]),
        ("in.pth out.pth", ["in.pth", "--model NAME"]),
        ("in.pth out.txt --model test_vit", ["out.txt", ".safetensors", ".pth"]),
        ("none.pth none/out.pth", ["none/out.pth"]),  # before anything is read
        ("in.pth out.pth --model convit_tiny", ["in.pth"]),
        ("in.pth out.pth --model visformer_tinyy", ["'visformer_tinyy'", "visformer_tiny,"]),
    ],
)
def test_convert_checkpoint_names_what_is_wrong(flags, values, tmp_path, convert, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": random_vit(3).state_dict()}, "in.pth")
    refuses(convert(*flags.split()), *values)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_sources_of_models(tmp_path):
    model, average = random_vit(3), random_vit(3, seed=1)
    path = str(save(tmp_path / "net.pth", model, average, classes=["a", "b", "c"]))
    source = models.find_model(path)
    assert (source.name, source.classes) == ("test_vit", ("a", "b", "c"))
    assert source.data_config.input_size == (32, 32)
    assert source.weights() == ("model", "ema")
    built, kwargs = source.build_with_kwargs(48)
    assert kwargs == {"num_classes": 3, "img_size": 48}
    assert source.load(built, "ema").resampled == ("pos_embed",)
    assert torch.equal(built.head.weight, average.head.weight)
    # arguments of one model are not those of another
    assert models.find_model(path, "vit_tiny_patch16_224").optional == {}
    random = models.find_model("test_vit")
    assert (random.checkpoint, random.load(model)) == ({}, None)
    assert random.data_config.input_size == (160, 160)
    with pytest.raises(models.CheckpointError, match="test_vit"):
        random.weights("ema")
    with pytest.raises(models.ModelError, match="test_vitt"):
        models.find_model("test_vitt")


def test_tables(tmp_path):
    path = tmp_path / "t.csv"
    rows = [("a, b", None), {"second": 0.1 + 0.2, "first": "\udcff", "third": 1}]
    tables.write_csv(path, ("first", "second"), rows)
    with open(path, newline="", errors="surrogateescape") as file:
        assert [*csv.reader(file)] == [
            ["first", "second"],
            ["a, b", ""],
            ["\udcff", "0.30000000000000004"],
        ]
    names = ["=1+1", "@x", "+x", "-x", "\tx", "x=1", "-1.5", "+2"]
    tables.write_csv(path, ("name",), [[name] for name in names])
    with open(path, newline="") as file:
        found = [name for (name,) in [*csv.reader(file)][1:]]
    assert found == ["'=1+1", "'@x", "'+x", "'-x", "'\tx", "x=1", "-1.5", "+2"]
    with pytest.raises(OutputError, match=str(tmp_path / "no" / "t.csv")):
        tables.write_csv(tmp_path / "no" / "t.csv", (), ())
    text = tables.aligned(["name", "n"], [["a\n", "10.5"], ["long", ""], ["c", "2"]])
    assert text.splitlines() == ["name     n", "a     10.5", "long", "c        2"]
    assert tables.markdown("ab", ["12"]) == "| a | b |\n|---|---|\n| 1 | 2 |"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "²"])
def test_positive(text):
    assert positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
        positive(text)


def test_the_list_for_a_gpu(tmp_path):
    python, lines = tmp_path / "python", tmp_path / "lines"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec echo "GPU 2.14"\necho "$*" >>{lines}\n'
        '[ "$2" != tools.benchmark ] || { echo no memory; exit 3; }\n'
    )
    python.chmod(0o755)
    command = [ROOT / "tools" / "gpu_day.sh", tmp_path / "out"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True)
    page, ran = (tmp_path / "out" / "gpu.md").read_text(), lines.read_text().splitlines()
    assert done.returncode == 1 and page.count("failed with status 3") == 1 and "no memory" in page
    assert page.count("\n## ") == len(ran) > 10
    for words in map(shlex.split, ran):
        if words[0] == "main.py":
            parse_args(words[1:])
        else:
            path = Path(ROOT, *words[1].split("."))
            assert words[1] == "pytest" or path.with_suffix(".py").exists() or path.is_dir()
    files = [word for line in ran for word in line.split() if word.startswith("tests/")]
    assert files and all((ROOT / file).exists() for file in files)
    python.write_text("#!/bin/sh\nexit 1\n")
    done = subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
