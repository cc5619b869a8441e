"""main.py from the outside: train, stop, resume, evaluate, and what it says to bad input."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    ROOT,
    clean_env,
    read_log,
    run_python,
    same_log,
    same_state,
    start_python,
    write_images,
)

import models

SMALL = ["--model", "visformer_tiny", "--input-size", 32, "--batch-size", 4, "--num_workers", 0]
RICH = [
    *SMALL,
    *("--epochs", 3, "--warmup-epochs", 1, "--accum-iter", 3, "--clip-grad", 1.0),
    *("--amp", "--amp-dtype", "bfloat16", "--model-ema-decay", 0.9, "--qk-scale-factor", -0.5),
]


def accuracy_lines(output):
    return [line for line in output.splitlines() if "* Acc@1" in line]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images", train=12, val=5)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The folder of a finished run of three epochs, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_python("main.py", *RICH, "--data-path", images, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_output_folder(trained):
    folder, output = trained
    names = {entry.name for entry in folder.iterdir()}
    assert {"checkpoint.pth", "best.pth", "log.txt", "args.yaml"} < names
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    deit = {"model", "model_ema", "optimizer", "lr_scheduler", "scaler", "epoch", "args"}
    assert deit < set(checkpoint)
    assert checkpoint["model_name"] == "visformer_tiny"
    assert checkpoint["model_kwargs"]["qk_scale_factor"] == -0.5
    assert (checkpoint["epoch"], checkpoint["input_size"]) == (2, 32)
    log = read_log(folder)
    wanted = {"train_loss", "train_lr", "test_acc1", "test_acc5", "test_loss", "ema_acc1"}
    assert all(wanted | {"epoch", "n_parameters"} <= set(line) for line in log)
    assert [line["epoch"] for line in log] == [0, 1, 2]
    assert log[0]["train_lr"] != log[1]["train_lr"]
    assert checkpoint["best_acc1"] == max(line["test_acc1"] for line in log)
    assert f"{log[-1]['test_acc1']:.3f}" in accuracy_lines(output)[-2]
    assert "learning rate 1.17188e-05 (--lr 0.0005) for 12 images per step" in output


def test_tensorboard_events(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0]))
    events.Reload()
    scalars = {"train/loss", "train/lr", "train/images_per_second", "test/acc1", "ema/acc1"}
    assert scalars <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("test/acc1")] == [0, 1, 2]
    assert [image.step for image in events.Images("train/images")] == [0]


def test_stopped_and_resumed_is_the_same_run(images, trained, tmp_path, main):
    folder, _ = trained
    run = [*RICH, "--data-path", images, "--output_dir", tmp_path]
    status, output, _ = main(*run, "--resume", "auto", "--stop-epoch", 1)
    assert status == 0
    assert "starting afresh" in output
    assert "stopped before epoch 1 of 3" in output
    assert [line["epoch"] for line in read_log(tmp_path)] == [0]
    status, output, _ = main(*run, "--resume", "auto", "--num_workers", 1)
    assert status == 0
    assert same_log(tmp_path, folder)
    assert same_state(tmp_path, folder)
    status, output, _ = main(*run, "--resume", "auto")
    assert status == 0
    assert "nothing left to train" in output
    assert same_log(tmp_path, folder)


def test_killed_and_resumed_is_the_same_run(images, trained, tmp_path):
    run = ["main.py", *RICH, "--data-path", images, "--output_dir", tmp_path]
    with start_python(*run) as process:
        for line in process.stdout:
            if line.startswith("epoch 1 step"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert 1 <= len(read_log(tmp_path)) <= 2
    done = run_python(*run, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert same_log(tmp_path, trained[0])
    assert same_state(tmp_path, trained[0])


def test_evaluation_rebuilds_the_model_of_the_checkpoint(images, trained, main):
    folder, output = trained
    path = folder / "checkpoint.pth"
    status, evaluated, _ = main(
        *("--eval", "--resume", path, "--data-path", images, "--batch-size", 4),
        *("--num_workers", 0, "--amp", "--amp-dtype", "bfloat16"),
    )
    assert status == 0
    assert accuracy_lines(evaluated) == accuracy_lines(output)[-2:]
    assert "'qk_scale_factor': -0.5" in evaluated


def test_evaluation_of_the_fused_net(images, trained, tmp_path, main):
    run = ["--eval", "--resume", trained[0] / "checkpoint.pth", "--data-path", images]
    lines = [accuracy_lines(main(*run, *more)[1]) for more in ([], ["--fuse"])]
    assert lines[0] == lines[1] and len(lines[0]) == 2
    other = ["--model", "resnet10t", "--data-path", images, "--num_workers", 0]
    status, _, errors = main(*SMALL, *other, "--epochs", 1, "--output_dir", tmp_path)
    assert status == 0, errors
    run = ["--eval", "--fuse", "--resume", tmp_path / "checkpoint.pth", "--data-path", images]
    status, _, errors = main(*run)
    assert status == 1
    assert errors == "error: resnet10t has no inference net of its own: leave --fuse out\n"


def test_compiled_training_captures_one_graph_each(images, tmp_path):
    # one for training, one for evaluation: 24 images train in 6 batches, 6 evaluate as 6
    run = [*SMALL, "--data-path", images, "--output_dir", tmp_path, "--epochs", 2]
    run += ["--drop-path", 0, "--compile", "aot_eager", "--batch-size", 4]
    done = run_python("main.py", *run, TORCH_LOGS="recompiles,graph_breaks")
    assert done.returncode == 0, done.stderr
    assert "Graph break" not in done.stderr
    reasons = [line for line in done.stderr.splitlines() if "    - " in line]
    assert len(reasons) == 1 and "grad_mode" in reasons[0], done.stderr
    plain = run_python("main.py", *run[:-4], "--output_dir", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    for one, two in zip(read_log(tmp_path), read_log(tmp_path / "plain"), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
        assert one["test_loss"] == pytest.approx(two["test_loss"], rel=1e-3)


def test_memory_format_and_recomputed_blocks_change_nothing(images, tmp_path, main):
    run = [*SMALL, "--data-path", images, "--epochs", 1]
    for name, words in (
        ("default", []),
        ("contiguous", ["--no-channels-last"]),
        ("checkpointed", ["--grad-checkpointing"]),
    ):
        status, _, errors = main(*run, *words, "--output_dir", tmp_path / name)
        assert status == 0, errors
    first = torch.load(tmp_path / "default" / "checkpoint.pth", weights_only=True)["model"]
    weight = first["stage1.0.mlp.conv2.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    other = torch.load(tmp_path / "contiguous" / "checkpoint.pth", weights_only=True)["model"]
    assert other["stage1.0.mlp.conv2.weight"].is_contiguous()
    losses = [read_log(tmp_path / name)[0]["train_loss"] for name in ("default", "contiguous")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    recomputed = read_log(tmp_path / "checkpointed")[0]["train_loss"]
    assert recomputed == pytest.approx(losses[0], rel=1e-5)


def test_contradicting_flags_are_warned_about(images, trained, main):
    path = trained[0] / "best.pth"
    run = ["--eval", "--resume", path, "--data-path", images, "--num_workers", 0]
    status, output, _ = main(*run, "--qk-scale-factor", -0.25, "--input-size", 64)
    assert status == 0
    assert "warning: --qk-scale-factor -0.25 is ignored" in output
    assert "warning: --input-size 64, but" in output
    assert "'img_size': 64" in output
    assert "'qk_scale_factor': -0.5" in output


def test_another_model_s_checkpoint(images, trained, main):
    run = ["--resume", trained[0] / "best.pth", "--data-path", images, "--num_workers", 0]
    status, _, errors = main(*run, "--eval", "--model", "visformer_small")
    assert status == 1
    assert "does not fit the model" in errors
    assert "of another shape: pos_embed1 ((1, 96, 4, 4) for (1, 192, 4, 4))" in errors


def test_classes_must_be_those_of_the_checkpoint(trained, main):
    status, _, errors = main("--eval", "--resume", trained[0] / "best.pth", "--num_workers", 0)
    assert status == 1
    assert "best.pth knows 2 classes, the dataset has 10" in errors


def test_weights_alone_start_a_new_run(images, trained, tmp_path, main):
    weights = tmp_path / "weights.pth"
    torch.save(models.read_checkpoint(trained[0] / "best.pth")["model"], weights)
    run = [*SMALL, "--data-path", images, "--resume", weights]
    status, output, _ = main(*run, "--epochs", 1)
    assert status == 0
    assert "holds no optimizer: its weights start a new run" in output
    assert "training epochs 0 to 0 of 1" in output
    status, output, _ = main(*run, "--eval")
    assert status == 0
    assert len(accuracy_lines(output)) == 1


def test_finetuning_keeps_the_body_and_starts_a_new_head(trained, tmp_path, main):
    run = [*SMALL, "--finetune", trained[0] / "best.pth", "--epochs", 1, "--output_dir", tmp_path]
    status, output, _ = main(*run, "--batch-size", 64)
    assert status == 0
    assert "left at their initial value: head" in output
    assert "pre-scale exponent -0.5, as trained" in output
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert checkpoint["model_kwargs"]["qk_scale_factor"] == -0.5
    assert checkpoint["model"]["head.weight"].shape == (10, 384)
    body = torch.load(trained[0] / "best.pth", weights_only=True)["model"]["stem.0.weight"]
    assert (checkpoint["model"]["stem.0.weight"] - body).abs().max() < 1e-2


def test_what_weights_compute_stays_with_the_run(images, trained, tmp_path, main):
    weights = tmp_path / "tanh.pth"
    content = torch.load(trained[0] / "best.pth", weights_only=True)
    torch.save({"model": content["model"], "qk_scale_factor": -0.4, "gelu": "tanh"}, weights)
    out = tmp_path / "out"
    run = [*SMALL, "--data-path", images, "--output_dir", out, "--epochs", 2, "--lr", 0]
    run += ["--warmup-lr", 0, "--min-lr", 0, "--weight-decay", 0, "--model-ema-decay", 0]
    assert main(*run, "--finetune", weights, "--stop-epoch", 1)[0] == 0
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=True)
    assert checkpoint["gelu"] == "tanh"
    assert checkpoint["model_kwargs"]["qk_scale_factor"] == -0.4
    status, output, _ = main(*run, "--resume", "auto")
    assert status == 0
    raw, average = accuracy_lines(output)
    assert average == f"EMA {raw}"  # the average computes the same function
    status, output, _ = main("--eval", "--resume", out / "checkpoint.pth", "--data-path", images)
    assert (status, accuracy_lines(output)) == (0, [raw, average])
    assert "tanh GELU, as trained" in output


def test_args_yaml_repeats_the_run(images, trained, tmp_path, main):
    folder, _ = trained
    status, *_ = main("-c", folder / "args.yaml", "--output_dir", tmp_path)
    assert status == 0
    assert same_log(tmp_path, folder)
    first, second = (yaml.safe_load((f / "args.yaml").read_text()) for f in (folder, tmp_path))
    assert {key for key in first if first[key] != second[key]} == {"output_dir"}


@pytest.mark.parametrize(
    "words",
    [
        "--opt sgd --sched step --decay-epochs 1 --mixup 0 --std-aug --loader timm",
        "--mixup 0 --cutmix 0 --sched-on-updates --model-ema-force-cpu --augment-on device",
        "--bce-loss --sched plateau --no-repeated-aug --ThreeAugment",
        "--model test_vit --no-model-ema --unscale-lr --warmup-epochs 0 --no-dist-eval --amp",
        "--model resnet10t --mixup_mode elem --drop 0.1 --cutmix-minmax 0.2 0.8 --train_mode",
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_flags_train(images, main, tmp_path, words):
    run = [*SMALL, "--data-path", images, "--output_dir", tmp_path, "--epochs", 2]
    status, output, errors = main(*run, *shlex.split(words))
    assert (status, errors) == (0, "")
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]
    status, output, errors = main(*run, *shlex.split(words), "--resume", "auto", "--epochs", 3)
    assert (status, errors) == (0, "")
    assert "training epochs 2 to 2 of 3" in output


def test_a_set_that_lies_on_the_device(main, tmp_path):
    """Digits that are augmented in batches: stopped between epochs, and evaluated."""
    run = ["--model", "test_vit", "--batch-size", 200, "--augment-on", "device", "--device", "cpu"]
    run += ["--epochs", 2, "--warmup-epochs", 0, "--num_workers", 0, "--lr", 0.004]
    for folder, first in (("whole", []), ("parts", ["--stop-epoch", 1])):
        status, output, errors = main(*run, *first, "--output_dir", tmp_path / folder)
        assert (status, errors) == (0, "")
    status, output, errors = main(*run, "--output_dir", tmp_path / "parts", "--resume", "auto")
    assert (status, errors) == (0, "")
    assert same_log(tmp_path / "whole", tmp_path / "parts")
    assert same_state(tmp_path / "whole", tmp_path / "parts")
    (accuracy,) = re.findall(r"^\* (Acc@1 .*)", output, re.M)
    for loader in ("fast", "timm"):
        words = ["--eval", "--resume", tmp_path / "parts" / "checkpoint.pth", "--loader", loader]
        assert f"* {accuracy}" in main(*words, "--device", "cpu", "--num_workers", 0)[1]


def test_old_command_lines_parse(main):
    from training.flags import parse_args

    line = (
        "--model visformer_small --batch-size 64 --data-path /data --output_dir /out --dist-eval "
        "--amp --qk-scale-factor -0.5 --drop-path 0.03 --clip-grad 5 --no-repeated-aug --pin-mem "
        "--data-set IMNET100 --start_epoch 3 --world_size 8 --dist_url env:// --num-workers 4 "
        "--output-dir /other --model_ema --no-model-ema --opt-betas 0.9 0.95 --dr 0.2 --resplit "
        "--local_rank=1 --no_pin_mem --std-aug --reprob=0 --cutmix-minmax 0.1 0.9"
    )
    args, given = parse_args(shlex.split(line))
    assert (args.output_dir, args.num_workers, args.qk_scale_factor) == ("/other", 4, -0.5)
    assert (args.model_ema, args.repeated_aug, args.pin_mem) == (False, False, False)
    assert (args.opt_betas, args.decay_rate, args.reprob) == ([0.9, 0.95], 0.2, 0.0)
    assert "drop_path" in given
    assert "epochs" not in given


def test_recipes_are_strict(tmp_path, main):
    recipe = tmp_path / "recipe.yaml"
    for text, message in {
        "modle: x": "'modle' is no flag",
        "- a": "must be a mapping",
        "a: [": "cannot read recipe",
        "batch-size: 0": "--batch-size 0 must be positive",
    }.items():
        recipe.write_text(text)
        status, _, errors = main("-c", recipe)
        assert (status, message in errors) == (1, True), errors
    assert "cannot read recipe /none.yaml" in main("-c", "/none.yaml")[2]
    from training.flags import parse_args

    recipe.write_text("lr: 4e-3\namp: true\nrepeated-aug: false\nopt_betas: [0.5, 0.6]\n")
    args, given = parse_args(["-c", str(recipe), "--lr", "1e-3", "--no-amp"])
    assert (args.lr, args.amp, args.repeated_aug, args.opt_betas) == (
        1e-3,
        False,
        False,
        [0.5, 0.6],
    )
    assert {"lr", "amp", "repeated_aug"} <= given


def test_shipped_recipes_parse():
    from training.flags import parse_args

    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        args, _ = parse_args(["-c", str(recipe)])
        assert f"-c configs/{recipe.name}" in recipe.read_text()
        assert args.model


BAD = {
    "--model visformer_smal": "there is no model 'visformer_smal'; the nearest are visformer_small",
    "--model nonsense_xyz": "there is no model 'nonsense_xyz'",
    "--input-size 33": "cannot build visformer_tiny .*33x33 does not fit",
    "--input-size 0": "--input-size 0 must be positive",
    "--model test_vit --input-size 8": "cannot (build|take)",
    "--model resnet10t --qk-scale-factor -0.5": "model resnet10t does not accept qk_scale_factor",
    "--batch-size 26": "--batch-size 26 is larger than the training set: 24 images",
    "--batch-size 3": "--batch-size 3 must be even with mixup or cutmix",
    "--data-path /none": "data folder /none does not exist",
    "--output_dir {file}/x": "cannot make --output_dir .*Not a directory",
    "--output_dir {file}": "cannot make --output_dir .*File exists",
    "--resume /none.pth": "cannot read checkpoint /none.pth",
    "--resume {file}": "is not a checkpoint",
    "--resume auto": "--resume auto looks into --output_dir, which is not given",
    "--eval": "--eval needs --resume",
    "--model dla34 --grad-checkpointing": "dla34 cannot recompute blocks",
    "--fuse": "--fuse is for --eval",
    "--opt sgdd": "cannot build optimizer --opt sgdd: .*sgdd",
    "--sched cosin": "--sched cosin",
    "--lr nan": "--lr nan must be 0 or more, and finite",
    "--model-kwargs depth": "--model-kwargs depth must be KEY=VALUE, such as depth=6",
    "--model-kwargs nonsense=1": "model visformer_tiny does not accept nonsense",
    "--model convit_tiny --model-kwargs depth=x": "cannot build convit_tiny",
    "--compile fast": "--compile fast is no backend here; there are .*inductor",
    "--device tpu9": "--device 'tpu9' is not a device",
    "--device meta": "--device meta holds no values",
    "--device xpu": "--device xpu is not here: ",
    "--aa nonsense": "--aa nonsense is none of timm's policies",
    "--model-kwargs num_classes=7": "num_classes is the dataset's: leave it out",
    "--model-kwargs img_size=64": "img_size is --input-size",
    "--model-kwargs pretrained=True": "pretrained .*: give --finetune",
    "--model-kwargs features_only=True": "features_only",
    "--resume {file} --finetune {file}": "would never be read: leave one of them out",
    "--world_size 8": "--world_size 8, but 1 process",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_named(images, tmp_path, main, words):
    import re

    file = tmp_path / "file"
    file.write_text("no checkpoint")
    run = [*SMALL, "--data-path", images]
    status, _, errors = main(*run, *shlex.split(words.format(file=file)))
    assert status == 1
    assert re.search(f"^error: .*{BAD[words]}", errors), errors
    assert len(errors.splitlines()) == 1


def test_unknown_flag():
    done = run_python("main.py", "--epoch", 3)
    assert done.returncode == 2
    assert "unrecognized arguments: --epoch" in done.stderr


def test_corrupt_image_stops_or_is_skipped(tmp_path, main):
    images = write_images(tmp_path / "images")
    broken = [images / "train" / "cat" / "2.jpg", images / "val" / "dog" / "1.jpg"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:150])
    run = [*SMALL, "--data-path", images, "--epochs", 1, "--no-repeated-aug"]
    for workers in (0, 1):
        status, _, errors = main(*run, "--num_workers", workers)
        assert status == 1
        assert errors.startswith(f"error: cannot decode image {broken[0]}")
        assert len(errors.splitlines()) == 1
    out = tmp_path / "out"
    status, output, _ = main(*run, "--on-corrupt", "skip", "--output_dir", out)
    assert status == 0
    assert "on 5 images (1 corrupt ones skipped)" in output
    (line,) = read_log(out)
    assert (line["train_corrupt"], line["test_corrupt"]) == (1, 1)


def test_loss_that_is_not_finite_keeps_the_last_checkpoint(images, tmp_path, main):
    run = [*SMALL, "--data-path", images, "--output_dir", tmp_path, "--warmup-epochs", 0]
    run += ["--clip-grad", 1e30, "--epochs", 2]
    assert main(*run, "--stop-epoch", 1)[0] == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()
    run += ["--save-every-steps", 1]  # the weights are spoilt one step before the loss tells
    status, output, errors = main(*run, "--resume", "auto", "--lr", 1e30, "--unscale-lr")
    assert status == 1
    assert "warning: loss or weights are not finite: the last checkpoint is kept" in output
    assert "the loss is not finite at epoch 1, step" in errors
    assert "float32, query/key pre-scale exponent -0.25" in errors
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_full_disk_keeps_the_last_checkpoint(images, tmp_path):
    run = [*SMALL, "--data-path", images, "--output_dir", tmp_path, "--epochs", 2]
    command = shlex.join(map(str, [sys.executable, "main.py", *run, "--resume", "auto"]))
    assert run_python("main.py", *run, "--stop-epoch", 1).returncode == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 20000; exec {command}"],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"cannot write {tmp_path}/checkpoint.pth: File too large" in done.stderr
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert not list(tmp_path.glob("checkpoint.pth?*"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds children through /proc")
def test_dead_loader_process_is_an_error():
    run = ["main.py", "--model", "visformer_tiny", "--num_workers", 1, "--log-interval", 1]
    with start_python(*run) as process:
        for line in process.stdout:
            if line.startswith("epoch 0 step 1/"):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert children
    assert process.returncode == 1
    assert "error: a loader process died" in errors
    assert "lower --num_workers" in errors


def test_interrupt_without_a_folder_says_that_nothing_is_saved():
    with start_python("main.py", "--model", "visformer_tiny", "--log-interval", 1) as process:
        for line in process.stdout:
            if line.startswith("epoch 0 step 1/"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped by SIGINT in epoch 0 after step" in errors
    assert "without --output_dir nothing is saved" in errors
