"""tools.predict: its input images, its errors, and its output files."""

import os
from pathlib import Path

import pytest
from PIL import Image
from validating import caller, content, no_access, random_vit, read, refuses, save

from tools import predict


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Return a checkpoint of three classes."""
    path = tmp_path_factory.mktemp("net") / "net.pth"
    return save(path, random_vit(3), classes=["ant", "bee", "cat"])


@pytest.fixture
def call(capsys, net):
    """Return ``call(*flags)`` of tools.predict with that checkpoint."""
    return caller(capsys, predict, more=("--checkpoint", net))


@pytest.fixture
def images(tmp_path):
    """Return a folder of four images and a text file."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(("a.jpg", "b.png", "c.png", "d.jpg")):
        Image.new("RGB", (16, 12), (60 * number, 99, 9)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def predicted(output):
    """Return the names of the images whose classes are printed."""
    return [Path(line[:-1]).name for line in output.splitlines() if line.endswith(":")]


def test_one_bad_image_does_not_stop_the_others(images, call, tmp_path):
    (images / "b.png").write_bytes(b"broken")
    long = "x" * 300 + ".jpg"
    flags = (images, tmp_path / "nowhere.jpg", long, "--csv", tmp_path / "p.csv", "--output")
    status, output, errors = call(*flags, tmp_path / "out")
    assert status == 1
    assert predicted(output) == ["a.jpg", "c.png", "d.jpg"]
    reasons = ("", "No such file or directory", "File name too long")
    bad = (images / "b.png", tmp_path / "nowhere.jpg", long)
    for path, reason, line in zip(bad, reasons, errors.splitlines(), strict=True):
        assert line.startswith("error: ")
        assert f"{path}: {reason}" in line
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a-prediction.png", "c-prediction.png", "d-prediction.png"]
    assert {*read(tmp_path / "p.csv", "image")} == {
        (str(images / name),) for name in ("a.jpg", "c.png", "d.jpg")
    }


def test_nothing_is_left_where_no_image_is_good(images, call, tmp_path):
    (tmp_path / "p.csv").write_text("kept")
    (images / "bad.jpg").write_bytes(b"broken")
    flags = (images / "bad.jpg", "--csv", tmp_path / "p.csv", "--output", tmp_path / "x" / "out")
    assert call(*flags)[0] == 1
    assert (tmp_path / "p.csv").read_text() == "kept"
    assert not (tmp_path / "x").exists()
    refuses(call(*flags, "--checkpoint", "nowhere.pth"), "nowhere.pth", "No such file")
    assert not (tmp_path / "x").exists()


def test_one_picture_that_cannot_be_written_does_not_stop_the_others(images, call, tmp_path):
    long = "0" * 245 + ".png"  # too long with the suffix of a picture
    (images / "b.png").rename(images / long)
    (images / "d.jpg").unlink()
    flags = (images, "--csv", tmp_path / "p.csv", "--output", tmp_path / "out")
    status, output, errors = call(*flags)
    assert status == 1
    assert f"{tmp_path}/out/{'0' * 245}-prediction.png" in errors
    assert errors.count("\n") == 1
    assert predicted(output) == [long, "a.jpg", "c.png"]
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert len(read(tmp_path / "p.csv")) == 9


def test_images_that_are_done_are_kept(images, call, tmp_path, monkeypatch):
    def interrupted(path, *options):
        if path.name == "c.png":
            raise KeyboardInterrupt
        return real(path, *options)

    real = predict.load_image
    monkeypatch.setattr(predict, "load_image", interrupted)
    flags = (images, "--csv", tmp_path / "p.csv", "--batch-size", 2)
    status, output, errors = call(*flags)
    assert (status, errors) == (130, "error: interrupted\n")
    assert predicted(output) == ["a.jpg", "b.png"]
    assert len(read(tmp_path / "p.csv")) == 6


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


def test_pictures_next_to_their_images_are_not_images(images, call):
    assert call(images / "a.jpg", "--output", images)[0] == 0
    assert (images / "a-prediction.png").is_file()
    assert predicted(call(images)[1]) == ["a.jpg", "b.png", "c.png", "d.jpg"]


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("images --output one.png", ["--output one.png", "4"]),
        ("images/b.png --output images/b.png", ["--output images/b.png"]),
        ("images/b.png --output images/../link.png", ["--output images/../link.png"]),
        ("b.csv --csv b.csv", ["--csv b.csv"]),
        ("images --csv net.csv --checkpoint net.csv", ["--csv net.csv"]),
        ("images --csv names.csv --classes names.csv", ["--csv names.csv"]),
        ("images/a.jpg --output no/a.png", ["--output no/a.png", " no"]),
        ("images/a.jpg --output net.csv/x", ["--output", "net.csv/x", "Not a directory"]),
        (f"images/a.jpg --output {'x' * 300}", ["--output", "x" * 300]),
        ("images/a.jpg --output a.jpg", ["--output a.jpg", ".png"]),
        ("images/a.jpg --output new/a.PDF", ["--output new/a.PDF", ".png"]),
        ("images/a.jpg --csv a.png", ["--csv a.png", ".csv"]),
        ("images/a.jpg --csv folder.csv", ["--csv folder.csv"]),
        (f"images/a.jpg --csv {'x' * 250}.csv", ["--csv x", "File name too long"]),
        ("images/a.jpg --output .", ["--output a-prediction.png"]),
        ("tree", ["tree", "tree/cats"]),
        ("empty", ["empty", ".jpg"]),
        ("images --csv no/where.csv", ["--csv no/where.csv", " no"]),
        ("images --class cta", ["--class 'cta'", "cat"]),
        ("images --amp-dtype float16", ["--amp-dtype float16", "--amp:"]),
        ("images --classes nowhere.txt", ["--classes nowhere.txt"]),
        ("images --weights ema", ["net.pth", "'model_ema'"]),
    ],
)
def test_errors_name_what_is_wrong(flags, values, images, call, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.png").symlink_to("images/b.png")
    for name in ("folder.csv", "a-prediction.png", "empty", "tree/cats"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b.csv").write_bytes((images / "b.png").read_bytes())
    (tmp_path / "net.csv").write_bytes(net.read_bytes())
    (tmp_path / "names.csv").write_text("a\nb\nc\n")
    before = content(tmp_path)
    refuses(call(*flags.split()), *values)
    assert content(tmp_path) == before


def test_a_model_is_needed(images, capsys):
    call = caller(capsys, predict, more=())
    for flags in ((), ("--model", "test_vit")):
        refuses(call(images, *flags), "--model NAME --pretrained")


def test_topk_must_be_positive(images, call, capsys):
    with pytest.raises(SystemExit) as done:
        call(images, "--topk", 0)
    assert done.value.code == 2
    assert "--topk" in capsys.readouterr().err


def test_a_folder_may_be_called_as_a_file(images, call, tmp_path):
    (tmp_path / "v1.jpg").mkdir()
    assert call(images / "a.jpg", "--output", tmp_path / "v1.jpg")[0] == 0
    assert (tmp_path / "v1.jpg" / "a-prediction.png").is_file()


def test_folders_without_permissions(images, call, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", no_access)
        refuses(call(images), images, "Permission denied")
    monkeypatch.setattr("tempfile.NamedTemporaryFile", no_access)
    for flag, name in (("--csv", "p.csv"), ("--output", "one.png"), ("--output", "out")):
        refuses(call(images / "a.jpg", flag, tmp_path / name), flag, name, "Permission denied")
        assert not (tmp_path / name).exists()


def test_an_output_that_nobody_reads_to_its_end(images, call, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:  # closing it would raise what was not dealt with
        monkeypatch.setattr("sys.stdout", pipe)
        status, _, errors = call(images, "--csv", tmp_path / "p.csv")
        monkeypatch.undo()
    assert (status, errors) == (1, "")
    assert len(read(tmp_path / "p.csv")) == 3  # of the image whose output failed
