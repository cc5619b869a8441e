"""tools.predict: the likeliest classes of images, as text, pictures and CSV files."""

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import THREADS, write_images
from PIL import Image
from torchvision import transforms

import models  # noqa: F401 - registers the models
from pipeline.images import DataError
from tools import predict
from tools.validate.classes import imagenet_wnids

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these are slower with several."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


def network(num_classes, size, seed=0):
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", num_classes=num_classes, img_size=size)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()


def save(path, model, size, **more):
    kwargs = {"num_classes": model.num_classes, "img_size": size}
    content = {"model": model.state_dict(), "model_name": "test_vit", "input_size": size}
    torch.save(content | {"model_kwargs": kwargs} | more, path)
    return path


@pytest.fixture
def call(capsys):
    """``call(*flags) -> (status, output, errors)`` of tools.predict."""

    def run_it(*flags):
        capsys.readouterr()
        return (predict.main([*map(str, flags)]), *capsys.readouterr())

    return run_it


@pytest.fixture
def images(tmp_path):
    """Four images that are not square."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "a.jpg", "c.png", "d.jpg"):
        pixels = generator.integers(0, 256, (90, 70, 3), np.uint8)
        Image.fromarray(pixels).resize((110, 80)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def probabilities_of(model, path, size):
    """By torchvision's transforms, in float64."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(int(size / 0.875), bicubic), transforms.CenterCrop(size)]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    image = transforms.Compose(steps)(Image.open(path).convert("RGB"))
    with torch.inference_mode():
        found = model.double()(image[None].double())[0].softmax(0).numpy()
    model.float()
    return found


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_probabilities_and_names(images, call, tmp_path):
    model, average = network(7, 48), network(7, 48, seed=1)
    more = {"classes": CLASSES, "model_ema": average.state_dict()}
    checkpoint = save(tmp_path / "net.pth", model, 48, **more)
    flags = (images, "--checkpoint", checkpoint, "--csv", tmp_path / "p.csv", "--batch-size", 3)
    for chosen, weights in ((model, "model"), (average, "ema")):
        status, output, _ = call(*flags, "--weights", weights, "--topk", 3)
        assert status == 0
        rows = rows_of(tmp_path / "p.csv")
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


def test_the_class_that_was_asked_for(images, call, tmp_path):
    model = network(7, 48)
    checkpoint = save(tmp_path / "net.pth", model, 48, classes=CLASSES)
    expected = probabilities_of(model, images / "a.jpg", 48)
    least = int(expected.argmin())
    for word in (CLASSES[least], str(least), CLASSES[least].upper()):
        flags = (images / "a.jpg", "--checkpoint", checkpoint, "--csv", tmp_path / "p.csv")
        status, output, _ = call(*flags, "--class", word)
        assert status == 0
        line = next(line for line in output.splitlines() if line.endswith("(--class)"))
        assert f"{100 * expected[least]:.2f}%  {least}  {CLASSES[least]}" in line
        last = rows_of(tmp_path / "p.csv")[-1]
        assert (last["rank"], last["class"]) == ("", str(least))
        assert float(last["probability"]) == pytest.approx(expected[least], abs=1e-5)


def test_finding_a_class():
    names = list(imagenet_wnids())
    assert predict.find_class("n01443537", names) == 1
    assert predict.find_class("Tinca tinca", names) == 0
    assert predict.find_class("goldfish", names) == 1
    assert predict.find_class("999", names) == 999
    assert predict.find_class("2", ["0", "2", "1"]) == 1  # a name goes before an index
    with pytest.raises(DataError, match="--class 1000 is beyond the classes, 0 to 999"):
        predict.find_class("1000", names)
    with pytest.raises(DataError, match="such as goldfish"):
        predict.find_class("goldfisch", names)
    with pytest.raises(DataError, match=r"no --class 'zzz'; such as ant, bee, cat, or 0 to 6"):
        predict.find_class("zzz", CLASSES)


def test_where_names_come_from(images, call, tmp_path):
    image, file = images / "a.jpg", tmp_path / "names.txt"
    plain = save(tmp_path / "plain.pth", network(7, 48), 48)
    assert re.search(r"\d  class \d$", call(image, "--checkpoint", plain)[1], re.MULTILINE)
    file.write_text("\n".join(f"kind {name}" for name in CLASSES) + "\n")
    output = call(image, "--checkpoint", plain, "--classes", file)[1]
    index, name = re.search(r"%  (\d)  (.*)$", output, re.MULTILINE).groups()
    assert name == f"kind {CLASSES[int(index)]}"
    file.write_text("ant\nbee\n")
    status, _, errors = call(image, "--checkpoint", plain, "--classes", file)
    assert status == 1
    assert "has 2 lines" in errors
    imagenet = save(tmp_path / "imagenet.pth", network(1000, 48), 48)
    output = call(image, "--checkpoint", imagenet, "--class", 1)[1]
    assert "1  goldfish, Carassius auratus  (--class)" in output


def test_one_bad_image_does_not_stop_the_others(images, call, tmp_path):
    checkpoint = save(tmp_path / "net.pth", network(7, 48), 48, classes=CLASSES)
    (images / "b.png").write_bytes(b"broken")
    flags = (images, tmp_path / "nowhere.jpg", "--checkpoint", checkpoint)
    status, output, errors = call(*flags, "--output", tmp_path / "out")
    assert status == 1
    assert output.count(".jpg:\n") + output.count(".png:\n") == 3
    lines = errors.splitlines()
    assert lines[0] == f"error: cannot decode image {images / 'b.png'}: no image of a known format"
    assert str(tmp_path / "nowhere.jpg") in lines[1]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a-prediction.png", "c-prediction.png", "d-prediction.png"]


def test_places_of_pictures(images, call, tmp_path):
    checkpoint = save(tmp_path / "net.pth", network(7, 48), 48, classes=CLASSES)
    target = tmp_path / "one.png"
    flags = ("--checkpoint", checkpoint, "--output")
    assert call(images / "a.jpg", *flags, target)[0] == 0
    with Image.open(target) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 200
    other = write_images(tmp_path / "others", train=0, val=1, classes=["x"]) / "val" / "x"
    (other / "0.jpg").rename(other / "a.jpg")
    assert call(images / "a.jpg", other, *flags, tmp_path / "out")[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a-2-prediction.png", "a-prediction.png"]
    before = (images / "b.png").read_bytes()
    for places, place, message in (
        ([images], target, "one file for 4 images"),
        ([images / "b.png"], images / "b.png", "would overwrite"),
        ([images / "a.jpg"], tmp_path / "no" / "a.png", "there is no folder"),
        ([images / "a.jpg"], target / "x", "cannot make folder"),
    ):
        status, _, errors = call(*places, *flags, place)
        assert (status, message in errors) == (1, True), errors
    assert (images / "b.png").read_bytes() == before


def test_picture():
    found = predict.Prediction(Path("dir/x$y.jpg"), (2, 0), (0.75, 0.125))
    names = ["n01440764", "bee", "a name that is far too long to be shown whole"]
    figure = predict.figure_of(found, names, Image.new("RGB", (2000, 1000)))
    left, right = figure.axes
    assert left.get_images()[0].get_array().shape == (320, 640, 3)
    assert left.get_title() == r"x\$y.jpg"
    assert [bar.get_width() for bar in right.containers[0]] == [75, 12.5]
    labels = [label.get_text() for label in right.get_yticklabels()]
    assert labels == ["a name that is far too long…", "tench"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give a checkpoint"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--model", "test_vit"], "give a checkpoint"),
        (["--checkpoint", "{net}", "--topk", "0"], "--topk 0 must be positive"),
        (["--checkpoint", "{net}", "--class", "cta"], "no --class 'cta'; such as cat"),
        (["--checkpoint", "{net}", "--csv", "no/where.csv"], "there is no folder no"),
        (["--checkpoint", "{net}", "--classes", "nowhere.txt"], "cannot read --classes nowhere"),
        (["--checkpoint", "{net}", "--weights", "ema"], "no weights under 'model_ema'"),
    ],
)
def test_errors_name_what_is_wrong(flags, message, images, call, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    net = save(tmp_path / "net.pth", network(7, 48), 48, classes=CLASSES)
    status, _, errors = call(images, *(flag.format(net=net) for flag in flags))
    assert status == 1
    assert errors.startswith("error: ")
    assert message in errors
    assert not list(work.iterdir())


def test_a_folder_without_images(call, tmp_path):
    status, _, errors = call(tmp_path, "--checkpoint", "net.pth")
    assert status == 1
    assert f"folder {tmp_path} has no images" in errors


def test_pictures_need_matplotlib(images, call, tmp_path, monkeypatch):
    checkpoint = save(tmp_path / "net.pth", network(7, 48), 48, classes=CLASSES)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, errors = call(images, "--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert status == 1
    assert "pip install matplotlib" in errors
    assert not (tmp_path / "out").exists()
