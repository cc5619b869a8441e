"""The crash test: a short one, and that it notices what it is meant to notice."""

import contextlib
import functools
import json
import random
import signal
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import ranks
import torch
from conftest import call

from tests.crash import job
from tests.crash.__main__ import main as crash
from tests.crash.compare import compare, differing_bits, survey
from tests.crash.job import CrashError
from tests.crash.run import Counts, Run, parts_of
from training.checkpoints import save_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
KILL, TERM = (parts_of(1, name)[0] for name in ("KILL", "TERM"))


class Forked:
    """The parts of ``subprocess.Popen`` that Job uses, in a process that need not import torch."""

    def __init__(self, command, stdout, env, **_):
        self._process = ranks.start(command[1:], env, stdout, stdout)
        self.pid, self.kill, self.wait = self._process.pid, self._process.kill, self._process.join

    def poll(self):
        return self._process.exitcode

    returncode = property(poll)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """``run(*flags) -> (status, output, errors)`` of a crash test of one rank, into tmp_path."""
    monkeypatch.setattr(job, "Popen", Forked)
    return functools.partial(call, crash, "--ranks", 1, "--output_dir", tmp_path)


def test_kills_leave_no_trace(run, tmp_path):
    flags = ["--kills", 3, "--epochs", 1, "--seed", 3, "--workers", 1, 0, "--model", "test_vit3"]
    main_flags = ["--std-aug", "--aa=", "--mixup=0", "--input-size=32"]
    status, output, errors = run(*flags, "--", *main_flags)
    assert status == 0, output + errors
    lines = output.splitlines()
    assert lines[0].startswith("seed 3, ")
    heads, _, *rows = [[cell.strip() for cell in x.split("|")[1:-1]] for x in lines if x[0] == "|"]
    killed, stopped = [dict(zip(heads, row, strict=True)) for row in rows]
    assert (killed["interrupted by"], stopped["interrupted by"]) == (str(KILL), str(TERM))
    assert (killed["kills"], stopped["kills"]) == ("2", "1")
    assert int(killed["restarts"]) >= 2
    assert stopped["steps done twice"] == "0"
    counts = "3 kills, 0 bits of difference, 0 lost checkpoints, 0 orphans"
    assert lines[-1].partition(": ")[2] == counts
    assert not any(tmp_path.iterdir())


def test_a_failing_run_is_reported_and_kept(run, tmp_path):
    status, output, errors = run("--kills", 1, "--model", "nonesuch")
    assert status == 1
    assert "status 1" in errors and "nonesuch" in errors
    assert output.splitlines()[-1].endswith("0 orphans, 1 failed")
    assert list(tmp_path.rglob("reference-1.txt"))


def flip(tensor, *indices):
    """A copy with the lowest bit of these bytes flipped."""
    copy = tensor.clone()
    for index in indices:
        copy.view(torch.uint8).flatten()[index] ^= 1
    return copy


WEIGHT = torch.arange(6, dtype=torch.float32).reshape(2, 3)


def state(**changes):
    optimizer = {"state": {0: {"step": torch.tensor(4.0)}}}
    content = {"model": {"weight": WEIGHT}, "optimizer": optimizer, "args": {"lr": 1}}
    return content | {"epoch": 0, "step": 3, "best_acc1": 12.5} | changes


@pytest.mark.parametrize(
    ("one", "other", "bits"),
    [
        (state(), state(args={"lr": 2}), 0),
        (state(), state(model={"weight": flip(WEIGHT, 9)}), 1),
        (state(), state(model={"weight": flip(WEIGHT, 9, 23)}), 2),
        (state(), state(best_acc1=12.500000000000002), 1),
        (state(), state(model={}), 8 * 6 * 4),
        (state(), state(model={"weight": WEIGHT.reshape(3, 2)}), 8 * 6 * 4),
        (torch.zeros(1), -torch.zeros(1), 1),
        (torch.zeros(1) / 0, torch.zeros(1) / 0, 0),
        ([1, 2], [1, 2, 3], 8 * len("[1, 2, 3]")),
    ],
)
def test_every_bit_counts(one, other, bits):
    assert differing_bits(one, other) == bits


@pytest.mark.parametrize("name", ["checkpoint.pth", "best.pth", "log.txt"])
def test_a_difference_in_any_file_is_found(tmp_path, name):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, rate in ((one, 1.5), (other, 2.5)):
        folder.mkdir()
        save_checkpoint(state(), folder / "checkpoint.pth", also=(folder / "best.pth",))
        line = {"epoch": 0, "train_loss": 0.5, "train_images_per_second": rate}
        (folder / "log.txt").write_text(json.dumps(line) + "\n")
    assert compare(one, other) == 0
    if name == "log.txt":
        path = other / name
        path.write_text(path.read_text().replace("0.5", "0.5000000000000001"))
    else:
        save_checkpoint(state(model={"weight": flip(WEIGHT, 0)}), other / name)
    assert compare(one, other) == 1


def test_a_truncated_checkpoint_is_lost(tmp_path):
    assert survey(tmp_path, 22) == (0, set())
    newest, previous = tmp_path / "checkpoint.pth", tmp_path / "previous.pth"
    save_checkpoint(state(epoch=-1, step=20), newest)
    save_checkpoint(state(), newest, keep=previous)
    assert survey(tmp_path, 22) == (25, set())
    newest.write_bytes(newest.read_bytes()[:-100])
    number = newest.stat().st_ino
    assert survey(tmp_path, 22) == (20, {number})
    newest.rename(tmp_path / "checkpoint.pth.damaged")
    assert survey(tmp_path, 22) == (20, {number})
    assert not Counts(lost_checkpoints=1).is_good


def test_an_orphan_is_counted_and_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "ORPHAN_SECONDS", 0.1)
    text = tmp_path / "text.txt"
    with text.open("wb") as file, subprocess.Popen(["sleep", "60"], stdout=file) as process:
        assert job.end_orphans(tmp_path / "another.txt") == 0
        assert job.end_orphans(text, among={1}) == 0
        assert job.end_orphans(text) == 1
        assert process.wait(60) == -signal.SIGKILL
    assert job.end_orphans(text) == 0


def test_a_start_that_hangs_is_an_error(tmp_path):
    words = ["sh", "-c", "echo still here; exec sleep 60"]
    with (
        pytest.raises(CrashError, match=r"(?s)\b1 s\b.*still here"),
        job.Job(words, tmp_path, tmp_path / "text.txt", 1.0) as start,
    ):
        start.wait()
    assert start.process.returncode == -signal.SIGKILL


def test_output_of_a_start_is_followed(tmp_path):
    lines = [
        "going on in epoch 1 after step 6",
        "training epochs 1 to 2 of 3",
        "epoch 1 step 7/22 loss 2.1",
        "epoch 1 step 8/22 los",  # not written yet
    ]
    words = ["printf", r"\n".join(lines)]
    with job.Job(words, tmp_path, tmp_path / "text.txt", 60.0, 22, reached=31) as start:
        assert not start.wait()
    assert (start.first, start.reached, start.repeated) == (28, 29, 3)


@pytest.mark.parametrize(("part", "kept"), [(KILL, True), (TERM, False)])
def test_progress_that_goes_back_is_a_loss(tmp_path, part, kept):
    counts, reference = Counts(), SimpleNamespace(per_epoch=22)
    run = Run(Namespace(), part, 1, reference, tmp_path, random.Random(0), counts)
    save_checkpoint(state(), tmp_path / "checkpoint.pth")
    started = SimpleNamespace(stepping=True, reached=25)
    run.survey(started)
    assert (run.progress, run.in_vain, counts.lost_checkpoints) == (25, False, 0)
    save_checkpoint(state(step=1), tmp_path / "checkpoint.pth")
    with contextlib.nullcontext() if kept else pytest.raises(CrashError, match=r"25\b.*\b23\b"):
        run.survey(started)
    assert counts.lost_checkpoints == 1
