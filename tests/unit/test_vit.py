"""ViT: equal to timm's, with the query/key pre-scale, at any size that the patch divides."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import vision_transformer as timm_vit
from timm.optim import create_optimizer_v2

import models.vit
from models import load_checkpoint
from models.layers import set_fused_attention, set_qk_scale_factor

NAMES = [f"vit_{net}_{patch}_{size}" for net in "bl" for patch in (16, 32) for size in (224, 384)]
SMALL = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


def timm_name(name):
    _, net, patch, size = name.split("_")
    return f"vit_{models.vit.TIMMS[net]}_patch{patch}_{size}"


def small(**kwargs):
    return timm.create_model("vit_b_32_224", **SMALL | kwargs)


def filled(**kwargs):
    """A small model whose attention is far from uniform."""
    model = small(**kwargs).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_both_names_build_timms_layout(name):
    with torch.device("meta"):
        theirs = getattr(timm_vit, timm_name(name))(num_classes=7)  # one has no classes of its own
        nets = {n: timm.create_model(n, num_classes=7) for n in (name, timm_name(name))}
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    for built, net in nets.items():
        assert type(net) is models.vit.ViT
        assert {key: value.shape for key, value in net.state_dict().items()} == shapes
        assert net.patch_embed.img_size == theirs.patch_embed.img_size
        assert net.pretrained_cfg["architecture"] == built
        assert net.pretrained_cfg["input_size"][1:] == net.patch_embed.img_size
    ours = nets[name].pretrained_cfg
    assert ours["mean"] == timm.data.IMAGENET_DEFAULT_MEAN and ours["crop_pct"] == 0.875


def test_timms_tags_stay():
    for name in map(timm_name, NAMES):
        tags = timm_vit.default_cfgs[name].tags
        for tag in tags:
            cfg = timm.get_pretrained_cfg(f"{name}.{tag}")
            assert cfg.hf_hub_id == timm_vit.default_cfgs[name].cfgs[tag].hf_hub_id or (
                cfg.hf_hub_id == f"timm/{name}.{tag}"
            )
        assert {f"{name}.{tag}" for tag in tags} <= set(timm.list_pretrained())


def test_a_tag_s_weights_are_loaded(tmp_path):
    source = timm_vit.vit_base_patch32_224(depth=2, embed_dim=48, num_heads=3)
    path = tmp_path / "model.pth"
    torch.save(source.state_dict(), path)
    model = timm.create_model(
        "vit_base_patch32_224.augreg_in21k_ft_in1k",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "custom_load": False},
        **SMALL,
    )
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert model.pos_embed.shape == (1, 1 + 4, 48)
    assert model.pretrained_cfg["tag"] == "augreg_in21k_ft_in1k"


def test_checkpoints_of_other_sizes_are_resampled(tmp_path):
    path = tmp_path / "large.pth"
    torch.save({"model": small(img_size=96).state_dict()}, path)
    assert load_checkpoint(small(), path).resampled == ("pos_embed",)


@pytest.mark.parametrize("exponent", [-0.25, -0.5, -0.4])
def test_attention_is_the_formula_and_the_exponent_counts_twice(exponent):
    torch.manual_seed(0)
    layer = models.vit.Attention(12, num_heads=3, qk_scale_factor=exponent, qkv_bias=True).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x).reshape(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)  # B h N d
    weights = (q @ k.transpose(-2, -1) * 4 ** (2 * exponent)).softmax(-1)
    expected = layer.proj((weights @ v).transpose(1, 2).reshape(2, 7, 12))
    for fused in (True, False):
        set_fused_attention(layer, fused)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_exponents_of_the_net():
    x = torch.randn(2, 3, 64, 64)
    usual, other = filled(), filled(qk_scale_factor=-0.5)
    assert (usual.qk_scale_factor, other.qk_scale_factor) == (-0.25, -0.5)
    assert {block.attn.scale for block in usual.blocks} == {16**-0.25}
    assert {block.attn.scale for block in other.blocks} == {16**-0.5}
    with torch.no_grad():
        expected = other(x)
        assert (usual(x) - expected).abs().max() > 0.1 * expected.std()
        set_qk_scale_factor(usual, -0.5)
        assert torch.equal(usual(x), expected)
        # queries smaller by the ratio of the two scales, twice: the same function
        for block in usual.blocks:
            block.attn.qkv.weight[:48] *= 16**-0.5
            block.attn.qkv.bias[:48] *= 16**-0.5
        set_qk_scale_factor(usual, -0.25)
        torch.testing.assert_close(usual(x), expected)


def test_query_and_key_norms_come_before_the_scale():
    ours = filled(qk_norm=True, scale_attn_norm=True)
    theirs = timm_vit.VisionTransformer(patch_size=32, qk_norm=True, scale_attn_norm=True, **SMALL)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_masks():
    torch.manual_seed(0)
    layer = models.vit.Attention(12, num_heads=3)
    x = torch.randn(2, 7, 12)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    added = torch.zeros(7, 7).masked_fill(~causal, -torch.inf)
    reference = timm_vit.Attention(12, num_heads=3)
    reference.load_state_dict(layer.state_dict())
    expected = reference(x, attn_mask=causal)
    for fused in (True, False):
        set_fused_attention(layer, fused)
        for mask in (causal, added):
            torch.testing.assert_close(layer(x, attn_mask=mask), expected)
    with pytest.raises(ValueError, match="causal attention is not supported"):
        layer(x, is_causal=True)


def test_dropout_of_attention_acts_in_training_only():
    x = torch.randn(1, 3, 64, 64)
    model = filled(attn_drop_rate=0.5)
    for fused in (True, False):
        set_fused_attention(model, fused)
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (64, 160), (128, 32)])
def test_other_sizes(size):
    model = filled()
    x = torch.randn(2, 3, *size)
    grid = size[0] // 32, size[1] // 32
    position = resample_abs_pos_embed(model.pos_embed.data, grid, (2, 2))
    built = small(img_size=size).eval()
    built.load_state_dict(model.state_dict() | {"pos_embed": position})
    with torch.no_grad():
        logits, tokens = model(x), model.forward_features(x)
        maps = model.forward_intermediates(x, indices=1, intermediates_only=True)[0]
        torch.testing.assert_close(logits, built(x))
    assert logits.shape == (2, 10) and maps.shape == (2, 48, *grid)
    assert tokens.shape == (2, 1 + grid[0] * grid[1], 48)


@pytest.mark.parametrize("size", [(65, 64), (64, 33), (224, 225)])
def test_sizes_that_the_patch_does_not_divide(size):
    with pytest.raises(AssertionError, match=r"should be divisible by patch size \(32\)"):
        small().eval()(torch.zeros(1, 3, *size))


def test_fixed_size_on_request():
    model = small(dynamic_img_size=False).eval()
    x = torch.randn(1, 3, 64, 64)
    flexible = small().eval()
    flexible.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), flexible(x))
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(torch.zeros(1, 3, 96, 96))


def test_features():
    model = small(features_only=True, out_indices=(0, 1)).eval()
    full = small().eval()
    model.load_state_dict({f"model.{k}": v for k, v in full.state_dict().items()}, strict=False)
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        maps = model(x)
        final, every = full.forward_intermediates(x)
    assert model.feature_info.channels() == [48, 48]
    assert model.feature_info.reduction() == [32, 32]
    assert [tuple(m.shape) for m in maps] == [(2, 48, 3, 2)] * 2
    torch.testing.assert_close(maps, every)
    torch.testing.assert_close(full.forward_features(x), final)
    assert full.prune_intermediate_layers([0]) == [0]
    assert len(full.blocks) == 1


def test_heads():
    model = small(num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 48)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == 7
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), model.head(pooled))
    assert small(global_pool="avg")(x).shape == (2, 10)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(in_chans):
    assert small(in_chans=in_chans)(torch.randn(2, in_chans, 64, 64)).shape == (2, 10)


def test_arguments_that_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop_path_ratee'"):
        small(drop_path_ratee=0.1)
    for name in ("block_fn", "attn_layer"):
        with pytest.raises(TypeError, match=f"multiple values for keyword argument '{name}'"):
            small(**{name: timm_vit.Block})
    with pytest.raises(TypeError, match="gated attention is not supported"):
        models.vit.Attention(12, num_heads=3, gated=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'qk_scale'"):
        models.vit.Attention(12, num_heads=3, qk_scale=-0.5)


def test_gradient_checkpointing_changes_no_gradient():
    plain = small()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    plain(x).sum().backward()
    calls = []
    hook = saving.blocks[1].attn.qkv.register_forward_pre_hook(lambda *_: calls.append(1))
    saving(x).sum().backward()
    hook.remove()
    assert len(calls) == 2  # once forward, once more in the backward pass
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_autocast(dtype, fused):
    model = small().eval()
    set_fused_attention(model, fused)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", dtype):
            low = model(x)
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1 * full.std().item())


def test_copies_and_pickles():
    model = filled(qk_scale_factor=-0.4)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)
            assert twin.qk_scale_factor == -0.4


def test_same_seed_same_weights_as_timms():
    torch.manual_seed(3)
    first = timm_vit.VisionTransformer(patch_size=32, **SMALL).state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(value, first[key]) for key, value in small().state_dict().items())


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_exports_and_compiles_without_graph_breaks(size):
    model = filled()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(exported, expected)
    torch.testing.assert_close(compiled, expected)


def test_trains_compiled():
    plain = small()
    compiled = copy.deepcopy(plain)
    x = torch.randn(2, 3, 64, 64)
    plain(x).sum().backward()
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(x).sum().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_weight_decay_and_layer_groups():
    model = small()
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            scales[names[id(p)]] = group["lr_scale"]
            decays = p.ndim > 1 and names[id(p)] not in ("pos_embed", "cls_token")
            assert (group["weight_decay"] > 0) == decays, names[id(p)]
    order = ["pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "head.weight"]
    assert sorted(order, key=scales.get) == order
    assert len({scales[name] for name in order}) == len(order)
