"""From any source to a model and its images."""

import argparse
import json
import re
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn

import datasets
import models
from models import CheckpointError, DataConfig, ModelError, load_model
from models.checkpoint.contents import WEIGHT_KEYS
from training.flags import parse_args

NAME = "convit_tiny"
SMALL = {"depth": 2, "local_up_to_layer": 1, "num_classes": 3}
IMAGENET = (0.485, 0.456, 0.406)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, **SMALL).eval()


@pytest.fixture
def save(tmp_path, model):
    """``save(**content) -> path`` of a checkpoint of the small model."""

    def write(**content):
        own = {"model_name": NAME, "model_kwargs": SMALL, "model": model.state_dict()}
        torch.save({k: v for k, v in (own | content).items() if v is not None}, path)
        return path

    path = tmp_path / "in.pth"
    return write


def same(found, expected):
    """True if two models are the same function."""
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(found.eval()(x), expected(x))


# Wrappers


def wrapped_names(state, prefix):
    return OrderedDict((prefix + key, value) for key, value in state.items())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "module.module.", "model.", "net."]
)
def test_wrappers_are_removed(prefix, model, tmp_path, container=None):
    state = wrapped_names(model.state_dict(), prefix)
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "in.pth")
    found = load_model(tmp_path / "in.pth", NAME, **SMALL)
    assert same(found.model, model)
    own = prefix.replace("_orig_mod.", "")
    assert (own in str(found.report)) if own else ("prefix" not in str(found.report))


@pytest.mark.parametrize("container", WEIGHT_KEYS)
def test_containers_are_found(container, model, tmp_path):
    test_wrappers_are_removed("module.", model, tmp_path, container)


def test_frameworks_own_wrappers(model, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(nn.DataParallel(model))
    torch.save({"model_ema": average.state_dict(), "model": {}}, tmp_path / "ema.pth")
    found = load_model(tmp_path / "ema.pth", NAME, weights="ema", **SMALL)
    assert same(found.model, model)
    assert found.report.ignored == ("n_averaged",)
    compiled = timm.create_model(NAME, **SMALL)
    compiled.load_state_dict(model.state_dict())
    compiled.blocks[0] = torch.compile(compiled.blocks[0])  # one part alone
    torch.save({"state_dict": torch.compile(compiled).state_dict()}, tmp_path / "part.pth")
    assert same(load_model(tmp_path / "part.pth", NAME, **SMALL).model, model)


def test_a_prefix_that_is_not_common_to_all_stays(model, tmp_path):
    state = wrapped_names(model.state_dict(), "model.") | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": state}, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=r"loss\.weight|model\.cls_token"):
        load_model(tmp_path / "in.pth", NAME, **SMALL)
    torch.save({"a.b": torch.ones(1), "_orig_mod.a.b": torch.ones(1)}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"two\.pth"):
        load_model(tmp_path / "two.pth", NAME, **SMALL)


# Metadata of a file


@pytest.mark.parametrize(
    "extra",
    [
        {"pretrained": True},
        {"pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth"}},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/tmp"},
        {"features_only": True},
        {"scriptable": True},
        {"unheard_of": 1},
        {"depth": 10**6},
        {"depth": 10**9},
        {"depth": -1},
        {"depth": "two"},
        {"embed_dim": 10**7},
        {"embed_dim": 0},
        {"num_heads": 0},
        {"num_classes": 10**9},
        {"num_classes": "three"},
        {"norm_layer": "os.system"},
        {"x" * 5000: 1},
        {7: 1},
        {"depth": {"a": 1}},
        {"depth": [2] * 5000},
    ],
    ids=lambda extra: str(extra)[:40],
)
def test_arguments_of_a_file_are_checked(extra, save):
    path = save(model_kwargs=SMALL | extra)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as refused:
        load_model(path)
    assert len(str(refused.value)) < 2100 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        {"model_name": "no_such_model"},
        {"model_name": "os.system"},
        {"model_name": 3},
        {"model_name": "hf-hub:someone/x"},
        {"model_kwargs": [1]},
        {"classes": ["a", "b"]},
        {"classes": {"a": 1}},
        {"model_kwargs": SMALL | {"num_classes": 4}},
        {"data_config": {"mean": [0, 0]}},
        {"data_config": {"std": [1, 1, 0]}},
        {"data_config": {"mean": [0, 0, float("nan")]}},
        {"data_config": {"interpolation": "random"}},
        {"data_config": {"crop_mode": ["center"]}},
        {"data_config": {"crop_pct": 0}},
        {"data_config": {"crop_pct": True}},
        {"data_config": {"input_size": (3, 10**6, 10**6)}},
        {"data_config": 7},
        {"input_size": True},
        {"input_size": "224"},
        {"args": {"eval_crop_ratio": "wide"}},
        {"args": {"mean": 7}, "arch": NAME},
        {"qk_scale_factor": "x", "model_kwargs": None},
        {"gelu": "other"},
    ],
    ids=str,
)
def test_contents_of_a_file_are_checked(content, save):
    path = save(**content)
    with pytest.raises(ModelError, match=re.escape(str(path))):
        load_model(path)


def test_the_files_own_model_wins_over_a_default_and_a_given_one_must_fit(save):
    path = save()
    assert models.find_model(str(path), default="visformer_small").name == NAME
    with pytest.raises(CheckpointError, match=f"{NAME}.*visformer_tiny"):
        load_model(path, "visformer_tiny")
    path = save(model_name=None, arch=NAME)  # as timm's trainer writes
    assert load_model(path).name == NAME
    path = save(model_name=None)
    with pytest.raises(ModelError, match=re.escape(str(path))):
        load_model(path)
    assert models.find_model(str(path), default=NAME).name == NAME


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("visformer_tinyy", "visformer_tiny"),
        ("visformer_tiny.no_such_tag", "no_such_tag"),
        ("no/such/file.pth", "no/such/file.pth"),
        ("local-dir:/no/such/folder", "/no/such/folder"),
        ("hf-hub:", "hf-hub:"),
        ("", "''"),
        ("a\0b", "a"),
        ("x" * 5000, "xxx"),
    ],
)
def test_sources_that_do_not_exist(source, named):
    with pytest.raises(ModelError, match=re.escape(named)):
        load_model(source)


# Images


def config_of(path, **options):
    return models.find_model(str(path), **options).data_config


def test_images_of_runs(save):
    old = {"args": {"eval_crop_ratio": 1.0}, "input_size": 96}  # written before it was recorded
    assert config_of(save(**old)) == DataConfig((96, 96), crop_pct=1.0)
    deit = {"args": argparse.Namespace(input_size=160), "model_name": None}
    assert config_of(save(**deit), name=NAME) == DataConfig((160, 160))
    assert config_of(save(**old | {"input_size": 32})).crop_mode == "squash"
    own = DataConfig((128, 96), "bilinear", (0.5,) * 3, (0.25,) * 3, 0.95, "border")
    assert config_of(save(**old, data_config=own.to_timm())) == own


def test_images_of_other_weights(save):
    path = save(model_name=None)
    vit = config_of(path, name="vit_base_patch32_384.augreg_in21k_ft_in1k")
    assert vit == DataConfig((384, 384), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    assert config_of(path, name="fastvit_t8") == DataConfig((256, 256), crop_pct=0.9)
    flags = {"img_size": 192, "crop_pct": 0.8, "mean": [0.1] * 3, "interpolation": "bilinear"}
    timms = config_of(save(model_name=None, arch="fastvit_t8", args=flags))
    assert timms == DataConfig((192, 192), "bilinear", (0.1,) * 3, DataConfig.std, 0.8)
    mindcv = models.data_config.data_config_of({"mindspore": {}}, {"input_size": (3, 256, 256)}, "")
    assert mindcv == DataConfig()


@pytest.mark.parametrize("extra", [{}, {"data_config": {"crop_pct": 1.0, "mean": (0.5,) * 3}}])
@pytest.mark.parametrize("size", [224, 160, 32])
def test_a_loaded_model_tells_timm_its_images(extra, size, save):
    path = save(input_size=size, classes=list("abc"), args={"eval_crop_ratio": 0.9}, **extra)
    found = load_model(path, img_size=size)
    config = found.model.pretrained_cfg
    assert (config["num_classes"], config["label_names"]) == (3, list("abc"))
    assert not config["url"] and not config["hf_hub_id"]
    photograph = np.random.default_rng(0).integers(256, size=(180, 301, 3), dtype=np.uint8)
    photograph = Image.fromarray(photograph)
    args, _ = parse_args([])
    ours = datasets.build_transform(False, args, found.data_config)(photograph)
    timms = create_transform(**resolve_data_config({}, model=found.model))(photograph)
    assert ours.shape == (3, size, size)
    assert torch.equal(ours, timms)


def test_new_classes_get_a_new_classifier(save):
    found = load_model(save(classes=list("abc")), num_classes=5)
    assert found.model.head.out_features == 5
    assert found.classes is None and "label_names" not in [
        key for key, value in found.model.pretrained_cfg.items() if value
    ]
    assert found.report.missing == ("head.weight", "head.bias")


# Folders in the layout of the Hub


def write_folder(folder, model, **config):
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    own = {"architecture": NAME, "num_classes": 3, "model_args": {"depth": 2} | SMALL}
    own["pretrained_cfg"] = {"crop_pct": 0.7, "input_size": [3, 160, 160], "url": "file:///x"}
    (folder / "config.json").write_text(json.dumps(own | config))
    return folder


@pytest.mark.parametrize("prefix", ["local-dir:", ""])
def test_folders_of_the_hubs_layout(prefix, model, tmp_path):
    folder = write_folder(tmp_path / "hub", model, label_names={"1": "b", "0": "a", "2": "c"})
    found = load_model(f"{prefix}{folder}")
    assert (found.name, found.classes) == (NAME, ("a", "b", "c"))
    assert found.data_config == DataConfig((160, 160), crop_pct=0.7)
    expected = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), expected(x))


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "no_such_model"},
        {"architecture": None},
        {"num_classes": 4},
        {"label_names": ["a"]},
        {"model_args": {"pretrained": True}},
        {"model_args": [1]},
        {"model_args": {"embed_dim": 10**7}},
        {"pretrained_cfg": [1]},
        {"pretrained_cfg": {"mean": 0.5}},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(config, model, tmp_path):
    folder = write_folder(tmp_path / "hub", model, **config)
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        load_model(f"local-dir:{folder}")


def test_folders_that_are_not_complete(model, tmp_path):
    folder = write_folder(tmp_path / "hub", model)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    (folder / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(str(folder))
    (folder / "config.json").unlink()
    (folder / "best.pth").touch()
    with pytest.raises(CheckpointError, match=r"best\.pth"):  # a run's output folder
        load_model(str(folder))


def test_no_network_is_told_at_once(monkeypatch):
    monkeypatch.setattr(models.hub, "CONNECT_SECONDS", 1)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"someone/x.*config\.json"):
        load_model("hf-hub:someone/x")
    with pytest.raises(ModelError, match=r"visformer_tiny.*model\.safetensors"):
        load_model("visformer_tiny", pretrained=True)
    with pytest.raises(ModelError, match="visformer_net1"):
        load_model("visformer_net1", pretrained=True)


def nested(depth):
    value = [1]
    for _ in range(depth):
        value = [value] * 900
    return value


@pytest.mark.parametrize(
    "content",
    [
        {"model_kwargs": SMALL | {"depth": nested(5)}},
        {"model_kwargs": SMALL | {"depth": 10**6000}},
        {"data_config": {"mean": nested(5)}},
        {"data_config": {"crop_pct": 10**6000}},
        {"data_config": {"input_size": nested(5)}},
        {"args": {"mean": nested(5), "crop_pct": nested(5)}, "arch": NAME},
        {"model_name": nested(5)},
        {"input_size": 10**6000},
        {"gelu": nested(5)},
        {"classes": nested(5)},
        {"head": nested(5), "model_kwargs": SMALL | {"num_classes": nested(5)}},
    ],
    ids=lambda content: "+".join(content),
)
def test_values_that_cannot_be_printed(content, save):
    path = save(**content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_model(path)
