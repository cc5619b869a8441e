"""Inference nets, the layers that they are made of, and what is kept in evaluation."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from models.layers import Block2d, Mlp2d, WindowAttention2d, set_fused_attention
from models.layers.fuse import fold_before, pack
from models.layers.gpsa import GPSA
from models.layers.packed import PackedConv2d, PackedLinear
from tools.flops import our_models

SHALLOW = {
    "vit": {"depth": 2, "img_size": 64},
    "convit": {"depth": 3, "local_up_to_layer": 2, "img_size": 64},
    "visformer": {"img_size": 64},
    "swin": {"img_size": 64},
    "fastvit": {},
}


def stir(model):
    """Statistics and affines as after training, and weights that keep activations small."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            deviation = 0.5 / module.weight[0].numel() ** 0.5
            nn.init.normal_(module.weight, 0, deviation, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
        if hasattr(module, "gamma"):
            nn.init.uniform_(module.gamma, 0.1, 0.9, generator=generator)
    return model.eval()


def make(name, **kwargs):
    torch.manual_seed(0)
    return stir(timm.create_model(name, num_classes=10, **kwargs))


def relative(value, expected):
    return ((value - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", our_models())
def test_every_net_keeps_its_function(name):
    model = make(name, **SHALLOW[name.partition("_")[0]])
    x = torch.randn(2, 3, 64, 64)
    net = model.fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with torch.inference_mode():
        expected = model.double()(x.double())
        assert relative(model.fuse()(x.double()), expected) < 1e-12
        assert relative(net(x).double(), expected) < 1e-5
        features = model.float().forward_features(x)
        last = net.to(memory_format=torch.channels_last)
        assert relative(last.forward_features(x), features) < 1e-5


@pytest.mark.parametrize("name", ["visformer_tiny", "convit_tiny", "fastvit_sa12", "vit_b_32_224"])
def test_nets_are_ordinary_modules(name):
    model = make(name, **SHALLOW[name.partition("_")[0]])
    before = copy.deepcopy(model.state_dict())
    net = model.fuse()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = net(x)
        torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), expected)
        torch.testing.assert_close(net.fuse()(x), expected)
        torch.testing.assert_close(
            torch.compile(net, backend="aot_eager", fullgraph=True)(x), expected
        )
        exported = torch.export.export(copy.deepcopy(net), (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.bfloat16
        set_fused_attention(net, False)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("size", [(33, 50), (64, 96), (30, 28)])
@pytest.mark.parametrize("clamp_shift", [True, False])
def test_windows_of_any_size_keep_their_function(size, clamp_shift):
    # padding comes after the norm, and is zero; folded, the norm turns zeros into something else
    options = {"use_pos_embed": False, "strict_img_size": False, "clamp_shift": clamp_shift}
    model = make("swin_visformer_tiny_v2", img_size=64, **options).double()
    x = torch.randn(2, 3, *(16 * s // 2 for s in size), dtype=torch.float64)
    with torch.inference_mode():
        assert relative(model.fuse()(x), model(x)) < 1e-10


@pytest.mark.parametrize("shift", [0, 2])
def test_padding_of_windows_with_biased_projections(shift):
    torch.manual_seed(0)
    attn = WindowAttention2d(16, 2, 4, shift, qkv_bias=True)
    nn.init.normal_(attn.qkv.bias)
    block = stir(Block2d(16, attn, 2.0, None)).double()
    x = torch.randn(2, 16, 7, 10, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
        for module in (block, block.attn, block.mlp):
            module.fuse_()
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_norms_are_not_folded_into_padding():
    with pytest.raises(ValueError, match="it pads, or has groups"):
        fold_before(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))
    mlp = Mlp2d(4, 8, spatial_groups=2).eval()
    mlp.fuse_()
    assert isinstance(mlp.conv2, PackedConv2d)


@pytest.mark.parametrize(
    "act", [None, nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=lambda act: str(act)
)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 12, 1), (2, 8, 5, 7)),
        (nn.Conv2d(8, 12, 3, 2, 1, groups=4, bias=False), (2, 8, 9, 7)),
        (nn.Conv2d(8, 8, 3, padding="same"), (2, 8, 9, 7)),
        (nn.Linear(8, 12), (2, 3, 5, 8)),
        (nn.Linear(8, 12, bias=False), (6, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_packed_layers_are_the_layer_and_its_activation(layer, shape, act):
    packed, x = pack(layer, act), torch.randn(shape)
    assert isinstance(packed, PackedConv2d | PackedLinear)
    with torch.inference_mode():
        expected = layer(x) if act is None else act(layer(x))
        torch.testing.assert_close(packed(x), expected)
        torch.testing.assert_close(packed(x[:1]), expected[:1])
    # with gradients, and in another dtype, the plain layer runs
    torch.testing.assert_close(packed(x), expected)
    assert copy.deepcopy(packed).double()(x.double()).dtype == torch.float64


def test_packed_layers_notice_other_weights():
    packed = pack(nn.Linear(4, 4, bias=False))
    x = torch.randn(2, 4)
    with torch.no_grad():
        packed(x)
        packed.weight.copy_(torch.eye(4))
        torch.testing.assert_close(packed(x), x)
        packed.load_state_dict({"weight": 2 * torch.eye(4)})
        torch.testing.assert_close(packed(x), 2 * x)


def windows():
    return WindowAttention2d(8, 2, 4, 2), torch.randn(1, 8, 8, 8), "relative_position_bias_table"


def grid():
    return GPSA(8, 2), torch.randn(1, 3, 4, 8), "pos_proj.weight"


@pytest.mark.parametrize("case", [windows, grid])
def test_what_is_kept_in_evaluation_follows_the_weights(case):
    torch.manual_seed(0)
    module, x, name = case()
    module.eval()

    def fresh():
        other = copy.deepcopy(module)
        assert other._kept._value is None
        return other(x)

    with torch.no_grad():
        first = module(x)
        kept = module._kept._value
        assert kept is not None
        module(x)
        assert module._kept._value is kept
        module.get_parameter(name).mul_(3)
        assert not torch.equal(module(x), first)
        assert torch.equal(module(x), fresh())
        module.get_parameter(name).data.mul_(3)  # this, the mode must tell
        module.eval()
        assert torch.equal(module(x), fresh())
        state = {k: v + 0.5 * torch.ones_like(v) for k, v in module.state_dict().items()}
        module.load_state_dict(state)
        assert torch.equal(module(x), fresh())
        wide = F.pad(x, (0, 0, 0, 4) if isinstance(module, GPSA) else (0, 4))
        assert module(wide).shape == wide.shape
        assert torch.equal(module(x), fresh())
    # frozen statistics, trained weights: the gradient is that of these weights
    module(x).sum().backward()
    assert module.get_parameter(name).grad.abs().sum() > 0
    assert pickle.loads(pickle.dumps(module))._kept._value is None
    module.double()
    with torch.no_grad():
        assert module(x.double()).dtype == torch.float64
