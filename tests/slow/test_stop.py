"""Runs that are told to stop, in the middle of an epoch, and go on as if they had not been."""

import random
import re
import signal

import numpy as np
import pytest
import torch
from conftest import (
    read_log,
    run_python,
    same_log,
    same_state,
    start_python,
    together,
    write_images,
)

import utils
from training.checkpoints import plain
from training.stopping import RequestExchange, StopSignals

RUN = [
    *("--model", "visformer_tiny", "--input-size", 32, "--batch-size", 2, "--num_workers", 0),
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
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_python("main.py", *RUN, "--data-path", images, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    assert "train_corrupt" in read_log(folder)[0]
    return folder


def interrupted(words, line, number):
    """Run, send a signal when a line begins so; (status, output, errors)."""
    with start_python(*words) as process:
        output = ""
        for text in process.stdout:
            output += text
            if text.startswith(line):
                process.send_signal(number)
                break
        rest, errors = process.communicate(timeout=200)
    return process.returncode, output + rest, errors


@pytest.mark.parametrize(
    ("number", "line", "status"),
    [
        (signal.SIGTERM, "epoch 1 step 2/", 0),
        (signal.SIGUSR1, "epoch 0 step 12/", 0),  # on the way to the evaluation
        (signal.SIGINT, "epoch 0 step 4/", 130),
    ],
)
def test_what_is_stopped_goes_on_bit_by_bit(images, whole, tmp_path, number, line, status):
    words = ["main.py", *RUN, "--data-path", images, "--output_dir", tmp_path]
    code, output, errors = interrupted(words, line, number)
    assert code == status, errors
    (where,) = re.findall(rf"stopped by {number.name} in epoch (\d) after step (\d+);", output)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (checkpoint["epoch"] + 1, checkpoint["step"]) == tuple(map(int, where))
    assert checkpoint["step"] % 3 == 0 and checkpoint["step"]
    done = run_python("main.py", *words[1:], "--resume", "auto", "--num_workers", 2)
    assert done.returncode == 0, done.stderr
    assert f"going on in epoch {where[0]} after step {where[1]}" in done.stdout
    assert same_log(tmp_path, whole)
    assert same_state(tmp_path, whole)
    (listed,) = (tmp_path / "corrupt.txt").read_text().splitlines()
    assert "3.jpg" in listed


def test_a_run_on_packed_shards_goes_on_bit_by_bit(images, tmp_path):
    shards = tmp_path / "shards"
    words = ["--data-path", images, "--output", shards, "--shard-images", 5]
    packed = run_python("-m", "tools.pack_dataset", *words, "--on-corrupt", "skip")
    assert packed.returncode == 0, packed.stderr
    pattern = shards / "train-{000000..000004}.tar"
    words = ["main.py", *RUN, "--data-set", "WDS", "--data-path", pattern, "--epochs", 1]
    done = run_python(*words, "--output_dir", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    words += ["--output_dir", tmp_path / "parts"]
    code, output, errors = interrupted(words, "epoch 0 step 4/", signal.SIGTERM)
    assert code == 0 and "stopped by SIGTERM in epoch 0" in output, errors
    done = run_python(*words, "--resume", "auto", "--num_workers", 2)
    assert done.returncode == 0, done.stderr
    assert "going on in epoch 0" in done.stdout
    assert same_log(tmp_path / "parts", tmp_path / "whole")
    assert same_state(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("flag", [("--save-every-steps", 3), ("--save-every-minutes", 1e-9)])
def test_checkpoints_within_an_epoch(images, whole, tmp_path, flag):
    words = ["main.py", *RUN, "--data-path", images, "--output_dir", tmp_path]
    # before the evaluation begins, what is on its way to the disk is waited for
    code, _, _ = interrupted([*words, *flag], "* Acc@1", signal.SIGKILL)
    assert code == -signal.SIGKILL
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == -1 and checkpoint["step"] > 0
    done = run_python("main.py", *words[1:], "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert same_log(tmp_path, whole)
    assert same_state(tmp_path, whole)


def test_the_second_signal_ends_at_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from training.control import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    print('ready', flush=True)\n"
        "    while signals.requested is None: pass\n"
        "    print(signals.requested.name, flush=True)\n"
        "    while True: pass\n"
    )
    with start_python(script) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "SIGUSR1\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM


def test_a_launcher_and_its_cluster_make_one_request():
    with StopSignals({"SLURM_JOB_ID": "7"}) as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.requested is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_alone_wishes_are_granted_at_once():
    assert RequestExchange().exchange([0, 3, 1]) == [0, 3, 1]
    assert RequestExchange().now([2]) == [2]


DISTRIBUTED = [*RUN, "--epochs", 1, "--accum-iter", 1]


# of three, sums depend on how gradients are grouped as they are exchanged
def test_a_signal_to_one_rank_stops_all(images, tmp_path):
    count = 3
    words = [*DISTRIBUTED, "--data-path", images]
    codes, output, errors = together(count, [*words, "--output_dir", tmp_path / "whole"])
    assert codes == [0] * count, errors
    stopped = [*words, "--output_dir", tmp_path / "stopped"]
    codes, output, errors = together(count, stopped, 1, signal.SIGUSR1, "epoch 0 step 1/")
    assert codes == [0] * count, errors
    assert "stopped by SIGUSR1 in epoch 0 after step" in output
    assert 0 < torch.load(tmp_path / "stopped/checkpoint.pth", weights_only=True)["step"] < 6
    codes, output, errors = together(count, [*stopped, "--resume", "auto"])
    assert codes == [0] * count, errors
    assert same_log(tmp_path / "stopped", tmp_path / "whole")
    assert same_state(tmp_path / "stopped", tmp_path / "whole")


def test_other_ranks_go_on_with_what_was_not_seen(images, tmp_path):
    words = [*DISTRIBUTED, "--data-path", images, "--output_dir", tmp_path]
    codes, output, errors = together(2, words, 0, signal.SIGTERM, "epoch 0 step 1/")
    assert codes == [0, 0], errors
    done = run_python("main.py", *words, "--resume", "auto", "--deterministic")
    assert done.returncode == 0, done.stderr
    assert "epoch 0 was begun by 2 process(es) with batches of 2" in done.stdout
    # two ranks of batches of 2 dealt 4 samples at a step, which are two steps of one process
    (steps,) = re.findall(r"stopped by SIGTERM in epoch 0 after step (\d+);", output)
    assert f"going on in epoch 0 after step {2 * int(steps)}\n" in done.stdout
    assert "epoch 0 step 12/12" in done.stdout


def test_random_numbers_go_on():
    device = torch.device("cpu")
    utils.seed_everything(3)
    state = utils.random_state(device)

    def draw():
        return random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item()

    first = [draw() for _ in range(3)]
    utils.set_random_state(plain(state), device)
    assert [draw() for _ in range(3)] == first
