"""tools.predict: which images it takes, what it refuses, and the files that it leaves."""

import csv
import os
from pathlib import Path

import pytest
import timm
import torch
from conftest import THREADS
from PIL import Image

import models  # noqa: F401 - registers the models
from tools import predict

CLASSES = ["ant", "bee", "cat"]
SIZE = 32


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these are slower with several."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A checkpoint."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=SIZE)
    content = {"model": model.state_dict(), "model_name": "test_vit", "input_size": SIZE}
    content |= {"model_kwargs": {"num_classes": 3, "img_size": SIZE}, "classes": CLASSES}
    path = tmp_path_factory.mktemp("net") / "net.pth"
    torch.save(content, path)
    return path


@pytest.fixture
def call(capsys, net):
    """``call(*flags) -> (status, output, errors)`` of tools.predict with that checkpoint."""

    def run_it(*flags, checkpoint=("--checkpoint", net)):
        capsys.readouterr()
        return (predict.main([*map(str, (*flags, *checkpoint))]), *capsys.readouterr())

    return run_it


@pytest.fixture
def images(tmp_path):
    """Four images, and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(("a.jpg", "b.png", "c.png", "d.jpg")):
        Image.new("RGB", (16, 12), (60 * number, 99, 9)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def predicted(output):
    """Names of the images that are told of."""
    return [Path(line[:-1]).name for line in output.splitlines() if line.endswith(":")]


def test_one_bad_image_does_not_stop_the_others(images, call, tmp_path):
    (images / "b.png").write_bytes(b"broken")
    long = "x" * 300 + ".jpg"
    flags = (images, tmp_path / "nowhere.jpg", long, "--csv", tmp_path / "p.csv", "--output")
    status, output, errors = call(*flags, tmp_path / "out")
    assert status == 1
    assert predicted(output) == ["a.jpg", "c.png", "d.jpg"]
    lines = errors.splitlines()
    assert lines[0] == f"error: cannot decode image {images / 'b.png'}: no image of a known format"
    assert lines[1:] == [
        f"error: cannot decode image {tmp_path / 'nowhere.jpg'}: No such file or directory",
        f"error: cannot decode image {long}: File name too long",
    ]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a-prediction.png", "c-prediction.png", "d-prediction.png"]
    assert {row["image"] for row in rows_of(tmp_path / "p.csv")} == {
        str(images / name) for name in ("a.jpg", "c.png", "d.jpg")
    }


def test_nothing_is_left_where_no_image_is_good(images, call, tmp_path):
    (tmp_path / "p.csv").write_text("kept")
    (images / "bad.jpg").write_bytes(b"broken")
    flags = (images / "bad.jpg", "--csv", tmp_path / "p.csv", "--output", tmp_path / "x" / "out")
    assert call(*flags)[0] == 1
    assert (tmp_path / "p.csv").read_text() == "kept"
    assert not (tmp_path / "x").exists()
    status, _, errors = call(*flags, checkpoint=("--checkpoint", "nowhere.pth"))
    assert status == 1
    assert errors.startswith("error: cannot read checkpoint nowhere.pth: No such file")
    assert not (tmp_path / "x").exists()


def test_one_picture_that_cannot_be_written_does_not_stop_the_others(images, call, tmp_path):
    long = "0" * 245 + ".png"  # and with the ending of a picture too long
    (images / "b.png").rename(images / long)
    flags = (images, "--csv", tmp_path / "p.csv", "--output", tmp_path / "out")
    status, output, errors = call(*flags)
    assert status == 1
    assert errors.startswith(f"error: cannot write {tmp_path}/out/{'0' * 245}-prediction.png: ")
    assert errors.count("\n") == 1
    assert predicted(output) == [long, "a.jpg", "c.png", "d.jpg"]
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert len(rows_of(tmp_path / "p.csv")) == 12


def test_images_that_are_done_are_kept(images, call, tmp_path, monkeypatch):
    def interrupted(path):
        if path.name == "c.png":
            raise KeyboardInterrupt
        return real(path)

    real = predict.load_image
    monkeypatch.setattr(predict, "load_image", interrupted)
    flags = (images, "--csv", tmp_path / "p.csv", "--batch-size", 2)
    status, output, errors = call(*flags)
    assert (status, errors) == (130, "error: interrupted\n")
    assert predicted(output) == ["a.jpg", "b.png"]
    assert len(rows_of(tmp_path / "p.csv")) == 6


def test_places_of_pictures(images, call, tmp_path):
    target = tmp_path / "one.png"
    assert call(images / "a.jpg", "--output", target)[0] == 0
    with Image.open(target) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 200
    others = [tmp_path / name for name in ("x", "y", "z")]
    for folder in others:
        folder.mkdir()
        Image.new("RGB", (9, 9)).save(folder / "a.jpg")
    assert call(*others, "--output", tmp_path / "out")[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a-2-prediction.png", "a-3-prediction.png", "a-prediction.png"]


def test_every_image_once(images, call, tmp_path):
    (tmp_path / "link.jpg").symlink_to(images / "a.jpg")
    detour = images / ".." / "images" / "c.png"
    status, output, _ = call(detour, images, tmp_path / "link.jpg", images / "b.png")
    assert status == 0
    assert predicted(output) == ["c.png", "a.jpg", "b.png", "d.jpg"]


def test_pictures_beside_their_images_are_no_images(images, call):
    for _ in range(2):
        status, output, _ = call(images, "--output", images)
        assert (status, predicted(output)) == (0, ["a.jpg", "b.png", "c.png", "d.jpg"])
    assert len(list(images.glob("*-prediction.png"))) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["images", "--output", "one.png"], "--output one.png is one file for 4 images: a folder"),
        (["images/b.png", "--output", "images/b.png"], "would overwrite what is read"),
        (["images/b.png", "--output", "images/../link.png"], "would overwrite what is read"),
        (["b.csv", "--csv", "b.csv"], "--csv b.csv would overwrite what is read"),
        (["images", "--csv", "net.csv", "--checkpoint", "net.csv"], "would overwrite what is read"),
        (["images", "--csv", "names.csv", "--classes", "names.csv"], "would overwrite what is"),
        (["images/a.jpg", "--output", "no/a.png"], "there is no folder no"),
        (
            ["images/a.jpg", "--output", "net.csv/x"],
            "cannot make folder net.csv/x: Not a directory",
        ),
        (["images/a.jpg", "--output", f"{'x' * 300}"], "cannot make folder"),
        (["images/a.jpg", "--output", "a.jpg"], "--output a.jpg must end in .png, or be a folder"),
        (["images/a.jpg", "--output", "new/a.PDF"], "--output new/a.PDF must end in .png, or be"),
        (["images/a.jpg", "--csv", "a.png"], "--csv a.png must end in .csv"),
        (["images/a.jpg", "--csv", "folder.csv"], "--csv folder.csv is a folder"),
        (["images/a.jpg", "--csv", f"{'x' * 250}.csv"], "cannot be written: File name too long"),
        (["images/a.jpg", "--output", "."], "--output a-prediction.png is a folder"),
        (["tree"], "folder tree has only folders: give one of them, such as tree/cats"),
        (["empty"], "folder empty has no images (.jpg, "),
    ],
)
def test_what_is_refused(flags, message, images, call, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.png").symlink_to("images/b.png")
    for name in ("folder.csv", "a-prediction.png", "empty", "tree/cats"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b.csv").write_bytes((images / "b.png").read_bytes())
    (tmp_path / "net.csv").write_bytes(net.read_bytes())
    (tmp_path / "names.csv").write_text("a\nb\nc\n")
    before = content(tmp_path)
    checkpoint = () if "--checkpoint" in flags else ("--checkpoint", net)
    status, output, errors = call(*flags, checkpoint=checkpoint)
    assert (status, output, errors.startswith("error: ")) == (1, "", True)
    assert message in errors
    assert content(tmp_path) == before


def test_a_folder_may_be_called_as_a_file(images, call, tmp_path):
    (tmp_path / "v1.jpg").mkdir()
    assert call(images / "a.jpg", "--output", tmp_path / "v1.jpg")[0] == 0
    assert (tmp_path / "v1.jpg" / "a-prediction.png").is_file()


def test_a_folder_that_may_not_be_read(images, call, monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", unreadable)
    status, _, errors = call(images)
    assert (status, errors) == (1, f"error: cannot read folder {images}: Permission denied\n")


def test_a_folder_that_may_not_be_written(images, call, tmp_path, monkeypatch):
    def unwritable(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", unwritable)
    for flag, name in (("--csv", "p.csv"), ("--output", "one.png"), ("--output", "out")):
        status, output, errors = call(images / "a.jpg", flag, tmp_path / name)
        assert (status, output, "cannot be written: Permission denied" in errors) == (1, "", True)
        assert not (tmp_path / name).exists()


def test_an_output_that_nobody_reads_to_its_end(images, call, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:  # closing it would raise what was not dealt with
        monkeypatch.setattr("sys.stdout", pipe)
        status, _, errors = call(images, "--csv", tmp_path / "p.csv")
        monkeypatch.undo()
    assert (status, errors) == (1, "")
    assert len(rows_of(tmp_path / "p.csv")) == 3  # of the image at which it was found out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give a checkpoint"),
        (["--model", "test_vit"], "give a checkpoint"),
        (["--checkpoint", "{net}", "--topk", "0"], "--topk 0 must be positive"),
        (["--checkpoint", "{net}", "--class", "cta"], "no --class 'cta'; such as cat"),
        (["--checkpoint", "{net}", "--csv", "no/where.csv"], "there is no folder no"),
        (["--checkpoint", "{net}", "--amp-dtype", "float16"], "does nothing without --amp"),
        (["--checkpoint", "{net}", "--classes", "nowhere.txt"], "cannot read --classes nowhere"),
        (["--checkpoint", "{net}", "--weights", "ema"], "no weights under 'model_ema'"),
    ],
)
def test_errors_name_what_is_wrong(flags, message, images, call, net, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    flags = [flag.format(net=net) for flag in flags]
    status, _, errors = call(images, *flags, checkpoint=())
    assert status == 1
    assert errors.startswith("error: ")
    assert message in errors
    assert not list(work.iterdir())
