"""Runs that stop within an epoch and resume as if they had not stopped."""

import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    clean_env,
    read_log,
    run_ranks,
    same_run,
    start_python,
    start_rank,
    succeed,
    write_images,
)
from packing import pack

import utils
from pipeline.fast import FastDataset
from training import stopping
from training.checkpoints import plain
from training.stopping import RequestExchange, StopSignals

RUN = [
    *("--model", "test_resnet", "--input-size", 32, "--batch-size", 2, "--num_workers", 0),
    *("--epochs", 2, "--warmup-epochs", 1, "--accum-iter", 3, "--clip-grad", 1.0),
    *("--amp", "--amp-dtype", "bfloat16", "--model-ema-decay", 0.9, "--log-interval", 1),
    *("--drop-path", 0.3, "--drop", 0.1, "--on-corrupt", "skip", "--device", "cpu"),
    "--no-repeated-aug",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 training images, of which one is broken, and 10 for evaluation."""
    root = write_images(tmp_path_factory.mktemp("data") / "images", train=12, val=5)
    (root / "train" / "cat" / "3.jpg").write_bytes(b"broken")
    return root


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    succeed(*RUN, "--data-path", images, "--output_dir", folder)
    assert "train_corrupt" in read_log(folder)[0]
    return folder


def first_step(output):
    return tuple(map(int, re.search(r"^epoch (\d+) step (\d+)/", output, re.M).groups()))


def saved_step(folder):
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    return checkpoint["epoch"] + 1, checkpoint["step"]


@pytest.mark.parametrize(
    ("number", "line", "status"),
    [
        (signal.SIGTERM, "epoch 1 step 2/", 0),
        (signal.SIGUSR1, "epoch 0 step 12/", 0),  # on the way to the evaluation
        (signal.SIGINT, "epoch 0 step 4/", 130),
        (signal.SIGHUP, "epoch 1 step 5/", 0),
    ],
)
def test_a_stopped_run_resumes_bitwise(images, whole, tmp_path, main, number, line, status):
    run = [*RUN, "--data-path", images, "--output_dir", tmp_path]
    code, output, errors = main(*run, line=line, act=number)
    assert code == status, errors
    epoch, step = saved_step(tmp_path)
    assert step % 3 == 0 and step
    assert re.search(rf"{number.name}\D+{epoch}\D+{step}\b", output)
    output = succeed(*run, "--resume", "auto", "--num_workers", 2)
    assert first_step(output) == (epoch, min(step + 1, 12))
    assert same_run(tmp_path, whole)
    (listed,) = (tmp_path / "corrupt.txt").read_text().splitlines()
    assert "3.jpg" in listed


@pytest.mark.parametrize(
    ("words", "steps", "named"),
    [
        (["--accum-iter", 2], 12, r"accum_iter 2\D+3"),  # the rest in updates of two batches
        (["--repeated-aug"], 12, "repeated_aug True.*False"),  # from the next epoch
        (["--seed", 7], 12, r"seed 7\D+0"),
        (["--mixup", 0, "--cutmix", 0], 12, "mixup 0.0.*0.8"),
        (["--batch-size", 4, "--accum-iter", 2], 5, r"batches of 2\b"),
        (["--sampling-ratio", 0.5], 6, r"has 12 images.*with 24"),  # the epoch restarts
    ],
)
def test_flags_that_change_within_an_epoch(images, tmp_path, words, steps, named):
    run = [*RUN, "--data-path", images, "--output_dir", tmp_path]
    succeed(*run, line="epoch 0 step 2/", act=signal.SIGTERM)
    assert saved_step(tmp_path) == (0, 3)
    output = succeed(*run, *words, "--resume", "auto")
    assert re.search(named, output)
    assert f"epoch 0 step {steps}/{steps} " in output
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]


def test_a_run_on_packed_shards_resumes_bitwise(images, tmp_path):
    assert pack(images, tmp_path / "shards", "--shard-images", 5, "--on-corrupt", "skip") == 0
    pattern = tmp_path / "shards" / "train-{000000..000004}.tar"
    run = [*RUN, "--data-set", "WDS", "--data-path", pattern, "--epochs", 1]
    succeed(*run, "--output_dir", tmp_path / "whole")
    run += ["--output_dir", tmp_path / "parts"]
    succeed(*run, line="epoch 0 step 4/", act=signal.SIGTERM)
    epoch, step = saved_step(tmp_path / "parts")
    output = succeed(*run, "--resume", "auto", "--num_workers", 2)
    assert first_step(output) == (epoch, step + 1) > (0, 1)
    assert same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("flag", [("--save-every-steps", 3), ("--save-every-minutes", 1e-9)])
def test_checkpoints_within_an_epoch(images, whole, tmp_path, flag):
    run = [*RUN, "--data-path", images, "--output_dir"]

    def copy_and_stop():
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        signal.raise_signal(signal.SIGTERM)

    # before the evaluation starts, the run waits for the file being written
    succeed(*run, tmp_path / "run", *flag, line="* Acc@1", act=copy_and_stop)
    epoch, step = saved_step(tmp_path / "copy")
    assert epoch == 0 and step > 0
    succeed(*run, tmp_path / "copy", "--resume", "auto")
    assert same_run(tmp_path / "copy", whole)


@pytest.mark.parametrize(
    ("line", "status"), [("epoch 0 step 3/", 0), ("epoch 0 step 4/", 128 + signal.SIGTERM)]
)
def test_a_stop_does_not_wait_for_a_stalled_loader(
    images, whole, tmp_path, main, monkeypatch, line, status
):
    run = [*RUN, "--data-path", images, "--output_dir", tmp_path]
    monkeypatch.setattr(stopping, "STALL", 0.2)

    def stop_and_stall():
        monkeypatch.setattr(FastDataset, "__getitems__", lambda *_: threading.Event().wait())
        signal.raise_signal(signal.SIGTERM)

    # after three batches there is nothing to lose; after four, gradients of the fourth
    code, _, errors = main(*run, line=line, act=stop_and_stall)
    assert code == status, errors
    monkeypatch.undo()
    if status == 0:
        assert saved_step(tmp_path) == (0, 3)
        succeed(*run, "--resume", "auto")
        assert same_run(tmp_path, whole)
    else:
        assert "SIGTERM" in errors and "epoch 0 step 3" in errors


def test_nobody_need_read_the_output(images, whole, tmp_path):
    words = [*RUN, "--data-path", images, "--output_dir"]
    process = start_python("main.py", *words, tmp_path / "unread")
    assert process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=300) == 0
    assert same_run(tmp_path / "unread", whole)
    command = shlex.join(map(str, [sys.executable, "main.py", *words, tmp_path / "closed"]))
    closed = subprocess.run(f"exec {command} <&- >&- 2>&-", shell=True, cwd=ROOT, env=clean_env())
    assert closed.returncode == 0
    assert same_run(tmp_path / "closed", whole)


def test_a_suspended_process_goes_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from training.watchdog import Watchdog\n"
        "with Watchdog(0, 1, timeout=2.0) as watchdog:\n"
        "    watchdog.loading(True)\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
        "    time.sleep(1.0)\n"
        "    print('alive', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = start_python(script, run=partial(subprocess.Popen, stdin=subprocess.PIPE))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)  # longer than the timeout
    process.send_signal(signal.SIGCONT)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "alive\n"
    _, errors = process.communicate(timeout=60)  # without progress it ends, as before
    assert process.returncode == 1 and "2 s" in errors


def test_the_second_signal_ends_at_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from training.stopping import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    print('ready', flush=True)\n"
        "    while signals.requested is None: pass\n"
        "    print(signals.requested.name, flush=True)\n"
        "    end = time.monotonic() + 1.1\n"
        "    while time.monotonic() < end: pass\n"
        "    print('again', flush=True)\n"
        "    while True: pass\n"
    )
    process = start_rank(script)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(signal.SIGTERM)  # within a second: the same request
    assert process.stdout.readline() == "again\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


def test_a_launcher_and_its_cluster_make_one_request():
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert signals.requested is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_nohup_is_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.requested is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_requests_of_a_single_process_are_granted_at_once():
    assert RequestExchange().exchange([0, 3, 1]) == [0, 3, 1]
    assert RequestExchange().now([2]) == [2]


DISTRIBUTED = [*RUN, "--epochs", 1, "--accum-iter", 1]


# of three, sums depend on how gradients are grouped as they are exchanged
def test_a_signal_to_one_rank_stops_all(images, tmp_path):
    run = [*DISTRIBUTED, "--data-path", images]
    run_ranks(3, [*run, "--output_dir", tmp_path / "whole"])
    run += ["--output_dir", tmp_path / "stopped"]
    output = run_ranks(3, run, rank=1, number=signal.SIGUSR1, line="epoch 0 step 1/")
    epoch, step = saved_step(tmp_path / "stopped")
    assert epoch == 0 and 0 < step < 4
    assert "SIGUSR1" in output
    run_ranks(3, [*run, "--resume", "auto"])
    assert same_run(tmp_path / "stopped", tmp_path / "whole")


def test_other_ranks_continue_with_the_unseen_samples(images, tmp_path):
    run = [*DISTRIBUTED, "--data-path", images, "--output_dir", tmp_path]
    run_ranks(2, run, rank=0, number=signal.SIGTERM, line="epoch 0 step 1/")
    _, step = saved_step(tmp_path)
    output = succeed(*run, "--resume", "auto", "--deterministic")
    # two ranks of batches of 2 drew 4 samples per step, which are two steps of one process
    assert first_step(output) == (0, 2 * step + 1)
    assert "epoch 0 step 12/12" in output


def test_random_numbers_are_restored():
    device = torch.device("cpu")
    utils.seed_everything(3)
    state = utils.random_state(device)

    def draw():
        return random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item()

    first = [draw() for _ in range(3)]
    utils.set_random_state(plain(state), device)
    assert [draw() for _ in range(3)] == first
