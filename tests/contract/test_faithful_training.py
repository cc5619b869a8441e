"""Training as the original recipes do it, against their formulas written with timm's parts."""

import math

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import engine
import models  # noqa: F401
from pipeline.reference import Batch
from training import losses, optimizers, schedules
from training.flags import parse_args
from training.joined import MovingAverage, join_kernels

CLASSES, SIZE, STEPS, IMAGES = 10, 64, 5, 4
# of each recipe: its command line, processes, and timm's own class
RECIPES = {
    "deit": (["--model", "deit_tiny_patch16_224"], 4, timm.models.deit.deit_tiny_patch16_224),
    "visformer": (
        ["-c", str(ROOT / "configs/visformer_tiny.yaml")],
        4,
        timm.models.visformer.visformer_tiny,
    ),
    "convit": (["-c", str(ROOT / "configs/convit_tiny.yaml")], 4, timm.models.convit.convit_tiny),
}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, 3, SIZE, SIZE)
    return [
        (
            torch.randn(shape, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (IMAGES,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def drawn(mixup):
    """Mixup whose draws of a batch depend on its number alone."""
    numbers = iter(range(STEPS))

    def mix(images, targets):
        np.random.seed(next(numbers))
        return mixup(images.clone(), targets)

    return mix


def reference(build, state, batches, rate):
    """Losses, last gradients, parameters and their average by the formulas of DeiT's main.py."""
    model = build(num_classes=CLASSES, img_size=SIZE).double().train()
    model.load_state_dict(state)
    mixup = drawn(Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES))
    criterion = SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(model, "adamw", lr=rate, weight_decay=0.05)
    average, found = ModelEmaV3(model, decay=0.99996), []
    for step, (images, targets) in enumerate(batches, start=1):
        images, targets = mixup(images, targets)
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=step)
        found.append(loss.item())
    return found, model, average.module


@pytest.mark.parametrize("name", RECIPES)
def test_five_steps_are_the_originals(name, batches):
    words, processes, build = RECIPES[name]
    args, _ = parse_args([*words, "--input-size", str(SIZE), "--batch-size", str(IMAGES)])
    recipe, _ = parse_args(words)
    rate = schedules.learning_rates(recipe, processes).peak
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=CLASSES, img_size=SIZE).double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected, original, mean = reference(build, state, batches, rate)

    join_kernels(model)
    mixup = drawn(losses.build_mixup(args, CLASSES))
    average, found, gradients = MovingAverage(model, decay=args.model_ema_decay), [], {}
    optimizer = optimizers.build(args, model, rate)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({k: p.grad.clone() for k, p in model.named_parameters()})
    )
    engine.train_one_epoch(
        model,
        losses.build_criterion(args, mixup, CLASSES),
        [Batch(*batch, []) for batch in batches],
        optimizer,
        torch.device("cpu"),
        0,
        engine.Precision(torch.device("cpu")),
        args.clip_grad,
        model_ema=average,
        mixup_fn=mixup,
        log_interval=1,
        report=lambda step, loss, lr, speed: found.append(loss),
    )
    means = [sum(expected[: step + 1]) / (step + 1) for step in range(STEPS)]
    assert found == pytest.approx(means, rel=1e-10)
    theirs = dict(original.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, theirs[key], rtol=0, atol=1e-10)
        torch.testing.assert_close(gradients[key], theirs[key].grad, rtol=0, atol=1e-10)
    moved = mean.state_dict()
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(value, moved[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", RECIPES)
def test_rates_are_those_of_deits_main(name):
    """Warm-up over 5 epochs from 1e-6, then half a cosine from 1e-3 to 1e-5 (global batch 1024)."""
    words, processes, _ = RECIPES[name]
    args, _ = parse_args([*words, "--batch-size", "256"])
    model = torch.nn.Linear(1, 1)
    rates = schedules.learning_rates(args, processes)
    optimizer = optimizers.build(args, model, rates.peak)
    scheduler, epochs = schedules.build(args, optimizer, 1, rates)
    assert epochs == args.epochs == 300
    for epoch in (0, 1, 5, 150, 299):
        scheduler.step(epoch)
        warm = 1e-6 + epoch / 5 * (1e-3 - 1e-6)
        cold = 1e-5 + (1e-3 - 1e-5) / 2 * (1 + math.cos(math.pi * epoch / 300))
        expected = warm if epoch < 5 else cold
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)
