"""FastViT's own: blocks, branches and their reparameterisation, weights in other layouts."""

import copy
import itertools
import re
from functools import partial

import pytest
import timm
import timm.models.fastvit
import torch
from loading import refused
from small_models import relative, stir
from timm.utils.model import reparameterize_model
from torch import nn

from models import CheckpointError, load_checkpoint
from models.fastvit import FastViT, Stage, checkpoint_filter_fn
from models.layers.fastvit import AttentionBlock
from models.layers.reparam import (
    LargeKernelConv,
    ReparamConv,
    ReparamModule,
    RepConditionalPosEnc,
    RepMixer,
    reparameterize,
)

# name: parameters in millions, before reparameterisation
NAMES = {
    "fastvit_t8": 4.0,
    "fastvit_t12": 7.6,
    "fastvit_s12": 9.5,
    "fastvit_sa12": 11.6,
    "fastvit_sa24": 21.6,
    "fastvit_sa36": 31.5,
    "fastvit_ma36": 44.1,
    "fastvit_mci0": 11.4,
    "fastvit_mci1": 21.5,
    "fastvit_mci2": 35.8,
    "fastvit_mci3": 125.2,
    "fastvit_mci4": 321.8,
}
TINY = (
    Stage(1, 16, 2.0),
    Stage(2, 32, 2.0),
    Stage(1, 32, 2.0),
    Stage(2, 64, 2.0, mixer="attention", position_encoding=True),
)


def tiny(**kwargs):
    """A model with every kind of layer."""
    torch.manual_seed(0)
    return timm.create_model("fastvit_sa12", **{"stages": TINY, "num_classes": 10} | kwargs)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_sa12"])
def test_reparameterised_checkpoints_of_the_original_load(golden, tmp_path, name):
    description, _, _ = golden(f"fastvit.{name}")
    weights = golden.weights({"keys": description["reparam"]["keys_after"]})
    path = tmp_path / "fused.pth"
    torch.save({"state_dict": weights}, path)
    model = timm.create_model(name, inference_mode=True)
    report = load_checkpoint(model, path)
    assert len(report.loaded) == len(weights) == len(model.state_dict())
    assert count(model) == description["reparam"]["n_params_after_all"]
    last = weights["network.5.proj.0.lkb_reparam.weight"]
    assert torch.equal(model.stages[3].downsample.proj[0].reparam_conv.weight, last)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_checkpoint(timm.create_model(name), path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastvit_sa24", "fastvit_ma36"])
def test_equals_timms(golden, name):
    theirs = getattr(timm.models.fastvit, name)(num_classes=10).eval()
    assert not isinstance(theirs, FastViT)
    entries = [(k, tuple(v.shape), str(v.dtype)) for k, v in theirs.state_dict().items()]
    theirs.load_state_dict(golden.weights({"keys": entries}))
    ours = timm.create_model(name, num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 40, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double()(x)
        scale = expected.abs().max()
        assert (ours.double()(x) - expected).abs().max() < 1e-9 * scale
        fused = timm.create_model(name, num_classes=10, inference_mode=True).eval().double()
        fused.load_state_dict(reparameterize_model(theirs).state_dict())
        assert (fused(x) - expected).abs().max() < 1e-9 * scale


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_facts_are_timms(name):
    with torch.device("meta"):
        ours, theirs = timm.create_model(name), getattr(timm.models.fastvit, name)()
        fused = timm.create_model(name, inference_mode=True)
        fused_theirs = getattr(timm.models.fastvit, name)(inference_mode=True)
    assert type(ours) is FastViT
    for a, b in ((ours, theirs), (fused, fused_theirs)):
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (a, b)]
        assert shapes[0] == shapes[1]
    assert round(count(ours) / 1e6, 1) == NAMES[name]
    assert count(fused) < count(ours)
    assert (ours.num_features, ours.head_hidden_size) == (theirs.num_features,) * 2
    assert ours.feature_info == theirs.feature_info
    assert ours.num_classes == theirs.num_classes
    tags = timm.models.fastvit.default_cfgs[name].cfgs
    facts = ("input_size", "crop_pct", "pool_size", "first_conv", "classifier", "license")
    for tag, known in tags.items():
        cfg = timm.get_pretrained_cfg(f"{name}.{tag}")
        assert cfg.hf_hub_id in (f"timm/{name}.{tag}", known.hf_hub_id)
        for fact in (*facts, "num_classes", "mean", "std"):
            assert getattr(cfg, fact) == getattr(known, fact), fact
    assert ours.pretrained_cfg["tag"] == next(iter(tags))


ENCODER = (
    Stage(1, 32, 3.0),
    Stage(2, 64, 3.0),
    Stage(1, 128, 3.0, patch_se=True),
    Stage(1, 256, 3.0, "attention", True, patch_se=True),
)
LARGE_ENCODER = (
    *(Stage(1, dim) for dim in (32, 64, 128)),
    *(Stage(1, dim, 4.0, "attention", True) for dim in (256, 512)),
)


@pytest.mark.parametrize("name", [name for name in NAMES if "mci" in name])
def test_image_encoders_equal_timms(name):
    stages = LARGE_ENCODER if name in ("fastvit_mci3", "fastvit_mci4") else ENCODER
    ours = stir(timm.create_model(name, stages=stages)).double()
    sizes = {"layers": [s.depth for s in stages], "embed_dims": [s.dim for s in stages]}
    theirs = getattr(timm.models.fastvit, name)(**sizes).eval().double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x)
        folded = reparameterize_model(theirs)
        fitting = timm.create_model(name, stages=stages, inference_mode=True).eval().double()
        fitting.load_state_dict(folded.state_dict())
        for net in (ours, ours.fuse(), copy.deepcopy(ours).reparameterize(), fitting):
            assert relative(net(x), expected) < 1e-12
        maps = [net.forward_intermediates(x, intermediates_only=True) for net in (ours, theirs)]
        for found, wanted in zip(*maps, strict=True):
            assert relative(found, wanted) < 1e-12
        for net in (ours, theirs):
            net.reset_classifier(0)
        assert relative(ours(x), theirs(x)) < 1e-12


def test_the_image_encoder_of_a_checkpoint_of_two_encoders():
    stages = [Stage(1, 32), Stage(1, 32, 2.0, patch_se=True)]
    model = timm.create_model("fastvit_mci0", stages=stages, num_classes=5)
    state = model.state_dict()
    weight = torch.randn(64, 5)
    content = {f"image_encoder.model.{k}": v for k, v in state.items() if "head" not in k}
    content |= {"image_encoder.model.head.proj": weight, "text_encoder.weight": torch.ones(1)}
    found = checkpoint_filter_fn(content, model)
    assert found.keys() == state.keys()
    assert torch.equal(found["head.fc.weight"], weight.T) and not found["head.fc.bias"].any()


LAYERS = {
    "dense": lambda: ReparamConv(6, 6, 3),
    "strided": lambda: ReparamConv(3, 8, 3, stride=2),
    "pointwise": lambda: ReparamConv(6, 6, 1),
    "groups": lambda: ReparamConv(6, 6, 3, groups=2, use_se=True),
    "depthwise": lambda: ReparamConv(6, 12, 3, groups=6),
    "branches": lambda: ReparamConv(6, 6, 5, num_convs=3, use_act=False),
    "norm": lambda: ReparamConv(6, 6, 3, groups=6, num_convs=0, use_scale=False),
    "mixer": lambda: RepMixer(6),
    "mixer without scale": lambda: RepMixer(6, 5, layer_scale_init_value=None),
    "large": lambda: LargeKernelConv(6, 12, 7, stride=2, groups=6),
    "large and more": lambda: LargeKernelConv(6, 12, 7, groups=6, use_se=True, use_act=True),
    "position": lambda: RepConditionalPosEnc(6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_keep_their_function(name):
    torch.manual_seed(0)
    layer = stir(LAYERS[name]()).double()
    x = torch.randn(2, layer.geometry["in_channels"], 9, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        single = copy.deepcopy(layer).float()
        expected_single = single(x.float())
        reparameterize(layer)
        reparameterize(single)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        error = (single(x.float()) - expected_single).norm() / expected_single.norm()
    assert error < 1e-5
    assert not any(n.partition(".")[0] in layer.branches for n, _ in layer.named_parameters())
    convolution = layer.reparam_conv
    assert convolution.weight.requires_grad
    assert convolution.weight.dtype == torch.float64
    layer.reparameterize()
    assert layer.reparam_conv is convolution


def test_reparameterised_weights_fit_inference_mode():
    model = stir(tiny()).reparameterize()
    twin = tiny(inference_mode=True).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(twin(x), expected)
        assert torch.equal(twin.reparameterize()(x), expected)
    model.train()(x).sum().backward()  # it may be fine-tuned
    assert model.stem[0].reparam_conv.weight.grad is not None


def test_without_overparameterisation_a_convolution_is_one_branch():
    model, whole = stir(tiny(overparameterize=False)), tiny()
    assert set(model.state_dict()) < set(whole.state_dict())
    gone = {key.rpartition(".")[0] for key in set(whole.state_dict()) - set(model.state_dict())}
    assert not [key for key in gone if ".blocks." in key or ".pos_emb" in key]
    ends = ("conv_scale.conv", "conv_scale.bn", "small_conv.conv", "small_conv.bn", "identity")
    assert all(key.endswith(ends) for key in gone)
    assert not [key for key in model.state_dict() if "small_conv" in key]
    for part in (model.stem, model.stages[1].downsample, model.final_conv):
        norms = [m for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
        convolutions = [m for m in part.modules() if isinstance(m, ReparamModule)]
        assert len(norms) == len(convolutions) > 0
    x = torch.randn(2, 3, 64, 64)
    model.train()(x).sum().backward()
    model.eval()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.reparameterize()(x), expected, rtol=1e-4, atol=1e-5)


def test_timms_tool_reparameterises_ours():
    model = stir(tiny())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        folded = reparameterize_model(model)
        assert count(folded) == count(tiny(inference_mode=True)) < count(model)
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)


def test_filter_is_pure_and_leaves_our_layout():
    model = tiny()
    state = model.state_dict()
    keys = list(state)
    converted = checkpoint_filter_fn(state, model)
    assert list(converted) == keys == list(state)
    assert all(converted[key] is state[key] for key in keys)
    original = {"network.6.pe.bias": torch.zeros(64), "network.7.1.layer_scale_2": torch.ones(1)}
    names = ["stages.3.pos_emb.pos_enc.bias", "stages.3.blocks.1.layer_scale_2.gamma"]
    assert list(checkpoint_filter_fn(original, model)) == names
    assert list(original) == ["network.6.pe.bias", "network.7.1.layer_scale_2"]
    unknown = {"network.9.weight": torch.zeros(1)}
    assert list(checkpoint_filter_fn(unknown, model)) == ["network.9.weight"]


def test_strided_scale_branch_is_the_strided_convolution():
    torch.manual_seed(0)
    layer = stir(ReparamConv(3, 4, 3, stride=2, num_convs=0, use_act=False)).double()
    for size in ((8, 8), (7, 10), (1, 1)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        branch = layer.conv_scale
        expected = branch.bn(nn.functional.conv2d(x, branch.conv.weight, stride=2))
        torch.testing.assert_close(layer(x), expected)


def test_layer_scales():
    model = tiny(layer_scale_init_value=0.3)
    gammas = {n: p for n, p in model.named_parameters() if n.endswith("gamma")}
    assert len(gammas) == 2 * 6
    assert all((p == 0.3).all() and p.ndim == 3 for p in gammas.values())
    for none in (tiny(layer_scale_init_value=0.0), FastViT(TINY, layer_scale_init_value=None)):
        assert not any(name.endswith("gamma") for name, _ in none.named_parameters())


@pytest.mark.parametrize("size", [(256, 192), (33, 50), (31, 8), (5, 1)])
def test_any_size(size):
    model = tiny().eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
        assert model(torch.randn(1, 3, *size)).shape == (1, 10)
    strides = (4, 8, 16, 32)
    assert [m.shape[-2:] for m in maps] == [tuple(-(-s // t) for s in size) for t in strides]


def test_blocks_are_the_papers():
    block = stir(AttentionBlock(32, 2.0))
    x = torch.randn(1, 32, 4, 4)
    y = x + block.layer_scale_1(block.token_mixer(block.norm(x)))
    torch.testing.assert_close(block(x), y + block.layer_scale_2(block.mlp(y)))
    names = {n for n, m in tiny().named_modules() if isinstance(m, nn.GELU)}
    assert not any(".downsample.proj.0" in name for name in names)  # computed and discarded
    assert "stages.1.downsample.proj.1.act" in names


@pytest.mark.parametrize(
    ("kwargs", "error", "values"),
    [
        ({"img_size": 256}, TypeError, ["img_size"]),
        ({"stages": (Stage(1, 16, mixer="conv"),)}, ValueError, ["'conv'", "repmixer"]),
        ({"stages": (Stage(1, 16), Stage(1, 40))}, ValueError, ["40", "16"]),
        ({"stages": (Stage(1, 48, mixer="attention"),)}, ValueError, ["48", "32"]),
        ({"cls_ratio": 1.5}, ValueError, ["1.5"]),
        ({"cls_ratio": 0.0}, ValueError, ["0.0"]),
    ],
)
def test_wrong_arguments_raise(kwargs, error, values):
    refused(partial(tiny, **kwargs), *values, kind=error)


def test_pruning_takes_the_last_convolution_with_the_head():
    model, x = tiny().eval(), torch.randn(1, 3, 64, 64)
    keeping = copy.deepcopy(model)
    assert keeping.prune_intermediate_layers([3], prune_head=False) == [3]
    assert torch.equal(keeping(x), model(x))
    (level,) = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert model.num_features == 32
    assert torch.equal(model.forward_features(x), level)


def test_parameter_groups_of_the_reparameterised_form():
    model = tiny(inference_mode=True)
    names = sorted(key for key, _ in model.named_parameters())
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(itertools.chain(*groups.values())) == names
