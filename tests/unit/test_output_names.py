"""The output folder: odd names, files that are none, who may read it; a long TMPDIR."""

import os
import subprocess
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import error_of, read_log, start_python
from saving import numbers, save, warnings_of

from main import main
from training import launch
from training.output import Output, list_corrupt
from utils import UserError

SMALL = ["--model", "test_vit", "--data-set", "DIGITS", "--epochs", 1, "--batch-size", 256]
SMALL += ["--warmup-epochs", 0, "--device", "cpu", "--no-model-ema"]
ODD = ["a\nb", "\x1b[31m", os.fsdecode(b"\xff\xfe"), "x" * 255, "a[b]*?", " ", "é", "s3:__b"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_odd_names(tmp_path, name, capsys):
    folder = tmp_path / name
    output = Output(str(folder))
    output.begin(Namespace(output_dir=str(folder)), 0)
    save(output, 3)
    output.log_epoch({"epoch": 0}, 0)
    output.list_corrupt([name])
    output.close()
    assert numbers(folder) == {"checkpoint.pth": 3}
    assert read_log(folder) == [{"epoch": 0}]
    assert yaml.safe_load((folder / "args.yaml").read_text()) == {"output_dir": str(folder)}
    assert len((folder / "corrupt.txt").read_text().splitlines()) == 1
    printed = capsys.readouterr().out
    has_events = bool(list(folder.glob("events.*")))
    assert has_events != bool(warnings_of(printed, "TensorBoard"))
    assert has_events or "\udcff" in name


def place(path, kind):
    """Put something other than a regular file there."""
    make = {"folder": Path.mkdir, "pipe": os.mkfifo}
    make["link to nothing"] = lambda path: path.symlink_to("/nonexistent/file")
    make["device"] = lambda path: path.symlink_to("/dev/null")
    make[kind](path)


KINDS = ["folder", "pipe", "link to nothing", "device"]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_folder_that_is_none(tmp_path, kind):
    place(tmp_path / "odd", kind)
    assert str(tmp_path / "odd") in error_of(main, *SMALL, "--output_dir", tmp_path / "odd")


def test_a_file_and_a_folder_within_it(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/run", "x" * 256, "a\0b"):
        with pytest.raises(UserError, match=str(tmp_path)):
            Output(str(tmp_path / name))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["log.txt", "run.lock", "corrupt.txt"])
def test_files_that_are_none_are_named_at_the_start(tmp_path, name, kind):
    place(tmp_path / name, kind)
    with pytest.raises(UserError, match=str(tmp_path / name)):
        Output(str(tmp_path))


def test_evaluation_does_not_wait_for_a_pipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "corrupt.txt")
    list_corrupt(tmp_path, ["1.jpg"])
    assert warnings_of(capsys.readouterr().out, tmp_path / "corrupt.txt")


def test_a_list_in_another_encoding_is_kept(tmp_path):
    (tmp_path / "corrupt.txt").write_bytes(b"\xff\n2.jpg\n")
    list_corrupt(tmp_path, ["1.jpg", "2.jpg"])
    assert (tmp_path / "corrupt.txt").read_bytes() == b"\xff\n2.jpg\n1.jpg\n"


@pytest.mark.slow
def test_nobody_else_may_read_what_programs_write(tmp_path, images):
    """With a umask of 077: a run, its export, its report, its pictures, shards."""
    run = tmp_path / "run"
    data = ["--data-path", images, "--num_workers", 0, "--device", "cpu"]
    train = ["--model", "test_vit", "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 4]
    weights, export = run / "checkpoint.pth", ["--no-benchmark", "--device", "cpu", "--output"]
    tables = ["--csv", run / "t.csv", "--per-class", run / "c.csv", "--confusion", run / "c.png"]
    programs = [
        ["main.py", *train, *data, "--input-size", 32, "--output_dir", run],
        ["-m", "tools.validate", weights, *data, *tables],
        ["-m", "tools.export", "--checkpoint", weights, *export, run / "m.onnx"],
        ["-m", "tools.export", "--checkpoint", weights, *export, run / "m.pt2"],
        ["-m", "tools.convert_checkpoint", weights, run / "m.safetensors"],
        ["-m", "tools.convert_checkpoint", weights, run / "hub", "--to", "hub"],
        ["-m", "tools.pack_dataset", "--data-path", images, "--output", run / "shards"],
    ]
    private = partial(subprocess.run, umask=0o077)
    for words in programs:
        done = start_python(*words, run=private)
        assert done.returncode == 0, done.stderr
    found = {path: path.stat().st_mode & 0o077 for path in run.rglob("*")}
    assert len(found) > 18 and not any(found.values()), found


def test_sockets_need_no_short_tmpdir(tmp_path):
    """Loader workers connect to sockets in a folder of the temporary one."""
    long = tmp_path / ("t" * 150)
    long.mkdir()
    words = ["main.py", *SMALL, "--num_workers", 2, "--output_dir", tmp_path / "run"]
    done = start_python(*words, run=partial(subprocess.run, timeout=100), TMPDIR=long)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0]
    assert not list(long.glob("pymp-*"))


def test_a_long_tmpdir_is_named_where_no_other_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "SHORT", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", "/" + 150 * "t")
    # this process may have a folder of its own already
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", tempfile.mkdtemp)
    with pytest.raises(UserError, match=f"TMPDIR.*{150 * 't'}"):
        launch.shorten_sockets()
    assert tempfile.tempdir == "/" + 150 * "t"
