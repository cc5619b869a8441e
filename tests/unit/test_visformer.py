"""Visformer's own: attention on feature maps, its pre-scale, position embeddings, image sizes."""

import pytest
import timm
import torch
from torch import nn

from models.layers import Attention2d, attention, resample_position_map


def tiny(**kwargs):
    return timm.create_model("visformer_tiny", **{"img_size": 64, "num_classes": 10} | kwargs)


def test_prescale_keeps_float16_finite():
    q = k = torch.full((1, 1, 4, 64), 200.0, dtype=torch.float16)
    assert ((q @ k.transpose(-2, -1)) * 64**-0.5).isinf().all()
    v = torch.randn(1, 1, 4, 64, dtype=torch.float16)
    out = attention(q, k, v, scale=64**-0.5, fused=False).double()
    mean = v.double().mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, rtol=2e-3, atol=2e-3)


def test_uneven_heads_raise():
    with pytest.raises(ValueError, match=r"10.*3"):
        Attention2d(10, num_heads=3)


def test_position_map_resampling():
    ramp = torch.linspace(0, 1, 8).reshape(1, 1, 8, 1).expand(1, 1, 8, 6).contiguous()
    assert resample_position_map(ramp, (8, 6)) is ramp
    wide = resample_position_map(ramp.double(), (16, 12))
    assert wide.dtype == torch.float64
    assert (wide[0, 0, 1:] >= wide[0, 0, :-1]).all()
    half = resample_position_map(ramp.half(), (16, 12))
    torch.testing.assert_close(half.double(), wide, rtol=0, atol=2e-3)


def test_sizes():
    with pytest.raises(ValueError, match=r"64x65.*32.*64x64"):
        tiny(img_size=(64, 65))
    model = tiny(strict_img_size=False).eval()  # patch embeddings leave out the remainder
    maps = model.forward_intermediates(torch.randn(1, 3, 125, 167), intermediates_only=True)
    assert [tuple(m.shape[-2:]) for m in maps] == [(15, 21), (7, 10), (3, 5)]


def test_final_norm_of_intermediates():
    model, x = tiny().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        final, plain = model.forward_intermediates(x)
        last, normed = model.forward_intermediates(x, norm=True)
    assert torch.equal(normed[-1], final)
    assert torch.equal(model.norm(plain[-1]), last)
    assert torch.equal(normed[0], plain[0])


def test_layers_have_no_bias_that_the_original_does_not_have():
    biased = {
        name
        for name, module in tiny().named_modules()
        if isinstance(module, nn.Conv2d) and module.bias is not None
    }
    assert biased == {f"patch_embed{i}.proj" for i in (1, 2, 3)}
