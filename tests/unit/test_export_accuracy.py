"""tools.export: images of a folder, accuracy on them, and what is refused before any work."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from exporting import export, source_of
from torch import nn
from validating import caller

from models import DataConfig
from pipeline.images import DataError
from tools.export import __main__ as program
from tools.export import calibration
from tools.export.calibration import CalibrationSet
from tools.export.check import Quality, compare, measure
from tools.export.formats import FLOAT16
from tools.files import move_into_place
from utils import UserError

CLASSES = ("cat", "dog", "eel")


class Net(nn.Module):
    """A linear model of 16x16 pixels."""

    def __init__(self, num_classes=3, channels=3):
        super().__init__()
        self.num_classes = num_classes
        self.head = nn.Linear(channels * 256, num_classes)

    def forward(self, image):
        return self.head(image.flatten(1))


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", train=0, val=4, classes=CLASSES, size=16) / "val"


def source(classes=CLASSES, channels=3, **options):
    images = DataConfig((16, 16), mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.3, 0.4)[:channels])
    net = Net(channels=channels)
    return source_of(net, (16, 16), classes=classes, images=images, **options)


def test_outputs_of_the_images_classes(folder):
    torch.manual_seed(0)
    model = source(classes=("eel", "cat", "dog"))
    images = CalibrationSet(folder, model)
    assert images.targets.tolist() == 4 * [1] + 4 * [2] + 4 * [0]
    inputs = torch.cat(list(images.batches(5)))
    assert inputs.shape == (15, 3, 16, 16) and torch.equal(inputs[12], inputs[11])
    logits = model.eager(inputs)[:12]
    right = logits.argmax(1)
    hits = (right == images.targets).sum().item()
    same = measure(model.eager, model, images, None)
    assert same == Quality(12, 12, hits, hits, 0.0) and same.drop == 0
    # of one image, another class; of another, no number
    worse = torch.zeros(12, 3)
    worse[torch.arange(12), images.targets] = 1.0
    worse[0, 0], worse[1] = 2.0, torch.nan
    batches = iter(worse.split(4))
    found = measure(lambda _: next(batches), model, images, 4)
    assert found.hits == 10 and found.expected == hits
    assert found.drop == pytest.approx(100 * (hits - 10) / 12)
    assert found.difference == np.inf


def test_without_classes_agreement_counts(folder):
    model = source()
    images = CalibrationSet(folder / "cat", model)
    assert images.targets is None
    found = measure(lambda x: -model.eager(x), model, images, None)
    assert found.hits is None and found.agreeing == 0 and found.drop == 100.0


def test_a_large_folder_is_sampled_evenly(folder, monkeypatch):
    monkeypatch.setattr(calibration, "MOST", 3)
    assert CalibrationSet(folder, source()).targets.tolist() == [0, 1, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_evaluation(channels, folder):
    model = source(channels=channels)
    normalized = next(CalibrationSet(folder, model).batches(12))
    pixels = next(CalibrationSet(folder, source(channels=channels, preprocessing=True)).batches(12))
    assert pixels.shape == (12, 16, 16, channels) and pixels.dtype == torch.uint8
    mean, std = (torch.tensor(values) for values in (model.images.mean, model.images.std))
    expected = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(normalized, expected)


@pytest.mark.parametrize(
    ("place", "named"), [("none", "none"), ("images", "val"), ("empty", "empty")]
)
def test_folders_that_do_not_fit(place, named, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=named):
        CalibrationSet(tmp_path / place, source())


def test_float16_has_a_tolerance_of_its_own():
    model = source()
    off = compare(lambda x: model.eager(x) * 1.003, model, None, FLOAT16)
    assert off.difference == pytest.approx(3e-3, rel=0.01)
    with pytest.raises(UserError, match=r"2e-02.*float32"):
        compare(lambda x: model.eager(x) * 1.03, model, None, FLOAT16)


IMAGES = ["--calibration", "images/val"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["o.onnx", "--precision", "int8"], ["--calibration"]),
        (["o.pt2", "--precision", "int8", *IMAGES], ["int8", "exported", "openvino float32"]),
        (["o.pte", "--precision", "float16"], ["float16", "executorch float32, int8"]),
        (["o.mlpackage", *IMAGES], ["Core ML"]),
        (["o.onnx", *IMAGES, "--no-check"], ["--no-check"]),
        (["o.onnx", "--max-drop", "2"], ["--max-drop 2"]),
        (["o.onnx", "--max-drop", "nan", *IMAGES], ["--max-drop nan"]),
        (["o.onnx", "--calibration", "none"], ["none"]),
        (["o.xml", "--format", "onnx"], [".onnx"]),
        (["in.xml", "--checkpoint", "in.bin"], ["in.bin"]),
        (["images.mlpackage"], ["images.mlpackage"]),
    ],
)
def test_flags_that_do_not_fit(words, named, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in.bin").write_bytes(b"weights")
    Path("images.mlpackage").mkdir()
    model = [] if "--checkpoint" in words else ["--model", "test_vit"]
    call = caller(capsys, program, more=())
    status, _, errors = call("--output", *words, *model)
    assert (status, errors.startswith("error: ")) == (1, True)
    assert all(value in errors for value in named), errors
    assert {path.name for path in tmp_path.iterdir()} == {"images", "in.bin", "images.mlpackage"}


@pytest.mark.parametrize(
    ("output", "package", "flags"),
    [
        ("o.mlpackage", "coremltools", []),
        ("o.pte", "executorch", []),
        ("o.xml", "openvino", []),
        ("o.xml", "nncf", ["--precision", "int8", *IMAGES]),
        ("o.pte", "torchao", ["--precision", "int8", *IMAGES]),
    ],
)
def test_says_which_package_to_install(
    output, package, flags, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("coremltools", "executorch", "openvino"):
        monkeypatch.setitem(sys.modules, name, sys)  # as if it were installed
    monkeypatch.setitem(sys.modules, package, None)
    assert export("--model", "test_vit", "--output", output, *flags) == 1
    error = capsys.readouterr().err
    assert "pip install " in error and package in error.split("pip install ")[1]


def test_files_move_together(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()

    def fill(folder, text):
        (folder / "m.xml").write_text(text)
        (folder / "m.bin").write_text(text)
        return [folder / "m.xml", folder / "m.bin"]

    old = fill(tmp_path, "old")
    move_into_place(fill(hidden, "new"), tmp_path)
    assert [path.read_text() for path in old] == ["new", "new"]
    new = fill(hidden, "newer")
    new[1].unlink()
    with pytest.raises(FileNotFoundError):
        move_into_place(new, tmp_path)
    assert [path.read_text() for path in old] == ["new", "new"]
    folder = hidden / "m"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "file").touch()
    move_into_place([folder], tmp_path)
    assert os.listdir(tmp_path / "m") == ["inner"]
