"""FastViT: equal to the original, before and after reparameterisation; a good citizen of timm."""

import copy
import itertools
import pickle

import pytest
import timm
import timm.models.fastvit
import torch
from timm.optim import create_optimizer_v2
from timm.utils.model import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import CheckpointError, load_checkpoint
from models.fastvit import AttentionBlock, FastViT, MapAttention, Stage, checkpoint_filter_fn
from models.layers import set_fused_attention, set_qk_scale_factor
from models.layers.reparam import (
    LargeKernelConv,
    LayerScale2d,
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
}
GOLDENS = {
    "fastvit.fastvit_t8": "fastvit_t8",
    "fastvit.fastvit_sa12": "fastvit_sa12",
    "timm.fastvit_t8": "fastvit_t8",
}
TINY = (
    Stage(1, 16, 2.0),
    Stage(2, 32, 2.0),
    Stage(1, 32, 2.0),
    Stage(2, 64, 2.0, mixer="attention", position_encoding=True),
)


def tiny(**kwargs):
    """A net with every kind of layer."""
    torch.manual_seed(0)
    return timm.create_model("fastvit_sa12", **{"stages": TINY, "num_classes": 10} | kwargs)


def stir(model):
    """Norms as after training, branches of about the same weight."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.1, generator=generator)
        elif isinstance(module, LayerScale2d):
            module.gamma.data.uniform_(0.1, 1.0, generator=generator)
    return model.eval()


def count(model):
    return sum(p.numel() for p in model.parameters())


def gmacs(model, x):
    set_fused_attention(model, False)  # the counter does not know every fused kernel
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    set_fused_attention(model, True)
    return counter.get_total_flops() / 2e9


def check_logits(model, x, reference, std):
    """A float64 model within 1e-6, its float32 twin within 1e-5 of the logits' deviation."""
    single = copy.deepcopy(model).float()
    for fused in (True, False):
        set_fused_attention(model, fused)
        set_fused_attention(single, fused)
        with torch.no_grad():
            assert (model(x.double()) - reference).abs().max() < 1e-6 * std
            assert (single(x) - reference).abs().max() < 1e-5 * std


@pytest.mark.parametrize("name", GOLDENS)
def test_equals_the_original(golden, tmp_path, name):
    description, weights, x = golden(name)
    path = tmp_path / "original.pth"
    torch.save({"state_dict": weights}, path)
    model = timm.create_model(GOLDENS[name]).eval()
    report = load_checkpoint(model, path)
    assert len(report.loaded) == len(description["keys"])
    assert count(model) == description["n_params"]
    assert gmacs(model, x) == pytest.approx(description["gmacs"], rel=1e-5)
    reference = torch.tensor(description["logits_f64"], dtype=torch.float64)
    std = description["stats"]["logits_std"]
    check_logits(model.double(), x, reference, std)
    folded = copy.deepcopy(model)
    assert folded.reparameterize() is folded
    check_logits(folded, x, reference, std)
    if fused := description.get("reparam"):
        assert count(folded) == fused["n_params_after_all"]
        assert gmacs(folded, x.double()) == pytest.approx(fused["gmacs_after"], rel=1e-5)
        row = torch.tensor(fused["logits_fused_first32_row0"])  # float32
        with torch.no_grad():
            logits = model.float().reparameterize()(x)
        assert (logits[0, :32] - row).abs().max() < 1e-5 * std


@pytest.mark.parametrize("name", [n for n in GOLDENS if n.startswith("fastvit.")])
def test_reparameterised_checkpoints_of_the_original_load(golden, tmp_path, name):
    description, _, _ = golden(name)
    weights = golden.weights({"keys": description["reparam"]["keys_after"]})
    path = tmp_path / "fused.pth"
    torch.save({"state_dict": weights}, path)
    model = timm.create_model(GOLDENS[name], inference_mode=True)
    report = load_checkpoint(model, path)
    assert len(report.loaded) == len(weights) == len(model.state_dict())
    assert count(model) == description["reparam"]["n_params_after_all"]
    last = weights["network.5.proj.0.lkb_reparam.weight"]
    assert torch.equal(model.stages[3].downsample.proj[0].reparam_conv.weight, last)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(timm.create_model(GOLDENS[name]), path)


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
    for tag in ("apple_in1k", "apple_dist_in1k"):
        cfg = timm.get_pretrained_cfg(f"{name}.{tag}")
        known = timm.models.fastvit.default_cfgs[name].cfgs[tag]
        assert cfg.hf_hub_id == f"timm/{name}.{tag}"
        for fact in ("input_size", "crop_pct", "pool_size", "first_conv", "classifier", "license"):
            assert getattr(cfg, fact) == getattr(known, fact), fact
    assert ours.pretrained_cfg["tag"] == "apple_in1k"


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


def test_model_keeps_its_function():
    model = stir(tiny())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        single, double = model(x), copy.deepcopy(model).double()(x.double())
        twin = copy.deepcopy(model).double()
        before = count(model)
        assert model.reparameterize() is model
        error = (model(x) - single).norm() / single.norm()
        assert error < 1e-5
        twin.reparameterize().reparameterize()
        assert (twin(x.double()) - double).norm() < 1e-12 * double.norm()
    assert count(model) < before
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.stem.modules())
    folded = [m for m in model.modules() if isinstance(m, ReparamModule)]
    assert all(m.reparam_conv is not None for m in folded)


def test_reparameterised_weights_fit_inference_mode():
    model = stir(tiny()).reparameterize()
    twin = tiny(inference_mode=True).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(twin(x), expected)
        assert torch.equal(twin.reparameterize()(x), expected)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
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


def test_channels_last_gradients_are_the_same():
    plain = tiny()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64)
    plain(x).square().sum().backward()
    last(x.to(memory_format=torch.channels_last)).square().sum().backward()
    for ours, theirs in zip(last.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6


def test_learns_a_fixed_batch():
    model = tiny().train()
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert all(after < before for before, after in itertools.pairwise(losses))


def test_attention_is_the_formula_and_the_exponent_counts_twice():
    torch.manual_seed(0)
    layer = MapAttention(12, num_heads=3, qk_scale_factor=-0.4).double()
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = layer.qkv(tokens).reshape(2, 15, 3, 3, 4).permute(2, 0, 3, 1, 4)  # B h N d
    weights = (q @ k.transpose(-2, -1) * 4**-0.8).softmax(-1)
    expected = layer.proj((weights @ v).transpose(1, 2).reshape(2, 15, 12))
    expected = expected.transpose(1, 2).reshape(2, 12, 3, 5)
    for fused in (True, False):
        set_fused_attention(layer, fused)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.attention_maps(x), weights, rtol=1e-12, atol=1e-12)


def test_exponent_of_the_net():
    model = tiny(qk_scale_factor=-0.5)
    assert model.qk_scale_factor == -0.5
    assert [b.token_mixer.scale for b in model.stages[3].blocks] == [32**-0.5] * 2
    set_qk_scale_factor(model, -0.25)
    assert model.qk_scale_factor == -0.25
    assert model.stages[3].blocks[1].token_mixer.scale == 32**-0.25


def test_dropouts_reach_their_layers():
    model = tiny(drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.5)
    block = model.stages[3].blocks[0]
    assert model.head.drop.p == 0.1
    assert (block.mlp.drop.p, block.token_mixer.proj_drop.p) == (0.2, 0.2)
    assert block.token_mixer.attn_drop == 0.3
    rates = [
        getattr(getattr(b, "drop_path", getattr(b, "drop_path2", None)), "drop_prob", 0.0)
        for stage in model.stages
        for b in stage.blocks
    ]
    assert rates == pytest.approx([0.1 * i for i in range(6)])
    assert block.drop_path1.drop_prob == block.drop_path2.drop_prob
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model.train()(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_layer_scales():
    model = tiny(layer_scale_init_value=0.3)
    gammas = {n: p for n, p in model.named_parameters() if n.endswith("gamma")}
    assert len(gammas) == 2 * 6
    assert all((p == 0.3).all() and p.ndim == 3 for p in gammas.values())
    assert model.no_weight_decay() == set(gammas)
    assert tiny(layer_scale_init_value=0.0).no_weight_decay() == set()
    assert FastViT(TINY, layer_scale_init_value=None).no_weight_decay() == set()


@pytest.mark.parametrize("size", [(256, 192), (33, 50), (31, 8), (5, 1)])
def test_any_size(size):
    model = tiny().eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
        assert model(torch.randn(1, 3, *size)).shape == (1, 10)
    strides = (4, 8, 16, 32)
    assert [m.shape[-2:] for m in maps] == [tuple(-(-s // t) for s in size) for t in strides]


def test_features_are_the_true_outputs_of_the_stages():
    full = stir(tiny())
    outputs = []
    for stage in full.stages:
        stage.register_forward_hook(lambda module, args, output: outputs.append(output))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        final, maps = full.forward_intermediates(x)
    assert [id(m) for m in maps] == [id(m) for m in outputs]
    assert torch.equal(full.forward_features(x), final)
    model = tiny(features_only=True, out_indices=(0, 3)).eval()
    state = {f"model.{key}": value for key, value in full.state_dict().items()}
    assert not model.load_state_dict(state, strict=False).missing_keys
    with torch.no_grad():
        pair = model(x)
    assert torch.equal(pair[0], maps[0])
    assert torch.equal(pair[1], maps[3])
    assert model.feature_info.channels() == [16, 64]
    assert model.feature_info.reduction() == [4, 32]
    assert not any(key.startswith(("model.head", "model.final")) for key in model.state_dict())


def test_early_stop_and_pruning_leave_later_stages_out():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    last, maps = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(last, maps[0])
    keeping = copy.deepcopy(model)
    assert keeping.prune_intermediate_layers([3], prune_head=False) == [3]
    assert torch.equal(keeping(x), model(x))
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    assert model.num_features == 32
    pruned = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert torch.equal(pruned[0], maps[0])
    assert torch.equal(model.forward_features(x), maps[0])
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_heads():
    model = tiny(num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, model.num_features) == (2, 128)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == 7
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    assert model.get_classifier().weight.std() < 0.03
    model.reset_classifier(5, global_pool="catavgmax")
    assert model(x).shape == (2, 5)
    assert model.head.fc.in_features == model.head_hidden_size == 256
    assert tiny(global_pool="max", cls_ratio=3)(x).shape == (2, 10)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(in_chans):
    assert tiny(in_chans=in_chans)(torch.randn(2, in_chans, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"drop_path_ratee": 0.1}, TypeError, "drop_path_ratee"),
        ({"img_size": 256}, TypeError, "img_size"),
        ({"stages": (Stage(1, 16, mixer="conv"),)}, ValueError, "'conv' of stage 0 is none of"),
        ({"stages": (Stage(1, 16), Stage(1, 40))}, ValueError, "dim 40 of stage 1.*before, 16"),
        ({"stages": (Stage(1, 48, mixer="attention"),)}, ValueError, "48 .* multiple of 32"),
        ({"cls_ratio": 1.5}, ValueError, "cls_ratio 1.5"),
        ({"cls_ratio": 0.0}, ValueError, "cls_ratio 0.0"),
    ],
)
def test_wrong_arguments_raise(kwargs, error, message):
    with pytest.raises(error, match=message):
        tiny(**kwargs)


def test_gradient_checkpointing_changes_no_gradient():
    plain = tiny()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    plain(x).sum().backward()
    calls = []
    hook = saving.stages[1].blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    saving(x).sum().backward()
    hook.remove()
    assert len(calls) == 2  # once forward, once more in the backward pass
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(saving.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)  # statistics are counted once


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    model = stir(tiny())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", dtype):
            low = model(x)
    assert low.dtype == dtype
    assert (low.float() - full).norm() < 0.1 * full.norm()


def test_copies_pickles_and_seeds():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), tiny().eval()):
            assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_exports_and_compiles_without_graph_breaks(fused):
    model = stir(tiny())
    set_fused_attention(model, fused)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(exported, expected)
    torch.testing.assert_close(compiled, expected)


def test_trains_compiled():
    plain = tiny()
    compiled = copy.deepcopy(plain)
    x = torch.randn(2, 3, 64, 64)
    plain(x).sum().backward()
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(x).sum().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_weight_decay_and_layer_groups(inference_mode):
    model = tiny(inference_mode=inference_mode)
    optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.1, layer_decay=0.5)
    scales = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            scales[names[id(p)]] = group["lr_scale"]
            decays = p.ndim > 1 and not names[id(p)].endswith("gamma")
            assert (group["weight_decay"] > 0) == decays, names[id(p)]
    conv = "reparam_conv.weight" if inference_mode else "conv_kxk.0.conv.weight"
    order = [f"stem.0.{conv}", "stages.0.blocks.0.mlp.fc1.weight"]
    order += [f"stages.1.downsample.proj.1.{conv}", "stages.1.blocks.0.mlp.fc1.weight"]
    order += ["stages.1.blocks.1.mlp.fc1.weight", "stages.3.blocks.1.mlp.fc1.weight"]
    order += [f"final_conv.{conv}", "head.fc.weight"]
    assert [scales[a] < scales[b] for a, b in itertools.pairwise(order)] == [True] * 7
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert sorted(key for group in groups.values() for key in group) == sorted(scales)


@pytest.mark.parametrize("in_chans", [3, 1])
def test_pretrained_goes_through_timms_machinery(tmp_path, in_chans):
    source = timm.create_model("fastvit_t8")
    path = tmp_path / "model.pth"
    torch.save(source.state_dict(), path)
    model = timm.create_model(
        "fastvit_t8.apple_in1k",
        pretrained=True,
        in_chans=in_chans,
        num_classes=5,
        pretrained_cfg_overlay={"file": str(path)},
    )
    assert torch.equal(model.final_conv.se.fc1.weight, source.final_conv.se.fc1.weight)
    assert model.stem[0].conv_scale.conv.weight.shape[1] == in_chans
    assert model.pretrained_cfg["hf_hub_id"] == "timm/fastvit_t8.apple_in1k"


def test_blocks_are_the_papers():
    block = stir(AttentionBlock(32, 2.0))
    x = torch.randn(1, 32, 4, 4)
    y = x + block.layer_scale_1(block.token_mixer(block.norm(x)))
    torch.testing.assert_close(block(x), y + block.layer_scale_2(block.mlp(y)))
    names = {n for n, m in tiny().named_modules() if isinstance(m, nn.GELU)}
    assert not any(".downsample.proj.0" in name for name in names)  # computed and discarded
    assert "stages.1.downsample.proj.1.act" in names
