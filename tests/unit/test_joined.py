"""Small kernels of a step, joined: the results are those of a step without."""

import copy

import pytest
import torch
from small_models import small
from timm.utils import ModelEmaV3
from torch import nn

from models.layers import DropPath
from training.joined import MovingAverage, join_kernels

FAMILIES = ["visformer_tiny", "swin_visformer_small_v2", "convit_tiny", "fastvit_sa12"]
FAMILIES += ["vit_b_16_224"]
pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(model, images, dtype, steps=2):
    """Gradients of ``steps`` backward passes, added up, and the buffers after them."""
    for _ in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(images).float().square().sum()
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same(name, dtype):
    model = small(name).train()
    frozen = [p for key, p in model.named_parameters() if "stem" in key or "patch_embed" in key]
    for parameter in frozen[:1]:
        parameter.requires_grad_(False)
    joined = copy.deepcopy(model)
    join_kernels(joined)
    joined = copy.deepcopy(joined)  # as a moving average copies it
    images = torch.randn(2, 3, 64, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected, found = (gradients(net, images, dtype) for net in (model, joined))
    assert expected.keys() == found.keys() and joined.state_dict().keys() == before.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert all(isinstance(value, nn.Parameter) for value in joined.parameters())
    counters = [value for key, value in joined.named_buffers() if key.endswith("batches_tracked")]
    assert all(value == 2 for value in counters)


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed_blocks_give_the_same_gradients(name):
    model = small(name).train()
    recomputed = copy.deepcopy(model)
    recomputed.set_grad_checkpointing(True)
    images = torch.randn(2, 3, 64, 64)
    for net in (model, recomputed):
        join_kernels(net)
    expected, found = (gradients(net, images, torch.bfloat16) for net in (model, recomputed))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_paths_are_dropped_at_their_rates():
    paths = [DropPath(rate) for rate in (0.0, 0.25, 0.5)]
    model = nn.Sequential(*paths)
    join_kernels(model)
    count = 20000
    torch.manual_seed(0)
    found = model(torch.ones(count, 1))
    kept = 1 / (0.75 * 0.5)
    assert set(found.flatten().tolist()) == {0.0, torch.tensor(kept).item()}
    assert abs((found > 0).double().mean() - 0.75 * 0.5) < 4 * (0.375 * 0.625 / count) ** 0.5
    assert torch.equal(model.eval()(torch.ones(3, 1)), torch.ones(3, 1))


def test_a_path_that_is_used_twice_draws_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.path = DropPath(0.5)

        def forward(self, x):
            return torch.stack([self.path(x), self.path(x)])

    model = Twice()
    join_kernels(model)
    torch.manual_seed(0)
    first, second = model(torch.ones(100, 1)) > 0
    assert 20 < (first != second).sum() < 80


def test_norms_count_their_calls_and_an_error_leaves_nothing_behind():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.linear = nn.Linear(2, 2)

        def forward(self, x, fail=False):
            x = self.linear(self.twice(self.twice(x)))
            if fail:
                raise ValueError("failed")
            return x

    model = Uneven()
    join_kernels(model)
    with pytest.raises(ValueError, match="failed"), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 2), fail=True)
    assert model.twice.num_batches_tracked == 2
    assert isinstance(model.linear.weight, nn.Parameter)
    model(torch.randn(4, 2))
    assert (model.twice.num_batches_tracked, model.never.num_batches_tracked) == (4, 0)


def test_the_average_is_timms():
    model = small("visformer_tiny").train()
    ours, theirs = MovingAverage(model, 0.9), ModelEmaV3(model, 0.9)
    for step in range(1, 4):
        with torch.no_grad():
            model(torch.randn(2, 3, 64, 64))
            for parameter in model.parameters():
                parameter.mul_(1.1)
        ours.update(model, step)
        theirs.update(model, step)
    for key, value in theirs.module.state_dict().items():
        assert torch.equal(ours.module.state_dict()[key], value), key
