"""Classes that differ in size: weights in the loss, and balanced sampling."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from loading import flags
from timm.data import Mixup

from samplers import RASampler
from training import losses
from training.class_weights import class_weights
from utils import UserError

COUNTS = (60, 25, 10, 5)
TARGETS = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
CLASSES = ["a", "b", "c", "d"]


def draws_of(epoch, world=1, batch_size=8, repeats=1):
    """Return the samples of an epoch on every rank, in turn."""
    ranks = []
    for rank in range(world):
        sampler = RASampler(100, world, rank, batch_size, repeats, seed=3, targets=TARGETS)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
    return [draw for step in zip(*ranks, strict=True) for draw in step]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_class_is_drawn_equally_often(world, repeats):
    for epoch in range(3):
        draws = draws_of(epoch, world, repeats=repeats)
        assert 100 <= len(draws) < 100 + world
        counts = Counter(TARGETS[list(map(int, draws))].tolist())
        assert max(counts.values()) - min(counts.values()) <= 2 * repeats
        assert len({(int(draw), draw.copy) for draw in draws}) == len(draws)  # none seen twice


def test_an_image_comes_again_after_all_of_its_class():
    seen = Counter()
    for epoch in range(12):  # 300 draws of each class
        seen.update(map(int, draws_of(epoch)))
    for name, count in enumerate(COUNTS):
        own = [seen[image] for image in range(100) if TARGETS[image] == name]
        assert sum(own) == 300
        assert (min(own), max(own)) == (300 // count, -(-300 // count))


def test_ranks_share_the_draws_of_one_process():
    assert draws_of(2, 2, 4)[:100] == draws_of(2, 1, 8)
    assert draws_of(2) != draws_of(1)


def test_an_interrupted_epoch_goes_on():
    whole, state = draws_of(1), RASampler(100, 1, 0, 8, 1, seed=3, targets=TARGETS)
    state.set_epoch(1)
    rest = RASampler(100, 1, 0, 8, 1, seed=3, targets=TARGETS)
    rest.load_state_dict(state.state_dict(5))
    assert [*itertools.islice(whole, 40), *rest] == whole
    with pytest.raises(ValueError, match="balanced"):
        RASampler(100, 1, 0, 8, 1, seed=3).load_state_dict(state.state_dict(5))
    with pytest.raises(ValueError, match=r"\b3\b.*\b100\b"):
        RASampler(100, targets=[0, 1, 2])


def test_balanced_weights_give_every_class_the_same_part():
    weights = class_weights("balanced", CLASSES, TARGETS.numpy())
    torch.testing.assert_close(weights * torch.tensor(COUNTS), torch.full((4,), 25.0))
    assert class_weights(None, CLASSES, TARGETS.numpy()) is None


def test_weights_of_a_file(tmp_path):
    file = tmp_path / "weights.csv"
    file.write_text("d,8\nb, 2\n\na,1\nc,0\n", encoding="utf-8-sig")
    weights = class_weights(str(file), CLASSES, TARGETS.numpy())
    torch.testing.assert_close(weights / weights[0], torch.tensor([1.0, 2.0, 0.0, 8.0]))
    torch.testing.assert_close(weights[TARGETS].mean(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a,1\nb,1\nc,1\n", "d"),
        ("a,1\nb,1\nc,1\nd,1\nx,1\n", "x"),
        ("a,1\nb,1\nc,1\nd,1\na,2\n", "line 5.*a"),
        ("a,1\nb,-1\n", "line 2.*-1"),
        ("a,1\nb,nan\n", "line 2.*nan"),
        ("a,1\nb\n", "line 2.*b"),
        ("a,0\nb,0\nc,0\nd,0\n", "above 0"),
        (b"\xff\xfea\x00", "weights.csv"),
        (None, "weights.csv"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, text, named):
    file = tmp_path / "weights.csv"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=named):
        class_weights(str(file), CLASSES, TARGETS.numpy())


def test_a_class_without_images_has_no_balanced_weight():
    with pytest.raises(UserError, match="d"):
        class_weights("balanced", CLASSES, np.array([0, 1, 2]))


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 3.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weighted_loss_is_its_formula(smoothing):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    args = flags("--smoothing", smoothing, "--mixup", 0, "--cutmix", 0)
    loss = losses.build_criterion(args, None, 4, WEIGHT)(logits, targets)
    soft = torch.full((6, 4), smoothing / 4, dtype=torch.float64)
    soft[torch.arange(6), targets] += 1 - smoothing
    wanted = -(WEIGHT.double() * soft * logits.double().log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


def test_the_weights_apply_to_mixed_targets_and_binary_losses():
    torch.manual_seed(0)
    logits, images = torch.randn(4, 4), torch.randn(4, 3, 8, 8)
    args = flags("--mixup", 0.8)
    mixup = losses.build_mixup(args, 4)
    assert isinstance(mixup, Mixup)
    _, soft = mixup(images, torch.tensor([0, 1, 2, 3]))
    loss = losses.build_criterion(args, mixup, 4, WEIGHT)(logits, soft)
    wanted = -(WEIGHT * soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, wanted)
    args = flags("--bce-loss", "--mixup", 0, "--cutmix", 0, "--smoothing", 0)
    loss = losses.build_criterion(args, None, 4, WEIGHT)(logits, torch.tensor([0, 1, 2, 3]))
    parts = torch.where(torch.eye(4).bool(), logits.sigmoid(), 1 - logits.sigmoid()).log()
    torch.testing.assert_close(loss, -(WEIGHT * parts).mean())
