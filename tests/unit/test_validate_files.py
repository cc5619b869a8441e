"""tools.validate: what it refuses, and what it leaves behind when something fails."""

import io
import os
import re

import pytest
import torch
from conftest import write_images
from PIL import Image
from validating import SIZE, caller, random_vit, read, save, trained, with_one_thread

from pipeline.images import DataError
from tools import files
from tools.validate import rows

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def one_thread():
    yield from with_one_thread()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(checkpoint with a moving average, image folder)."""
    return trained(tmp_path_factory.mktemp("run"), CLASSES, 2)[:2]


@pytest.fixture
def call(capsys):
    return caller(capsys)


@pytest.fixture
def place(run, tmp_path, monkeypatch):
    """A folder to be in, with files of many kinds."""
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


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def fails_from(number, error, monkeypatch):
    """Let evaluations fail, from the one of this number on."""
    evaluate, calls = rows.evaluate, []

    def failing(*words):
        calls.append(words)
        if len(calls) >= number:
            raise error
        return evaluate(*words)

    monkeypatch.setattr(rows, "evaluate", failing)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give a checkpoint"),
        (["--pretrained"], "--pretrained needs --model"),
        (["{checkpoint}", "--pretrained"], "leave the checkpoints out"),
        (["nowhere.pth"], "cannot read checkpoint nowhere.pth: No such file or directory"),
        (["{checkpoint}", "--data-path", "nowhere"], "--data-path nowhere does not exist"),
        (["{checkpoint}", "--data-path", __file__], f"--data-path {__file__} is no folder"),
        (["{checkpoint}", "--num_workers", "-1"], "--num_workers -1 must be 0 or more"),
        (["{checkpoint}", "--amp-dtype", "bfloat16"], "--amp-dtype bfloat16 does nothing without"),
        (["{checkpoint}", "--input-size", "0"], "--input-size 0 must be positive"),
        (["{checkpoint}", "--batch-size", "0"], "--batch-size 0 must be positive"),
        (["{checkpoint}", "--eval-crop-ratio", "0"], "--eval-crop-ratio 0.0"),
        (["{checkpoint}", "--compile", "gcc"], "--compile gcc is no backend"),
        (["{checkpoint}", "--fuse"], "leave --fuse out"),
        (["{checkpoint}", "--csv", "no/where.csv"], "no folder no"),
        (["{checkpoint}", "--reliability", "no/where.png"], "no folder no"),
        (["{checkpoint}", "--confusion", "c.jpg"], "--confusion c.jpg must end in .png"),
        (["{checkpoint}", "--csv", "c.png"], "--csv c.png must end in .csv"),
        (["{checkpoint}", "--csv", ""], "--csv . must end in .csv"),
        (["{checkpoint}", "--per-class", "c.png"], "--per-class c.png must end in .csv"),
        (["{checkpoint}", "--corruptions", "nowhere"], "--corruptions nowhere is no folder"),
        (["{checkpoint}", "--corruptions", ".", "--confusion", "c.png"], "--confusion is not for"),
        (
            ["{checkpoint}", "--corruptions", ".", "--data-set", "CIFAR"],
            "--data-set is not for --corruptions",
        ),
        (
            ["{checkpoint}", "--corruptions", ".", "--data-path", "x"],
            "--data-path is not for --corruptions",
        ),
        (["{checkpoint}", "--real-labels", "timm"], "knows 3"),
        (["{checkpoint}", "--classes", "wnid"], "knows 3 classes"),
        (
            ["{checkpoint}", "--model", "test_vitt"],
            "no model 'test_vitt'; the nearest are test_vit,",
        ),
    ],
)
def test_errors_name_what_is_wrong(flags, message, run, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [flag.format(checkpoint=run[0]) for flag in flags]
    if not {"--data-path", "--corruptions"} & {*flags}:
        flags += ["--data-path", run[1]]
    status, _, errors = call(*flags)
    assert status == 1
    assert errors.startswith("error: ")
    assert message in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--csv", "net.csv"], "--csv net.csv would overwrite what is read"),
        (["--csv", "link.csv"], "--csv link.csv would overwrite what is read"),
        (["--csv", "set/../net.csv"], "would overwrite what is read"),
        (["--csv", "real.csv", "--real-labels", "real.csv"], "--csv real.csv would overwrite"),
        (
            ["--confusion", "set/val/bee/1.png", "--weights", "model"],
            "would overwrite what is read",
        ),
        (["--csv", "a.csv", "--per-class", "a.csv"], "--csv and --per-class would both be written"),
        (["--confusion", "a.png", "--reliability", "./a.png"], "would both be written to a.png"),
        (
            ["--csv", "a-2-ema-32.csv", "--per-class", "a.csv"],
            "would both be written to a-2-ema-32",
        ),
        (["--csv", "folder.csv"], "--csv folder.csv is a folder"),
        (["--csv", "pipe.csv"], "--csv pipe.csv is no regular file"),
        (["--csv", "net.csv/a.csv"], "there is no folder net.csv"),
        (["--reliability", f"{'x' * 250}.png"], "cannot be written: File name too long"),
        (["--per-class", f"{'x' * 230}.csv"], "1-model-32.csv cannot be written: File name too lo"),
    ],
)
def test_files_that_would_not_be_written(flags, message, place, call, monkeypatch):
    fails_from(1, AssertionError("evaluated"), monkeypatch)
    before = content(place)
    status, output, errors = call("net.csv", "--data-path", "set", *flags)
    assert (status, output, errors.startswith("error: ")) == (1, "", True)
    assert message in errors
    assert content(place) == before


def test_a_folder_that_may_not_be_written_is_told_first(run, call, tmp_path, monkeypatch):
    fails_from(1, AssertionError("evaluated"), monkeypatch)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", unwritable)
    path = tmp_path / "c.csv"
    status, _, errors = call(run[0], "--data-path", run[1], "--per-class", path)
    assert (status, errors) == (
        1,
        f"error: --per-class {path} cannot be written: Permission denied\n",
    )


def unwritable(**options):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("broken", ["text", "size", "classes"])
def test_all_that_is_to_come_is_looked_at_first(broken, run, call, tmp_path, monkeypatch):
    fails_from(1, AssertionError("evaluated"), monkeypatch)
    second, more = tmp_path / "second.pth", []
    if broken == "text":
        second.write_text("no checkpoint")
    elif broken == "size":
        save(second, random_vit(3), classes=CLASSES)
        more = ["--input-size", 32, 33]
    else:
        save(second, random_vit(3), classes=["ant", "bee", "cow"])
    status, output, errors = call(run[0], second, "--data-path", run[1], *more)
    assert (status, output) == (1, "")
    assert {"text": "second.pth", "size": "--input-size 33", "classes": "'cat' is not"}[
        broken
    ] in errors


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (DataError("broken"), 1, "error: broken\n"),
    ],
)
def test_rows_that_are_done_are_kept(error, status, message, run, call, tmp_path, monkeypatch):
    fails_from(2, error, monkeypatch)
    flags = (run[0], "--data-path", run[1], "--csv", tmp_path / "t.csv")
    found, output, errors = call(*flags, "--per-class", tmp_path / "c.csv")
    assert (found, errors) == (status, message)
    assert [row["weights"] for row in read(tmp_path / "t.csv")] == ["model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c-1-model-32.csv", "t.csv"]
    assert re.search(r"^1 +\S+ +model +32 ", output, re.MULTILINE)
    (tmp_path / "t.csv").write_text("kept")
    fails_from(1, error, monkeypatch)
    assert call(*flags)[0] == status
    assert (tmp_path / "t.csv").read_text() == "kept"  # there are no rows


def test_a_file_that_cannot_be_written_leaves_the_others(run, call, tmp_path, monkeypatch):
    evaluate = rows.evaluate

    def blocking(*words):
        (tmp_path / "t.csv").mkdir(exist_ok=True)  # after it was looked for
        return evaluate(*words)

    monkeypatch.setattr(rows, "evaluate", blocking)
    flags = (run[0], "--data-path", run[1], "--weights", "model", "--csv", tmp_path / "t.csv")
    status, output, errors = call(*flags, "--per-class", tmp_path / "c.csv")
    assert status == 1
    assert re.fullmatch(rf"error: cannot write {tmp_path}/t.csv: .*\n", errors)
    assert f"written to {tmp_path / 'c.csv'}" in output
    assert len(read(tmp_path / "c.csv")) == 3
    assert "t.csv" not in output


def test_a_file_is_whole_or_as_it_was(run, call, tmp_path, monkeypatch):
    names = ("t.csv", "p.csv", "c.png", "r.png")
    for name in names:
        (tmp_path / name).write_text("as it was")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    flags = (run[0], "--data-path", run[1], "--weights", "model")
    for flag, name in zip(("--csv", "--per-class", "--confusion", "--reliability"), names,
                          strict=True):  # fmt: skip
        flags += (flag, tmp_path / name)
    status, _, errors = call(*flags)
    assert (status, errors.count("No space left on device")) == (1, 4)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        names, "as it was"
    )


def test_outputs_that_are_not_finite_fail(run, call, tmp_path):
    model = random_vit(3)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    checkpoint = save(tmp_path / "nan.pth", model, classes=CLASSES)
    flags = ("--data-path", run[1], "--csv", tmp_path / "t.csv")
    status, output, errors = call(checkpoint, run[0], *flags)
    assert status == 1
    assert errors.endswith(
        "nan.pth (model, 32 pixels): 6 images have outputs that are not finite\n"
    )
    assert "written to" in output
    assert [row["top1"] == "0.0" for row in read(tmp_path / "t.csv")] == [True, False, False]


def test_corrupt_images_are_told_once(run, call, place):
    bad = place / "set" / "val" / "ant" / "bad\nname.jpg"
    bad.write_bytes(b"broken")
    flags = (run[0], "--data-path", place / "set", "--csv", place / "t.csv")
    status, output, errors = call(*flags, "--on-corrupt", "skip")
    assert status == 0
    assert [row["corrupt"] for row in read(place / "t.csv")] == ["1", "1"]
    assert "corrupt" in output
    assert errors == (
        f"warning: cannot decode image {bad.parent}/bad name.jpg: no image of a known format\n"
    )
    for path in (place / "set" / "val").glob("*/*"):
        path.write_bytes(b"broken")
    status, _, errors = call(*flags, "--on-corrupt", "skip")
    assert status == 1
    assert "7 corrupt images, no sound one; the first: cannot decode image" in errors


def test_digits_are_not_taken_for_others(run, call, tmp_path):
    pytest.importorskip("sklearn")
    status, _, errors = call(run[0])
    assert status == 1
    assert "--data-path is missing: without it, images are of DIGITS" in errors
    digits = save(tmp_path / "d.pth", random_vit(10), classes=list("0123456789"))
    assert call(digits)[0] == 0
    others = save(tmp_path / "o.pth", random_vit(10), classes=list("abcdefghij"))
    assert "--data-path is missing" in call(others)[2]
    torch.save(random_vit(1000).state_dict(), tmp_path / "plain.pth")
    flags = (tmp_path / "plain.pth", "--model", "test_vit", "--input-size", SIZE)
    assert "--data-path is missing" in call(*flags)[2]


def test_what_programs_hide_in_folders_is_no_class(run, call, place):
    flags = (run[0], "--csv", place / "t.csv", "--weights", "model", "--data-path")
    root = place / "set"
    kept = ("top1", "nll", "images")
    assert call(*flags, root)[0] == 0
    before = [read(place / "t.csv")[0][key] for key in kept]
    for folder in (root, root / "val", root / "val" / "ant"):
        (folder / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(root / "val" / "ant" / ".ipynb_checkpoints" / "1.png")
    for data in (root, root / "val"):
        assert call(*flags, data)[0] == 0
        assert [read(place / "t.csv")[0][key] for key in kept] == before


@pytest.mark.parametrize("flag", ["--data-path", "--corruptions"])
def test_folders_that_may_not_be_read(flag, run, call, tmp_path, monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", unreadable)
    status, _, errors = call(run[0], flag, tmp_path)
    assert (status, errors) == (1, f"error: cannot read folder {tmp_path}: Permission denied\n")


def test_a_set_without_what_is_needed(run, call, tmp_path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    flags = (run[0], "--data-path")
    assert "has train/, but neither val/ nor validation/" in call(*flags, tmp_path)[2]
    assert "has no folders of classes" in call(*flags, tmp_path / "train" / "ant")[2]
    (tmp_path / "validation" / "ant").mkdir(parents=True)
    assert "class ant" in call(*flags, tmp_path)[2]


def test_names_that_a_terminal_cannot_show(run, call, tmp_path, monkeypatch):
    checkpoint = tmp_path / "ключ.pth"
    checkpoint.write_bytes(run[0].read_bytes())
    terminal = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    assert call(checkpoint, "--data-path", run[1], "--weights", "model")[0] == 0
    assert rb"/\u043a\u043b\u044e\u0447.pth (model, 32 pixels)" in terminal.getvalue()


def test_a_folder_for_files_goes_again_if_it_stays_empty(tmp_path):
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
