"""torchrun over several machines: two hosts, each a network namespace of this one, and a cable."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, clean_env, processes_and_launcher, run_ranks, same_run, until

RUN = ["--model", "test_resnet", "--input-size", 32, "--batch-size", 2, "--num_workers", 0]
RUN += ["--epochs", 1, "--log-interval", 1, "--device", "cpu", "--no-repeated-aug"]
PORT = 29500  # of a host that nobody else is on


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def hosts():
    """Names, addresses and interfaces of two hosts that reach each other and nobody else."""
    names = [f"test-{os.getpid()}-{letter}" for letter in "ab"]
    cables = [f"veth{os.getpid() % 10**7}{letter}" for letter in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ends = [["name", c, "netns", n] for c, n in zip(cables, names, strict=True)]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for name, cable, address in zip(names, cables, addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield list(zip(names, addresses, cables, strict=True))
    finally:
        if shutil.which("ip"):
            for name in names:
                kill_host(name)
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def kill_host(name):
    """End all that runs on a host, at once."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def start(host, is_first, count, words):
    """torchrun with ``count`` ranks on a host, as on the other one."""
    name, address, cable = host
    options = ["--nnodes", 2, "--nproc_per_node", count, "--rdzv_backend", "c10d"]
    options += ["--rdzv_id", "test"]
    options += ["--rdzv_endpoint", f"10.77.0.1:{PORT}", "--local-addr", address]
    options += ["--rdzv-conf", f"is_host={int(is_first)}"]  # the hosts have one name
    words = ["-m", "torch.distributed.run", *options, "main.py", *words]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, *map(str, words)],
        cwd=ROOT,
        env=clean_env(GLOO_SOCKET_IFNAME=cable, TP_SOCKET_IFNAME=cable),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_hosts_train_bitwise_as_one_does(hosts, images, tmp_path):
    words = [*RUN, "--data-path", images, "--output_dir"]
    pair = [start(host, i == 0, 2, [*words, tmp_path / "two"]) for i, host in enumerate(hosts)]
    outputs = [process.communicate(timeout=200) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    printed = [output for output, _ in outputs]
    (first,) = filter(None, printed)  # one process prints
    assert processes_and_launcher(first) == ("4", "torchrun")
    run_ranks(4, [*words, tmp_path / "one"])
    assert same_run(tmp_path / "two", tmp_path / "one")


def test_a_host_that_is_lost_is_named(hosts, images):
    words = [*RUN, "--data-path", images, "--epochs", 100, "--dist-timeout", 10]
    pair = [start(host, i == 0, 1, words) for i, host in enumerate(hosts)]
    first, second = pair  # numbered by their addresses
    until(first, "epoch 0 step 2/")
    kill_host(hosts[1][0])
    _, errors = first.communicate(timeout=100)
    second.communicate(timeout=60)
    assert first.returncode == 1
    assert re.search(r"^error on rank 0: .*epoch \d+ step \d+.*\brank 1\b", errors, re.M)
