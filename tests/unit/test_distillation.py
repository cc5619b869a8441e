"""Learning from a teacher: the loss against its formula, the teacher against its own forward."""

import pytest
import timm
import torch
from conftest import read_log
from timm.data import Mixup
from torch import nn

import models
from engine import Precision
from training.distillation import DistillationLoss, DistillBatch, TeacherTargets, build_teacher
from training.network import Renormalized

CPU = torch.device("cpu")
NORMALIZATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    given, own = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2)), ((0.49, 0.4, 0.42), (0.1, 0.2, 0.4))
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
    assert torch.equal(lesson.teacher, expected.float())
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
    teacher = build_teacher(args, 2, Precision(CPU), NORMALIZATION)
    cfg = teacher.model.pretrained_cfg
    assert tuple(cfg["mean"]) != NORMALIZATION[0], "choose a model of another normalisation"
    content = torch.load(teacher_file, weights_only=True) | {"args": {}, "model_name": "test_vit"}
    torch.save(content, tmp_path / "ours.pth")
    args.teacher_path = str(tmp_path / "ours.pth")  # trained here: it knows images as they are
    native = build_teacher(args, 2, Precision(CPU), NORMALIZATION)
    pixels = torch.rand(2, 3, 32, 32)
    ours, theirs = (
        (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in (NORMALIZATION, (cfg["mean"], cfg["std"]))
    )
    net = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    models.load_checkpoint(net, teacher_file)
    for one in (teacher, native):
        assert not any(p.requires_grad for p in one.parameters())
        assert not any(module.training for module in one.modules())
    with torch.no_grad():
        assert torch.allclose(teacher(ours), net(theirs), atol=1e-5)
        assert torch.equal(native(ours), net(ours))


SMALL = ["--model", "visformer_tiny", "--input-size", 32, "--batch-size", 4, "--num_workers", 0]


def test_runs_with_a_teacher_and_goes_on(image_folder, teacher_file, tmp_path, main):
    """A run of this project teaches another one, by its own file's word."""
    run = [*SMALL, "--data-path", image_folder, "--no-model-ema", "--epochs", 2]
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["--teacher-model", "test_vit", "--teacher-path", teacher_file]
    status, output, errors = main(
        *(*run, *words, "--distillation-type", "soft", "--distillation-tau", 2),
        *("--output_dir", first, "--stop-epoch", 1),
    )
    assert status == 0, errors
    assert f"teacher test_vit: {teacher_file}" in output
    plain = main(*run, "--output_dir", tmp_path / "plain", "--stop-epoch", 1)
    assert plain[0] == 0
    assert read_log(first)[0]["train_loss"] != read_log(tmp_path / "plain")[0]["train_loss"]
    words = ["--teacher-path", first / "checkpoint.pth", "--distillation-type", "hard"]
    student = ["--model", "deit_tiny_distilled_patch16_224"]  # it has a head for the teacher
    learning = ["--weight-decay", 0, "--warmup-lr", 1e-3, "--distillation-alpha", 1]
    once = [*run, *words, *student, *learning, "--output_dir", second]

    def heads():
        weights = torch.load(second / "checkpoint.pth", weights_only=True)["model"]
        return weights["head.weight"], weights["head_dist.weight"]

    assert main(*once, "--stop-epoch", 1)[0] == 0
    before = heads()
    status, output, _ = main(*once, "--resume", "auto")
    assert status == 0 and "epoch 1 " in output
    assert torch.equal(before[0], heads()[0]) and not torch.equal(before[1], heads()[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distillation-type", "hard"], "needs a teacher: give --teacher-model"),
        (["--teacher-model", "test_vit"], "teacher test_vit would do nothing"),
        (["--distillation-type", "hard", "--teacher-model", "resnet18"], "knows 1000 classes"),
        (["--distillation-type", "hard", "--teacher-model", "resnet18x"], "the nearest are"),
        (
            ["--distillation-type", "hard", "--teacher-model", "resnet18.none"],
            "there is no model 'resnet18.none': Invalid pretrained tag",
        ),
        (
            ["--distillation-type", "hard", "--teacher-model", "convit_tiny_plus"],
            "timm has no weights of teacher convit_tiny_plus",
        ),
        (["--distillation-type", "soft", "--teacher-path", "FILE"], "does not name its model"),
        (
            ["--distillation-type", "soft", "--teacher-path", "none.pth"],
            "cannot read checkpoint none.pth",
        ),
        (["--distillation-alpha", 2], "--distillation-alpha 2.0 must be from 0 to 1"),
        (["--distillation-tau", 0], "--distillation-tau 0.0 must be positive"),
    ],
)
def test_bad_input_is_named(image_folder, teacher_file, main, words, message):
    words = [teacher_file if word == "FILE" else word for word in words]
    status, _, errors = main(*SMALL, "--data-path", image_folder, "--epochs", 1, *words)
    assert status == 1 and message in errors


def test_a_teacher_of_another_class_count(image_folder, tmp_path, main):
    saved = tmp_path / "five.pth"
    net = timm.create_model("visformer_tiny", num_classes=5, img_size=32)
    kwargs = {"num_classes": 5, "img_size": 32}
    content = {"model": net.state_dict(), "model_name": "visformer_tiny", "model_kwargs": kwargs}
    words = ["--teacher-path", saved, "--distillation-type", "hard", "--epochs", 1]
    for what in (content, net.state_dict()):
        torch.save(what, saved)
        words += ["--teacher-model", "visformer_tiny"]
        status, _, errors = main(*SMALL, "--data-path", image_folder, *words)
        assert status == 1 and "knows 5 classes, the training set has 2" in errors
