"""The benchmark of the input pipeline prints and writes consistent figures."""

import csv
import re
import subprocess
import sys

import pytest
from conftest import write_images

from tools.benchmark_data.__main__ import main as benchmark
from tools.benchmark_data.pipelines import memory_of

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ["--rounds", "1", "--batch-size", "4"]
LAST = r"fast/reference images/s per core: raw [\d.]+ packed [\d.]+ host-raw [\d.]+ host-packed "


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path, train=6, size=90) / "train"


def test_stages_and_rates(images, tmp_path, capsys):
    words = ["--data-path", str(images), "--images", "9", "--input-size", "48"]
    words += ["--short-side", "64", "--num_workers", "1", "--csv", str(tmp_path / "stages.csv")]
    assert benchmark([*words, "--plot", str(tmp_path / "stages.png"), *QUICK]) == 0
    output = capsys.readouterr().out
    assert re.fullmatch(LAST + r"[\d.]+", output.splitlines()[-1])
    assert output.startswith("9 images")
    for side in ("reference", "fast", "host"):
        for name in ("raw", "packed"):
            rows = re.findall(rf"^\| {side} {name} \| (.*?) \| (\d+) \|", output, re.M)
            assert [where for where, _ in rows] == ["one core", "1 workers"]
            assert all(int(rate) > 0 for _, rate in rows)
            assert float(re.search(rf"^\| {side} {name} \| (\d+) \|$", output, re.M)[1]) > 10  # MiB
    with open(tmp_path / "stages.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["side"] for row in rows] == [
        f"{side} {name}" for name in ("raw", "packed") for side in ("reference", "fast")
    ]
    for row in rows:
        times = {key: float(value) for key, value in row.items() if key != "side"}
        assert len(times) == 11 and min(times.values()) > 0
        parts = sum(times.values()) - times["total"] - times["mixup"]
        assert parts == pytest.approx(times["total"], rel=1e-6)
    assert (tmp_path / "stages.png").read_bytes().startswith(b"\x89PNG")


def test_training_on_what_the_loader_brings(images, capsys):
    words = ["--data-path", str(images), "--model", "visformer_tiny", "--input-size", "32"]
    words += ["--device", "cpu", "--steps", "1", "--num_workers", "1"]
    assert benchmark([*words, *QUICK]) == 0
    output = capsys.readouterr().out
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", output, re.M)
    assert [row[0] for row in rows] == ["files", "memory"]
    for _, fed, at_hand, ratio in rows:
        assert abs(float(ratio) - float(fed) / float(at_hand)) < 0.2


def test_what_cannot_be_measured_is_named(images, tmp_path, capsys):
    for words, message in (
        (["--data-path", str(tmp_path / "none")], "none"),
        (["--data-path", str(images), "--input-size", "32"], "--input-size 32"),
        (["--data-path", str(tmp_path / "none"), "--csv", "none/x.csv"], "--csv none/x.csv"),
        (["--data-path", str(tmp_path / "none"), "--plot", "none/x.png"], "--plot none/x.png"),
    ):
        assert benchmark([*words, *QUICK]) == 1
        assert message in capsys.readouterr().err


def test_memory_of_a_process():
    words = [sys.executable, "-c", "x = bytearray(b'x') * (64 << 20); print(flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert 64 < memory_of(process.pid) < 90
        process.communicate(b"\n")
    assert memory_of(process.pid) != memory_of(process.pid)  # not a number
