"""``--fsdp``: sharded runs train, stop, resume and evaluate as runs of whole replicas do."""

import copy
import shutil
import signal
from argparse import Namespace

import pytest
import timm
import torch
from conftest import accuracy_lines, error_of, read_log, run_ranks, same_run, succeed, write_images
from loading import flags
from ranks import group
from test_stop import first_step, saved_step
from timm.optim import list_optimizers
from torch import nn
from torch.optim import AdamW

import models
from main import main
from tests.crash.compare import differing_bits
from training import optimizers
from training.blocks import find_blocks
from training.fsdp import (
    check,
    gather,
    gathered,
    shard,
    shard_optimizer_state,
)
from training.joined import MovingAverage
from utils import UserError

CPU = torch.device("cpu")
RUN = [
    *("--model", "test_resnet", "--input-size", 32, "--batch-size", 2, "--num_workers", 0),
    *("--epochs", 2, "--warmup-epochs", 1, "--model-ema-decay", 0.9, "--log-interval", 1),
    *("--drop-path", 0.3, "--drop", 0.1, "--no-repeated-aug", "--keep-checkpoints", 2),
    *("--device", "cpu", "--no-channels-last"),  # weights that are sharded have the plain layout
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Flags, with 20 images to train and 8 to evaluate: two ranks have 2 and 1 batches of those."""
    images = write_images(tmp_path_factory.mktemp("data") / "images", train=10, val=4)
    return [*RUN, "--data-path", images, "--output_dir"]


@pytest.fixture(scope="module")
def replicas(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    run_ranks(2, [*run, folder])
    return folder


@pytest.fixture(scope="module")
def sharded(run, tmp_path_factory):
    """The same, sharded, and its output."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_ranks(2, [*run, folder, "--fsdp"])


def losses(folder):
    return [
        {key: value for key, value in line.items() if key.endswith("loss")}
        for line in read_log(folder)
    ]


def load(*folders):
    return [torch.load(f / "checkpoint.pth", weights_only=True) for f in folders]


def test_two_ranks_train_bitwise_as_replicas_do(replicas, sharded):
    folder, _ = sharded
    assert len(losses(folder)) == 2
    assert same_run(folder, replicas)
    one, other = load(folder, replicas)
    assert one.keys() == other.keys()
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert {type(value) for value in one["model"].values()} == {torch.Tensor}


def test_three_ranks_with_accumulation(run, tmp_path):
    flags = ["--model", "test_vit", "--epochs", 1, "--accum-iter", 2]
    flags += ["--opt", "momentum", "--grad-checkpointing", "--clip-grad", 0.5, "--warmup-epochs", 0]
    folders = [tmp_path / name for name in ("replicas", "sharded")]
    for folder, fsdp in zip(folders, ([], ["--fsdp"]), strict=True):
        run_ranks(3, [*run, folder, *flags, *fsdp])
    # sums over three are of another order; float32 has steps of 6e-8
    (line,), (other,) = map(losses, folders)
    assert line == pytest.approx(other, rel=1e-5)
    one, other = load(*folders)
    for key in ("model", "model_ema"):
        for name, value in one[key].items():
            torch.testing.assert_close(value, other[key][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory):
    """The folder of a sharded run that a signal stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    stop = {"rank": 1, "number": signal.SIGTERM, "line": "epoch 1 step 1/"}
    run_ranks(2, [*run, folder, "--fsdp"], **stop)
    epoch, step = saved_step(folder)
    assert epoch == 1 and 1 <= step <= 4
    return folder


def test_a_stopped_run_resumes_bitwise(run, sharded, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    output = run_ranks(2, [*run, tmp_path / "run", "--fsdp", "--resume", "auto"])
    epoch, step = saved_step(stopped)
    assert first_step(output) == (epoch, step + 1)
    assert same_run(tmp_path / "run", sharded[0])


def test_a_checkpoint_is_evaluated_by_one_process(run, sharded):
    folder, output = sharded
    found = succeed("--eval", "--resume", folder / "checkpoint.pth", *run[:-1])
    assert len(accuracy_lines(output)) == 4
    assert accuracy_lines(found) == accuracy_lines(output)[-2:]


def test_one_process_resumes_without_shards(run, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    output = succeed(*run, tmp_path / "run", "--resume", "auto")
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0, 1]
    before, after = load(stopped, tmp_path / "run")
    # of 20 images, two ranks have had two each per step
    assert first_step(output) == (1, 2 * before["step"] + 1)
    steps = [{s["step"].item() for s in c["optimizer"]["state"].values()} for c in (before, after)]
    assert steps[1] == {steps[0].pop() + 10 - 2 * before["step"]}


def test_a_run_of_replicas_resumes_in_shards(run, replicas, tmp_path):
    run_ranks(2, [*run, tmp_path, "--fsdp", "--resume", replicas / "checkpoint-0000.pth"])
    assert losses(tmp_path) == losses(replicas)[1:]
    assert differing_bits(*load(tmp_path, replicas)) == 0


def build(name, seed=0):
    torch.manual_seed(seed)
    return models.build_model(name, {"num_classes": 5}, {"img_size": 32})[0]


def local_bytes(tensors):
    return sum(t.to_local().numel() for t in tensors) / sum(t.numel() for t in tensors)


def shards(rank, world, name):
    """Measurements of two steps, of which the first is skipped, and of what is saved of them."""
    model, plain = build(name), build(name)
    average = MovingAverage(model, 0.9)
    shard(model, CPU)
    shard(average.module, CPU)
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
    before = gather(model.state_dict(), True)
    skipped = []
    for bad_rank in (world - 1, None):
        scaler.scale(model.train()(images).square().mean()).backward()
        if rank == bad_rank:
            gradients = [parameter.grad.to_local() for parameter in model.parameters()]
            next(g for g in gradients if g.numel()).view(-1)[0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update(model, step=9)
        after = gather(model.state_dict(), True)
        skipped.append(all(torch.equal(after[n], before[n]) for n, _ in plain.named_parameters()))
    mean = gather(average.module.state_dict(), True)
    wanted = {n: before[n].lerp(after[n], 0.1) for n, _ in plain.named_parameters()}
    moments = gather(optimizer.state_dict(), True)

    # whole tensors, into other shards and into a model that has none
    twin = build(name, seed=1)
    shard(twin, CPU)
    twin.load_state_dict(after)
    second = AdamW(twin.parameters(), lr=1e-3, fused=True)
    optimizers.restore(second, shard_optimizer_state(second, moments), "here")
    again = gather(second.state_dict(), True)["state"]
    reloaded = gather(twin.state_dict(), True)
    plain.load_state_dict(after)
    plain.eval()
    outputs = []
    with gathered(twin.eval()), torch.inference_mode():
        for _ in range(rank):  # none on the first process: whoever waited for it would hang
            outputs.append(torch.equal(twin(images), plain(images)))
    return {
        "weights": local_bytes(list(model.parameters())),
        "moments": local_bytes([s["exp_avg"] for s in optimizer.state.values()]),
        "other moments": local_bytes([s["exp_avg"] for s in second.state.values()]),
        "average": local_bytes(list(average.module.parameters())),
        "resharded": local_bytes(list(twin.parameters())),
        "skipped": skipped,
        "scale": scaler.get_scale(),
        "average off": max((mean[n] - w).abs().max().item() for n, w in wanted.items()),
        "reloaded": all(torch.equal(v, reloaded[n]) for n, v in after.items()),
        "moments reloaded": all(
            torch.equal(v, again[i][k]) for i, s in moments["state"].items() for k, v in s.items()
        ),
        "outputs": outputs,
        "dropped": gather(next(model.parameters()), False) is None,
    }


@pytest.mark.parametrize(("name", "world"), [("test_resnet", 2), ("test_vit", 3)])
def test_shards_are_parts_of_a_whole(name, world):
    for rank, found in enumerate(group(shards, world, name)):
        for key in ("weights", "moments", "other moments", "average", "resharded"):
            assert found[key] == pytest.approx(1 / world, abs=0.03), (rank, key)
        assert found["skipped"] == [True, False]  # the bad gradient was of one process
        assert found["scale"] == 2.0
        assert found["average off"] < 1e-6
        assert found["reloaded"] and found["moments reloaded"]
        assert found["outputs"] == [True] * rank
        assert found["dropped"]


def steps(model, optimizer, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(4, 3, 2, 2, generator=generator)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def trained_shards(rank, world, names):
    """For each optimizer: the largest difference from a whole model's weights, relative to the
    largest step; and whether it resumes bitwise. None if it is refused."""

    def build(name):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 2), nn.Flatten(), nn.Linear(16, 17))
        return model, flags("--opt", name, "--fsdp")

    def sharded(name, weights):
        model, args = build(name)
        shard(model, CPU)
        model.load_state_dict(weights)
        optimizer = optimizers.build(args, model, 0.01)
        optimizers.check(optimizer, args, world)
        return model, optimizer

    found = {}
    for name in names:
        whole, args = build(name)
        first = copy.deepcopy(whole.state_dict())
        steps(whole, optimizers.build(args, whole, 0.01), range(7))
        try:
            model, optimizer = sharded(name, first)
        except UserError:
            found[name] = None
            continue
        steps(model, optimizer, range(7))
        saved = gather((model.state_dict(), optimizers.full_state(optimizer)), True)
        weights, state = copy.deepcopy(saved)
        off, moved = (
            max(
                (value - other[key]).abs().max().item() for key, value in whole.state_dict().items()
            )
            for other in (weights, first)
        )
        steps(model, optimizer, range(7, 10))
        twin, other = sharded(name, weights)
        optimizers.restore(other, shard_optimizer_state(other, state), "here")
        steps(twin, other, range(7, 10))
        ends = [gather(each.state_dict(), True) for each in (model, twin)]
        same = all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
        found[name] = off / moved, same
    return found


def test_every_optimizer_trains_shards_as_a_whole_or_is_refused():
    names = [name for name in list_optimizers() if not name.startswith(("bnb", "fused", "kron"))]
    names.remove("adahessian")  # its gradients of the whole model need another loop
    for found in group(trained_shards, 2, [*names, "lookahead_adamw", "lookahead_lamb"]):
        assert found["muon"] is found["cadamw"] is None
        assert sum(result is not None for result in found.values()) > len(names) / 2
        for name, result in found.items():
            assert result is None or (result[0] < 1e-4 and result[1]), (name, result)


def random_steps(rank, world):
    timm.optim.kron.has_dynamo = False  # of this process; compiling takes long
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 3))
    optimizer = optimizers.build(flags("--opt", "kron"), model.module, 0.01)
    torch.manual_seed(rank)
    steps(model, optimizer, range(3))
    return model.module.weight.detach()


def test_random_steps_are_equal_on_all_ranks():
    first, second = group(random_steps, 2)
    assert torch.equal(first, second)


BLOCKS = {"compile": "inductor", "compile_blocks": True}


@pytest.mark.parametrize(("name", "blocks"), [("visformer_tiny", 15), ("test_vit", 6)])
def test_blocks(name, blocks):
    assert len(find_blocks(timm.create_model(name))) == blocks


@pytest.mark.parametrize(
    ("flags", "processes", "named"),
    [
        ({}, 1, "--nproc_per_node"),
        ({"compile": "eager"}, 2, "--compile-blocks"),
        ({"compile_mode": "reduce-overhead", **BLOCKS}, 2, "--compile-mode reduce-overhead"),
        ({"model_ema": True, "model_ema_force_cpu": True}, 2, "--model-ema-force-cpu"),
    ],
)
def test_contradicting_flags_are_named(flags, processes, named):
    plain = {"compile": None, "compile_blocks": False, "compile_mode": None}
    plain |= {"model_ema": False, "model_ema_force_cpu": True}
    check(Namespace(**plain), 2)
    check(Namespace(**plain | BLOCKS), 2)
    with pytest.raises(UserError, match=f"--fsdp .*{named}"):
        check(Namespace(**plain | flags), processes)


def test_a_single_process_cannot_shard():
    assert "--fsdp" in error_of(main, *RUN, "--fsdp")


def test_compiled_blocks_train_as_plain_ones_do(run, sharded, tmp_path):
    run_ranks(2, [*run, tmp_path, "--fsdp", "--compile", "aot_eager", "--compile-blocks"])
    for line, other in zip(losses(tmp_path), losses(sharded[0]), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
