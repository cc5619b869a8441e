"""Flags of the training loop: what is evaluated, mixed, trained and compared, and at what size."""

import re
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import read_log, same_run
from loading import flags, refused
from small_models import small
from torch import nn

import engine
import models
from engine import Precision
from training import flag_checks, losses, optimizers, schedules
from training.cosub import CosubLoss, TwoViews
from training.flags import get_args_parser, parse_args
from training.output import Output
from training.recipes import ON_COMMAND_LINE
from utils import UserError

CPU = torch.device("cpu")
RUN = ["--model", "test_resnet", "--batch-size", 4, "--num_workers", 0, "--device", "cpu"]
RUN += ["--warmup-epochs", 0, "--lr", 0.05, "--model-ema-decay", 0.9, "--log-interval", 1]


def load(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


def succeed(main, *words, **options):
    status, output, errors = main(*words, **options)
    assert status == 0, errors
    return output


# --val-interval


def test_evaluation_every_third_epoch_and_after_the_last(images, tmp_path, main):
    run = [*RUN, "--input-size", 32, "--data-path", images, "--epochs", 5, "--keep-checkpoints", 2]
    every, third = tmp_path / "every", tmp_path / "third"
    succeed(main, *run, "--output_dir", every)
    run += ["--val-interval", 3, "--output_dir", third]
    succeed(main, *run, "--stop-epoch", 2)
    saved = load(third)
    assert (saved["epoch"], saved["best_acc1"], saved["best"]) == (1, 0.0, [])
    assert not (third / "best.pth").exists()
    succeed(main, *run, "--resume", "auto")
    whole, log = read_log(every), read_log(third)
    measured = {key for key in whole[0] if key.startswith(("test_", "ema_"))}
    assert [bool(measured & {*line}) for line in log] == [False, False, True, False, True]
    for line, full in zip(log, whole, strict=True):
        changes = {"train_images_per_second", *(measured if line["epoch"] not in (2, 4) else ())}
        assert {k: line[k] for k in line if k not in changes} == {
            k: full[k] for k in full if k not in changes
        }
    states = [load(folder) for folder in (every, third)]
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key])
    accuracies = {line["epoch"]: line["test_acc1"] for line in log if "test_acc1" in line}
    assert states[1]["best_acc1"] == max(accuracies.values())
    assert sorted(states[1]["best"]) == sorted((value, key) for key, value in accuracies.items())
    assert load(third, "best.pth")["epoch"] == max(accuracies, key=accuracies.get)
    assert {path.name for path in third.glob("*-*.pth")} == {
        *("checkpoint-0003.pth", "checkpoint-0004.pth", "best-0002.pth", "best-0004.pth")
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("interval", "patience", "falls"), [(1, 4, 6), (2, 4, 8), (3, 4, 9)])
def test_patience_is_in_epochs_however_many_of_them_are_evaluated(interval, patience, falls):
    """The rate falls at the first evaluation after more bad epochs than the patience."""
    words = ("--sched", "plateau", "--patience-epochs", patience, "--cooldown-epochs", 0)
    args = flags(*words, "--warmup-epochs", 0, "--val-interval", interval, "--epochs", 30)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, _ = schedules.build(args, optimizer, 1, schedules.Rates(1.0, 1e-5, 1e-6))
    rates = []
    for epoch in range(12):
        metric = 50.0 if engine.is_evaluated(args, epoch) else None
        scheduler.step(epoch + 1, metric)
        rates.append(optimizer.param_groups[0]["lr"])
    assert next(epoch + 1 for epoch, rate in enumerate(rates) if rate < 1) == falls


# --mixup-off-epoch


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("wrap", [lambda mixup: mixup, TwoViews])
def test_images_are_mixed_before_the_epoch_only(mode, wrap):
    args = flags("--mixup-off-epoch", 3, "--mixup-mode", mode, "--smoothing", 0.2)
    mixup = wrap(losses.build_mixup(args, 5))
    images, targets = torch.rand(8, 3, 8, 8), torch.arange(8) % 5
    smoothed = F.one_hot(targets, 5) * 0.8 + 0.2 / 5
    mixed = []
    for epoch in range(5):
        losses.switch_mixup(mixup, args, epoch)
        np.random.seed(epoch)
        found, labels = mixup(images.clone(), targets)
        mixed.append(not torch.equal(found[:8], images))
        assert mixed[-1] != torch.allclose(labels, smoothed)
    assert mixed == [True, True, True, False, False]
    losses.switch_mixup(None, args, 0)
    losses.switch_mixup(mixup, flags(), 10**6)
    assert not torch.equal(mixup(images.clone(), targets)[0][:8], images)


# --progressive-sizes


@pytest.mark.parametrize(
    ("sizes", "epochs", "expected"),
    [
        ((160, 192, 224), 6, [160, 160, 192, 192, 224, 224, 224]),
        ((160, 192, 224), 4, [160, 160, 192, 224]),
        ((32,), 2, [32, 32]),
        ((1, 2, 3), 3, [1, 2, 3]),
    ],
)
def test_sizes_have_equal_spans(sizes, epochs, expected):
    args = flags("--progressive-sizes", *sizes, "--epochs", epochs)
    assert args.input_size == sizes[-1]
    assert [engine.train_size(args, epoch) for epoch in range(len(expected))] == expected


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--augment-on", "device"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_training_sizes_grow_and_resume_within_an_epoch(images, tmp_path, main, monkeypatch, words):
    run = [*RUN, "--data-path", images, "--epochs", 4, *words, "--output_dir"]
    run_sizes = ["--progressive-sizes", 24, 40, "--val-interval", 2]
    sides = []
    train = engine.train_one_epoch

    def record(model, criterion, loader, *rest, **options):
        def recorded():
            for batch in loader:
                sides.append((rest[2], model.training, batch[0].shape[-1]))
                yield batch

        class Recorded:
            def __len__(self):
                return len(loader)

            def __iter__(self):
                return recorded()

        return train(model, criterion, Recorded(), *rest, **options)

    monkeypatch.setattr(engine, "train_one_epoch", record)
    succeed(main, *run, tmp_path / "whole", *run_sizes)
    assert {(epoch, side) for epoch, _, side in sides} == {(0, 24), (1, 24), (2, 40), (3, 40)}
    assert len(sides) == 4 * 6
    checkpoint = load(tmp_path / "whole")
    assert (checkpoint["input_size"], checkpoint["data_config"]["input_size"][-1]) == (40, 40)
    del sides[:]
    parts = [*run, tmp_path / "parts", *run_sizes]
    for epoch, workers in ((1, 0), (2, 1)):
        options = {"line": f"epoch {epoch} step 2/6", "act": signal.SIGTERM}
        succeed(main, *parts, "--resume", "auto", "--num_workers", workers, **options)
        saved = load(tmp_path / "parts")
        assert saved["epoch"] == epoch - 1 and 2 <= saved["step"] < 6
    succeed(main, *parts, "--resume", "auto")
    assert len(sides) == 4 * 6
    assert same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--progressive-sizes 32 24", "--progressive-sizes 32 24"),
        ("--progressive-sizes 24 24", "--progressive-sizes 24 24"),
        ("--progressive-sizes 24 32 --input-size 64", "--input-size 64"),
        ("--progressive-sizes 24 32 40 --epochs 2", "--epochs 2"),
        ("--progressive-sizes 0 32", "--progressive-sizes 0"),
        ("--progressive-sizes 32 64 --scale 0.5 1", "32 pixels"),
        ("--progressive-sizes 150 160 --model test_vit", "--progressive-sizes 150"),
        ("--progressive-sizes 33 64 --model visformer_tiny", "--progressive-sizes 33"),
    ],
)
def test_sizes_that_cannot_be_trained_on(images, main, words, named):
    status, output, errors = main(*RUN, "--data-path", images, *words.split())
    assert (status, errors.count("\n")) == (1, 1) and named in errors
    assert "epoch 0" not in output


@pytest.mark.parametrize("name", ["visformer_tiny", "convit_tiny", "vit_b_32_224"])
def test_models_take_smaller_images(name):
    """Position embeddings of another size are interpolated, and learn."""
    model = small(name).train()
    for size in (32, 64):
        model.zero_grad()
        model(torch.rand(2, 3, size, size)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


# --attn-only


@pytest.mark.parametrize("name", ["visformer_tiny", "convit_tiny", "vit_b_32_224"])
def test_only_attention_learns(name):
    model = small(name)
    models.freeze_all_but_attention(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = optimizers.build(flags("--weight-decay", 0.5), model, lr=0.1)
    batch = torch.randn(2, 3, 64, 64), torch.tensor([0, 1]), []
    loss = nn.CrossEntropyLoss()
    engine.train_one_epoch(model, loss, [batch], optimizer, CPU, 0, Precision(CPU))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    deit = re.compile(r".*\.attn\..*|head\..*|pos_embed\d*")  # main.py of DeiT
    assert all(deit.fullmatch(key) for key in changed)
    learning = {key for key, p in model.named_parameters() if p.requires_grad}
    assert learning == {key for key, _ in model.named_parameters() if deit.fullmatch(key)}
    assert len(changed) > 0.8 * len(learning)


def test_attention_only_needs_attention_and_weights(images, tmp_path, main):
    model = small("fastvit_t8")
    refused(lambda: models.freeze_all_but_attention(model), "FastViT", kind=models.ModelError)
    refused(lambda: flags("--attn-only"), "--attn-only", "--finetune", kind=UserError)
    for other in ("--linear-probe", "--freeze-stages=1"):
        words = ("--finetune", "x.pth", "--attn-only", other)
        refused(lambda w=words: flags(*w), "--attn-only", other.split("=")[0], kind=UserError)
    run = [*RUN, "--model", "visformer_tiny", "--input-size", 32, "--data-path", images]
    run += ["--epochs", 1, "--no-model-ema", "--output_dir"]
    succeed(main, *run, tmp_path / "a")
    weights = tmp_path / "a" / "checkpoint.pth"
    succeed(main, *run, tmp_path / "b", "--finetune", weights, "--attn-only")
    old, new = (load(tmp_path / name)["model"] for name in "ab")
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed and all(re.search(r"\.attn\.|^head\.|^pos_embed", key) for key in changed)


# --cosub


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("bce", [True, False])
def test_cosub_is_deit_s(mixes, bce):
    words = ["--cosub", "--smoothing", 0.1, *(["--bce-loss"] if bce else [])]
    args = flags(*words, *([] if mixes else ["--mixup", 0, "--cutmix", 0]))
    mixup = losses.build_mixup(args, 6)
    criterion = CosubLoss(losses.build_criterion(args, mixup, 6))
    np.random.seed(1)
    images, targets = TwoViews(mixup)(torch.rand(4, 3, 8, 8), torch.tensor([0, 3, 5, 3]))
    assert images.shape == (8, 3, 8, 8) and torch.equal(images[:4], images[4:])
    logits = torch.randn(8, 6, requires_grad=True)
    found = criterion(logits, targets)
    (gradient,) = torch.autograd.grad(found, logits)

    labels = targets if mixes else F.one_hot(targets, 6) * 0.9 + 0.1 / 6
    if bce and mixes:
        labels = (labels > 0.1 / 6 * 1.001).float()
    bce_loss = nn.BCEWithLogitsLoss()
    a, b = logits.split(4)
    expected = 0.25 * sum(
        bce_loss(one, labels) + bce_loss(one, other.detach().sigmoid())
        for one, other in ((a, b), (b, a))
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_cosub_trains_two_submodels(images, tmp_path, main, monkeypatch):
    seen = []

    class Spy(CosubLoss):
        def forward(self, logits, targets):
            a, b = logits.detach().chunk(2)
            seen.append((len(logits), torch.equal(a, b)))
            return super().forward(logits, targets)

    monkeypatch.setattr("training.job.CosubLoss", Spy)
    run = [*RUN, "--model", "test_vit", "--input-size", 32, "--data-path", images, "--epochs", 1]
    succeed(main, *run, "--cosub", "--drop-path", 0.5, "--output_dir", tmp_path)
    assert {count for count, _ in seen} == {8} and len(seen) == 6
    assert not all(equal for _, equal in seen)
    (line,) = read_log(tmp_path)
    assert 0.2 < line["train_loss"] < 2
    words = ("--cosub", "--distillation-type", "hard", "--teacher-model", "test_vit")
    refused(lambda: flags(*words), "--cosub", "--distillation-type hard", kind=UserError)


# every flag


VALUES = {  # where the rule of value_of does not do
    "data_set": "CIFAR10",
    "opt": "lookahead_sgd",
    "opt_betas": [0.8, 0.9],
    "sched": "step",
    "aa": "original",
    "cutmix_minmax": [0.25, 0.75],
    "model_kwargs": ["depth=3", "name=[1, 2]"],
    "opt_kwargs": ["rho=0.1", "name=[1, 2]"],
    "log_to": ["wandb", "mlflow"],
    "input_size": 7,
    "val_split": 0.25,
    "decay_milestones": [3, 7],
    "compile": "eager",
    "scale": [0.25, 0.5],
    "ratio": [0.5, 2.0],
    "progressive_sizes": [24, 40],
    "dist_url": "tcp://localhost:1",
    "world_size": 2,
}
WITH = {  # flags that another one needs
    "compile_mode": ["--compile"],
    "compile_blocks": ["--compile"],
    "eval": ["--resume", "x.pth"],
    "val_split": ["--data-path", "x"],
    "k_folds": ["--fold", "3", "--data-path", "x"],
    "fold": ["--k-folds", "9", "--data-path", "x"],
    "fuse": ["--eval", "--resume", "x.pth"],
    "distillation_type": ["--teacher-model", "x"],
    "teacher_model": ["--distillation-type", "soft"],
    "teacher_path": ["--distillation-type", "soft"],
    "experiment": ["--log-to", "wandb", "--output_dir", "x"],
    "log_to": ["--output_dir", "x"],
} | {key: ["--finetune", "x.pth"] for key in ("attn_only", "linear_probe", "freeze_stages")}


def value_of(action):
    """A value of a flag that is not its default."""
    if action.dest in VALUES:
        return VALUES[action.dest]
    if action.nargs == 0 or isinstance(action.default, bool) or "--no-" in str(action):
        return not action.default
    if action.choices:
        return next(one for one in reversed(list(action.choices)) if one != action.default)
    value = {int: 7, float: 0.375}.get(action.type, "some text: #1")
    return [value] if action.nargs == "+" else value


ACTIONS = [a for a in get_args_parser()._actions if a.dest not in ON_COMMAND_LINE]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.dest)
def test_a_flag_is_saved_and_restored(tmp_path, action, monkeypatch):
    """From a recipe, by args.yaml."""
    monkeypatch.setattr(flag_checks, "check_installed", lambda packages: None)
    value = value_of(action)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({action.option_strings[0].lstrip("-"): value}))
    words = ["-c", str(recipe), *WITH.get(action.dest, [])]
    args, given = parse_args(words)
    assert getattr(args, action.dest) == value != action.default
    assert action.dest in given
    output = Output(str(tmp_path / "out"))
    output.begin(args, 0)
    output.close()
    again, _ = parse_args(["-c", str(tmp_path / "out" / "args.yaml")])
    assert vars(again) == vars(args)
