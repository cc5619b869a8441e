"""Windowed attention: against brute force, at any size, and as detection uses it."""

import pytest
import timm
import torch
from torch.nn import functional as F

from models import load_checkpoint
from models.layers import Attention2d, WindowAttention2d, resample_bias_table, set_fused_attention
from models.layers.window import shift_mask


def layer(**options):
    torch.manual_seed(0)
    built = WindowAttention2d(8, num_heads=2, window=4, **options).double()
    torch.nn.init.normal_(built.relative_position_bias_table)
    return built


def brute_force(layer, x, shift):
    """Every query against every key: those of its window and region count, others do not."""
    height, width = x.shape[-2:]
    window = layer.window
    x = F.pad(x, (0, -width % window, 0, -height % window))
    rows, columns = x.shape[-2:]
    x = x.roll((-shift, -shift), dims=(2, 3))
    q, k, v = layer.qkv(x).reshape(len(x), 3, 2, 4, rows * columns).unbind(1)  # B h d N
    scores = (q * layer.scale).transpose(-2, -1) @ (k * layer.scale)
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # N 2
    origin = (cells + shift) % torch.tensor([rows, columns])
    apart = (cells // window)[:, None] != cells // window  # N N 2, as what follows
    wrapped = (origin < shift)[:, None] != (origin < shift)
    y, x_ = (cells[:, None] - cells + window - 1).clamp(0, 2 * window - 2).unbind(-1)
    scores = scores + layer.relative_position_bias_table[y * (2 * window - 1) + x_].permute(2, 0, 1)
    scores = scores - 100 * wrapped.any(-1)
    scores = scores.masked_fill(apart.any(-1), -torch.inf)
    out = (v @ scores.softmax(-1).transpose(-2, -1)).reshape(len(x), 8, rows, columns)
    return layer.proj(out).roll((shift, shift), dims=(2, 3))[:, :, :height, :width]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (7, 10), (3, 4)])
@pytest.mark.parametrize("shift", [0, 2])
def test_equals_brute_force(size, shift, fused):
    attn = layer(shift=shift, clamp_shift=False)
    set_fused_attention(attn, fused)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = brute_force(attn, x, shift)
        torch.testing.assert_close(attn(x), expected, rtol=1e-12, atol=1e-12)


def test_shift_is_clamped_where_a_window_covers_the_map():
    x = torch.randn(1, 8, 4, 9, dtype=torch.float64)
    clamped, shifted, plain = layer(shift=2), layer(shift=2, clamp_shift=False), layer()
    assert torch.equal(clamped(x), plain(x))
    assert not torch.allclose(shifted(x), plain(x))
    larger = torch.randn(1, 8, 8, 9, dtype=torch.float64)
    assert torch.equal(clamped(larger), shifted(larger))


def test_one_window_without_bias_is_global_attention():
    attn = layer()
    torch.nn.init.zeros_(attn.relative_position_bias_table)
    whole = Attention2d(8, num_heads=2).double()
    whole.load_state_dict({k: v for k, v in attn.state_dict().items() if "bias_table" not in k})
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(attn(x), whole(x), rtol=1e-12, atol=1e-12)
    maps = attn.attention_maps(x)
    torch.testing.assert_close(maps[:, 0], whole.attention_maps(x), rtol=1e-12, atol=1e-12)


def test_attention_maps_stay_within_windows_and_regions():
    attn = layer(shift=2)
    maps = attn.attention_maps(torch.randn(1, 8, 8, 12, dtype=torch.float64))
    assert maps.shape == (1, 6, 2, 16, 16)
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 6, 2, 16, dtype=torch.float64))
    mask = shift_mask(8, 12, 4, 2, maps.dtype, maps.device)
    assert maps[mask.expand(2, -1, -1, -1).transpose(0, 1)[None] < 0].max() < 1e-30
    assert not mask[0].any()  # the first window holds one region
    assert mask[-1].any()


def test_bias_tables_are_resampled():
    ramp = torch.arange(7.0)[:, None].expand(7, 7).reshape(49, 1).repeat(1, 3)
    assert torch.equal(resample_bias_table(ramp, 49), ramp)
    wide = resample_bias_table(ramp, 169).T.reshape(3, 13, 13)
    assert (wide[:, 1:, 6] > wide[:, :-1, 6]).all()
    torch.testing.assert_close(wide[:, 6, 6], torch.full((3,), 3.0))


def test_windows_shrink_to_the_map_they_are_built_for():
    small = timm.create_model("swin_visformer_tiny_v2", img_size=64, num_classes=3)
    assert {m.window for m in small.stage2.modules() if hasattr(m, "window")} == {4}
    native = timm.create_model("swin_visformer_tiny_v2")
    shifts = [block.attn.shift for block in (*native.stage2, *native.stage3)]
    assert shifts == [7, 0, 7, 0, 7, 0, 3, 0, 3]


def test_weights_move_to_other_sizes(tmp_path):
    source = timm.create_model("swin_visformer_tiny_v2", img_size=64, num_classes=3)
    path = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, path)
    target = timm.create_model("swin_visformer_tiny_v2", img_size=(96, 128), num_classes=3).eval()
    report = load_checkpoint(target, path)
    assert "pos_embed2" in report.resampled
    assert "stage2.0.attn.relative_position_bias_table" in report.resampled
    with torch.no_grad():
        assert target(torch.randn(1, 3, 96, 128)).shape == (1, 3)
        assert target(torch.randn(1, 3, 256, 224)).isfinite().all()


@pytest.mark.parametrize(
    ("shift", "batch", "qkv_bias"), [(0, 1, True), (0, 2, False), (2, 1, False), (2, 2, True)]
)
def test_gradients_are_those_of_brute_force(shift, batch, qkv_bias):
    attn = layer(shift=shift, clamp_shift=False, qkv_bias=qkv_bias).train()
    x = torch.randn(batch, 8, 7, 10, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    inputs = [x, *attn.parameters()]
    expected = torch.autograd.grad((brute_force(attn, x, shift) * direction).sum(), inputs)
    found = torch.autograd.grad((attn(x) * direction).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_what_inference_kept_serves_training():
    attn = layer(shift=2, clamp_shift=False)
    x = torch.randn(1, 8, 9, 11, dtype=torch.float64)
    with torch.inference_mode():
        attn.eval()(x)
    attn.train()(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()
