"""tools.validate on ImageNet's other labels and sets: ReaL and C."""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import write_images
from PIL import Image
from timm.data import RealLabelsImagenet
from validating import (
    CLASSES,
    SIZE,
    STOPS,
    caller,
    fails_from,
    formulas,
    logits_of,
    plain,
    random_vit,
    read,
    refuses,
    save,
    trained,
)

from tools.validate import imagenet_c
from tools.validate.classes import imagenet_wnids, match_classes
from tools.validate.imagenet_c import ALEXNET, Corruption
from tools.validate.metrics import RealMetrics
from tools.validate.sets import read_real_labels


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"), CLASSES, 1)


@pytest.fixture
def call(capsys):
    return caller(capsys)


@pytest.fixture
def imagenet_files(tmp_path):
    """9 validation images of two classes, and labels of the same and of others."""
    names = ("n01440764", "n01443537")
    folder = write_images(tmp_path / "images", train=0, val=5, classes=names) / "val"
    (folder / names[1] / "4.jpg").unlink()
    for number, path in enumerate(sorted(folder.glob("*/*")), start=1):
        shuffled = number * 4 % 11
        path.rename(path.with_name(f"ILSVRC2012_val_{shuffled:08}.JPEG"))
    return folder


def test_real_labels(imagenet_files, call, tmp_path):
    flags, model = plain(tmp_path / "plain.pth")
    logits, _, paths = logits_of(model, imagenet_files, plain=True)
    best = np.argsort(-logits, axis=1)
    labels = [[] for _ in range(10)]
    for row, path in enumerate(paths):
        number = int(path.stem[-8:])
        kinds = [[int(best[row, 0]), 3], [5, int(best[row, 3])], [int(best[row, 700])], []]
        labels[number - 1] = kinds[row % 4]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    judge = RealLabelsImagenet(
        [str(p) for p in paths] + ["ILSVRC2012_val_00000001.JPEG"] * (10 - len(paths)),
        tmp_path / "real.json",
    )
    judge.add_result(torch.from_numpy(logits))
    flags += ["--batch-size", 2, "--data-path", imagenet_files]
    flags += ["--real-labels", tmp_path / "real.json"]
    assert call(*flags, "--csv", tmp_path / "rows.csv")[0] == 0
    row = read(tmp_path / "rows.csv")[0]
    assert int(row["real_images"]) == len(judge.is_correct[1]) == 7
    assert float(row["real_top1"]) == pytest.approx(judge.get_accuracy(1))
    assert float(row["real_top5"]) == pytest.approx(judge.get_accuracy(5))
    assert judge.get_accuracy(1) != judge.get_accuracy(5)
    # a corrupt image does not shift the labels
    paths[1].write_bytes(b"broken")
    judge.is_correct = {k: v[:1] + v[2:] for k, v in judge.is_correct.items()}
    assert call(*flags, "--csv", tmp_path / "rows.csv", "--on-corrupt", "skip")[0] == 0
    row = read(tmp_path / "rows.csv")[0]
    assert (row["images"], row["corrupt"], row["real_images"]) == ("8", "1", "6")
    assert float(row["real_top1"]) == pytest.approx(judge.get_accuracy(1))
    refuses(call(*flags), paths[1])


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("[[0], [1]", ["{file}", "JSON"]),
        ('{"a": [1]}', ["{file}"]),
        ("[[0], [1000]]", ["{file}", "1000", "image 2", "0 to 999"]),
        ("[[0], [1]]", ["1 to 2", "ILSVRC2012_val_0000000"]),
        (None, ["{file}", "No such file"]),
    ],
)
def test_real_labels_that_cannot_be_used(content, values, imagenet_files, call, tmp_path):
    file = tmp_path / "real.json"
    if content is not None:
        file.write_text(content)
    flags, _ = plain(tmp_path / "plain.pth")
    flags += ["--csv", tmp_path / "rows.csv", "--data-path", imagenet_files]
    refuses(call(*flags, "--real-labels", file), *(value.format(file=file) for value in values))
    assert not (tmp_path / "rows.csv").exists()


def test_real_labels_need_imagenets_file_names(imagenet_files, call, tmp_path):
    odd = next(imagenet_files.glob("*/*"))
    odd.rename(odd.with_name("cat.jpg"))
    flags, _ = plain(tmp_path / "plain.pth")
    found = call(*flags, "--data-path", imagenet_files, "--real-labels", "timm")
    refuses(found, odd.with_name("cat.jpg"))


def test_outputs_that_are_not_finite_are_no_real_labels():
    counted = RealMetrics(torch.ones(2, 6, dtype=torch.bool))
    counted.update(torch.tensor([[1.0] * 6, [float("nan")] * 6]), torch.tensor([0, 1]))
    assert counted.compute() == {"real_images": 2, "real_top1": 50, "real_top5": 50}
    unlabelled = RealMetrics(torch.zeros(1, 6, dtype=torch.bool))
    unlabelled.update(torch.ones(1, 6), torch.tensor([0]))
    assert unlabelled.compute() == {"real_images": 0, "real_top1": None, "real_top5": None}


def test_timms_copy_of_the_real_labels():
    labels = read_real_labels("timm")
    assert (len(labels), sum(not one for one in labels)) == (50000, 3163)


def write_corruptions(root, names, classes, count):
    """Images of every severity of corruptions, ``count`` of each class."""
    generator = np.random.default_rng(0)
    for name, severity, kind in product(names, "12345", classes):
        folder = root / name / severity / kind
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def corrupted(tmp_path):
    """Three corruptions of three of the classes, 4 images each."""
    return write_corruptions(tmp_path / "images", ("fog", "zoom_blur", "spatter"), CLASSES[:3], 4)


def test_corruptions(run, call, corrupted, tmp_path):
    checkpoint, _, model, _ = run
    expected = {"zoom_blur": [], "fog": [], "spatter": []}
    for name, severity in product(expected, "12345"):
        logits, targets, _ = logits_of(model, corrupted / name / severity)
        expected[name].append(100 - formulas(logits[:, :3], targets)["top1"])
    flags = (checkpoint, "--weights", "model", "--corruptions", corrupted)
    status, output, _ = call(*flags, "--csv", tmp_path / "c.csv")
    assert status == 0
    rows = read(tmp_path / "c.csv")
    assert [row["corruption"] for row in rows] == ["zoom_blur", "fog", "spatter", "mean"]
    for row in rows[:-1]:
        errors = [float(row[f"severity_{severity}"]) for severity in range(1, 6)]
        assert errors == pytest.approx(expected[row["corruption"]])
        assert float(row["error"]) == pytest.approx(np.mean(errors))
        assert (row["relative"], row["corrupt"]) == ("", "0")
    assert float(rows[-1]["error"]) == pytest.approx(np.mean([*expected.values()]))
    assert "mCE" not in output
    assert "corrupt " not in output
    assert f"{np.mean(expected['fog']):.2f}" in output
    (corrupted / "fog" / "3").rename(corrupted / "fog" / "6")
    refuses(call(*flags), corrupted / "fog" / "3")


def test_hidden_folders_are_not_corruptions(run, call, corrupted, tmp_path):
    flags = (run[0], "--weights", "model", "--corruptions", corrupted, "--csv", tmp_path / "c.csv")
    assert call(*flags)[0] == 0
    rows = read(tmp_path / "c.csv")
    (corrupted / ".cache").mkdir()
    first, second = (corrupted / "fog" / severity / CLASSES[0] for severity in "12")
    (first.parent / ".ipynb_checkpoints").mkdir()
    shutil.copytree(second, first / ".copies")
    assert call(*flags)[0] == 0
    assert read(tmp_path / "c.csv") == rows


def test_corrupt_images_of_corruptions_are_reported(run, call, corrupted, tmp_path):
    bad = corrupted / "fog" / "4" / CLASSES[1] / "2.png"
    bad.write_bytes(b"broken")
    flags = (run[0], "--corruptions", corrupted, "--csv", tmp_path / "c.csv")
    status, output, errors = call(*flags, "--on-corrupt", "skip")
    assert status == 0
    one = [("zoom_blur", "0"), ("fog", "1"), ("spatter", "0"), ("mean", "1")]
    assert read(tmp_path / "c.csv", "corruption", "corrupt") == one * 2
    assert re.search(r"mean error  corrupt\n", output)
    assert (errors.count("\n"), errors.startswith("warning: ")) == (1, True)
    assert str(bad) in errors


@STOPS
def test_corruptions_that_are_done_are_kept(
    error, status, run, call, corrupted, tmp_path, monkeypatch
):
    fails_from(imagenet_c, 13, error, monkeypatch)  # in the third corruption
    found, output, errors = call(run[0], "--corruptions", corrupted, "--csv", tmp_path / "c.csv")
    assert (found, errors.startswith("error: "), str(error) in errors) == (status, True, True)
    assert read(tmp_path / "c.csv", "corruption") == [("zoom_blur",), ("fog",)]
    assert re.search(r"^fog +\d", output, re.MULTILINE)
    assert "mean  " not in output  # of some it would look like that of all


def test_classes_of_corruptions_are_checked_first(run, call, corrupted):
    folder = corrupted / "spatter" / "5"
    (folder / CLASSES[1]).rename(folder / "odd")
    refuses(call(run[0], "--corruptions", corrupted), folder, "'odd'")


def test_outputs_under_corruptions_that_are_not_finite(call, corrupted, tmp_path):
    checkpoint = save(tmp_path / "nan.pth", random_vit(12, finite=False), classes=CLASSES)
    status, _, errors = call(checkpoint, "--corruptions", corrupted, "--csv", tmp_path / "c.csv")
    assert status == 1
    assert re.search(rf"^error: {checkpoint} .* 180 ", errors)
    assert read(tmp_path / "c.csv", "error") == [("100.0",)] * 4


def test_corruptions_have_the_models_size(call, tmp_path):
    model = timm.create_model("test_vit", num_classes=1, img_size=160)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    write_corruptions(tmp_path / "images", ["fog"], ["only"], 1)
    flags = (tmp_path / "plain.pth", "--model", "test_vit", "--corruptions", tmp_path / "images")
    status, output, _ = call(*flags)
    assert status == 0
    assert re.search(r"plain\.pth .*\b160\b", output)


def test_mce_is_relative_to_alexnet():
    def measured(share, names=ALEXNET):
        return [Corruption(name, (share * ALEXNET[name],) * 5, True) for name in names]

    assert imagenet_c.mce(measured(1.0)) == pytest.approx(100)
    # AlexNet's errors as published, and their order
    published = "88.6 89.4 92.3 82.0 82.6 78.6 79.8 86.7 82.7 81.9 56.5 85.3 64.6 71.8 60.7"
    assert list(ALEXNET.values()) == [float(value) for value in published.split()]
    names = list(ALEXNET)
    mixed = measured(0.5, names[:5]) + measured(0.8, names[5:])
    extra = Corruption("spatter", (10.0, 20.0, 30.0, 40.0, 50.0), True)
    assert imagenet_c.mce([*mixed, extra]) == pytest.approx((5 * 50 + 10 * 80) / 15)
    assert imagenet_c.mce(measured(1.0, names[1:])) is None
    assert imagenet_c.rows_of([extra], True)[-1]["error"] == 30
    assert imagenet_c.table(imagenet_c.rows_of([*mixed, extra], True)).endswith("mCE 70.0")


@pytest.mark.parametrize(
    ("names", "num_outputs", "is_imagenet"),
    [(imagenet_wnids(), 1000, True), (imagenet_wnids()[:3], 1000, False), (CLASSES, 12, False)],
)
def test_alexnet_is_compared_on_all_of_imagenet(names, num_outputs, is_imagenet, monkeypatch):
    model = SimpleNamespace(
        match=lambda names, title: match_classes(names, num_outputs), args=None, images=None
    )
    test_set = SimpleNamespace(classes=names, title="set", lines=list)
    scores = {"top1": 60.0, "messages": (), "corrupt": 0, "nonfinite": 0}
    monkeypatch.setattr(imagenet_c, "open_class_folders", lambda path, *args: test_set)
    monkeypatch.setattr(imagenet_c, "evaluate", lambda *words: scores)
    found = imagenet_c.measure(model, "fog", [Path("1"), Path("2")], set())
    assert (found.mean, found.is_imagenet) == (40, is_imagenet)
    assert found.relative == (pytest.approx(100 * 40 / 81.9) if is_imagenet else None)


def test_the_mce_of_an_imagenet_model(run, call, tmp_path, monkeypatch):
    write_corruptions(tmp_path / "images", ALEXNET, CLASSES[:1], 0)

    def measure(case, name, paths, told):
        errors = (0.5 * ALEXNET[name],) * 5
        return Corruption(name, errors, case.weights == "model")

    monkeypatch.setattr(imagenet_c, "measure", measure)
    flags = (run[0], "--corruptions", tmp_path / "images", "--csv", tmp_path / "c.csv")
    status, output, _ = call(*flags)
    assert status == 0
    assert output.count("mCE 50.0") == 1  # not of the average, which is said to be another's
    rows = read(tmp_path / "c.csv")
    assert [row["corruption"] for row in rows] == [*ALEXNET, "mean"] * 2
    relative = [row["relative"] and float(row["relative"]) for row in rows]
    assert relative == [pytest.approx(50)] * 16 + [""] * 16
