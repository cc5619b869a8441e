"""The crash test: a short one, and that it notices what it is there to notice."""

import contextlib
import random
import re
import signal
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import clean_env, run_python

from tools.crashtest import job
from tools.crashtest.compare import compare, differing_bits, survey
from tools.crashtest.job import CrashError
from tools.crashtest.run import Counts, Reference, Run, draw_moment, parts_of
from training.checkpoints import save_checkpoint


def test_three_kills_leave_no_trace(tmp_path):
    flags = ["--kills", 3, "--ranks", 1, "--epochs", 1, "--seed", 3, "--workers", 1, 0]
    words = ["-m", "tools.crashtest", *flags, "--model", "convit_tiny", "--output_dir", tmp_path]
    done = run_python(*words, "--", "--std-aug", "--aa=", "--mixup=0", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 3, ")
    rows = [re.split(r" *\| *", line)[1:-1] for line in done.stdout.splitlines() if line[0] == "|"]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert [row["interrupted by"] for row in table] == [
        "SIGKILL of the process",
        "SIGTERM of the process",
    ]
    assert [row["kills"] for row in table] == ["2", "1"]
    assert int(table[0]["restarts"]) >= 2
    assert table[1]["steps done twice"] == "0"
    assert done.stdout.splitlines()[-1] == (
        "crashtest: 3 kills, 0 bits of difference, 0 lost checkpoints, 0 orphans"
    )
    assert not any(tmp_path.iterdir())


def test_a_failing_run_is_told_and_kept(tmp_path):
    flags = ["--kills", 1, "--ranks", 1, "--model", "nonesuch", "--output_dir", tmp_path]
    done = run_python("-m", "tools.crashtest", *flags)
    assert done.returncode == 1
    assert "status 1 without having been disturbed" in done.stderr
    assert "nonesuch" in done.stderr.partition("the end of")[2]
    assert done.stdout.splitlines()[-1].endswith("0 orphans, 1 failed")
    assert list(tmp_path.rglob("reference-1.txt"))


def flip(tensor, index=0):
    """A copy with the lowest bit of one byte turned over."""
    copy = tensor.clone()
    copy.view(torch.uint8).flatten()[index] ^= 1
    return copy


def state(**changes):
    weights = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    optimizer = {"state": {0: {"step": torch.tensor(4.0)}}}
    content = {"model": {"weight": weights}, "optimizer": optimizer, "args": {"lr": 1}}
    return content | {"epoch": 0, "step": 3, "best_acc1": 12.5} | changes


def test_every_bit_counts():
    weight = state()["model"]["weight"]
    assert differing_bits(state(), state(args={"lr": 2})) == 0
    assert differing_bits(state(), state(model={"weight": flip(weight, 9)})) == 1
    assert differing_bits(state(), state(model={"weight": flip(flip(weight, 9), 23)})) == 2
    assert differing_bits(state(), state(best_acc1=12.500000000000002)) == 1
    assert differing_bits(state(), state(model={})) == 8 * 6 * 4
    assert differing_bits(state(), state(model={"weight": weight.reshape(3, 2)})) == 8 * 6 * 4
    nothing, minus = torch.zeros(1), -torch.zeros(1)
    assert differing_bits(nothing, minus) == 1
    assert differing_bits(nothing / 0, nothing / 0) == 0
    assert differing_bits([1, 2], [1, 2, 3]) > 0


@pytest.fixture
def finished(tmp_path):
    """The folders of two runs that came to the same."""
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        save_checkpoint(state(), folder / "checkpoint.pth", also=(folder / "best.pth",))
        rate = "1.5" if name == "one" else "2.5"
        (folder / "log.txt").write_text(
            f'{{"epoch": 0, "train_loss": 0.5, "train_images_per_second": {rate}}}\n'
        )
    return tmp_path / "one", tmp_path / "two"


@pytest.mark.parametrize("name", ["checkpoint.pth", "best.pth", "log.txt"])
def test_a_difference_in_any_file_is_found(finished, name):
    assert compare(*finished) == 0
    if name == "log.txt":
        path = finished[1] / name
        path.write_text(path.read_text().replace("0.5", "0.5000000000000001"))
    else:
        weight = flip(state()["model"]["weight"])
        save_checkpoint(state(model={"weight": weight}), finished[1] / name)
    assert compare(*finished) == 1


def test_a_truncated_checkpoint_is_lost(tmp_path):
    assert survey(tmp_path, 22) == (0, set())
    newest, previous = tmp_path / "checkpoint.pth", tmp_path / "previous.pth"
    save_checkpoint(state(epoch=-1, step=20), newest)
    save_checkpoint(state(), newest, keep=previous)
    assert survey(tmp_path, 22) == (25, set())
    newest.write_bytes(newest.read_bytes()[:-100])
    assert survey(tmp_path, 22) == (20, {newest.stat().st_ino})
    newest.rename(tmp_path / "checkpoint.pth.damaged")
    steps, damaged = survey(tmp_path, 22)
    assert (steps, len(damaged)) == (20, 1)
    assert not Counts(lost_checkpoints=len(damaged)).is_good


@pytest.mark.skipif(not job.HAS_PROC, reason="needs /proc")
def test_an_orphan_is_counted_and_killed(monkeypatch):
    monkeypatch.setattr(job, "ORPHAN_SECONDS", 0.1)
    words = [sys.executable, "-c", "print(1, flush=True); input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=clean_env(CRASHTEST_RUN="a run"), **pipes) as process:
        process.stdout.readline()
        assert job.end_orphans("another run") == 0
        assert job.end_orphans("a run", among={1}) == 0
        assert job.end_orphans("a run") == 1
        assert process.wait(60) == -signal.SIGKILL
    assert job.end_orphans("a run") == 0


def test_a_start_that_hangs_is_an_error(tmp_path):
    words = [sys.executable, "-c", "import signal; print('still here', flush=True); signal.pause()"]
    with (
        pytest.raises(CrashError, match=r"(?s)no end after 5 s.*still here"),
        job.Job(words, tmp_path, tmp_path / "text.txt", 5.0) as start,
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
    words = [sys.executable, "-c", f"print({chr(10).join(lines)!r}, end='')"]
    with job.Job(words, tmp_path, tmp_path / "text.txt", 60.0, 22, reached=31) as start:
        assert not start.wait()
    assert (start.begun, start.reached, start.repeated) == (28, 29, 3)


@pytest.mark.parametrize(("part", "kept"), [(0, True), (1, False)])
def test_progress_that_goes_back_is_a_loss(tmp_path, part, kept):
    counts, reference = Counts(), Reference(tmp_path, 22, 1.0, 1.0, 1.0)
    part = parts_of(1, "mixed")[part]
    run = Run(Namespace(), part, 1, reference, tmp_path, random.Random(0), counts)
    save_checkpoint(state(), tmp_path / "checkpoint.pth")
    started = SimpleNamespace(stepping=True, reached=25)
    run.survey(started)
    assert (run.progress, run.in_vain, counts.lost_checkpoints) == (25, False, 0)
    save_checkpoint(state(step=1), tmp_path / "checkpoint.pth")
    with contextlib.nullcontext() if kept else pytest.raises(CrashError, match="23 steps"):
        run.survey(started)
    assert counts.lost_checkpoints == 1


def test_moments_make_progress():
    draws = random.Random(0)
    moments = [draw_moment(draws, kills, in_vain=False) for kills in range(200)]
    assert [moment.kind for moment in moments[:3]] == ["saving", "steps", "start"]
    assert {moment.kind for moment in moments} == {"saving", "steps", "start"}
    after_vain = [draw_moment(draws, kills, in_vain=True) for kills in range(200)]
    assert all(moment.saves and moment.kind != "start" for moment in after_vain)
    assert any(moment.saves == 0 for moment in moments)


def test_parts():
    assert [part.number for part in parts_of(1, "TERM")] == [signal.SIGTERM]
    assert len(parts_of(2, "mixed")) == len(parts_of(2, "KILL")) + len(parts_of(2, "TERM"))
    assert any(part.restarts for part in parts_of(2, "KILL")) == job.HAS_PROC
