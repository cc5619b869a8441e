"""The recipes of configs/: what they say of themselves, and that each of them trains."""

import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import yaml
from conftest import ROOT, write_images
from small_models import shrunk
from torch.optim.optimizer import register_optimizer_step_post_hook

import models
from models.layers.attention import MultiHeadAttention
from tools.flops import our_models
from training import schedules
from training.flags import get_args_parser, parse_args
from training.keywords import keyword_arguments
from utils import UserError

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
LOOKED_FOR = {"model", "epochs", "batch-size", "lr", "drop-path", "input-size", "num_workers"}
LOOKED_FOR |= {"distillation-alpha", "distillation-tau"}
OF_WEIGHTS = {"model", "input-size"}  # where a recipe leaves them to --finetune
PIXELS = 32


class Header(NamedTuple):
    """What the comment at the head of a recipe says."""

    processes: int
    words: list[str]  # of main.py's command line
    accuracy: str  # top-1 in %, empty where none is published
    global_batch: int


def header(path):
    """Read the comment, which must have all its parts, once each."""
    text = path.read_text()
    comment = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ") and comment[0].endswith(":")
    command = " ".join(line.strip(" \\") for line in comment if line.startswith("   "))
    prose = "\n".join(line.strip() for line in comment if not line.startswith("   "))
    start, words = command.split("main.py ")
    processes = re.fullmatch(r"torchrun --nproc_per_node=(\d+) ", start)
    assert processes or start == "python "
    (accuracy,) = re.findall(r"^(?:([\d.]+) % top-1|No published accuracy)", prose, re.M)
    (global_batch,) = re.findall(r"^Global batch (\d+)\.$", prose, re.M)
    number = int(processes[1]) if processes else 1
    return Header(number, shlex.split(words), accuracy, int(global_batch))


def parse_recipe(name, *words):
    return parse_args(["-c", str(ROOT / "configs" / f"{name}.yaml"), *words])


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_header_agrees_with_the_file(path):
    head = header(path)
    assert f"configs/{path.name}" in head.words
    assert f"output/{path.stem}" in head.words
    assert path.stem == "digits" or "--data-path" in head.words
    args, _ = parse_args(
        [str(ROOT / word) if word.startswith("configs") else word for word in head.words]
    )
    assert args.batch_size * args.accum_iter * head.processes == head.global_batch
    assert timm.is_model(args.model)
    rates = schedules.learning_rates(args, head.processes)
    note, floor = (
        re.search(rf"^{key}: \S+  # (\S+) for (\d+) images$", path.read_text(), re.M)
        for key in ("lr", "min-lr")
    )
    assert bool(floor) == (head.global_batch < schedules.REFERENCE_BATCH)
    if floor:
        assert (rates.floor, head.global_batch) == (float(floor[1]), int(floor[2]))
        assert rates.warmup in (0.0, 1e-6)
    if note:
        assert int(note[2]) == head.global_batch
        assert rates.peak == pytest.approx(float(note[1]), rel=1e-5)
    else:
        assert head.global_batch == schedules.REFERENCE_BATCH or path.stem == "digits"


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_says_what_differs_from_the_defaults(path):
    keys = yaml.safe_load(path.read_text())
    args, given = parse_args(["-c", str(path)])
    names = {key: key.replace("-", "_") for key in keys}
    assert given - {"config"} == set(names.values())
    parser = get_args_parser()
    usual = {k for k, name in names.items() if getattr(args, name) == parser.get_default(name)}
    assert usual <= LOOKED_FOR
    wanted = {"model", "input-size", "batch-size", "epochs", "lr", "drop-path"}
    assert wanted - set(keys) == (OF_WEIGHTS if path.stem == "finetune_own" else set())
    assert not {"data-path", "output_dir", "resume", "finetune", "teacher-path"} & set(keys)


def test_table_of_the_recipes_agrees_with_the_files():
    page = (ROOT / "docs" / "RECIPES.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\(\.\./configs/(\w+)\.yaml\) \|(.*)\|$", page, re.M)
    assert sorted(name for name, _, _ in rows) == NAMES
    for name, file, cells in rows:
        assert name == file
        columns = (cell.strip() for cell in cells.split("|"))
        model, millions, epochs, batch, accuracy, top5, source, _ = columns
        head, (args, given) = header(ROOT / "configs" / f"{name}.yaml"), parse_recipe(name)
        assert model == (f"`{args.model}`" if "model" in given else "that of the weights")
        assert (int(epochs), int(batch)) == (args.epochs, head.global_batch)
        assert accuracy == head.accuracy
        assert bool(source) == bool(accuracy)
        assert not top5 or float(top5) > float(accuracy)
        if millions:
            with torch.device("meta"):
                kwargs = {"num_classes": 1000} | keyword_arguments(args.model_kwargs)
                net = timm.create_model(args.model, **kwargs)
            assert float(millions) == round(sum(p.numel() for p in net.parameters()) / 1e6, 1)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_attention_layer_sees_several_positions(path):
    args, _ = parse_args(["-c", str(path)])
    kwargs = keyword_arguments(args.model_kwargs)
    if timm.get_pretrained_cfg(args.model).fixed_input_size:
        kwargs["img_size"] = args.input_size or 224
    with torch.device("meta"):
        model = timm.create_model(args.model, **kwargs)
    positions = {}

    def note(name):
        def hook(module, inputs):
            weight = next(p for p in module.parameters() if p.ndim > 1)  # of the projection
            positions[name] = inputs[0][0].numel() // weight.shape[1]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention | timm.layers.Attention):
            module.register_forward_pre_hook(note(name))
    model.eval()(torch.zeros(1, 3, *models.height_and_width(args.input_size or 224), device="meta"))
    assert min(positions.values(), default=16) >= 16


# stochastic depth and mixup of apple/ml-fastvit's commands, alone and with a teacher
FASTVIT = {
    "t8": ((0, 0.2), (0, 0.2)),
    "t12": ((0, 0.2), (0, 0.2)),
    "s12": ((0, 0.2), (0, 0.2)),
    "sa12": ((0.1, 0.2), (0, 0.8)),
    "sa24": ((0.1, 0.2), (0.05, 0.8)),
    "sa36": ((0.2, 0.2), (0.1, 0.8)),
    "ma36": ((0.35, 0.8), (0.2, 0.8)),
}


@pytest.mark.parametrize("size", FASTVIT)
def test_fastvit_has_its_authors_settings(size):
    for suffix, (drop_path, mixup) in zip(("", "_distilled"), FASTVIT[size], strict=True):
        args, _ = parse_recipe(f"fastvit_{size}{suffix}")
        assert (args.model, args.drop_path, args.mixup) == (f"fastvit_{size}", drop_path, mixup)
        assert (args.input_size, args.model_ema_decay, args.repeated_aug) == (256, 0.9995, False)
        assert args.distillation_type == ("hard" if suffix else "none")
        assert (args.teacher_model == "regnety_160.deit_in1k") == bool(suffix)


def test_few_data_are_shown_as_often_as_all_of_them():
    whole, few = (parse_recipe(name)[0] for name in ("convit_tiny", "convit_tiny_few_data"))
    assert few.sampling_ratio < whole.sampling_ratio == 1
    assert few.epochs * few.sampling_ratio == pytest.approx(whole.epochs)
    assert few.warmup_epochs * few.sampling_ratio == pytest.approx(whole.warmup_epochs)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two training images of each of two classes: two steps of two."""
    return write_images(tmp_path_factory.mktemp("few") / "images", train=2, val=1)


@pytest.fixture(scope="module")
def more_images(tmp_path_factory):
    """Twenty of each, of which a tenth is as many as ``images`` has."""
    return write_images(tmp_path_factory.mktemp("more") / "images", train=20, val=1)


def weights(path, name, classes):
    model, _ = models.build_model(name, {"num_classes": classes}, {})
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def optimizer_steps():
    """How many steps the optimizer says it has done, after each of them."""
    counts = []

    def count(optimizer, args, kwargs):
        (state,) = {float(state["step"]) for state in optimizer.state.values()}
        counts.append(state)

    handle = register_optimizer_step_post_hook(count)
    yield counts
    handle.remove()


@pytest.fixture
def small(monkeypatch):
    """Our models are built small: other tests build them whole."""
    build = models.build_model

    def build_small(name, required, optional):
        if name not in our_models():
            return build(name, required, optional)
        less = {key: value for key, value in shrunk(name).items() if key != "img_size"}
        required = {key: value for key, value in required.items() if key != "width"}
        return build(name, {**required, **less}, optional)

    monkeypatch.setattr(models, "build_model", build_small)
    monkeypatch.setattr(models.source, "build_model", build_small)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains(name, images, more_images, tmp_path, small, optimizer_steps, main):
    args, _ = parse_recipe(name)
    folder = images if args.sampling_ratio == 1 else more_images
    run = ["-c", ROOT / "configs" / f"{name}.yaml", "--data-set", "IMNET", "--data-path", folder]
    run += ["--input-size", PIXELS, "--batch-size", 2, "--epochs", 1, "--log-interval", 1]
    run += ["--num_workers", 0, "--device", "cpu"]
    if args.amp:  # in float16, the first steps only look for a loss scale
        run += ["--amp-dtype", "bfloat16"]
    if args.distillation_type != "none":
        run += ["--teacher-model", "test_vit"]
        run += ["--teacher-path", weights(tmp_path / "teacher.pth", "test_vit", 2)]
    if "--finetune" in header(ROOT / "configs" / f"{name}.yaml").words:
        run += ["--finetune", weights(tmp_path / "weights.pth", args.model, 1000)]
    status, output, errors = main(*run)
    assert (status, errors) == (0, "")
    dtype = "bfloat16" if args.amp else "float32"
    assert re.search(rf"^model {args.model} .*\b{dtype}\b", output, re.M)
    losses = [float(loss) for loss in re.findall(r"^epoch 0 step [12]/2 loss (\S+) ", output, re.M)]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert optimizer_steps == [1, 2]
    averaged = re.findall(r"^EMA \* Acc@1", output, re.M)
    assert len(averaged) == args.model_ema


STRICT = {
    "modle: visformer_tiny": "'modle'",
    "data-path: 'pipe:touch x'": "'data-path' .*--data-path",
    "val-path: ' pipe:touch x'": "'val-path' .*--val-path",
    "config: other.yaml": "'config'",
    "1: 2": r"\b1\b",
    "epochs: many": "'epochs' .*'many'",
    "epochs: 1.5": "'epochs' .*1.5",
    "epochs: true": "'epochs' .*True",
    "lr: [0.1, 0.2]": r"'lr' .*\[0.1, 0.2\]",
    "model: [visformer_tiny]": r"'model' .*\['visformer_tiny'\]",
    "output_dir: {a: b}": "'output_dir' .*{'a': 'b'}",
    "opt-betas: []": r"'opt-betas' .*\[\]",
    "opt-betas: [0.9, x]": "'opt-betas' .*'x'",
    "opt-betas: [[0.9]]": r"'opt-betas' .*\[0.9\]",
    "amp: maybe": "'amp' .*'maybe'",
    "std-aug: 'false'": "'std-aug' .*'false'",
    "repeated-aug: 0": "'repeated-aug' .*0",
    "remode: colour": "'remode' .*'colour'",
    "data-set: MNIST": "'data-set' .*MNIST",
    "lr: 0.1\nepochs: 3\nlr: 0.2": "'lr'(.|\n)*line 3",
    "batch-size: 8\nbatch_size: 16": "'batch_size' .*'batch-size'",
    "": "",
    "visformer_tiny": "",
    "- epochs: 3": "",
    "epochs: [3": "line 1",
}


@pytest.mark.parametrize("text", STRICT, ids=lambda text: text.replace("\n", "; ") or "empty")
def test_recipe_with_an_error_is_refused(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=STRICT[text] or None) as caught:
        parse_args(["-c", str(path)])
    assert str(path) in str(caught.value)


def test_command_line_wins_over_a_recipe():
    args, given = parse_recipe("convit_tiny_mindcv", "--lr=1", "--no-amp", "--repeated_aug")
    assert (args.lr, args.amp, args.repeated_aug, args.aa) == (1.0, False, True, "")
    assert (args.weight_decay, args.remode) == (1e-4, "const")
    assert {"lr", "amp", "aa"} <= given
    assert "cutmix" not in given


def test_args_yaml_gives_the_same_flags(images, tmp_path, main):
    run = ["--data-path", images, "--num_workers", 0, "--device", "cpu", "--epochs", 1]
    run += ["--batch-size", 2, "--opt-betas", 0.8, 0.99]
    recipe = ROOT / "configs" / "cifar10_scratch.yaml"
    status, _, errors = main("-c", recipe, *run, "--output_dir", tmp_path)
    assert (status, errors) == (0, "")
    wanted, _ = parse_args(["-c", str(recipe), *map(str, run), "--output_dir", str(tmp_path)])
    again, _ = parse_args(["-c", str(tmp_path / "args.yaml")])
    assert vars(again) == vars(wanted)
    assert again.opt_betas == [0.8, 0.99]
    assert Path(again.data_path) == images
