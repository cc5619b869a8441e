"""``--fsdp``: sharded runs train, stop, resume and evaluate as runs of whole replicas do."""

import json
import re
import shutil
import signal
from argparse import Namespace

import pytest
import torch
from conftest import (
    free_port,
    read_log,
    run_python,
    same_log,
    same_state,
    together,
    write_images,
)
from test_distributed import accuracy_lines

from training.fsdp import check
from utils import UserError

RUN = [
    *("--model", "visformer_tiny", "--input-size", 32, "--batch-size", 2, "--num_workers", 0),
    *("--epochs", 2, "--warmup-epochs", 1, "--model-ema-decay", 0.9, "--log-interval", 1),
    *("--drop-path", 0.3, "--drop", 0.1, "--no-repeated-aug"),
    *("--device", "cpu", "--no-channels-last"),  # weights that are sharded have the plain layout
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """20 training images, and 8 for evaluation: two processes have 2 and 1 batches of those."""
    return write_images(tmp_path_factory.mktemp("data") / "images", train=10, val=4)


@pytest.fixture(scope="module")
def replicas(images, tmp_path_factory):
    """A run of two whole replicas."""
    folder = tmp_path_factory.mktemp("replicas")
    words = [*RUN, "--data-path", images, "--output_dir", folder]
    codes, _, errors = together(2, [*words, "--keep-checkpoints", 2])
    assert codes == [0, 0], errors
    return folder


@pytest.fixture(scope="module")
def sharded(images, tmp_path_factory):
    """The same, sharded, and what it printed."""
    folder = tmp_path_factory.mktemp("sharded")
    words = [*RUN, "--data-path", images, "--output_dir", folder, "--fsdp"]
    codes, output, errors = together(2, words)
    assert codes == [0, 0], errors
    return folder, output


def losses(folder):
    return [
        {key: value for key, value in line.items() if key.endswith("loss")}
        for line in read_log(folder)
    ]


def test_two_ranks_train_bit_by_bit_as_replicas_do(replicas, sharded):
    folder, _ = sharded
    assert len(losses(folder)) == 2
    assert same_log(folder, replicas)
    assert same_state(folder, replicas)
    one, other = (torch.load(f / "checkpoint.pth", weights_only=True) for f in (folder, replicas))
    assert one.keys() == other.keys()
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert {type(value) for value in one["model"].values()} == {torch.Tensor}


def test_digits_on_three_ranks_with_accumulation(tmp_path):
    run = ["--model", "test_vit", "--input-size", 32, "--batch-size", 160, "--num_workers", 0]
    run += ["--device", "cpu", "--epochs", 1, "--accum-iter", 2, "--opt", "momentum"]
    run += ["--grad-checkpointing", "--warmup-epochs", 0, "--model-ema-decay", 0.9]
    run += ["--clip-grad", 0.5]
    for name, flags in (("replicas", []), ("sharded", ["--fsdp"])):
        codes, _, errors = together(3, [*run, *flags, "--output_dir", tmp_path / name])
        assert codes == [0] * 3, errors
    # sums over three are of another order; float32 has steps of 6e-8
    (line,), (other,) = (losses(tmp_path / name) for name in ("sharded", "replicas"))
    assert line == pytest.approx(other, rel=1e-5)
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("sharded", "replicas")
    )
    for key in ("model", "model_ema"):
        for name, value in one[key].items():
            torch.testing.assert_close(value, other[key][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def stopped(images, tmp_path_factory):
    """The folder of a sharded run that a signal stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    words = [*RUN, "--data-path", images, "--output_dir", folder, "--fsdp"]
    codes, output, errors = together(2, words, 1, signal.SIGTERM, "epoch 1 step 1/")
    assert codes == [0, 0], errors
    assert re.search(r"stopped by SIGTERM in epoch 1 after step [1-4];", output)
    return folder


def test_what_is_stopped_goes_on_bit_by_bit(images, sharded, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    words = [*RUN, "--data-path", images, "--output_dir", tmp_path / "run", "--fsdp"]
    codes, output, errors = together(2, [*words, "--resume", "auto"])
    assert codes == [0, 0], errors
    assert "going on in epoch 1 after step" in output
    assert same_log(tmp_path / "run", sharded[0])
    assert same_state(tmp_path / "run", sharded[0])


def test_a_checkpoint_is_evaluated_by_one_process(images, sharded):
    folder, output = sharded
    flags = ["--eval", "--resume", folder / "checkpoint.pth", "--data-path", images]
    done = run_python("main.py", *flags, "--batch-size", 2, "--num_workers", 0, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert len(accuracy_lines(output)) == 4
    assert accuracy_lines(done.stdout) == accuracy_lines(output)[-2:]


def test_one_process_goes_on_without_shards(images, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    before = torch.load(stopped / "checkpoint.pth", weights_only=True)
    words = ["main.py", *RUN, "--data-path", images, "--output_dir", tmp_path / "run"]
    done = run_python(*words, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "epoch 1 was begun by 2 process(es)" in done.stdout
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0, 1]
    after = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    steps = [{s["step"].item() for s in c["optimizer"]["state"].values()} for c in (before, after)]
    left = 10 - 2 * before["step"]  # of 20 images two each
    assert steps[1] == {steps[0].pop() + left}


def test_a_run_of_replicas_goes_on_in_shards(images, replicas, tmp_path):
    words = [*RUN, "--data-path", images, "--output_dir", tmp_path, "--fsdp"]
    codes, _, errors = together(2, [*words, "--resume", replicas / "checkpoint-0000.pth"])
    assert codes == [0, 0], errors
    assert losses(tmp_path) == losses(replicas)[1:]
    assert same_state(tmp_path, replicas)


SHARDS = """
import copy, json, multiprocessing, os, sys, timm, torch, torch.distributed as dist
import engine, models, utils
from training import sharding
from training.sharding import ShardedAverage, gather, gathered, shard, shard_optimizer_state

torch.set_num_threads(1)
CPU = torch.device("cpu")


def build(name, seed=0):
    torch.manual_seed(seed)
    return timm.create_model(name, img_size=32, num_classes=5)


def local_bytes(tensors):
    return sum(t.to_local().numel() for t in tensors) / sum(t.numel() for t in tensors)


def check(name, rank, world):
    model, plain = build(name), build(name)
    average = ShardedAverage(model, 0.9)
    blocks = sharding.find_blocks(model)
    shard(model, CPU)
    shard(average.module, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
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
    second = torch.optim.AdamW(twin.parameters(), lr=1e-3, fused=True)
    run_state.restore_optimizer(second, shard_optimizer_state(second, moments), "here")
    again = gather(second.state_dict(), True)["state"]
    reloaded = gather(twin.state_dict(), True)
    plain.load_state_dict(after)
    plain.eval()
    outputs = []
    with gathered(twin.eval()), torch.inference_mode():
        for _ in range(rank):  # none on the first process: whoever waited for it would hang
            outputs.append(torch.equal(twin(images), plain(images)))
    return {
        "blocks": len(blocks),
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


def work(name, rank, world, port):
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    found = check(name, rank, world)
    os.write(1, f"{json.dumps([name, world, rank, found])}\\n".encode())
    dist.destroy_process_group()


cases = [("visformer_tiny", 2), ("test_vit", 3)]
for (name, world), port in zip(cases, map(int, sys.argv[1:])):
    context = multiprocessing.get_context("fork")
    places = [(name, rank, world, port) for rank in range(world)]
    processes = [context.Process(target=work, args=place) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
"""


def test_shards_are_shards_and_make_a_whole(tmp_path):
    script = tmp_path / "shards.py"
    script.write_text(SHARDS)
    done = run_python(script, *(free_port() for _ in range(2)), timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 + 3
    for name, world, rank, found in lines:
        assert found["blocks"] == {"visformer_tiny": 15, "test_vit": 6}[name]
        for key in ("weights", "moments", "other moments", "average", "resharded"):
            assert found[key] == pytest.approx(1 / world, abs=0.03), (name, world, rank, key)
        assert found["skipped"] == [True, False]  # the bad gradient was of one process
        assert found["scale"] == 2.0
        assert found["average off"] < 1e-6
        assert found["reloaded"] and found["moments reloaded"]
        assert found["outputs"] == [True] * rank
        assert found["dropped"]


@pytest.mark.parametrize(
    ("flags", "processes", "message"),
    [
        ({}, 1, "--fsdp shares a model among processes, and there is one"),
        ({"compile": "eager"}, 2, "--fsdp does not go with --compile"),
        ({"model_ema": True, "model_ema_force_cpu": True}, 2, "leave --model-ema-force-cpu out"),
    ],
)
def test_what_does_not_go_together_is_said(flags, processes, message):
    plain = {"compile": None, "model_ema": False, "model_ema_force_cpu": True}
    check(Namespace(**plain), 2)
    with pytest.raises(UserError, match=message):
        check(Namespace(**plain | flags), processes)


def test_one_process_is_told_what_to_start(main):
    status, _, errors = main(*RUN, "--fsdp")
    assert status == 1
    assert re.fullmatch(r"error: --fsdp shares .* by torchrun --nproc_per_node\n", errors)
