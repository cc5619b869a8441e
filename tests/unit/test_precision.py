"""The dtype of mixed precision by device, of a resumed run, and of every program."""

import re
from argparse import Namespace

import pytest
import torch
import yaml
from conftest import succeed

from object_detection.rcnn_flags import parse_args as rcnn_flags
from tools import cli
from tools.predict import get_parser as predict_parser
from tools.validate.__main__ import get_parser as validate_parser
from training import launch
from training.flags import parse_args
from training.network import choose_precision, with_amp_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RUN = ["--model", "test_resnet", "--input-size", 32, "--batch-size", 16, "--num_workers", 0]
RUN += ["--device", "cpu", "--warmup-epochs", 0, "--amp"]


def run_of(**flags):
    return {"optimizer": {}, "args": flags}


@pytest.mark.parametrize(
    ("given", "device", "checkpoint", "dtype"),
    [
        (None, CPU, None, "bfloat16"),
        (None, CUDA, None, "float16"),
        ("float16", CPU, run_of(amp_dtype="bfloat16"), "float16"),
        (None, CPU, run_of(amp_dtype="float16"), "float16"),
        (None, CUDA, run_of(amp_dtype="bfloat16"), "bfloat16"),
        (None, CPU, run_of(amp_dtype="float8"), "bfloat16"),
        (None, CPU, run_of(amp_dtype=[16]), "bfloat16"),
        (None, CPU, {"optimizer": {}, "args": None}, "bfloat16"),
        (None, CPU, {"args": {"amp_dtype": "float16"}}, "bfloat16"),  # weights start a new run
    ],
)
def test_dtype_of_mixed_precision(given, device, checkpoint, dtype, capsys):
    args = Namespace(amp=True, amp_dtype=given)
    assert with_amp_dtype(args, device, checkpoint).amp_dtype == dtype
    assert args.amp_dtype == given
    printed = capsys.readouterr().out
    assert ("bfloat16" in printed) == (given is None and dtype == "bfloat16" and device == CPU)


def test_every_program_leaves_the_dtype_to_the_device():
    model = torch.nn.Linear(1, 1)
    for args in (
        parse_args(["--amp"])[0],
        rcnn_flags(["--amp", "--data-path", "any"]),
        cli.parse(validate_parser, ["any.pth", "--amp"]),
        cli.parse(predict_parser, ["any.png", "--amp"]),
    ):
        assert choose_precision(args, model, CPU).dtype is torch.bfloat16
        assert with_amp_dtype(args, CUDA).amp_dtype == "float16"


def test_a_run_keeps_its_dtype(images, tmp_path):
    data = ["--data-path", images]
    run = [*RUN, *data, "--output_dir", tmp_path, "--epochs", 2]
    output = succeed(*run, "--amp-dtype", "float16", "--stop-epoch", 1)
    assert re.search(r"parameters, float16$", output, re.M)
    output = succeed(*run, "--resume", "auto")
    assert re.search(r"parameters, float16$", output, re.M)
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["amp_dtype"] == "float16"
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert checkpoint["args"]["amp_dtype"] == "float16"
    output = succeed(*RUN, *data, "--eval", "--resume", tmp_path / "checkpoint.pth")
    assert output.count("--amp-dtype") == 1  # the device's own default is said once
    assert re.search(r"parameters, bfloat16$", output, re.M)


def test_an_operator_without_a_deterministic_kernel_is_named(capsys):
    torch.use_deterministic_algorithms(True)
    try:
        place = torch.zeros(1, dtype=torch.int64)
        status = launch.run_program(lambda: torch.zeros(2).put_(place, torch.ones(1)))
    finally:
        torch.use_deterministic_algorithms(False)
    errors = capsys.readouterr().err
    assert (status, errors.count("\n")) == (1, 1)
    assert "put_" in errors and "--deterministic" in errors
