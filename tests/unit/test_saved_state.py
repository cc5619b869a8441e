"""Values of any type in a checkpoint to resume from, and in messages."""

import json

import pytest
import torch
from loading import refused

from models import CheckpointError
from models.data_config import data_config_of
from models.load import from_checkpoint
from pipeline.sources.shard_index import parse_index
from tools.cli import shown
from training.flags import get_args_parser
from training.launch import DistInfo, rendezvous
from training.parser import Parser
from training.recipes import recipe_argv
from training.saved_state import check_state, restoring
from utils import UserError

SAMPLER = {"epoch": 0, "dealt": 4, "num_images": 16, "num_replicas": 1, "batch_size": 4}
SAMPLER |= {"num_repeats": 1, "seed": 0, "shards": None, "window": 16}
RANK = {"meter": {"steps": 3, "total": 1.5, "corrupt": []}, "random": {}}
GOOD = {
    "epoch": -1,
    "step": 3,
    "best_acc1": torch.tensor(75.0),
    "best": [(75.0, 3)],
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{}]},
    "scaler": None,
    "sampler": SAMPLER,
    "ranks": [RANK],
}


def test_what_runs_save_is_right():
    check_state(GOOD, "x.pth")
    check_state({}, "x.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("epoch", value) for value in ("0", -2, None, 0.5, 1 << 70, torch.zeros(2))],
        ("step", [3]),
        ("best_acc1", torch.zeros(2)),
        ("best", [1]),
        ("optimizer", {"state": {0: {"exp_avg": "x"}}, "param_groups": []}),
        ("scaler", 3),
        *[("sampler", SAMPLER | {"dealt": value}) for value in (-5, 99, "a")],
        ("sampler", SAMPLER | {"num_replicas": 0}),
        *[("ranks", value) for value in (3, [], [1], [{}], [RANK | {"random": [1]}])],
    ],
)
def test_other_values_are_named(key, value):
    refused(lambda: check_state(GOOD | {key: value}, "x.pth"), "x.pth", key, kind=CheckpointError)


def test_errors_of_restoring_are_named():
    with pytest.raises(CheckpointError, match=r"x.pth.*ranks.*meter"), restoring("ranks", "x.pth"):
        raise KeyError("meter")


@pytest.mark.parametrize("key", ["model_name", "classes", "model_kwargs"])
def test_tensors_are_no_metadata(key):
    content = {"model_name": "vit_b_32_224", "model": {"head.weight": torch.zeros(2, 2)}}
    content[key] = torch.zeros(2)
    refused(lambda: from_checkpoint(content, "x.pth"), "x.pth", key, kind=CheckpointError)


@pytest.mark.parametrize(("key", "value"), [("crop_pct", 10**400), ("mean", [10**400] * 3)])
def test_numbers_beyond_all_floats(key, value):
    content = {"data_config": {key: value}}
    refused(lambda: data_config_of(content, None, "x.pth"), "x.pth", key, kind=CheckpointError)


def test_text_of_files_cannot_command_a_terminal(capsys):
    assert shown("a\u202eb\x1b[2J\nc") == "a b [2J c"
    with pytest.raises(SystemExit):
        Parser("x").parse_args(["--none\x1b[2J\nerror"])
    assert all(c.isprintable() for line in capsys.readouterr().err.split("\n") for c in line)


def test_slurm_s_job_is_a_number():
    env = {"SLURM_JOB_ID": "x", "SLURM_STEP_NODELIST": "a"}
    refused(lambda: rendezvous(DistInfo(0, 2, 0, "srun"), env), "SLURM_JOB_ID", kind=UserError)


@pytest.mark.parametrize("text", ["lr: " + "[" * 10**5, "epochs: 1" + "0" * 5000])
def test_yaml_beyond_python_s_limits(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    refused(lambda: recipe_argv(get_args_parser(), str(path)), path, kind=UserError)


def test_no_shard_has_a_nul():
    shard = {"name": "a\0.tar", "size": 1, "sha256": None, "images": 1}
    members = {"name": "a.npz", "size": 1, "sha256": None}
    text = {"format": "packed shards 1", "shards": [shard], "members": members, "classes": []}
    refused(lambda: parse_index(json.dumps(text), "x.json"), "x.json")
