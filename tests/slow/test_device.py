"""Training and inference on CUDA: a GPU, or a device that is not there and computes nothing."""

import pytest
from conftest import read_log

NETS = ("visformer_small", "swin_visformer_small_v2", "convit_small", "fastvit_sa12")
NETS += ("vit_base_patch16_224",)


@pytest.mark.parametrize("sm", [80, 89, 90, 100])
def test_no_attention_falls_back_to_plain_products(count_on_device, sm):
    found = count_on_device("attention", *NETS, options=["--sm", sm])
    assert {line["model"] for line in found} == set(NETS)
    for line in found:
        assert "math" not in line["chosen"] and "none" not in line["chosen"], line
        assert sum(line["chosen"].values()) == line["layers"] > 0, line


# operations of a training step in float16 with mixup and a moving average
OPERATIONS = {
    "visformer_small": 550,
    "swin_visformer_small_v2": 1100,
    "convit_small": 1100,
    "fastvit_sa12": 1000,
}


def test_a_step_asks_for_few_operations_and_waits_for_none(count_on_device):
    found = count_on_device("step", *OPERATIONS, "--batch-size", 8, "--clip-grad", 1)
    assert [line["model"] for line in found] == list(OPERATIONS)
    for line in found:
        assert 100 < line["operations"] <= OPERATIONS[line["model"]], line
        # numbers of a step alone: none of it waits, or copies from the host
        assert not {key for key in line if "sync" in key or "h2d" in key}, line


def test_half_precision_stays_half(count_on_device):
    (found,) = count_on_device("traffic", "visformer_small", "--batch-size", 64)
    assert found["gigabytes"] < 17
    # each of 65 weights, its gradient, the images and the loss
    assert found["casts"] <= 132


def test_a_run_trains_evaluates_and_resumes(on_device, tmp_path):
    flags = ["main.py", "--model", "visformer_tiny", "--input-size", 32, "--epochs", 2, "--amp"]
    flags += ["--warmup-epochs", 0, "--batch-size", 32, "--sampling-ratio", 0.2, "--lr", 0]
    flags += ["--device", "cuda", "--num_workers", 0, "--output_dir", tmp_path]
    _, _, counted = on_device(*flags, "--stop-epoch", 1, options=["--bool", 1])
    output, _, _ = on_device(*flags, "--resume", "auto", options=["--bool", 1])
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]
    assert "cuda:0" in output
    for counts in counted:  # empty on a GPU
        assert counts["launch"] > 1000 and counts["sync_stream"] > 0
