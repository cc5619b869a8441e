"""tools.predict: the most likely classes of images, as text, pictures and CSV files."""

import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from validating import caller, random_vit, read, refuses, save

from tools import predict

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def call(capsys):
    return caller(capsys, predict, more=())


@pytest.fixture
def net(tmp_path):
    """Return a model of ``CLASSES`` for images of 48 pixels, and its checkpoint."""
    model = random_vit(7, size=48)
    return model, save(tmp_path / "net.pth", model, size=48, classes=CLASSES)


@pytest.fixture
def images(tmp_path):
    """Return a folder of four images that are not square."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "a.jpg", "c.png", "d.jpg"):
        pixels = generator.integers(0, 256, (90, 70, 3), np.uint8)
        Image.fromarray(pixels).resize((110, 80)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def probabilities_of(model, path, size):
    """Return the probabilities by torchvision's transforms, in float64."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(int(size / 0.875), bicubic), transforms.CenterCrop(size)]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    image = transforms.Compose(steps)(Image.open(path).convert("RGB"))
    with torch.inference_mode():
        found = model.double()(image[None].double())[0].softmax(0).numpy()
    model.float()
    return found


def test_probabilities_and_names(images, call, tmp_path):
    model, average = random_vit(7, size=48), random_vit(7, seed=1, size=48)
    checkpoint = save(tmp_path / "net.pth", model, average, 48, classes=CLASSES)
    flags = (images, "--checkpoint", checkpoint, "--csv", tmp_path / "p.csv", "--batch-size", 3)
    for chosen, weights in ((model, "model"), (average, "ema")):
        status, output, _ = call(*flags, "--weights", weights, "--topk", 3)
        assert status == 0
        rows = read(tmp_path / "p.csv")
        paths = [images / name for name in ("a.jpg", "b.png", "c.png", "d.jpg")]
        assert [row["image"] for row in rows] == [str(path) for path in paths for _ in range(3)]
        for number, path in enumerate(paths):
            expected = probabilities_of(chosen, path, 48)
            best = np.argsort(-expected)[:3]
            for rank, row in enumerate(rows[3 * number : 3 * number + 3]):
                assert (int(row["rank"]), int(row["class"])) == (rank + 1, best[rank])
                assert row["name"] == CLASSES[best[rank]]
                assert float(row["probability"]) == pytest.approx(expected[best[rank]], abs=1e-4)
        printed = re.findall(r"^ +([\d.]+)%  (\d)  (\w+)$", output, re.MULTILINE)
        told = [(f"{100 * float(r['probability']):.2f}", r["class"], r["name"]) for r in rows]
        assert printed == told
    assert len({row["name"] for row in rows}) > 3


def test_the_class_that_was_asked_for(images, call, net, tmp_path):
    model, checkpoint = net
    expected = probabilities_of(model, images / "a.jpg", 48)
    least = int(expected.argmin())
    for word in (CLASSES[least], str(least), CLASSES[least].upper()):
        flags = (images / "a.jpg", "--checkpoint", checkpoint, "--csv", tmp_path / "p.csv")
        status, output, _ = call(*flags, "--class", word)
        assert status == 0
        line = next(line for line in output.splitlines() if line.endswith("(--class)"))
        assert f"{100 * expected[least]:.2f}%  {least}  {CLASSES[least]}" in line
        last = read(tmp_path / "p.csv")[-1]
        assert (last["rank"], last["class"]) == ("", str(least))
        assert float(last["probability"]) == pytest.approx(expected[least], abs=1e-5)


def test_where_names_come_from(images, call, tmp_path):
    image, file = images / "a.jpg", tmp_path / "names.txt"
    plain = save(tmp_path / "plain.pth", random_vit(7))
    assert re.search(r"\d  class \d$", call(image, "--checkpoint", plain)[1], re.MULTILINE)
    file.write_text("\n".join(f"kind {name}" for name in CLASSES) + "\n")
    output = call(image, "--checkpoint", plain, "--classes", file)[1]
    index, name = re.search(r"%  (\d)  (.*)$", output, re.MULTILINE).groups()
    assert name == f"kind {CLASSES[int(index)]}"
    file.write_text("cat, black\ncat, white\n" + "".join(f"x{i}\n" for i in range(5)))
    status, output, _ = call(image, "--checkpoint", plain, "--classes", file, "--class", 0)
    assert (status, "cat, black  (--class)" in output) == (0, True)
    file.write_text("ant\nbee\n")
    refuses(call(image, "--checkpoint", plain, "--classes", file), file, "2", "7")
    imagenet = save(tmp_path / "imagenet.pth", random_vit(1000))
    output = call(image, "--checkpoint", imagenet, "--class", 1)[1]
    assert "1  goldfish, Carassius auratus  (--class)" in output


def picture(found, labels, asked=None, size=(200, 100)):
    """Return the axes of a picture: the image, and the bars."""
    return predict.figure_of(found, labels, asked, Image.new("RGB", size)).axes


def bars_of(axes):
    """Return labels, widths and colours of bars, from the top of the picture."""
    names = [label.get_text() for label in axes.get_yticklabels()]
    bars = axes.containers[0]
    assert axes.yaxis_inverted()
    assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == list(range(len(bars)))
    assert axes.get_yticks().tolist() == list(range(len(bars)))
    widths = [bar.get_width() for bar in bars]
    assert [text.get_text() for text in axes.texts] == [f"{width:.1f}%" for width in widths]
    return names, widths, [bar.get_facecolor() for bar in bars]


def test_picture():
    found = predict.Prediction(Path("dir/x$y.jpg"), (2, 0), (0.75, 0.125))
    left, right = picture(found, ["tench", "bee", "a $"], size=(2000, 1000))
    assert left.get_images()[0].get_array().shape == (320, 640, 3)
    assert left.get_title() == r"x\$y.jpg"
    names, widths, colours = bars_of(right)
    assert (names, widths) == ([r"a \$", "tench"], [75, 12.5])
    assert colours[0] == colours[1]


def test_titles_are_cut_where_they_are_long():
    for name, title in (("x" * 60 + ".jpg", "x" * 39 + "…"), ("a\n\udcff.jpg", "a �.jpg")):
        found = predict.Prediction(Path(name), (0,), (1.0,))
        assert picture(found, ["ant"])[0].get_title() == title


def test_the_class_that_was_asked_for_in_a_picture():
    labels = [f"kind {index}" for index in range(50)]
    found = predict.Prediction(Path("x.jpg"), tuple(range(10)), (0.05,) * 10, asked=0.05)
    names, _, colours = bars_of(picture(found, labels, asked=3)[1])
    assert names == [*labels[:3], "kind 3  (--class)", *labels[4:10]]
    assert [colour != colours[0] for colour in colours] == [index == 3 for index in range(10)]
    # in the top 40, of which 30 are drawn, or not in the top
    for count, asked in ((40, 35), (40, 45), (5, 45)):
        found = predict.Prediction(Path("x.jpg"), tuple(range(count)), (0.02,) * count, asked=0.01)
        axes = picture(found, labels, asked)[1]
        names, widths, _ = bars_of(axes)
        assert names == [*labels[: min(count, 30)], f"kind {asked}  (--class)"]
        assert (widths[0], widths[-1]) == (2, 1)
        assert axes.figure.get_size_inches()[1] < 16


def test_pictures_show_their_own_image_and_class(images, call, net, tmp_path, monkeypatch):
    model, checkpoint = net
    drawn = []
    monkeypatch.setattr(predict, "save", lambda figure, path: drawn.append((figure, path)))
    flags = ("--checkpoint", checkpoint, "--output", tmp_path / "out", "--topk", 3, "--class")
    status, output, _ = call(images, *flags, "eel")
    assert status == 0
    paths = sorted(path for path in images.iterdir() if path.suffix != ".txt")
    asked = [probabilities_of(model, path, 48)[4] for path in paths]
    told = re.findall(r"([\d.]+)%  4  eel  \(--class\)", output)
    assert [float(value) for value in told] == pytest.approx([100 * p for p in asked], abs=0.02)
    assert len({*told}) > 1
    for path, (figure, place) in zip(paths, drawn, strict=True):
        assert place.name == f"{path.stem}-prediction.png"
        left, right = figure.axes
        assert left.get_title() == path.name
        assert np.array_equal(left.get_images()[0].get_array(), Image.open(path).convert("RGB"))
        names, widths, _ = bars_of(right)
        expected = probabilities_of(model, path, 48)
        order = dict.fromkeys([*np.argsort(-expected)[:3], 4])
        assert names == [CLASSES[i] + "  (--class)" * int(i == 4) for i in order]
        assert widths == pytest.approx([100 * expected[i] for i in order], abs=0.02)


def test_outputs_that_are_not_finite(images, call, tmp_path):
    checkpoint = save(tmp_path / "nan.pth", random_vit(7, finite=False), classes=CLASSES)
    csv_file = tmp_path / "p.csv"
    csv_file.write_text("kept")
    flags = ("--checkpoint", checkpoint, "--csv", csv_file, "--output", tmp_path / "out")
    status, output, errors = call(images, *flags)
    assert (status, output) == (1, "")
    for name, line in zip(("a.jpg", "b.png", "c.png", "d.jpg"), errors.splitlines(), strict=True):
        assert line.startswith("error: ")
        assert str(images / name) in line
        assert str(checkpoint) in line
    assert csv_file.read_text() == "kept"
    assert not (tmp_path / "out").exists()


def test_names_of_any_kind(images, call, tmp_path):
    names = ["an\tt", "be\ne", "c$t", "dog, black", "dog, white", "\udcfe", "猫"]
    checkpoint = save(tmp_path / "net.pth", random_vit(7), classes=names)
    odd = images / os.fsdecode(b"\xff\n.jpg")
    (images / "a.jpg").rename(odd)
    flags = (odd, "--checkpoint", checkpoint, "--topk", 7, "--csv", tmp_path / "p.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, output, _ = call(*flags, "--output", tmp_path / "out")
    assert status == 0
    first, *lines, picture, table = output.splitlines()
    assert first == f"{images}/� .jpg:"
    shown = {line.split("  ", 4)[-1].strip() for line in lines}
    assert shown == {"an t", "be e", "c$t", "dog, black", "dog, white", "�", "猫"}
    assert table.endswith(str(tmp_path / "p.csv"))
    assert picture.endswith(f"{tmp_path / 'out'}/� -prediction.png")
    assert os.listdir(os.fsencode(tmp_path / "out")) == [b"\xff\n-prediction.png"]
    with open(tmp_path / "p.csv", "rb") as file:
        assert os.fsencode(odd) in file.read()
