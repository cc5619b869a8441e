"""Layers of fused models, and what is kept in evaluation."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import relative, small, stir
from torch import nn

import models
from models.layers import Block2d, Mlp2d, WindowAttention2d
from models.layers.fuse import fold_before, pack
from models.layers.gpsa import GPSA
from models.layers.packed import PackedConv2d, PackedLinear


@pytest.mark.parametrize(
    ("size", "clamp_shift"), [((33, 50), True), ((64, 96), False), ((30, 28), True)]
)
def test_windows_of_any_size_keep_their_function(size, clamp_shift):
    # padding comes after the norm, and is zero; folded, the norm turns zeros into something else
    options = {"use_pos_embed": False, "strict_img_size": False, "clamp_shift": clamp_shift}
    model = stir(small("swin_visformer_tiny_v2", **options)).double()
    x = torch.randn(1, 3, *(8 * side for side in size), dtype=torch.float64)
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
    with pytest.raises(ValueError, match="Conv2d"):
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


@pytest.mark.parametrize(
    ("make", "shape", "name"),
    [
        (lambda: WindowAttention2d(8, 2, 4, 2), (1, 8, 8, 8), "relative_position_bias_table"),
        (lambda: GPSA(8, 2), (1, 3, 4, 8), "pos_proj.weight"),
    ],
    ids=["windows", "gpsa"],
)
def test_what_is_kept_in_evaluation_follows_the_weights(make, shape, name):
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(shape)

    def fresh():
        return copy.deepcopy(module)(x)

    with torch.no_grad():
        first = module(x)
        assert torch.equal(module(x), first)
        module.get_parameter(name).mul_(3)
        assert not torch.equal(module(x), first)
        assert torch.equal(module(x), fresh())
        module.get_parameter(name).data.mul_(3)  # does not change the version
        module.eval()
        assert torch.equal(module(x), fresh())
        module.load_state_dict({k: v + 0.5 for k, v in module.state_dict().items()})
        assert torch.equal(module(x), fresh())
        wide = F.pad(x, (0, 0, 0, 4) if isinstance(module, GPSA) else (0, 4))
        assert module(wide).shape == wide.shape
        assert torch.equal(module(x), fresh())
    # frozen statistics, trained weights: the gradient is that of these weights
    module(x).sum().backward()
    assert module.get_parameter(name).grad.abs().sum() > 0
    module.double()
    with torch.no_grad():
        assert module(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0"])
def test_timms_branches_are_folded(name):
    model = stir(timm.create_model(name, num_classes=3)).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        expected = model(x)
        folded = models.fused(model, name)
        assert relative(folded(x), expected) < 1e-10
        assert torch.equal(model(x), expected)
    assert sum(parameter.numel() for parameter in folded.parameters()) < before
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())


def test_a_model_without_branches_is_named():
    model = timm.create_model("test_vit")
    assert not models.is_fusible(model)
    with pytest.raises(models.ModelError, match="test_vit"):
        models.fused(model, "test_vit")
