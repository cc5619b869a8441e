"""Optimizers of ``--opt``: their state, and what they do not support."""

import re

import pytest
import timm
import torch
from conftest import ROOT, error_of
from timm.optim import list_optimizers
from torch import nn

import engine
from main import main
from models import CheckpointError
from training import optimizers
from training.checkpoints import plain
from training.flags import parse_args
from utils import UserError

CPU = torch.device("cpu")
SMALL = ["--model", "test_vit", "--data-set", "DIGITS", "--epochs", "1", "--device", "cpu"]


NEWER = ("fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay")


def flags(*words):
    return parse_args([str(word) for word in words])[0]


def build(name):
    """A model whose larger weights Adafactor factors, and its optimizer."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 2), nn.Flatten(), nn.Linear(16, 17), nn.GELU(), nn.Linear(17, 3))
    model = nn.Sequential(*layers)
    return model, optimizers.build(flags("--opt", name), model, 0.01)


def train(model, optimizer, steps):
    generators = [torch.Generator().manual_seed(step) for step in steps]
    data = [
        (torch.randn(4, 3, 2, 2, generator=g), torch.randint(3, (4,), generator=g), [])
        for g in generators
    ]
    options = {"epoch": 0, "precision": engine.Precision(CPU)}
    engine.train_one_epoch(model, nn.CrossEntropyLoss(), data, optimizer, CPU, **options)


def test_state_without_a_generator_loads():
    """Of checkpoints before it was saved."""
    model, optimizer = build("adahessian")
    train(model, optimizer, range(2))
    _, other = build("adahessian")
    optimizers.restore(other, optimizer.state_dict(), "old.pth")
    assert {s["hessian step"] for s in other.state.values()} == {2}


def test_state_of_other_shapes_is_refused_within_lookahead():
    model, optimizer = build("lookahead_adamw")
    train(model, optimizer, range(1))
    state = plain(optimizer.state_dict())
    state["state"][0]["exp_avg"] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r"exp_avg .*\(5,\)"):
        optimizers.restore(build("lookahead_adamw")[1], state, "x.pth")


@pytest.mark.parametrize(
    ("saved", "name", "fits"),
    [
        ({"opt": "adamw"}, "AdamW", True),
        ({"opt": "sgd"}, "momentum", True),
        ({}, "adamw", True),
        (None, "adamw", True),
        ({"opt": "momentum"}, "adamw", False),
        ({"opt": "adamw"}, "lookahead_adamw", False),
    ],
)
def test_optimizer_of_a_checkpoint_is_named(saved, name, fits):
    if fits:
        optimizers.compare(name, saved, "x.pth")
    else:
        with pytest.raises(CheckpointError, match=rf"x\.pth.* {saved['opt']}\b.* {name}\b"):
            optimizers.compare(name, saved, "x.pth")


@pytest.mark.parametrize(
    ("words", "processes", "named"),
    [
        (["--compile"], 1, "--compile"),
        (["--fsdp"], 2, "--fsdp"),
        (["--grad-checkpointing"], 1, "--grad-checkpointing"),
        (["--amp", "--amp-dtype", "float16"], 1, "float16"),
        ([], 2, "2 processes"),
    ],
)
@pytest.mark.parametrize("name", ["adahessian", "lookahead_adahessian"])
def test_second_order_needs_gradients_of_gradients(words, processes, named, name):
    _, optimizer = build(name)
    optimizers.check(optimizer, flags("--opt", name, "--amp", "--amp-dtype", "bfloat16"), 1)
    with pytest.raises(UserError, match=rf"--opt {name}\b.*{named}"):
        optimizers.check(optimizer, flags("--opt", name, *words), processes)


@pytest.mark.parametrize("name", ["muon", "adafactor", "lookahead_kron", "cadamw", "novograd"])
def test_shards_need_elementwise_steps(name):
    optimizers.check(build("adamw")[1], flags("--opt", "adamw", "--fsdp"), 2)
    optimizers.check(build(name)[1], flags("--opt", name), 2)
    with pytest.raises(UserError, match=rf"--opt {name}\b.*--fsdp"):
        optimizers.check(build(name)[1], flags("--opt", name, "--fsdp"), 2)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--opt", "adahessian", "--grad-checkpointing"], "adahessian"),
        (["--opt", "bnbadamw"], "bnbadamw"),
        (["--opt", "lookahead_bnbadamw"], "lookahead_bnbadamw"),
        (["--opt", "adamw", "--opt-betas", "0.9", "0.99", "0.999"], "0.9 0.99 0.999"),
        (["--opt", "adan", "--opt-betas", "0.9", "0.99"], "0.9 0.99"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(words, named):
    assert named in error_of(main, *SMALL, *words)


def test_second_order_trains_a_transformer():
    """Whose fused attention has no second derivative."""
    args = flags("--opt", "adahessian")
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    optimizer = optimizers.build(args, model, 0.01)
    before = model.head.weight.detach().clone()
    data = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), [])]
    options = {"epoch": 0, "precision": engine.Precision(CPU)}
    engine.train_one_epoch(model, nn.CrossEntropyLoss(), data, optimizer, CPU, **options)
    assert not torch.equal(before, model.head.weight)


def test_weight_decay_spares_biases():
    args = flags("--opt-betas", 0.8, 0.9, "--opt-eps", 1e-6, "--weight-decay", 0.3)
    optimizer = optimizers.build(args, nn.Linear(12, 3), 1e-3)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.3}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["eps"] == 1e-6
    sgd = optimizers.build(flags("--opt", "momentum", "--momentum", 0.7), nn.Linear(12, 3), 1e-3)
    assert sgd.param_groups[0]["momentum"] == 0.7


def test_the_documented_count_of_optimizers_is_true():
    page = (ROOT / "docs" / "RECIPES.md").read_text()
    trained, whole, version = re.search(
        r"(\d+) of (\d+) optimizers of timm ([\d.]*\d)", page
    ).groups()
    if timm.__version__ != version:
        pytest.skip(f"timm {timm.__version__} is not {version}")
    refused = 0
    for name in list_optimizers():
        try:
            build(name)
        except UserError as error:
            refused += 1
            other = str(error).split()[-1]
            assert f"--opt {name} " in str(error)
            assert other in list_optimizers() and not other.startswith(("bnb", "fused"))
    assert (int(trained), int(whole)) == (len(list_optimizers()) - refused, len(list_optimizers()))
