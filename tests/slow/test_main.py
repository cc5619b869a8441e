"""main.py from the outside: train, stop, resume, evaluate, and what it says to bad input."""

import re
import shlex
import signal

import pytest
import timm
import torch
import yaml
from conftest import (
    accuracy_lines,
    error_of,
    read_log,
    run_main,
    same_run,
    start_rank,
    succeed,
    until,
    write_images,
)
from torch._dynamo.utils import counters

import models
from main import main
from training.flags import parse_args

COMMON = ["--input-size", 32, "--batch-size", 4, "--num_workers", 0, "--device", "cpu"]
SMALL = ["--model", "test_resnet", *COMMON]
RICH = [
    *("--model", "visformer_tiny", *COMMON),
    *("--epochs", 2, "--warmup-epochs", 1, "--accum-iter", 3, "--clip-grad", 1.0),
    *("--amp", "--amp-dtype", "bfloat16", "--model-ema-decay", 0.9, "--qk-scale-factor", -0.5),
]


def epochs(folder):
    return [line["epoch"] for line in read_log(folder)]


def load(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The folder of a finished run of two epochs, and its output."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, succeed(*RICH, "--data-path", images, "--output_dir", folder)


def test_output_folder(trained):
    folder, output = trained
    names = {entry.name for entry in folder.iterdir()}
    assert {"checkpoint.pth", "best.pth", "log.txt", "args.yaml"} < names
    checkpoint = load(folder)
    deit = {"model", "model_ema", "optimizer", "lr_scheduler", "scaler", "epoch", "args"}
    assert deit < set(checkpoint)
    assert checkpoint["model_name"] == "visformer_tiny"
    assert checkpoint["model_kwargs"]["qk_scale_factor"] == -0.5
    assert (checkpoint["epoch"], checkpoint["input_size"]) == (1, 32)
    log = read_log(folder)
    wanted = {"train_loss", "train_lr", "test_acc1", "test_acc5", "test_loss", "ema_acc1"}
    assert all(wanted | {"epoch", "n_parameters"} <= set(line) for line in log)
    assert epochs(folder) == [0, 1]
    assert log[0]["train_lr"] != log[1]["train_lr"]
    assert checkpoint["best_acc1"] == max(line["test_acc1"] for line in log)
    assert f"{log[-1]['test_acc1']:.3f}" in accuracy_lines(output)[-2]
    assert re.search(r"1\.17188e-05 .*--lr 0\.0005.* 12 ", output)  # images per step


def test_tensorboard_events(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0]))
    events.Reload()
    scalars = {"train/loss", "train/lr", "train/images_per_second", "test/acc1", "ema/acc1"}
    assert scalars <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("test/acc1")] == [0, 1]
    (grid,) = events.Images("train/images")
    assert grid.step == 0 and grid.width > 8 * 64  # 8 images in a row


def test_a_run_repeats_bitwise_from_its_args_yaml_and_in_parts(trained, tmp_path):
    folder, _ = trained
    run = ["-c", folder / "args.yaml", "--output_dir", tmp_path, "--resume", "auto"]
    succeed(*run, "--stop-epoch", 1)
    assert epochs(tmp_path) == [0]
    succeed(*run, "--num_workers", 1)
    assert same_run(tmp_path, folder)
    first, second = (yaml.safe_load((f / "args.yaml").read_text()) for f in (folder, tmp_path))
    changed = {key for key in first if first[key] != second[key]}
    assert changed == {"output_dir", "resume", "num_workers"}
    assert not accuracy_lines(succeed(*run))  # nothing is left to train
    assert same_run(tmp_path, folder)


def test_a_killed_run_resumes_bitwise(images, trained, tmp_path):
    run = [*RICH, "--data-path", images, "--output_dir", tmp_path]
    process = start_rank("main.py", *run)
    until(process, "epoch 1 step")
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert epochs(tmp_path) == [0]
    succeed(*run, "--resume", "auto")
    assert same_run(tmp_path, trained[0])


@pytest.mark.parametrize("more", [["--amp", "--amp-dtype", "bfloat16"], ["--fuse"]])
def test_evaluation_rebuilds_the_model_of_the_checkpoint(images, trained, more):
    folder, output = trained
    flags = ["--eval", "--data-path", images, "--batch-size", 4, "--num_workers", 0, "--resume"]
    evaluated = succeed(*flags, folder / "checkpoint.pth", *more)
    assert "'qk_scale_factor': -0.5" in evaluated
    if "--amp" not in more:  # trained in bfloat16
        output = succeed(*flags, folder / "checkpoint.pth")
    assert accuracy_lines(evaluated) == accuracy_lines(output)[-2:]


def test_compiled_training_captures_one_graph_each(images, tmp_path):
    # one for training, one for evaluation: 24 images train in 6 batches, 6 evaluate as 6
    run = [*SMALL, "--data-path", images, "--epochs", 2, "--drop-path", 0, "--output_dir"]
    torch._dynamo.reset()
    counters.clear()
    succeed(*run, tmp_path / "compiled", "--compile", "aot_eager")
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    succeed(*run, tmp_path / "plain")
    logs = (read_log(tmp_path / name) for name in ("compiled", "plain"))
    for one, two in zip(*logs, strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
        assert one["test_loss"] == pytest.approx(two["test_loss"], rel=1e-3)


def is_last(checkpoint):
    """True if the run's weights were channels last: its moments are. Weights are stored in rows."""
    weights = checkpoint["model"].values()
    assert all(weight.is_contiguous() for weight in weights)
    moments = [state["exp_avg"] for state in checkpoint["optimizer"]["state"].values()]
    layouts = {m.is_contiguous() for m in moments if m.ndim == 4 and min(*m.shape) > 1}
    assert len(layouts) == 1
    return layouts == {False}


def test_memory_format_and_recomputed_blocks_change_nothing(images, trained, tmp_path):
    assert is_last(load(trained[0]))
    flags = {"default": [], "last": ["--channels-last"], "less": ["--grad-checkpointing"]}
    for name, words in flags.items():
        run = [*SMALL, "--data-path", images, "--epochs", 1, *words]
        succeed(*run, "--output_dir", tmp_path / name)
    assert [is_last(load(tmp_path / name)) for name in flags] == [False, True, False]
    losses = [read_log(tmp_path / name)[0]["train_loss"] for name in flags]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_contradicting_flags_are_warned_about(images, trained):
    run = ["--eval", "--resume", trained[0] / "best.pth", "--data-path", images, "--num_workers", 0]
    output = succeed(*run, "--qk-scale-factor", -0.25, "--input-size", 64)
    for flag in ("--qk-scale-factor -0.25", "--input-size 64"):
        assert f"warning: {flag}" in output
    assert "'img_size': 64" in output
    assert "'qk_scale_factor': -0.5" in output


def test_checkpoints_of_other_models_and_classes(images, trained):
    run = ["--eval", "--num_workers", 0, "--resume", trained[0] / "best.pth"]
    error = error_of(main, *run, "--data-path", images, "--model", "visformer_small")
    assert re.search(r"pos_embed1 .*\(1, 96, 4, 4\).*\(1, 192, 4, 4\)", error)
    assert re.search(r"best\.pth .*\b0, 1.*\bcat, dog\b", error_of(main, *run))  # classes


def test_weights_alone_start_a_new_run(images, trained, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(models.read_checkpoint(trained[0] / "best.pth")["model"], weights)
    run = ["--model", "visformer_tiny", *COMMON, "--data-path", images, "--resume", weights]
    succeed(*run, "--epochs", 1, "--output_dir", tmp_path)
    assert epochs(tmp_path) == [0]
    assert len(accuracy_lines(succeed(*run, "--eval"))) == 1


def test_what_weights_compute_stays_with_the_run(images, trained, tmp_path):
    weights = tmp_path / "tanh.pth"
    content = load(trained[0], "best.pth")
    torch.save({"model": content["model"], "qk_scale_factor": -0.4, "gelu": "tanh"}, weights)
    out = tmp_path / "out"
    run = ["--model", "visformer_tiny", *COMMON, "--data-path", images, "--output_dir", out]
    run += ["--epochs", 2, "--lr", 0, "--warmup-lr", 0, "--min-lr", 0, "--weight-decay", 0]
    run += ["--model-ema-decay", 0]
    succeed(*run, "--finetune", weights, "--stop-epoch", 1)
    checkpoint = load(out)
    assert checkpoint["gelu"] == "tanh"
    assert checkpoint["model_kwargs"]["qk_scale_factor"] == -0.4
    raw, average = accuracy_lines(succeed(*run, "--resume", "auto"))
    assert average == f"EMA {raw}"  # the average computes the same function
    output = succeed("--eval", "--resume", out / "checkpoint.pth", "--data-path", images)
    assert accuracy_lines(output) == [raw, average]
    assert "tanh" in output


@pytest.mark.parametrize(
    "words",
    [
        "--opt sgd --sched step --decay-epochs 1 --mixup 0 --std-aug --loader timm",
        "--mixup 0 --cutmix 0 --sched-on-updates --model-ema-force-cpu --augment-on device",
        "--bce-loss --sched plateau --no-repeated-aug --ThreeAugment",
        "--model test_vit --no-model-ema --unscale-lr --warmup-epochs 0 --no-dist-eval --amp",
        "--mixup_mode elem --drop 0.1 --cutmix-minmax 0.2 0.8 --train_mode",
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_flags_train(images, tmp_path, words):
    run = [*SMALL, "--data-path", images, "--output_dir", tmp_path, *shlex.split(words)]
    succeed(*run, "--epochs", 2)
    assert epochs(tmp_path) == [0, 1]
    succeed(*run, "--resume", "auto", "--epochs", 3)
    assert epochs(tmp_path) == [0, 1, 2]


def test_a_dataset_on_the_device(tmp_path):
    """Digits that are augmented in batches: stopped between epochs, and evaluated."""
    run = ["--model", "test_vit", "--batch-size", 64, "--augment-on", "device", "--device", "cpu"]
    run += ["--epochs", 2, "--warmup-epochs", 0, "--num_workers", 0, "--lr", 0.004]
    run += ["--sampling-ratio", 0.2, "--output_dir"]
    succeed(*run, tmp_path / "whole")
    succeed(*run, tmp_path / "parts", "--stop-epoch", 1)
    output = succeed(*run, tmp_path / "parts", "--resume", "auto")
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    for loader in ("fast", "timm"):
        flags = ["--eval", "--resume", tmp_path / "parts" / "checkpoint.pth", "--loader", loader]
        evaluated = succeed(*flags, "--device", "cpu", "--num_workers", 0)
        assert accuracy_lines(evaluated) == accuracy_lines(output)


def test_old_command_lines_parse():
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


# what the error of each command line must name
BAD = {
    "--model visformer_smal": "'visformer_smal'.* visformer_small",
    "--model nonsense_xyz": "'nonsense_xyz'",
    "--model visformer_tiny --input-size 33": "visformer_tiny .*33x33",
    "--model test_vit --input-size 8": "test_vit",
    "--model resnet10t --qk-scale-factor -0.5": "resnet10t .*qk_scale_factor",
    "--batch-size 26": "--batch-size 26 .*24",
    "--batch-size 3": "--batch-size 3 .*mixup",
    "--data-path /none": "/none",
    "--output_dir {file}/x": "--output_dir {file}/x",
    "--output_dir {file}": "--output_dir {file}",
    "--resume /none.pth": "/none.pth",
    "--resume {file}": "{file}",
    "--resume auto": "--output_dir",
    "--eval": "--resume",
    "--fuse": "--eval",
    "--eval --fuse --resume {resnet}": "test_resnet .*--fuse",
    "--model dla34 --grad-checkpointing": "dla34",
    "--opt sgdd": "--opt sgdd",
    "--sched cosin": "--sched cosin",
    "--lr nan": "--lr nan",
    "--model-kwargs depth": "depth.* KEY=VALUE",
    "--model visformer_tiny --model-kwargs nonsense=1": "visformer_tiny .*nonsense",
    "--model convit_tiny --model-kwargs depth=x": "convit_tiny",
    "--compile fast": "--compile fast.* inductor",
    "--device tpu9": "--device 'tpu9'",
    "--device meta": "--device meta",
    "--device xpu": "--device xpu",
    "--aa nonsense": "--aa nonsense",
    "--model-kwargs num_classes=7": "num_classes",
    "--model-kwargs img_size=64": "img_size .*--input-size",
    "--model-kwargs pretrained=True": "pretrained .*--pretrained",
    "--model-kwargs features_only=True": "features_only",
    "--resume {file} --finetune {file}": "--finetune {file}|--resume {file}",
    "--world_size 8": "--world_size 8.* 1 ",
    "-c /none.yaml": "/none.yaml",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_named(images, tmp_path, words):
    file = tmp_path / "file"
    file.write_text("no checkpoint")
    places = {"file": file, "resnet": tmp_path / "resnet.pth"}
    content = {"model_name": "test_resnet", "model_kwargs": {"num_classes": 2}}
    model = timm.create_model("test_resnet", num_classes=2)
    torch.save(content | {"model": model.state_dict()}, places["resnet"])
    error = error_of(main, *SMALL, "--data-path", images, *shlex.split(words.format(**places)))
    assert re.search(BAD[words].format(**places), error)


def test_an_unknown_flag():
    with pytest.raises(SystemExit) as caught:
        main(["--epoch", "3"])
    assert caught.value.code == 2


def test_a_corrupt_image_stops_or_is_skipped(tmp_path):
    images = write_images(tmp_path / "images")
    broken = [images / "train" / "cat" / "2.jpg", images / "val" / "dog" / "1.jpg"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:150])
    run = [*SMALL, "--data-path", images, "--epochs", 1, "--no-repeated-aug"]
    for workers in (0, 1):
        assert str(broken[0]) in error_of(main, *run, "--num_workers", workers)
    out = tmp_path / "out"
    output = succeed(*run, "--on-corrupt", "skip", "--output_dir", out)
    assert all(re.search(r"\b5 images \(1 ", line) for line in accuracy_lines(output))
    (line,) = read_log(out)
    assert (line["train_corrupt"], line["test_corrupt"]) == (1, 1)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(images, tmp_path):
    run = ["--model", "visformer_tiny", *COMMON, "--data-path", images, "--output_dir", tmp_path]
    run += ["--warmup-epochs", 0, "--clip-grad", 1e30, "--epochs", 2]
    succeed(*run, "--stop-epoch", 1)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    run += ["--save-every-steps", 1]  # the weights are lost one step before the loss tells
    status, output, errors = run_main(*run, "--resume", "auto", "--lr", 1e30, "--unscale-lr")
    assert status == 1
    assert "warning: " in output
    for part in (r"epoch 1, step \d", "float32", r"-0\.25"):
        assert re.search(part, errors)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_an_interrupt_without_a_folder_says_that_nothing_is_saved(images):
    run = [*SMALL, "--data-path", images, "--log-interval", 1]
    status, _, errors = run_main(*run, line="epoch 0 step 1/", act=signal.SIGINT)
    assert status == 130
    for part in ("SIGINT", "epoch 0", "step 1", "--output_dir"):
        assert part in errors
