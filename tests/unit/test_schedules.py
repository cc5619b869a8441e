"""Learning rates and schedules, and runs that resume in them."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import error_of, succeed
from loading import flags, refused
from timm.optim import list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

import engine
from datasets import build_train_loader
from main import main
from models import CheckpointError, DataConfig, read_checkpoint
from pipeline.sources.base import Pixels
from samplers import RASampler
from training import schedules
from training.checkpoints import plain, save_checkpoint, snapshot
from training.launch import DistInfo
from training.network import Network
from training.run_state import RunState
from training.schedules import Rates
from utils import UserError

CPU = torch.device("cpu")
EPOCHS, UPDATES, SIZE = 4, 3, 4
ACCURACIES = (50.0, 40.0, 30.0, 45.0)
RATES = Rates(0.01, 1e-4, 1e-3)
RUN = ["--epochs", EPOCHS, "--warmup-epochs", 1, "--batch-size", SIZE, "--no-model-ema"]
RUN += ["--lr", RATES.peak, "--min-lr", RATES.floor, "--warmup-lr", RATES.warmup, "--unscale-lr"]
# flags of a schedule, and the arguments of timm's that they stand for
SCHEDULES = {
    "cosine": {},
    "cosine --lr-noise 0.5 --lr-noise-pct 0.4 --lr-noise-std 0.5": {
        "noise": [0.5],
        "noise_pct": 0.4,
        "noise_std": 0.5,
    },
    "cosine --epochs 2 --lr-cycle-limit 2": {"num_epochs": 2, "cycle_limit": 2, "cycle_decay": 0.5},
    "cosine --epochs 3 --warmup-prefix": {"num_epochs": 3, "warmup_prefix": True},
    "cosine --lr-k-decay 2": {"k_decay": 2.0},
    "tanh --lr-cycle-mul 3 --lr-cycle-limit 2 --epochs 1 --lr-cycle-decay 0.3": {
        "num_epochs": 1,
        "cycle_mul": 3.0,
        "cycle_limit": 2,
        "cycle_decay": 0.3,
    },
    "tanh": {},
    "poly --decay-rate 0.9": {"decay_rate": 0.9},
    "step --decay-epochs 1": {"decay_epochs": 1.0},
    "multistep --decay-milestones 2 3": {"decay_milestones": [2, 3]},
    "plateau --patience-epochs 0": {"patience_epochs": 0},
    "wsd --decay-epochs 2": {"decay_epochs": 2.0},
    "rsqrt --decay-epochs 1": {"decay_epochs": 1.0},
    "none": {"warmup_epochs": 0, "sched": "step", "decay_rate": 1.0},
    "constant": {"sched": "step", "decay_rate": 1.0},
}
KINDS = {words.split()[0] for words in SCHEDULES}


class Weights:
    """A source of a checkpoint's weights."""

    label = "checkpoint.pth"

    def __init__(self, path):
        self.checkpoint = read_checkpoint(path)

    def load(self, model, *_, **__):
        model.load_state_dict(self.checkpoint["model"])


class Run:
    """A run of a small model, which records the losses and the learning rates of its steps."""

    def __init__(self, *words):
        args = flags(*RUN, *words)
        torch.manual_seed(0)  # larger weights are factored by Adafactor
        layers = (nn.Conv2d(3, 16, 2), nn.Flatten(), nn.Linear(16, 17), nn.GELU(), nn.Linear(17, 3))
        images = DataConfig((2, 2))
        network = Network(nn.Sequential(*layers), "small", {}, engine.Precision(CPU), images)
        sampler = RASampler(UPDATES * SIZE, batch_size=SIZE, num_repeats=1)
        rates = schedules.learning_rates(args, 1)
        self.state = RunState(args, network, rates, UPDATES, sampler, DistInfo())
        self.losses, self.rates = [], []

    def loss(self, logits, targets):
        value = nn.functional.cross_entropy(logits, targets)
        self.losses.append(value.item())
        self.rates.append(max(g["lr"] for g in self.state.optimizer.param_groups))
        return value

    def train(self, stop=math.inf):
        """Train until ``stop`` updates are done, in all."""
        state = self.state
        while state.epoch + 1 < state.epochs and UPDATES * (state.epoch + 1) < stop:
            epoch = state.begin_epoch()
            options = {"lr_scheduler": state.scheduler, "meter": state.meter}
            options["after_update"] = lambda meter: UPDATES * epoch + meter.steps >= stop  # noqa: B023
            data = [batch(UPDATES * epoch + i) for i in range(state.meter.steps, UPDATES)]
            values = (self.loss, data, state.optimizer, CPU, epoch, state.precision)
            if engine.train_one_epoch(state.model, *values, **options) is None:
                return
            state.end_epoch(ACCURACIES[epoch])

    def save(self, path):
        save_checkpoint(snapshot(plain(self.state.state())), path)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(SIZE, 3, 2, 2, generator=generator)
    return images, torch.randint(3, (SIZE,), generator=generator), []


def rates_of_timm(on_updates, **options):
    """The learning rates of all steps by timm's schedule, stepped by hand."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATES.peak)
    usual = {"num_epochs": EPOCHS, "warmup_epochs": 1}
    usual |= {"min_lr": RATES.floor, "warmup_lr": RATES.warmup, "updates_per_epoch": UPDATES}
    scheduler, _ = create_scheduler_v2(optimizer, **usual | options, step_on_epochs=not on_updates)
    found = []
    for epoch, metric in enumerate([None, *ACCURACIES[:-1]]):
        scheduler.step(epoch, metric)
        for update in range(UPDATES):
            scheduler.step_update(UPDATES * epoch + update)
            found.append(optimizer.param_groups[0]["lr"])
    return found


OPTIMIZERS = [name for name in list_optimizers() if not name.startswith(("bnb", "fused"))]
# steps before the checkpoint: within an epoch; the 6th of Lookahead is its first slow one
CASES = [(f"--opt {name}", "cosine", False, 4) for name in OPTIMIZERS]
CASES += [(f"--opt lookahead_{n}", "cosine", False, 7) for n in ("adamw", "adahessian", "lamb")]
CASES += [
    ("--opt adamw", words, on_updates, stop)
    for words, on_updates, stop in itertools.product(SCHEDULES, (False, True), (6, 7, 10))
    if not (on_updates and words.startswith("plateau"))
]
SOME = ("adamw", "adafactor", "adafactorbv", "adahessian", "lookahead_adamw", "muon", "kron")


def case(opt, words, on_updates, stop):
    usual = opt.split()[1] in SOME and (words != "cosine" or stop in (4, 7))
    name = f"{opt.split()[1]}-{words}-{'updates' if on_updates else 'epochs'}-{stop}"
    marks = () if usual else pytest.mark.slow
    return pytest.param(opt, words, on_updates, stop, id=name, marks=marks)


@pytest.mark.parametrize(("opt", "words", "on_updates", "stop"), [case(*c) for c in CASES])
def test_resuming_is_exact(opt, words, on_updates, stop, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr("timm.optim.kron.has_dynamo", False)  # compiling takes seconds
    words = [*opt.split(), "--sched", *words.split(), *["--sched-on-updates"] * on_updates]
    whole, first, second = (Run(*words) for _ in range(3))
    whole.state.set_lr()
    whole.train()
    first.state.set_lr()
    first.train(stop)
    first.save(tmp_path / "checkpoint.pth")
    torch.rand(7)  # of another process, the global generator is elsewhere
    second.state.start(Weights(tmp_path / "checkpoint.pth"), True)
    second.train()
    assert len(whole.losses) == EPOCHS * UPDATES and len(first.losses) == stop
    assert first.losses + second.losses == whole.losses
    assert first.rates + second.rates == whole.rates
    for one, other in zip(*(run.state.model.parameters() for run in (whole, second)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("on_updates", [False, True])
@pytest.mark.parametrize("words", SCHEDULES)
def test_rates_are_those_of_timm(words, on_updates):
    sched, *others = words.split()
    if (sched, on_updates) == ("plateau", True):
        with pytest.raises(UserError, match=r"--sched plateau .*--sched-on-updates"):
            flags("--sched", sched, "--sched-on-updates")
        return
    run = Run("--sched", sched, *others, *["--sched-on-updates"] * on_updates)
    run.state.set_lr()
    run.train()
    options = {"sched": sched} | SCHEDULES[words]
    assert run.rates == rates_of_timm(on_updates, **options)
    assert (len({*run.rates}) > 1) == (sched != "none")


def test_every_schedule_is_tried():
    assert {*schedules.NAMES} == KINDS


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--sched", "nonesuch"], "nonesuch; .*wsd"),
        (["--sched", "wsd"], "--sched wsd.* 30 .*--decay-epochs"),
        (["--sched", "rsqrt", "--decay-epochs", 1, "--warmup-epochs", 0], "--warmup-epochs"),
        (["--decay-milestones", 3, 2], "--decay-milestones 3 2"),
        (["--decay-milestones", 0, 2], "--decay-milestones 0"),
        (["--decay-epochs", 0], "--decay-epochs 0"),
        (["--lr-cycle-limit", 0], "--lr-cycle-limit 0"),
        (["--lr-noise", 0.1, 0.2, 0.3], "--lr-noise 0.1 0.2 0.3"),
        (["--lr-noise-pct", 0], "--lr-noise-pct 0"),
        (["--min-lr", -1], "--min-lr -1"),
    ],
)
def test_what_a_schedule_cannot_do_is_named(words, named):
    with pytest.raises(UserError, match=named):
        Run(*words)


def test_a_schedule_that_an_older_timm_lacks_is_named(monkeypatch):
    monkeypatch.delattr("timm.scheduler.WSDLRScheduler")
    monkeypatch.setattr(schedules, "create_scheduler_v2", lambda *_, **__: (None, 1))
    with pytest.raises(UserError, match=r"--sched wsd; timm .*cosine, multistep, none") as caught:
        Run("--sched", "wsd")
    assert "rsqrt" not in str(caught.value)


def test_no_schedule_keeps_the_decay_of_layers():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "lr_scale": s} for p, s in zip(parameters, (0.5, 1.0), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedules.build(flags("--sched", "none"), optimizer, 1, RATES._replace(peak=0.1))[0].step(3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


def test_options_of_a_resumed_plateau_are_those_of_the_flags(tmp_path):
    first = Run("--sched", "plateau", "--patience-epochs", 9)
    first.state.set_lr()
    first.train(7)
    first.save(tmp_path / "checkpoint.pth")
    second = Run("--sched", "plateau", "--patience-epochs", 0, "--dr", 0.5)
    second.state.start(Weights(tmp_path / "checkpoint.pth"), True)
    second.train()
    assert second.rates[-1] == pytest.approx(RATES.peak / 2)


def test_plateau_without_warm_up_begins_at_the_learning_rate():
    run = Run("--sched", "plateau", "--warmup-epochs", 0)
    for epoch in range(3):
        run.state.scheduler.step(epoch, 50.0)
        assert run.state.optimizer.param_groups[0]["lr"] == pytest.approx(RATES.peak)


def test_warm_up_ends_where_it_says_and_the_cosine_takes_over():
    run = Run("--epochs", 30, "--warmup-epochs", 5)
    rates = []
    for epoch in range(30):
        run.state.scheduler.step(epoch)
        rates.append(run.state.optimizer.param_groups[0]["lr"])
    peak, floor, start, _ = RATES
    warm = [start + (peak - start) * epoch / 5 for epoch in range(5)]
    cosine = [floor + (peak - floor) * (1 + math.cos(math.pi * t / 30)) / 2 for t in range(5, 30)]
    assert rates == pytest.approx(warm + cosine, rel=1e-9)


@pytest.mark.parametrize(
    ("batch_size", "accum", "world", "scale", "less"),
    [(64, 2, 8, 2, 1), (4, 1, 1, 1 / 128, 1 / 128), (64, 2, 2, 0.5, 0.5), (512, 1, 1, 1, 1)],
)
def test_rates_follow_the_global_batch(batch_size, accum, world, scale, less):
    words = ["--lr", 1e-3, "--batch-size", batch_size, "--accum-iter", accum]
    words += ["--min-lr", 2e-5, "--warmup-lr", 3e-6]
    rates = schedules.learning_rates(flags(*words), world)
    assert rates == (1e-3 * scale, 2e-5 * less, 3e-6 * less, ())
    rates = schedules.learning_rates(flags(*words, "--unscale-lr"), world)
    assert rates == (1e-3, 2e-5, 3e-6, ())
    both = ("min_lr", "warmup_lr")
    for old in ({}, {"unscaled_rates": torch.ones(2)}, {"args": {"min_lr": 2e-5, "lr": 3}}):
        rates = schedules.learning_rates(flags(*words), world, old)
        assert rates == (1e-3 * scale, 2e-5, 3e-6, both)
    rates = schedules.learning_rates(flags(*words), world, {"args": {"min_lr": 1e-5}})
    assert rates == (1e-3 * scale, 2e-5 * less, 3e-6, both[1:])
    rates = schedules.learning_rates(flags(*words), world, {"unscaled_rates": ()})
    assert rates.floor == 2e-5 * less


TINY = ["--model", "test_vit", "--device", "cpu", "--num_workers", 0, "--batch-size", 4]
TINY += ["--no-model-ema", "--input-size", 32, "--sched-on-updates", "--warmup-epochs", 1]


def test_old_runs_keep_their_rates(images, tmp_path):
    """Also when they are resumed a second time; new ones have rates that fall."""
    run = [*TINY, "--data-path", images, "--epochs", 3, "--output_dir", tmp_path]
    output = succeed(*run, "--stop-epoch", 1)
    assert "learning rate 3.90625e-06 " in output and "floor 7.8125e-08 " in output
    path = tmp_path / "checkpoint.pth"
    saved = read_checkpoint(path)
    del saved["unscaled_rates"]
    save_checkpoint(saved, path)
    for epoch in (2, 3):
        output = succeed(*run, "--resume", "auto", "--stop-epoch", epoch)
        assert "floor 1e-05 " in output and "3.90625e-06" in output
        assert len(read_checkpoint(path)["unscaled_rates"]) == 2


def test_odd_rates_are_named(images, tmp_path):
    run = [*TINY, "--data-path", images, "--stop-epoch", 0]
    rates = [line for line in succeed(*run).splitlines() if "--min-lr" in line]
    assert len(rates) == 1 and not rates[0].startswith("warning")
    output = succeed(*run, "--min-lr", 1e-3)
    (line,) = [o for o in output.splitlines() if "--min-lr" in o and o.startswith("warning")]
    assert "7.8125e-06" in line and "3.90625e-06" in line and "--min-lr 0.001" in line
    output = succeed(*run, "--sched", "multistep", "--epochs", 20)
    assert "--decay-milestones 90 180 270" in output and "--epochs 20" in output


def test_cycles_make_a_run_longer(images, tmp_path):
    run = [*TINY, "--data-path", images, "--epochs", 1, "--lr-cycle-limit", 2]
    succeed(*run, "--output_dir", tmp_path)
    assert read_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 1


def test_arguments_of_optimizers(tmp_path):
    group = Run("--opt-kwargs", "amsgrad=True").state.optimizer.param_groups[0]
    assert group["amsgrad"] is True
    for words, named in {
        "amsgrd=True": "--opt-kwargs amsgrd=True.* amsgrad",
        "lr=3": "--opt-kwargs lr=3.*--lr",
        "momentum=0": "--opt-kwargs momentum=0.*--momentum",
        "x": "--opt-kwargs x ",
        "fused=True foreach=True": "--opt adamw",
    }.items():
        with pytest.raises(UserError, match=named):
            Run("--opt-kwargs", *words.split())
    first = Run("--opt-kwargs", "amsgrad=False")
    first.train(3)
    first.save(tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"amsgrad=False.*amsgrad=True"):
        Run("--opt-kwargs", "amsgrad=True").state.start(Weights(tmp_path / "checkpoint.pth"), True)


def test_single_images(images, tmp_path):
    run = [*TINY, "--data-path", images, "--mixup", 0, "--cutmix", 0, "--batch-size", 1]
    run += ["--epochs", 1]
    assert "--batch-size 2" in error_of(main, *run, "--model", "fastvit_t8")
    succeed(*run, "--model", "test_resnet", "--input-size", 64)
    succeed(*run, "--model", "fastvit_t8", "--no-train-mode")


def test_batches_larger_than_the_set(images):
    line = error_of(main, *TINY, "--data-path", images, "--batch-size", 50)
    assert line.rstrip().endswith("--batch-size 24")
    dataset = Pixels(np.zeros((24, 4, 4, 3), np.uint8), [0] * 24, ["a"])
    dataset.source = dataset
    for words, ranks, named in (
        ((), 8, "--batch-size 2"),  # mixup needs pairs
        (("--mixup", 0, "--cutmix", 0), 8, "--batch-size 3"),
        ((), 24, "--batch-size 1"),
    ):
        args = flags("--batch-size", 4, *words)
        assert refused(lambda: build_train_loader(dataset, args, ranks, 0), "24").endswith(named)  # noqa: B023
