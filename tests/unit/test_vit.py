"""ViT's own: equal to timm's, with the query/key pre-scale, at any size that the patch divides."""

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import vision_transformer as timm_vit

import models.vit
from models.layers import set_fused_attention

NAMES = [f"vit_{net}_{patch}_{size}" for net in "bl" for patch in (16, 32) for size in (224, 384)]
SMALL = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


def timm_name(name):
    _, net, patch, size = name.split("_")
    return f"vit_{'base' if net == 'b' else 'large'}_patch{patch}_{size}"


def small(**kwargs):
    return timm.create_model("vit_b_32_224", **SMALL | kwargs)


def filled(**kwargs):
    model = small(**kwargs).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_both_names_have_timms_weights(name):
    tags = timm_vit.default_cfgs[timm_name(name)].tags
    assert timm.get_pretrained_cfg(name).tag == tags[0]
    for tag in tags:
        ours, theirs = (
            timm.get_pretrained_cfg(f"{n}.{tag}").to_dict() for n in (name, timm_name(name))
        )
        assert ours.pop("architecture") == name
        assert theirs.pop("architecture") == timm_name(name)
        assert ours == theirs
        assert not theirs["hf_hub_id"] or theirs["hf_hub_id"].startswith(("timm/vit_", "facebook/"))


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="attn_mask"):
        layer(x, is_causal=True)


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


def test_fixed_size_on_request():
    model = small(dynamic_img_size=False).eval()
    x = torch.randn(1, 3, 64, 64)
    flexible = small().eval()
    flexible.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), flexible(x))
    with pytest.raises(AssertionError, match="96"):
        model(torch.zeros(1, 3, 96, 96))


def test_same_seed_same_weights_as_timms():
    torch.manual_seed(3)
    first = timm_vit.VisionTransformer(patch_size=32, **SMALL).state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(value, first[key]) for key, value in small().state_dict().items())


def test_arguments_that_are_refused():
    for name in ("block_fn", "attn_layer"):
        with pytest.raises(TypeError, match=name):
            small(**{name: timm_vit.Block})
    with pytest.raises(TypeError, match="gated"):
        models.vit.Attention(12, num_heads=3, gated=True)
    with pytest.raises(TypeError, match="qk_scale"):
        models.vit.Attention(12, num_heads=3, qk_scale=-0.5)
