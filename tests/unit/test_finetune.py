"""Starting from other weights, with part of the net or of the data."""

import re

import numpy as np
import pytest
import timm
import torch
from conftest import read_log, write_images
from loading import flags
from PIL import Image
from small_models import small
from torch import nn

import engine
import models
from pipeline.sources.base import Files, Pixels
from pipeline.sources.subset import share_of, stratified_share
from training import optimizers, schedules
from training.network import model_arguments
from training.schedules import Rates
from utils import UserError

SMALL = ["--input-size", 32, "--batch-size", 4, "--num_workers", 0, "--no-model-ema"]
FIRST = {  # the stage that is frozen first
    "visformer_tiny": "stage1",
    "swin_visformer_tiny_v2": "stage0",
    "convit_tiny": "blocks.0",
    "fastvit_t8": "stages.0",
    "vit_b_32_224": "blocks.0",
}


@pytest.mark.parametrize("name", FIRST)
def test_layers_learn_the_slower_the_deeper_they_lie(name):
    model = small(name)
    optimizer = optimizers.build(flags("--layer-decay", 0.5), model, lr=1.0)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert len(scale) == len(list(model.parameters()))
    scales = {key: scale[id(parameter)] for key, parameter in model.named_parameters()}
    assert {value for key, value in scales.items() if key.startswith("head")} == {1.0}
    row = [value for key, value in scales.items() if "blocks." in key or key.startswith("stage")]
    assert row == sorted(row)
    assert min(scales.values()) == 0.5 ** (len(set(scales.values())) - 1)
    assert scales[next(key for key in scales if key.startswith(("stem", "patch_embed")))] < min(row)
    schedules.build(flags(), optimizer, 10, Rates(1.0, 0.0, 0.25))[0].step(0)
    assert {g["lr"] for g in optimizer.param_groups} == {0.25 * s for s in scales.values()}


def test_layers_that_a_model_does_not_tell():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

    with pytest.raises(UserError, match="Plain"):
        optimizers.build(flags("--layer-decay", 0.5), Plain(), lr=1.0)


@pytest.mark.parametrize("name", FIRST)
def test_frozen_stages_stay_as_they_are(name):
    """Neither parameters nor statistics change, whatever the net is told about its mode."""
    model = small(name)
    models.freeze_stages(model, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = optimizers.build(flags("--weight-decay", 0.5), model, lr=0.1)
    batch = torch.randn(2, 3, 64, 64), torch.tensor([0, 1]), []
    precision = engine.Precision(torch.device("cpu"))
    loss = nn.CrossEntropyLoss()
    engine.train_one_epoch(model, loss, [batch], optimizer, precision.device, 0, precision)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    stem = ("stem", "patch_embed1" if name == "visformer_tiny" else "patch_embed.", "cls_token")
    still = (FIRST[name] + ".", *stem)
    assert not [key for key in changed if key.startswith(still)]
    learning = {key for key, p in model.named_parameters() if p.requires_grad}
    assert learning and not [key for key in learning if key.startswith(still)]
    assert len(changed & learning) > 0.9 * len(learning)


def test_only_the_classifier_learns():
    for name in ("visformer_tiny", "fastvit_t8"):
        model = small(name)
        models.freeze_all_but_classifier(model)
        learning = [key for key, p in model.named_parameters() if p.requires_grad]
        assert learning and all(key.startswith("head") for key in learning)
        model.train()
        engine.eval_frozen(model)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and not any(norm.training for norm in norms)
        assert model.training
    with pytest.raises(models.ModelError):
        models.freeze_all_but_classifier(small("visformer_tiny").stage1)


def test_a_share_is_stratified_fixed_and_nested():
    targets = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 5], [200, 40, 10, 1]))
    tenth, fifth = (stratified_share(targets, ratio) for ratio in (0.1, 0.2))
    assert np.bincount(targets[tenth]).tolist() == [20, 4, 1, 0, 0, 1]
    assert np.bincount(targets[fifth]).tolist() == [40, 8, 2, 0, 0, 1]
    assert set(tenth) < set(fifth) and (np.diff(tenth) > 0).all()
    assert (stratified_share(targets, 1.0) == np.arange(len(targets))).all()
    assert (tenth == stratified_share(targets, 0.1)).all()
    spread = np.diff(np.flatnonzero(np.isin(np.flatnonzero(targets == 0), tenth)))
    assert len(set(spread.tolist())) > 3  # at random, not the first ones or every tenth


def test_a_share_of_files_shards_and_pixels(tmp_path):
    targets = [0, 1] * 6
    paths = []
    for i in range(12):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(paths[-1])
    indices = stratified_share(np.array(targets), 0.5)
    whole = Files(paths, targets, ["a", "b"])
    whole.shards = (5, 0, 4, 3)
    part = share_of(whole, 0.5)
    assert [np.asarray(part.open(i))[0, 0, 0] for i in range(len(part))] == indices.tolist()
    assert [part.name(i) for i in range(6)] == [str(paths[i]) for i in indices]
    shard = np.repeat([0, 2, 3], [5, 4, 3])[indices]
    assert part.shards == tuple((shard == i).sum() for i in range(4))
    assert part.targets.tolist() == [targets[i] for i in indices] and part.classes == ["a", "b"]
    pixels = np.stack([np.asarray(whole.open(i)) for i in range(12)])
    part = share_of(Pixels(pixels, targets, ["a", "b"]), 0.5)
    assert (part.pixels == pixels[indices]).all() and part.targets.sum() == 3
    assert share_of(whole, 1.0) is whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    images = write_images(folder / "images", train=20, val=3)
    others = write_images(folder / "others", train=8, val=3, classes=("bird", "fish"))
    more = write_images(folder / "more", train=8, val=3, classes=("bird", "cat", "dog"))
    return images, others, more, folder


@pytest.mark.slow
def test_from_run_to_run(trained, main):
    """A share of the set; then other classes with a new classifier; names that are told apart."""
    images, others, more, folder = trained
    base = ["--model", "visformer_tiny", *SMALL, "--epochs", 1, "--warmup-lr", 1e-3]
    run = [*base, "--data-path", images, "--output_dir", folder / "a", "--sampling-ratio", 0.25]
    status, output, errors = main(*run)
    assert status == 0, errors
    assert re.search(r"\b10 images \(0\.25 ", output)
    first = torch.load(folder / "a/checkpoint.pth", weights_only=True)
    assert first["classes"] == ["cat", "dog"]

    tuned = [*base, "--finetune", folder / "a/checkpoint.pth", "--output_dir"]
    status, output, _ = main(*tuned, folder / "b", "--data-path", others, "--linear-probe")
    assert status == 0 and "(0.001 M " in output  # trainable parameters
    second = torch.load(folder / "b/checkpoint.pth", weights_only=True)
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]) == (not key.startswith("head")), key
    assert read_log(folder / "b")[0]["n_parameters"] == sum(
        value.numel() for key, value in first["model"].items() if key.startswith("head")
    )

    torch.save(first | {"gelu": "tanh"}, folder / "tanh.pth")
    tuned[tuned.index("--finetune") + 1] = folder / "tanh.pth"
    words = ["--input-size", 64, "--layer-decay", 0.8, "--freeze-stages", 0]
    words += ["--qk-scale-factor", -0.5]
    status, output, errors = main(*tuned, folder / "c", "--data-path", more, *words)
    assert status == 0, errors
    assert re.search(r"\b3 resampled.*\bhead\b", output)
    assert re.search(r"\b18 layers .* 0\.0225\b", output)
    assert re.search(r"warning: --qk-scale-factor -0\.5 .* -0\.25\b", output)
    words += ["--resume", "auto"]
    status, output, errors = main(*tuned, folder / "c", "--data-path", more, *words)
    assert status == 0, errors
    assert re.search("^--finetune .*tanh.pth .*checkpoint.pth$", output, re.M)
    third = torch.load(folder / "c/checkpoint.pth", weights_only=True)
    assert (first["gelu"], third["gelu"]) == ("none", "tanh")

    words = ["--resume", folder / "a/checkpoint.pth", "--eval", "--data-path", others]
    status, _, errors = main(*words, *SMALL)
    assert status == 1 and "bird" in errors and "cat" in errors


def test_weights_that_expect_other_images_get_them(trained, main):
    *_, more, folder = trained
    net = timm.create_model("test_vit", num_classes=5, img_size=32)
    torch.save(net.state_dict(), folder / "timm.pth")
    run = [*SMALL, "--model", "test_vit", "--data-path", more, "--epochs", 1]
    run += ["--output_dir", folder / "half"]
    status, _, errors = main(*run, "--finetune", folder / "timm.pth")
    assert status == 0, errors
    source = models.find_model(str(folder / "half" / "checkpoint.pth"))
    assert (source.data_config.mean, source.data_config.std) == ((0.5,) * 3, (0.5,) * 3)


def test_what_a_recipe_holds_is_not_always_asked_for():
    model, args = "vgg11", flags("--drop-path", 0.1)  # which knows no drop_path_rate
    args.model, args.input_size = model, 32
    source = models.find_model(model)
    required, optional = model_arguments(args, {"drop_path"}, source, 2)
    assert "drop_path_rate" not in required and optional["drop_path_rate"] == 0.1
    args.drop_path = 0.2
    assert model_arguments(args, {"drop_path"}, source, 2)[0]["drop_path_rate"] == 0.2
    with torch.device("meta"):  # timm says "argument(s)" of this one
        _, kwargs = models.build_model("hrnet_w18_small", {"num_classes": 2}, optional)
    assert kwargs.keys() == {"num_classes", "drop_rate"}


def test_options_of_a_resumed_optimizer_are_those_of_the_flags():
    model = small("vit_b_32_224")
    words = ["--layer-decay", 0.5, "--weight-decay", 0.3, "--opt-betas", 0.8, 0.9]
    before = optimizers.build(flags(*words), model, lr=1.0)
    model(torch.zeros(1, 3, 64, 64)).sum().backward()
    before.step()
    after = optimizers.build(flags("--layer-decay", 0.7), model, lr=2.0)
    optimizers.restore(after, before.state_dict(), "file")
    assert {g["betas"] for g in after.param_groups} == {(0.9, 0.999)}
    assert {g["weight_decay"] for g in after.param_groups} == {0.0, 0.05}
    assert min(g["lr_scale"] for g in after.param_groups) == pytest.approx(0.7**3)
    old, new = (list(o.state.values()) for o in (before, after))
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(old, new, strict=True))


def test_locality_of_convit(trained, main):
    images, *_, folder = trained
    words = ["--model", "convit_tiny", *SMALL, "--epochs", 1, "--data-path", images]
    words += ["--locality-strength", 0.5, "--local-up-to-layer", 3, "--output_dir", folder / "d"]
    words += ["--model-kwargs", "embed_dim=96", "use_pos_embed=False"]
    assert main(*words)[0] == 0
    saved = torch.load(folder / "d/checkpoint.pth", weights_only=True)
    kwargs = saved["model_kwargs"]
    assert (kwargs["locality_strength"], kwargs["local_up_to_layer"]) == (0.5, 3)
    gates = [key for key in saved["model"] if key.endswith("gating_param")]
    assert len(gates) == 3
    assert "pos_embed" not in saved["model"] and saved["model"]["norm.weight"].shape == (96,)
    assert main("-c", folder / "d/args.yaml", "--epochs", 1, "--resume", "auto")[0] == 0
    words = ["--eval", "--resume", folder / "d/checkpoint.pth", "--data-path", images]
    status, output, _ = main(*words)
    assert status == 0 and "'local_up_to_layer': 3" in output


# command lines, and what the error must name (without one: the words themselves)
BAD = {
    "--sampling-ratio 0.0": None,
    "--sampling-ratio 1.5": None,
    "--layer-decay 1.2": None,
    "--freeze-stages 1": "--freeze-stages",
    "--linear-probe": None,
    "--linear-probe --resume auto --output_dir {new}": "{new}",
    "--drop-path 2.0": None,
    "--smoothing -0.5": None,
    "--clip-grad -1.0": None,
    "--num-workers -1": None,
    "--weight-decay nan": None,
    "--cutmix-minmax 0.9 0.1": None,
    "--opt-betas 0.9": None,
    "--model test_vit.nosuchtag": "test_vit.nosuchtag",
    "--finetune x --linear-probe --layer-decay 0.5": "--layer-decay",
    "--finetune x --linear-probe --freeze-stages 0": "--freeze-stages",
    "--finetune x --freeze-stages -2": "--freeze-stages -2",
    "--finetune {new}.pth --freeze-stages 7": r"\b7 .*\b4 ",
    "--locality-strength 1": "visformer_tiny .*locality_strength",
    "--local-up-to-layer 2": "visformer_tiny .*local_up_to_layer",
    "--model convit_tiny --local-up-to-layer 12": "local_up_to_layer 12 .* 11",
    "--finetune none.pth": "none.pth",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_named(trained, main, words):
    images, *_, folder = trained
    base = ["--model", "visformer_tiny", *SMALL, "--epochs", 1, "--data-path", images]
    torch.save({"head.weight": torch.ones(1)}, folder / "new.pth")
    status, _, errors = main(*base, *words.format(new=folder / "new").split())
    assert status == 1
    assert re.search(f"^error: .*{(BAD[words] or words).format(new=folder / 'new')}", errors)
