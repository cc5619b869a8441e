"""tools.validate: what it refuses, and what it leaves behind when something fails."""

import io
import os
import re

import pytest
from conftest import write_images
from PIL import Image
from validating import (
    STOPS,
    caller,
    content,
    fails_from,
    no_access,
    plain,
    random_vit,
    read,
    refuses,
    save,
    trained,
)

from tools import files
from tools.validate import __main__ as validate

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"), CLASSES, 2)[:2]


@pytest.fixture
def call(capsys):
    return caller(capsys)


@pytest.fixture
def place(run, tmp_path, monkeypatch):
    """Return the working directory, with files of many types."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.csv").write_bytes(run[0].read_bytes())
    (tmp_path / "link.csv").symlink_to("net.csv")
    (tmp_path / "real.csv").write_text("[]")
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    write_images(tmp_path / "set", train=0, val=1, classes=CLASSES)
    for name in CLASSES:
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / "val" / name / "1.png")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("", ["--model NAME --pretrained"]),
        ("--pretrained", ["--pretrained", "--model"]),
        ("CHECKPOINT --pretrained", ["--pretrained"]),
        ("nowhere.pth", ["nowhere.pth", "No such file or directory"]),
        ("CHECKPOINT --data-path nowhere", ["--data-path nowhere"]),
        (f"CHECKPOINT --data-path {__file__}", [f"--data-path {__file__}"]),
        ("CHECKPOINT --num_workers -1", ["--num-workers -1"]),
        ("CHECKPOINT --amp-dtype bfloat16", ["--amp-dtype bfloat16", "--amp:"]),
        ("CHECKPOINT --batch-size 0", ["--batch-size 0"]),
        ("CHECKPOINT --eval-crop-ratio 0", ["--eval-crop-ratio 0.0"]),
        ("CHECKPOINT --eval-crop-ratio 1.5", ["--eval-crop-ratio 1.5"]),
        ("CHECKPOINT --compile gcc", ["--compile gcc", "inductor"]),
        ("CHECKPOINT --fuse", ["test_vit", "--fuse"]),
        ("CHECKPOINT --csv no/where.csv", ["--csv no/where.csv", " no"]),
        ("CHECKPOINT --reliability no/where.png", ["--reliability no/where.png", " no"]),
        ("CHECKPOINT --confusion c.jpg", ["--confusion c.jpg", ".png"]),
        ("CHECKPOINT --csv c.png", ["--csv c.png", ".csv"]),
        ("CHECKPOINT --csv=", ["--csv .", ".csv"]),
        ("CHECKPOINT --per-class c.png", ["--per-class c.png", ".csv"]),
        ("CHECKPOINT --corruptions nowhere", ["--corruptions nowhere"]),
        ("CHECKPOINT --corruptions .", ["--corruptions .", "CORRUPTION/SEVERITY/CLASS"]),
        ("CHECKPOINT --corruptions . --confusion c.png", ["--confusion ", "--corruptions"]),
        ("CHECKPOINT --corruptions . --data-set CIFAR", ["--data-set ", "--corruptions"]),
        ("CHECKPOINT --corruptions . --data-path x", ["--data-path ", "--corruptions"]),
        ("CHECKPOINT --real-labels timm", ["--real-labels", "1000", "3"]),
        ("CHECKPOINT --classes wnid", ["1000", "3"]),
        ("CHECKPOINT --model test_vitt", ["'test_vitt'", "test_vit,"]),
    ],
)
def test_errors_name_what_is_wrong(flags, values, run, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags.replace("CHECKPOINT", str(run[0])).split()
    if not {"--data-path", "--corruptions"} & {*flags}:
        flags += ["--data-path", run[1]]
    refuses(call(*flags), *values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("--csv net.csv", ["--csv net.csv"]),
        ("--csv link.csv", ["--csv link.csv"]),
        ("--csv set/../net.csv", ["--csv set/../net.csv"]),
        ("--csv real.csv --real-labels real.csv", ["--csv real.csv"]),
        ("--confusion set/val/bee/1.png --weights model", ["--confusion set/val/bee/1.png"]),
        ("--csv a.csv --per-class a.csv", ["--csv", "--per-class", "a.csv"]),
        ("--confusion a.png --reliability ./a.png", ["--confusion", "--reliability", "a.png"]),
        ("--csv a-2-ema-32.csv --per-class a.csv", ["--csv", "--per-class", "a-2-ema-32.csv"]),
        ("--csv folder.csv", ["--csv folder.csv"]),
        ("--csv pipe.csv", ["--csv pipe.csv"]),
        ("--csv net.csv/a.csv", ["net.csv"]),
        (f"--reliability {'x' * 250}.png", ["--reliability x", "File name too long"]),
        (f"--per-class {'x' * 230}.csv", ["1-model-32.csv", "File name too long"]),
    ],
)
def test_files_that_would_not_be_written(flags, values, place, call, monkeypatch):
    fails_from(validate, 1, AssertionError("evaluated"), monkeypatch)
    before = content(place)
    refuses(call("net.csv", "--data-path", "set", *flags.split()), *values)
    assert content(place) == before


def test_permissions_are_checked_first(run, call, tmp_path, monkeypatch):
    fails_from(validate, 1, AssertionError("evaluated"), monkeypatch)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", no_access)
    path = tmp_path / "c.csv"
    found = call(run[0], "--data-path", run[1], "--per-class", path)
    refuses(found, f"--per-class {path}", "Permission denied")


@pytest.mark.parametrize("broken", ["text", "size", "classes"])
def test_all_models_are_checked_first(broken, run, call, tmp_path, monkeypatch):
    fails_from(validate, 1, AssertionError("evaluated"), monkeypatch)
    second, more = tmp_path / "second.pth", []
    if broken == "text":
        second.write_text("no checkpoint")
    elif broken == "size":
        save(second, random_vit(3), classes=CLASSES)
        more = ["--input-size", 32, 33]
    else:
        save(second, random_vit(3), classes=["ant", "bee", "cow"])
    value = {"text": second, "size": "--input-size 33", "classes": "'cat'"}[broken]
    refuses(call(run[0], second, "--data-path", run[1], *more), value)


@STOPS
def test_rows_that_are_done_are_kept(error, status, run, call, tmp_path, monkeypatch):
    fails_from(validate, 2, error, monkeypatch)
    flags = (run[0], "--data-path", run[1], "--csv", tmp_path / "t.csv")
    found, output, errors = call(*flags, "--per-class", tmp_path / "c.csv")
    assert (found, errors.count("\n"), errors[:7]) == (status, 1, "error: ")
    assert str(error) in errors
    assert read(tmp_path / "t.csv", "weights") == [("model",)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c-1-model-32.csv", "t.csv"]
    assert re.search(r"^1 +\S+ +model +32 ", output, re.MULTILINE)
    (tmp_path / "t.csv").write_text("kept")
    fails_from(validate, 1, error, monkeypatch)
    assert call(*flags)[0] == status
    assert (tmp_path / "t.csv").read_text() == "kept"  # there are no rows


def test_a_file_that_cannot_be_written_leaves_the_others(run, call, tmp_path, monkeypatch):
    evaluate = validate.evaluate

    def blocking(*words):
        (tmp_path / "t.csv").mkdir(exist_ok=True)  # after it was looked for
        return evaluate(*words)

    monkeypatch.setattr(validate, "evaluate", blocking)
    flags = (run[0], "--data-path", run[1], "--weights", "model", "--csv", tmp_path / "t.csv")
    status, output, errors = call(*flags, "--per-class", tmp_path / "c.csv")
    assert (status, errors.count("\n")) == (1, 1)
    assert str(tmp_path / "t.csv") in errors
    assert str(tmp_path / "c.csv") in output
    assert len(read(tmp_path / "c.csv")) == 3
    assert "t.csv" not in output


def test_a_file_is_whole_or_as_it_was(run, call, tmp_path, monkeypatch):
    names = ("t.csv", "p.csv", "c.png", "r.png")
    for name in names:
        (tmp_path / name).write_text("as it was")

    monkeypatch.setattr("os.fsync", no_access)
    flags = [run[0], "--data-path", run[1], "--weights", "model"]
    for flag, name in zip(("csv", "per-class", "confusion", "reliability"), names, strict=True):
        flags += [f"--{flag}", tmp_path / name]
    status, _, errors = call(*flags)
    assert (status, errors.count("Permission denied")) == (1, 4)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(names, "as it was")


def test_outputs_that_are_not_finite_fail(run, call, tmp_path):
    checkpoint = save(tmp_path / "nan.pth", random_vit(3, finite=False), classes=CLASSES)
    flags = ("--data-path", run[1], "--csv", tmp_path / "t.csv")
    status, output, errors = call(checkpoint, run[0], *flags)
    assert status == 1
    assert re.search(r"nan.pth \(model, 32 pixels\).* 6 ", errors)
    assert str(tmp_path / "t.csv") in output
    assert [top1 == "0.0" for (top1,) in read(tmp_path / "t.csv", "top1")] == [True, False, False]


def test_corrupt_images_are_reported_once(run, call, place):
    bad = place / "set" / "val" / "ant" / "bad\nname.jpg"
    bad.write_bytes(b"broken")
    flags = (run[0], "--data-path", place / "set", "--csv", place / "t.csv")
    status, output, errors = call(*flags, "--on-corrupt", "skip")
    assert status == 0
    assert read(place / "t.csv", "corrupt") == [("1",), ("1",)]
    assert "corrupt" in output
    assert (errors.count("\n"), errors.startswith("warning: ")) == (1, True)
    assert f"{bad.parent}/bad name.jpg" in errors
    for path in (place / "set" / "val").glob("*/*"):
        path.write_bytes(b"broken")
    refuses(call(*flags, "--on-corrupt", "skip"), "7", bad.parent)


def test_digits_are_not_taken_for_others(run, call, tmp_path):
    digits = save(tmp_path / "d.pth", random_vit(10), classes=list("0123456789"))
    assert call(digits)[0] == 0
    others = save(tmp_path / "o.pth", random_vit(10), classes=list("abcdefghij"))
    for flags in ([run[0]], [others], plain(tmp_path / "plain.pth")[0]):
        refuses(call(*flags), "--data-path", "DIGITS", flags[0])


def test_hidden_folders_are_not_classes(run, call, place):
    flags = (run[0], "--csv", place / "t.csv", "--weights", "model", "--data-path")
    root = place / "set"
    kept = ("top1", "nll", "images")
    assert call(*flags, root)[0] == 0
    before = read(place / "t.csv", *kept)
    for folder in (root, root / "val", root / "val" / "ant"):
        (folder / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(root / "val" / "ant" / ".ipynb_checkpoints" / "1.png")
    for data in (root, root / "val"):
        assert call(*flags, data)[0] == 0
        assert read(place / "t.csv", *kept) == before


@pytest.mark.parametrize("flag", ["--data-path", "--corruptions"])
def test_folders_that_may_not_be_read(flag, run, call, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "scandir", no_access)
    refuses(call(run[0], flag, tmp_path), tmp_path, "Permission denied")


def test_a_set_without_what_is_needed(run, call, tmp_path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    flags = (run[0], "--data-path")
    refuses(call(*flags, tmp_path), f"--data-path {tmp_path} ", "train/", "val/", "validation/")
    refuses(call(*flags, tmp_path / "train" / "ant"), tmp_path / "train" / "ant")
    (tmp_path / "validation" / "ant").mkdir(parents=True)
    refuses(call(*flags, tmp_path), tmp_path / "validation", "ant")


def test_names_that_a_terminal_cannot_show(run, call, tmp_path, monkeypatch):
    checkpoint = tmp_path / "ключ.pth"
    checkpoint.write_bytes(run[0].read_bytes())
    terminal = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    assert call(checkpoint, "--data-path", run[1], "--weights", "model")[0] == 0
    assert rb"/\u043a\u043b\u044e\u0447.pth (model, 32 pixels)" in terminal.getvalue()


def test_an_output_folder_that_stays_empty_is_removed(tmp_path):
    (tmp_path / "there").mkdir()
    with files.folder_for("--output", tmp_path / "there" / "a" / "b"):
        assert (tmp_path / "there" / "a" / "b").is_dir()
    assert not list((tmp_path / "there").iterdir())
    with files.folder_for("--output", tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()
    with files.folder_for("--output", tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "x").touch()
    assert (tmp_path / "a" / "b" / "x").is_file()
