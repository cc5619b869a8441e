"""A run that an output folder holds: continued, refused, or removed when asked."""

import re
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import error_of, read_log, run_main, succeed
from saving import warnings_of

from main import main
from tools.submit.__main__ import flags_of_run
from tools.submit.__main__ import get_parser as submit_parser
from training import existing_run
from training.existing_run import CONTINUE, OVERWRITE, REFUSE, describe, treatment
from training.files import OutputError
from utils import UserError

SMALL = ["--model", "test_vit", "--data-set", "DIGITS", "--batch-size", 256, "--num_workers", 0]
SMALL += ["--warmup-epochs", 0, "--device", "cpu", "--epochs", 2, "--output_dir"]
NOTES = "notes.txt"  # of the user


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one of two epochs, with files of the user; do not change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    succeed(*SMALL, folder, "--stop-epoch", 1, "--keep-checkpoints", 2)
    for name in (NOTES, "model.pth", "checkpoint-mine.pth"):
        (folder / name).write_text("mine")
    return folder


@pytest.fixture
def held(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def files(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_second_run_is_refused(held, tmp_path):
    other = shutil.copytree(held, tmp_path / "other")
    for lock in (True, False):  # runs of other programs have none
        if not lock:
            (held / "run.lock").unlink()
        before = files(held)
        for words in ([], ["--resume", other / "checkpoint.pth"], ["--start_epoch", 1]):
            error = error_of(main, *SMALL, held, *words)
            for part in (f"{held} ", "1 of 2 epochs", "--resume auto", "--overwrite"):
                assert part in error
        assert files(held) == before


def test_weights_alone_do_not_continue_the_run_of_their_folder(held):
    weights = torch.load(held / "checkpoint.pth", weights_only=True)["model"]
    torch.save({"model": weights}, held / "exported.pth")
    error = error_of(main, *SMALL, held, "--resume", held / "exported.pth")
    assert f"{held} " in error and "--overwrite" in error
    assert [line["epoch"] for line in read_log(held)] == [0]


def test_a_file_of_the_folder_continues_its_run(held):
    output = succeed(*SMALL, held, "--resume", held / "best.pth")
    assert [line["epoch"] for line in read_log(held)] == [0, 1]
    assert not warnings_of(output)
    output = succeed(*SMALL, held, "--resume", "auto")
    assert re.search(r"\b2 of 2 epochs .*finished", output)
    assert "2 of 2 epochs" in error_of(main, *SMALL, held)


def test_overwrite_removes_the_run_and_no_other_file(held):
    (held / "checkpoint.pth.damaged").write_text("damaged")
    (held / "corrupt.txt").write_text("1.jpg")
    old_events = {path.name for path in held.glob("events.*")}
    assert old_events
    succeed(*SMALL, held, "--stop-epoch", 1, "--overwrite", "--seed", 7)
    names = {path.name for path in held.iterdir() if not path.name.startswith("events.")}
    run = {"args.yaml", "best.pth", "checkpoint.pth", "data.json", "log.txt", "run.lock"}
    assert names == run | {NOTES, "model.pth", "checkpoint-mine.pth"}
    assert not old_events & {path.name for path in held.iterdir()}
    assert "\nseed: 7\n" in (held / "args.yaml").read_text()
    assert "overwrite:" not in (held / "args.yaml").read_text()
    assert [line["epoch"] for line in read_log(held)] == [0]


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "test_vit", "--model-kwargs", "nonsense=1"],
        ["--data-path", "/none", "--data-set", "IMNET"],
        ["--opt-betas", "0.1", "0.2", "0.3", "0.4"],
        ["--finetune", "/none.pth"],
    ],
    ids=lambda words: words[0],
)
def test_a_wrong_flag_next_to_overwrite_loses_nothing(held, words):
    before = files(held).keys() | {"run.lock"}
    checkpoint = (held / "checkpoint.pth").read_bytes()
    error_of(main, *SMALL, held, "--overwrite", *words)
    assert files(held).keys() == before
    assert (held / "checkpoint.pth").read_bytes() == checkpoint


EXCLUDED = {  # what the error must name
    ("--overwrite",): "--output_dir",
    ("--overwrite", "--output_dir", "{held}", "--resume", "auto"): "--resume auto",
    ("--overwrite", "--output_dir", "{held}", "--resume", "{held}/best.pth"): "best.pth",
    ("--overwrite", "--output_dir", "{held}", "--finetune", "{held}/best.pth"): "best.pth",
    ("--overwrite", "--output_dir", "{held}", "--eval", "--resume", "x.pth"): "--eval",
}


@pytest.mark.parametrize("words", EXCLUDED, ids=" ".join)
def test_flags_that_overwrite_excludes(trained, words):
    before = files(trained)
    error = error_of(main, *[word.format(held=trained) for word in words])
    assert EXCLUDED[words] in error
    assert files(trained) == before


def test_a_recipe_cannot_overwrite(tmp_path):
    (tmp_path / "x.yaml").write_text("overwrite: true\n")
    assert "overwrite" in error_of(main, "-c", tmp_path / "x.yaml", *SMALL, tmp_path)


def test_a_job_that_is_queued_again_cannot_overwrite(tmp_path):
    options = submit_parser().parse_args(["--job-dir", str(tmp_path)])
    with pytest.raises(UserError, match="--overwrite"):
        flags_of_run(options, ["--model", "test_vit", "--overwrite"])


def test_a_run_without_a_folder_warns_once_that_nothing_is_saved():
    status, output, _ = run_main(*SMALL[:-1], "--stop-epoch", 1)
    assert status == 0 and len(warnings_of(output, "--output_dir")) == 1


# --- what a folder holds --------------------------------------------------------------------


def test_what_is_a_run(tmp_path):
    assert describe(tmp_path / "missing") == describe(tmp_path) == ""
    (tmp_path / "stdout.txt").write_text("")
    (tmp_path / "events.out.tfevents.1.host").write_text("")
    (tmp_path / "corrupt.txt").write_text("1.jpg")
    (tmp_path / "log.txt").write_text("")
    assert describe(tmp_path) == ""
    (tmp_path / "log.txt").write_text("no line of a run\n")  # which a run would drop
    assert "log.txt" in describe(tmp_path)
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 11}\n{"epoch": "x"}\n{"epo')
    assert describe(tmp_path) == "12 epochs"
    (tmp_path / "args.yaml").write_text("lr: 0.1\nepochs: 20\n")
    assert describe(tmp_path) == "12 of 20 epochs"
    (tmp_path / "log.txt").unlink()
    assert describe(tmp_path) == "0 of 20 epochs"
    (tmp_path / "args.yaml").unlink()
    (tmp_path / "best-0003.pth").touch()
    assert "best-0003.pth" in describe(tmp_path)


def test_a_restarted_run_continues(tmp_path, monkeypatch):
    error_file = tmp_path / "launch/attempt_0/0/error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    error_file.parent.mkdir(parents=True)
    args = Namespace(resume="", output_dir=str(tmp_path))
    assert treatment(args, False, restarted=True) == CONTINUE
    assert treatment(args, True, restarted=True) == CONTINUE
    assert treatment(args, True, restarted=False) == OVERWRITE
    assert treatment(args, False, restarted=False) == REFUSE
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
    with pytest.raises(OutputError):
        existing_run.refuse(tmp_path)
    # torchrun starts what was refused again
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "launch/attempt_1/0/error.json"))
    assert treatment(args, False, restarted=True) == REFUSE


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_restarts_need_no_flag(held, monkeypatch, variable):
    monkeypatch.setattr("conftest.LAUNCHER", ("RANK",))
    monkeypatch.setenv(variable, "1")
    succeed(*SMALL, held, "--overwrite")
    assert [line["epoch"] for line in read_log(held)] == [0, 1]
    assert (held / "previous.pth").exists()
