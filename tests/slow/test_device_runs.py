"""What runs on CUDA resume, set and exchange: a GPU, or devices that are not there."""

import json

import pytest

from training.watchdog import ANSWER, TICK

NETS = ("visformer_tiny", "swin_visformer_tiny_v2", "convit_tiny", "fastvit_t8", "vit_b_32_224")
FUSED = {"adamw", "adam", "sgd"}


@pytest.fixture(scope="module")
def checks(count_on_device):
    """The lines of ``tests.nullcuda.devices`` by their check."""
    found = {}
    for line in count_on_device("devices", options=["--devices", 2]):
        found.setdefault(line.pop("check"), []).append(line)
    return found


def test_optimizers_of_any_origin_resume_on_any_device(checks):
    assert len(checks["resume"]) == 60
    for line in checks["resume"]:
        assert line["fused"] == (line["opt"] in FUSED), line
        if line["opt"] in ("adamw", "adam"):  # a fused optimizer counts on its device
            assert line["counters"] == [line["target"]], line


def test_one_policy_for_products_of_float32(checks):
    assert [line["by"] for line in checks["tf32"]] == [
        [by, tf32] for by in ("run", "benchmark") for tf32 in (True, False)
    ]
    for line in checks["tf32"]:
        tf32 = line["by"][1]
        assert (line["matrix"] == "highest", line["convolution"]) == (not tf32, tf32)
        assert ("TF32" in line["text"]) == tf32


def test_times_are_those_of_the_chosen_device(checks):
    assert checks["clock"] == [{"recorded": [1, 1]}]
    assert checks["select"] == [{"chosen": "cuda:1", "current": 1}]


def test_ranks_leave_the_watchdog_time_and_copy_no_gradient(on_device):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone"]
    options = ["--devices", 2]
    output, errors, _ = on_device(*launcher, "-m", "tests.nullcuda.ranks", options=options)
    lines = sorted((json.loads(x) for x in output.splitlines()), key=lambda x: x["rank"])
    assert [line["current"] for line in lines] == [0, 1]
    for line in lines:
        # after waiting for data, for another rank, and for answers of the store
        least = 2 * line["timeout"] + 2 * ANSWER + 4 * TICK
        assert min(line["nccl"], line["heartbeat"]) > least
    assert "strides" not in errors


def test_deterministic_training_at_any_size(count_on_device):
    found = count_on_device("deterministic", *NETS, "--batch-size", 2)
    assert [line["model"] for line in found] == [name for name in NETS for _ in range(2)]
