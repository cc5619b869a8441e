"""One epoch of training and evaluation, against the formulas."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from loading import flags
from timm.utils import ModelEmaV3
from torch import nn

import engine
from engine import Precision
from pipeline.reference import Batch
from training import losses, optimizers
from utils import UserError

CPU = torch.device("cpu")


def batches(count, size=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randn(size, 3, 2, 2, generator=generator),
            torch.randint(classes, (size,), generator=generator),
            [],
        )
        for _ in range(count)
    ]


def linear(classes=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double().float()


def train(model, data, opt=None, precision=None, criterion=None, **options):
    return engine.train_one_epoch(
        model,
        criterion or nn.CrossEntropyLoss(),
        data,
        opt or torch.optim.SGD(model.parameters(), lr=0.1),
        CPU,
        options.pop("epoch", 0),
        precision or Precision(CPU),
        **options,
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_accumulated_batches_equal_large_ones(count):
    data = batches(count, size=4)
    small, large = linear(), linear()
    train(small, data, accum_iter=3)
    groups = [data[i : i + 3] for i in range(0, count, 3)]
    images, targets = ([torch.cat([b[i] for b in g]) for g in groups] for i in range(2))
    train(large, [Batch(*parts, []) for parts in zip(images, targets, strict=True)])
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-5, atol=1e-6)


def test_an_epoch_resumes_with_other_accumulation():
    data = batches(5, size=4)
    resumed, fresh = linear(), linear()
    meter = engine.Meter()
    meter.steps = 1  # of an epoch that began with updates of one batch
    train(resumed, data, accum_iter=2, meter=meter)
    train(fresh, data, accum_iter=2)
    assert torch.equal(weights(resumed), weights(fresh))
    assert meter.steps == 6


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_gradients_are_clipped_after_unscaling(dtype):
    model = linear()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision = Precision(CPU, dtype)
    assert precision.scaler.is_enabled() == (dtype is torch.float16)
    train(model, batches(1), optimizer, precision, max_norm=1e-3)
    step = (weights(model) - before).norm().item()
    assert step == pytest.approx(1e-3, rel=1e-2)


def test_moving_average_follows_every_update():
    model = linear()
    ema = ModelEmaV3(model, decay=0.9)
    expected = weights(model)
    reference, history = linear(), []
    for batch in batches(4):
        train(reference, [batch])
        history.append(weights(reference))
    train(model, batches(4), model_ema=ema)
    expected = history[0]  # the first update starts the average
    for value in history[1:]:
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(weights(ema.module), expected)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_device_is_read_at_log_intervals_only(monkeypatch, dtype):
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original):
            reads.append(self.shape)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def count(steps, interval):
        model = linear()
        optimizer = optimizers.build(flags(), model, 1e-3)
        reports = []
        options = {"max_norm": 1.0, "model_ema": ModelEmaV3(model), "log_interval": interval}
        data = batches(steps)
        del reads[:]
        options["report"] = lambda *values: reports.append(values)
        train(model, data, optimizer, Precision(CPU, dtype), **options)
        return len(reads), len(reports)

    few, many, often = count(2, 100), count(12, 100), count(12, 3)
    assert few == many
    assert often[1] == 4 and often[0] > many[0]


def test_reports_and_statistics():
    reports = []
    model = linear()
    stats = train(model, batches(5), log_interval=2, report=lambda *values: reports.append(values))
    assert [step for step, *_ in reports] == [2, 4, 5]
    assert stats["loss"] == pytest.approx(reports[-1][1])
    assert stats["lr"] == 0.1
    assert stats["images_per_second"] > 0
    data = [batch._replace(corrupt=["bad"] * i) for i, batch in enumerate(batches(3))]
    assert train(model, data)["corrupt"] == 3


@pytest.mark.parametrize("interval", [2, 100])
def test_a_loss_that_is_not_finite_stops_and_says_where(interval):
    model = linear()
    model.qk_scale_factor = -0.25
    data = batches(6)
    data[3].images[0] = math.inf
    with pytest.raises(UserError, match=r"epoch 7, step 3\b.* 0\.1\b.*bfloat16.* -0\.25\b"):
        train(model, data, precision=Precision(CPU, torch.bfloat16), epoch=7, log_interval=interval)


def bad_batches(count, bad):
    """Batches of which some make an infinite loss."""
    data = batches(count)
    for step in bad:
        data[step].images[0] = math.inf
    return data


def test_in_float16_bad_losses_are_left_out_and_counted():
    model, reference = linear(), linear()
    options = {"set_training_mode": False, "max_nonfinite": 3}
    data = bad_batches(7, [1, 2, 5])
    precision = Precision(CPU, torch.float16)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    stats = train(model, data, precision=precision, **options)
    assert (stats["nonfinite"], stats["skipped"]) == (3, 3)
    assert precision.scaler.get_scale() == 0.5
    good = [batch for step, batch in enumerate(data) if step not in (1, 2, 5)]
    expected = train(reference, good, precision=Precision(CPU, torch.float16), **options)
    assert "skipped" not in expected
    assert stats["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bad", [[1, 2, 3], [3, 4, 5]])
def test_losses_that_stay_bad_end_the_training(bad):
    precision = Precision(CPU, torch.float16)
    message = rf"epoch 0, step {bad[0]}\b.* 3 .* float16, .* bfloat16 .*--qk-scale"
    with pytest.raises(UserError, match=message):
        train(linear(), bad_batches(6, bad), precision=precision, max_nonfinite=3, log_interval=4)


def test_a_row_of_bad_losses_goes_on_in_the_next_epoch():
    meter, model, precision = engine.Meter(), linear(), Precision(CPU, torch.float16)
    train(model, bad_batches(4, [2, 3]), precision=precision, max_nonfinite=3, meter=meter)
    meter.restart()
    with pytest.raises(UserError, match=r"epoch 0, step \d, .* 3 "):
        train(model, bad_batches(4, [0]), precision=precision, max_nonfinite=3, meter=meter)


def test_a_meter_goes_on_where_it_was():
    meter, other = engine.Meter(), engine.Meter()
    for step, value in enumerate([1.0, math.nan, 0.1, math.inf, math.inf]):
        meter.add(torch.tensor(value))
        meter.corrupt.append(f"image {step}")
    meter.add_skipped(torch.tensor(True))
    other.load_state_dict(meter.state_dict())
    for each in (meter, other):
        each.add(torch.tensor(0.3))
        each.read()
    assert other.mean() == meter.mean() == pytest.approx(1.4 / 3)
    assert other.counts() == meter.counts() == {"nonfinite": 3, "skipped": 1}
    assert (other.steps, other.bad_in_row, other.bad_step) == (6, 2, 1)
    assert other.state_dict() == meter.state_dict()


def test_meters_of_other_processes_are_merged():
    states = []
    for values in ([1.0, 3.0], [5.0, math.nan]):
        meter = engine.Meter()
        for value in values:
            meter.add(torch.tensor(value))
        meter.images, meter.corrupt = 8, ["x"]
        states.append(meter.state_dict())
    merged = [engine.merge_meters(states, 4, 1, rank=rank) for rank in (0, 1)]
    meters = [engine.Meter() for _ in merged]
    for meter, state in zip(meters, merged, strict=True):
        meter.load_state_dict(state)
    assert [meter.mean() for meter in meters] == [3.0, 3.0]
    assert [meter.steps for meter in meters] == [4, 4]
    assert sum(meter.counts()["nonfinite"] for meter in meters) == 1
    assert sum(len(meter.corrupt) for meter in meters) == 2
    assert meters[0].images == 16


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ((), "SoftTargetCrossEntropy"),
        (("--mixup", 0), "SoftTargetCrossEntropy"),
        (("--cutmix", 0), "SoftTargetCrossEntropy"),
        (("--mixup", 0, "--cutmix", 0), "LabelSmoothingCrossEntropy"),
        (("--mixup", 0, "--cutmix", 0, "--smoothing", 0), "CrossEntropyLoss"),
        (("--mixup", 0, "--cutmix", 0, "--cutmix-minmax", 0.2, 0.8), "SoftTargetCrossEntropy"),
        (("--bce-loss",), "BinaryCrossEntropy"),
        (("--bce-loss", "--mixup", 0, "--cutmix", 0), "BinaryCrossEntropy"),
    ],
)
def test_every_mix_of_losses_trains(words, kind):
    args = flags(*words)
    mixup_fn = losses.build_mixup(args, 3)
    criterion = losses.build_criterion(args, mixup_fn, 3)
    assert type(criterion).__name__ == kind
    model = linear()
    first = train(model, batches(4), criterion=criterion, mixup_fn=mixup_fn)["loss"]
    assert math.isfinite(first)


def test_binary_cross_entropy_makes_every_mixed_class_a_full_target():
    args = flags("--bce-loss", "--mixup", 0, "--cutmix", 1)
    criterion = losses.build_criterion(args, losses.build_mixup(args, 4), 4)
    off = 0.1 / 4
    soft = torch.tensor([[0.3 * 0.9 + off, 0.7 * 0.9 + off, off, off]])
    logits = torch.randn(1, 4)
    expected = F.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(criterion(logits, soft), expected)


def test_odd_batches_cannot_be_mixed():
    with pytest.raises(UserError, match="--batch-size 7"):
        losses.build_mixup(flags("--batch-size", 7), 3)
    assert losses.build_mixup(flags("--batch-size", 7, "--mixup", 0, "--cutmix", 0), 3) is None


def test_train_mode_off_leaves_statistics_alone():
    model = nn.Sequential(nn.BatchNorm2d(3), linear())
    before = copy.deepcopy(model[0].running_mean)
    train(model, batches(2), set_training_mode=False)
    assert torch.equal(model[0].running_mean, before)
    train(model, batches(2))
    assert not torch.equal(model[0].running_mean, before)


@pytest.mark.parametrize("classes", [3, 10])
def test_evaluation_counts(classes):
    model = linear(classes)
    data = batches(5, size=7, classes=classes)
    data.insert(2, Batch(torch.empty(0), torch.empty(0, dtype=torch.long), ["bad"] * 4))
    stats = engine.evaluate(data, model, CPU)
    images = torch.cat([b.images for b in data if len(b.images)])
    targets = torch.cat([b.targets for b in data])
    logits = model(images)
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert stats["acc1"] == 100 * (ranks < 1).sum().item() / 35
    assert stats["acc5"] == 100 * (ranks < 5).sum().item() / 35
    assert stats["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert (stats["images"], stats["corrupt"]) == (35, 4)


def test_evaluation_of_nothing_is_an_error():
    data = [Batch(torch.empty(0), torch.empty(0, dtype=torch.long), ["bad"] * 4)]
    with pytest.raises(UserError, match=r"\b4\b"):
        engine.evaluate(data, linear(), CPU)
