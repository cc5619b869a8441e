"""Visformer: equal to the original, and a good citizen of timm."""

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT, clean_env
from timm.optim import create_optimizer_v2
from torch import nn

import models
from models.layers import (
    Attention2d,
    attention,
    drop_path_rates,
    resample_position_map,
    set_fused_attention,
)

NAMES = ["visformer_tiny", "visformer_small"]


def tiny(**kwargs):
    return timm.create_model("visformer_tiny", **{"img_size": 64, "num_classes": 10} | kwargs)


def test_import_is_silent_and_ours_wins():
    code = (
        "import warnings, timm; warnings.simplefilter('error');"
        "import models;"
        "m = timm.create_model('visformer_small', drop_path_rate=0.1, qk_scale_factor=-0.5);"
        "assert type(m).__module__ == 'models.visformer', type(m).__module__;"
        "assert m.stage2[0].attn.scale == 64 ** -0.5"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_attention_is_the_formula_and_the_exponent_counts_twice():
    torch.manual_seed(0)
    layer = Attention2d(12, num_heads=3, qk_scale_factor=-0.4).double()
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    q, k, v = layer.qkv(x).reshape(2, 3, 3, 4, 15).unbind(1)  # B h d N
    weights = (q.transpose(-2, -1) @ k * 4**-0.8).softmax(-1)
    expected = layer.proj((weights @ v.transpose(-2, -1)).transpose(-2, -1).reshape(2, 12, 3, 5))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.attention_maps(x), weights, rtol=1e-12, atol=1e-12)


def test_prescale_keeps_float16_finite():
    size = 200.0
    q = k = torch.full((1, 1, 4, 64), size, dtype=torch.float16)
    classical = (q @ k.transpose(-2, -1)) * 64**-0.5
    assert classical.isinf().all()
    scaled = q * 64**-0.5
    v = torch.randn(1, 1, 4, 64, dtype=torch.float16)
    out = attention(scaled, k * 64**-0.5, v, fused=False)
    torch.testing.assert_close(
        out.double(), v.double().mean(2, keepdim=True).expand_as(out), rtol=2e-3, atol=2e-3
    )


def test_attention_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer = Attention2d(8, num_heads=2, attn_drop=0.5)
    x = torch.randn(1, 8, 4, 4)
    for fused in (True, False):
        set_fused_attention(layer, fused)
        layer.train()
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_attention_refuses_uneven_heads():
    with pytest.raises(ValueError, match="dim 10 is not a multiple of num_heads 3"):
        Attention2d(10, num_heads=3)


def test_drop_path_grows_linearly():
    model = tiny(drop_path_rate=0.14)
    rates = [
        getattr(block.drop_path2, "drop_prob", 0.0)
        for stage in (model.stage1, model.stage2, model.stage3)
        for block in stage
    ]
    assert rates == pytest.approx([0.01 * i for i in range(15)])
    assert drop_path_rates(0.3, [1]) == [[0.0]]


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (224, 160)])
def test_other_sizes_resample_position_embeddings(size):
    model = tiny().eval()
    with torch.no_grad():
        maps = model.forward_features(torch.randn(1, 3, *size))
    assert maps.shape == (1, 384, size[0] // 32, size[1] // 32)


def test_position_map_resampling():
    ramp = torch.linspace(0, 1, 8).reshape(1, 1, 8, 1).expand(1, 1, 8, 6).contiguous()
    assert resample_position_map(ramp, (8, 6)) is ramp
    wide = resample_position_map(ramp.double(), (16, 12))
    assert wide.dtype == torch.float64
    assert (wide[0, 0, 1:] >= wide[0, 0, :-1]).all()
    half = resample_position_map(ramp.half(), (16, 12))
    torch.testing.assert_close(half.double(), wide, rtol=0, atol=2e-3)


@pytest.mark.parametrize("size", [(33, 64), (64, 65), (16, 64)])
def test_sizes_that_do_not_fit_are_named(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} does not fit.*multiples of 32"):
        tiny().eval()(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match="does not fit"):
        tiny(img_size=size)


def test_lenient_sizes_floor_as_patch_embeddings_do():
    model = tiny(strict_img_size=False).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, 125, 167), intermediates_only=True)
    assert [tuple(m.shape[-2:]) for m in maps] == [(15, 21), (7, 10), (3, 5)]


@pytest.mark.parametrize("name", NAMES)
def test_features(name):
    model = timm.create_model(name, features_only=True, out_indices=(0, 2), img_size=64).eval()
    full = timm.create_model(name, img_size=64).eval()
    model.load_state_dict({f"model.{k}": v for k, v in full.state_dict().items()}, strict=False)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = model(x)
        final, every = full.forward_intermediates(x, norm=True)
    assert model.feature_info.channels() == [m.shape[1] for m in maps]
    assert model.feature_info.reduction() == [64 // m.shape[-1] for m in maps] == [8, 32]
    torch.testing.assert_close(maps[0], every[0])
    torch.testing.assert_close(full.norm(maps[1]), final)
    torch.testing.assert_close(every[2], final)


def test_early_stop_and_pruning_leave_later_stages_out():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    last, maps = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(last, maps[0])
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert not any("3" in key.split(".")[0] for key in model.state_dict())
    pruned = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    torch.testing.assert_close(pruned[0], maps[0])
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_heads():
    model = tiny(num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 384)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == 7
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), model.head(pooled))
    model.reset_classifier(5, global_pool="catavgmax")
    assert model(x).shape == (2, 5)
    assert model.head.in_features == model.head_hidden_size == 768
    assert tiny(global_pool="max")(x).shape == (2, 10)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(in_chans):
    assert tiny(in_chans=in_chans)(torch.randn(2, in_chans, 64, 64)).shape == (2, 10)


def test_unknown_argument_raises():
    with pytest.raises(TypeError, match="drop_path_ratee"):
        tiny(drop_path_ratee=0.1)


def test_gradient_checkpointing_changes_no_gradient():
    plain = tiny()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    plain(x).sum().backward()
    calls = []
    hook = saving.stage2[1].register_forward_pre_hook(lambda *_: calls.append(1))
    saving(x).sum().backward()
    hook.remove()
    assert len(calls) == 2  # once forward, once more in the backward pass
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(saving.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)  # statistics are counted once
    compiled = torch.compile(saving, fullgraph=True, backend="aot_eager")
    assert torch.isfinite(compiled(x)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", dtype):
            low = model(x)
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1 * full.std().item())


def test_copies_and_pickles():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)


def test_same_seed_same_weights():
    torch.manual_seed(3)
    first = tiny().state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(value, first[key]) for key, value in tiny().state_dict().items())


def test_exports_and_compiles_without_graph_breaks():
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(exported, expected)
    torch.testing.assert_close(compiled, expected)


def test_weight_decay_and_layer_groups():
    model = tiny()
    assert model.no_weight_decay() == {"pos_embed1", "pos_embed2", "pos_embed3"}
    optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.1, layer_decay=0.5)
    scales = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            scales[names[id(p)]] = group["lr_scale"]
            decays = p.ndim > 1 and not names[id(p)].startswith("pos_embed")
            assert (group["weight_decay"] > 0) == decays, names[id(p)]
    order = ["stem.0.weight", "stage1.0.mlp.conv1.weight", "stage1.6.mlp.conv1.weight"]
    order += ["patch_embed2.proj.weight", "stage2.0.attn.qkv.weight", "stage3.3.mlp.conv1.weight"]
    order += ["head.weight"]
    assert [scales[a] < scales[b] for a, b in itertools.pairwise(order)] == [True] * 6


def test_pretrained_goes_through_timms_machinery(tmp_path):
    source = timm.create_model("visformer_tiny")
    path = tmp_path / "model.pth"
    torch.save(source.state_dict(), path)
    model = timm.create_model(
        "visformer_tiny.in1k",
        pretrained=True,
        img_size=64,
        num_classes=5,
        pretrained_cfg_overlay={"file": str(path)},
    )
    assert torch.equal(model.stage3[0].attn.qkv.weight, source.stage3[0].attn.qkv.weight)
    assert model.pos_embed1.shape[-1] == 8
    assert model.pretrained_cfg["hf_hub_id"] == "timm/visformer_tiny.in1k"


def test_layers_have_no_bias_that_the_original_has_not():
    model = tiny()
    biased = {
        name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None
    }
    assert biased == {f"patch_embed{i}.proj" for i in (1, 2, 3)}
    assert models.visformer.Stage(depth=1, dim=8).num_heads is None
