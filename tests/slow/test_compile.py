"""Compiled models: graphs, values, resuming, and flags that contradict each other."""

import copy

import pytest
import timm
import torch
from conftest import error_of, read_log, succeed
from ranks import group
from small_models import small
from torch._dynamo.utils import counters

import engine
from main import main
from training.compilation import compiled
from training.ddp import distribute
from training.joined import draw_together
from utils import UserError

KINDS_OF_BLOCKS = {
    **{"visformer_tiny": 3, "swin_visformer_small_v2": 5, "convit_tiny": 2, "fastvit_t8": 4},
    "vit_b_16_224": 1,
}
FAMILIES = list(KINDS_OF_BLOCKS)
CPU = torch.device("cpu")
RUN = [
    *("--input-size", 32, "--batch-size", 2, "--num_workers", 0, "--device", "cpu"),
    *("--epochs", 2, "--warmup-epochs", 1, "--model-ema-decay", 0.9, "--log-interval", 1),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def batch_of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def step(net, x):
    net(x).square().mean().backward()


def graphs():
    """Number of graphs captured so far, in none of which the code breaks off."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_one_graph_from_the_first_step_on(name):
    net, x = compiled(small(name).train(), "eager"), batch_of(2, 3, 64, 64)
    for _ in range(2):
        step(net, x)
        assert graphs() == 1
    net.eval()
    for _ in range(2):
        with torch.inference_mode():
            net(x)
        assert graphs() == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_blocks_share_a_graph(name):
    deeper = {"depth": 4} if name.startswith(("vit", "convit")) else {}
    plain = small(name, **deeper).train()
    net = compiled(copy.deepcopy(plain), "eager", None, blocks=True)
    x = batch_of(2, 3, 64, 64)
    step(plain, x)
    step(net, x)
    first = graphs()
    assert 0 < first <= KINDS_OF_BLOCKS[name]
    step(net, x)
    assert graphs() == first
    step(plain, x)
    for (key, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), key


@pytest.mark.parametrize(("together", "count"), [(True, 4), (False, 15)])
def test_blocks_that_drop_other_shares(together, count):
    net = timm.create_model("visformer_tiny", img_size=64, drop_path_rate=0.1)
    if together:
        draw_together(net)
    compiled(net, "eager", None, blocks=True)
    for _ in range(2):
        step(net, batch_of(2, 3, 64, 64))  # PyTorch gives up after 8 graphs, if not told otherwise
        assert graphs() == count


def test_copies_are_plain_and_compiling_again_changes_nothing():
    model = small("vit_b_16_224")
    net = compiled(model, "eager")
    assert net is model is compiled(net, "eager") and engine.is_compiled(net)
    assert list(net.state_dict()) == list(small("vit_b_16_224").state_dict())
    assert not engine.is_compiled(copy.deepcopy(net))
    assert engine.is_compiled(compiled(copy.deepcopy(net), "eager", None, blocks=True))
    assert not engine.is_compiled(compiled(copy.deepcopy(net), None))


def test_recomputed_blocks_count_a_batch_once():
    plain = small("visformer_tiny").train()
    plain.set_grad_checkpointing()
    whole, parts = (
        compiled(copy.deepcopy(plain), "aot_eager", None, blocks) for blocks in (False, True)
    )
    x = batch_of(2, 3, 64, 64)
    for model in (plain, whole, parts):
        step(model, x)
    for net in (whole, parts):
        for (key, ours), theirs in zip(net.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=key)
        for (key, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6, key
    first = graphs()
    step(parts, x)  # the second pass is the graph of the first one
    assert graphs() == first <= 1 + 3


def test_a_new_size_is_one_more_graph(tmp_path, images):
    run = [*RUN, "--model", "test_resnet", "--data-path", images, "--progressive-sizes", 24, 32]
    run += ["--compile", "eager", "--output_dir"]
    succeed(*run, tmp_path / "compiled")
    assert graphs() == 3  # two sizes to train with, one to evaluate
    succeed(*run[:-3], "--output_dir", tmp_path / "plain")
    for one, two in zip(
        *(read_log(tmp_path / name) for name in ("compiled", "plain")), strict=True
    ):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-5)
        assert one["ema_loss"] == pytest.approx(two["ema_loss"], rel=1e-5)


def test_a_model_without_blocks_is_named():
    with pytest.raises(UserError, match="--compile-blocks: Linear"):
        compiled(torch.nn.Linear(2, 2), "eager", None, blocks=True)


def distributed_steps(rank, world, blocks):
    plain = small("convit_tiny").train()
    net = distribute(compiled(copy.deepcopy(plain), "aot_eager", None, blocks), CPU, False)
    theirs = distribute(plain, CPU)
    x = batch_of(2, 3, 64, 64) + rank
    for _ in range(2):
        step(net, x)
        step(theirs, x)
    pairs = zip(net.parameters(), theirs.parameters(), strict=True)
    return graphs(), max(((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in pairs)


@pytest.mark.parametrize(("blocks", "most"), [(False, 1), (True, 2)])
def test_ranks_average_gradients_of_unbroken_graphs(blocks, most):
    for count, error in group(distributed_steps, 2, blocks):
        assert count == most
        assert error < 1e-3


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--compile-mode", "max-autotune"], "--compile-mode max-autotune"),
        (["--compile-blocks"], "--compile-blocks"),
        (["--compile", "eager", "--compile-mode", "reduce-overhead"], "--compile eager"),
        (["--compile", "gcc"], "--compile gcc"),
        (["--compile", "--compile-mode", "max-autotune", "--deterministic"], "--deterministic"),
        (["--compile", "--compile-mode", "reduce-overhead"], "cpu"),
        (["--fsdp", "--compile", "eager"], "--fsdp"),
    ],
)
def test_flags_that_contradict_each_other_are_named(flags, named, images):
    assert named in error_of(main, *RUN, "--model", "test_resnet", "--data-path", images, *flags)
