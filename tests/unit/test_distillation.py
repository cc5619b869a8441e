"""Learning from a teacher: the loss against its formula, the teacher against its own forward."""

import re

import pytest
import timm
import torch
from conftest import read_log, succeed
from timm.data import Mixup
from torch import nn

import models
from engine import Precision
from models import DataConfig
from training.distillation import (
    DistillationLoss,
    DistillBatch,
    Renormalized,
    TeacherTargets,
    build_teacher,
)

CPU = torch.device("cpu")
SMALL_IMAGES = DataConfig((32, 32))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_soft_loss_is_equation_2(alpha):
    z, teacher = (5 * torch.randn(4, 7, dtype=torch.float64) for _ in range(2))
    targets, tau = torch.tensor([0, 3, 6, 3]), 3.0
    loss = DistillationLoss(nn.CrossEntropyLoss(), "soft", alpha, tau)(
        z, DistillBatch(targets, teacher)
    )
    q, p = (x / tau - (x / tau).exp().sum(1, keepdim=True).log() for x in (z.float(), teacher))
    divergence = (p.exp() * (p - q)).sum(1).mean()
    hits = torch.softmax(z, 1)[torch.arange(4), targets]
    expected = (1 - alpha) * -hits.log().mean() + alpha * tau**2 * divergence
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_hard_loss_is_equation_3_and_a_second_head_learns_from_the_teacher():
    own, taught, teacher = (torch.randn(4, 7, dtype=torch.float64) for _ in range(3))
    targets = torch.tensor([1, 2, 3, 4])
    loss = DistillationLoss(nn.CrossEntropyLoss(), "hard", 0.25, 1.0)

    def entropy(logits, labels):
        return -torch.softmax(logits, 1)[torch.arange(4), labels].log().mean()

    lesson = DistillBatch(targets, teacher)
    expected = 0.75 * entropy(own, targets) + 0.25 * entropy(taught, teacher.argmax(1))
    assert torch.allclose(loss((own, taught), lesson), expected)
    expected = 0.75 * entropy(own, targets) + 0.25 * entropy(own, teacher.argmax(1))
    assert torch.allclose(loss(own, lesson), expected)


def test_teacher_sees_the_mixed_images_in_its_own_normalization_without_gradients():
    net = timm.create_model("test_vit", num_classes=5, img_size=32)
    net.head_drop.p = 0.5  # would show in training mode
    given = DataConfig(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    own = DataConfig(mean=(0.49, 0.4, 0.42), std=(0.1, 0.2, 0.4))
    scale, shift = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([0.1, 0.0, -0.3])
    teacher = Renormalized(net, given, own).eval()
    mixup = Mixup(mixup_alpha=0.8, num_classes=5)
    taught = TeacherTargets(teacher, mixup, Precision(CPU, torch.bfloat16))
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    before = images.clone()
    mixed, lesson = taught(images, targets)
    assert not torch.equal(mixed, before) and lesson.targets.shape == (4, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = net(mixed * scale.view(3, 1, 1) + shift.view(3, 1, 1))
    assert expected.dtype == torch.bfloat16 and lesson.teacher.dtype == torch.float32
    torch.testing.assert_close(lesson.teacher, expected.float(), rtol=2e-2, atol=2e-3)
    assert not lesson.teacher.requires_grad


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """Weights alone of a network of timm, for two classes."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    net = timm.create_model("test_vit", num_classes=2, img_size=32)
    torch.save({"model": net.state_dict()}, path)
    return path


def parsed(*words):
    from training.flags import parse_args

    return parse_args(["--input-size", "32", *map(str, words)])[0]


def test_images_reach_a_foreign_teacher_as_timm_says(teacher_file, tmp_path):
    args = parsed(
        *("--teacher-model", "test_vit", "--teacher-path", teacher_file),
        *("--distillation-type", "hard"),
    )
    teacher = build_teacher(args, 2, Precision(CPU), SMALL_IMAGES)
    cfg = teacher.model.pretrained_cfg
    assert tuple(cfg["mean"]) != SMALL_IMAGES.mean
    content = torch.load(teacher_file, weights_only=True) | {"args": {}, "model_name": "test_vit"}
    torch.save(content, tmp_path / "ours.pth")
    args.teacher_path = str(tmp_path / "ours.pth")  # trained here: it knows images as they are
    native = build_teacher(args, 2, Precision(CPU), SMALL_IMAGES)
    pixels = torch.rand(2, 3, 32, 32)
    ours, theirs = (
        (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in ((SMALL_IMAGES.mean, SMALL_IMAGES.std), (cfg["mean"], cfg["std"]))
    )
    net = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    models.load_checkpoint(net, teacher_file)
    for one in (teacher, native):
        assert not any(p.requires_grad for p in one.parameters())
        assert not any(module.training for module in one.modules())
    with torch.no_grad():
        assert torch.allclose(teacher(ours), net(theirs), atol=1e-5)
        assert torch.equal(native(ours), net(ours))


SMALL = ["--model", "test_resnet", "--input-size", 32, "--batch-size", 4, "--num_workers", 0]


def test_runs_with_a_teacher_resume(image_folder, teacher_file, tmp_path):
    """A run of this project teaches another one, whose model its file names."""
    run = [*SMALL, "--data-path", image_folder, "--no-model-ema", "--epochs", 2]
    first, plain, second = (tmp_path / name for name in ("first", "plain", "second"))
    once = [*run, "--stop-epoch", 1, "--output_dir"]
    words = ["--teacher-model", "test_vit", "--teacher-path", teacher_file]
    output = succeed(*once, first, *words, "--distillation-type", "soft", "--distillation-tau", 2)
    assert f"test_vit: {teacher_file}" in output
    succeed(*once, plain)
    assert read_log(first)[0]["train_loss"] != read_log(plain)[0]["train_loss"]
    words = ["--teacher-path", first / "checkpoint.pth", "--distillation-type", "hard"]
    # a student that has a head for the teacher
    words += ["--model", "deit_tiny_distilled_patch16_224", "--model-kwargs", "depth=1"]
    words += ["--weight-decay", 0, "--warmup-lr", 1e-3, "--distillation-alpha", 1]

    def heads():
        weights = torch.load(second / "checkpoint.pth", weights_only=True)["model"]
        return weights["head.weight"], weights["head_dist.weight"]

    succeed(*once, second, *words)
    before = heads()
    succeed(*run, "--output_dir", second, *words, "--resume", "auto")
    assert [line["epoch"] for line in read_log(second)] == [0, 1]
    assert torch.equal(before[0], heads()[0]) and not torch.equal(before[1], heads()[1])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--distillation-type hard", "--teacher-model"),
        ("--teacher-model test_vit", "test_vit"),
        ("--distillation-type hard --teacher-model test_vit", "1000"),  # classes
        ("--distillation-type hard --teacher-model resnet18x", "'resnet18x'"),
        ("--distillation-type hard --teacher-model resnet18.none", "'resnet18.none'"),
        ("--distillation-type hard --teacher-model convit_tiny_plus", "convit_tiny_plus"),
        ("--distillation-type soft --teacher-path {file}", "{file}"),
        ("--distillation-type soft --teacher-path none.pth", "none.pth"),
        ("--distillation-alpha 2", "--distillation-alpha 2.0"),
        ("--distillation-tau 0", "--distillation-tau 0.0"),
    ],
)
def test_bad_input_is_named(image_folder, teacher_file, main, words, named):
    run = [*SMALL, "--data-path", image_folder, "--epochs", 1]
    status, _, errors = main(*run, *words.format(file=teacher_file).split())
    assert status == 1 and named.format(file=teacher_file) in errors


def test_a_teacher_of_another_class_count(image_folder, tmp_path, main):
    saved = tmp_path / "five.pth"
    kwargs = {"num_classes": 5, "img_size": 32}
    net = timm.create_model("test_vit", **kwargs)
    content = {"model": net.state_dict(), "model_name": "test_vit", "model_kwargs": kwargs}
    words = ["--teacher-path", saved, "--distillation-type", "hard", "--epochs", 1]
    for what in (content, net.state_dict()):
        torch.save(what, saved)
        words += ["--teacher-model", "test_vit"]
        status, _, errors = main(*SMALL, "--data-path", image_folder, *words)
        assert status == 1 and re.search(r"\b5 classes.*\b2\b", errors)
