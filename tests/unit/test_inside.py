"""Values that tools.visualize shows: attention, distances, positions, kernels."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from torch import nn
from visualizing import TINY, randomize

from models import vit
from models.layers import Attention2d, SelfAttention, WindowAttention2d, set_fused_attention
from models.layers.fastvit import MapAttention
from models.layers.gpsa import GPSA, head_offsets
from models.layers.reparam import (
    LargeKernelConv,
    LayerScale2d,
    ReparamConv,
    RepConditionalPosEnc,
    RepMixer,
)
from models.visformer import Stage
from tools.visualize import positions
from tools.visualize.capture import attention_layers, attention_parts, capture
from tools.visualize.features import principal_colours
from tools.visualize.heads import nonlocality_of
from tools.visualize.kernels import kernels_of, own_slices


def check_rows(weights):
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert weights.min() >= 0


@pytest.mark.parametrize(
    ("layer", "exponent"),
    [
        (Attention2d(12, 3, qkv_bias=True, qk_scale_factor=-0.4), -0.4),
        (MapAttention(12, 3, qk_scale_factor=-0.4), -0.4),
        (SelfAttention(12, 3, qkv_bias=True), -0.25),
        (vit.Attention(12, 3, qkv_bias=True), -0.25),
        (vit.Attention(12, 3, qkv_bias=True, qk_scale_factor=-0.4), -0.4),
        (vit.Attention(12, 3, qk_norm=True, norm_layer=nn.LayerNorm, qk_scale_factor=-0.5), -0.5),
        (TimmAttention(12, 3, qkv_bias=True), -0.25),
    ],
)
def test_attention_is_the_formula_and_the_exponent_counts_twice(layer, exponent):
    layer, is_map = randomize(layer).double(), isinstance(layer, Attention2d | MapAttention)
    x = torch.randn(2, *((12, 3, 5) if is_map else (15, 12)), dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2) if is_map else x

    def linear(module, x):
        return F.linear(x, module.weight.flatten(1), module.bias)

    with torch.no_grad():
        q, k, v = linear(layer.qkv, tokens).reshape(2, 15, 3, 3, 4).permute(2, 0, 3, 1, 4)
        if hasattr(layer, "q_norm"):
            q, k = layer.q_norm(q), layer.k_norm(k)
        weights = (q @ k.transpose(-2, -1) * 4 ** (2 * exponent)).softmax(-1)
        expected = linear(layer.proj, (weights @ v).transpose(1, 2).flatten(2))
        expected = expected.transpose(1, 2).reshape(x.shape) if is_map else expected
        for fused in (True, False):
            set_fused_attention(layer, fused)
            torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        full, _, position = attention_parts(layer, x)
        torch.testing.assert_close(full, weights, rtol=1e-12, atol=1e-12)
        assert position is None


WINDOWED = [  # height, width, window, shift
    pytest.param(4, 4, 4, 0, id="one window"),
    pytest.param(8, 4, 4, 0, id="plain"),
    pytest.param(8, 8, 4, 2, id="shifted"),
    pytest.param(6, 5, 4, 0, id="padded"),
    pytest.param(6, 9, 4, 2, id="padded and shifted"),
]


@pytest.mark.parametrize(("height", "width", "window", "shift"), WINDOWED)
def test_windows_put_back_reproduce_the_output(height, width, window, shift):
    """Row by row over the map: padding has the value 0 there, as the projection has no bias."""
    layer = randomize(WindowAttention2d(8, 2, window, shift))
    x = torch.randn(2, 8, height, width)
    with torch.no_grad():
        weights = attention_parts(layer, x).full
        check_rows(weights)
        v = layer.qkv(x).chunk(3, 1)[-1].unflatten(1, (2, 4))  # B h d H W
        out = torch.empty_like(v)
        for query in range(height * width):
            row = layer.weights_of_query(weights, query, height, width)  # B h H W
            at = (query // width, query % width)
            out[..., at[0], at[1]] = torch.einsum("bhyx,bhdyx->bhd", row, v)
        assert torch.allclose(layer.proj(out.flatten(1, 2)), layer(x), atol=1e-5)


@pytest.mark.parametrize(("height", "width", "window", "shift"), WINDOWED)
def test_window_weights_reproduce_the_output(height, width, window, shift):
    """Within the windows, with a bias, which padding has for its value."""
    layer = randomize(WindowAttention2d(8, 2, window, shift, qkv_bias=True))
    x = torch.randn(2, 8, height, width)
    with torch.no_grad():
        weights = attention_parts(layer, x).full
        v = layer.heads(x)[2]
        expected = layer.proj(layer.merge(weights @ v, height, width))
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_parts_of_window_attention():
    layer = randomize(WindowAttention2d(8, 2, 4, 2))
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        full, content, position = attention_parts(layer, x)
        for part in (content, position):
            check_rows(part)
        # log of a softmax is the score but for a constant: full is the sum of both scores
        within = full > 1e-20
        shifted = (content.double().log() + position.double().log()).masked_fill(~within, -1e9)
        assert torch.allclose(shifted.softmax(-1), full.double(), atol=1e-5)
        # a shift keeps apart what it brings together in all of them: the last window has 4 regions
        apart = layer.mask(8, 8, x)[-1, 0] < 0
        assert apart.any()
        for part in (full, content, position):
            assert part[:, -1][..., apart].max() < 1e-20
        layer.relative_position_bias_table.zero_()
        flat = attention_parts(layer, x)
        assert torch.allclose(flat.full, content, atol=1e-6)
        assert torch.allclose(flat.position[0, 0], torch.full((16, 16), 1 / 16), atol=1e-6)


def test_capture_has_what_layers_get():
    torch.manual_seed(0)
    model = randomize(timm.create_model("convit_tiny", img_size=16, num_classes=3, **TINY), 0.1)
    images = torch.randn(2, 3, 16, 16)
    layers = attention_layers(model)
    got = {c.name: c for c in capture(model, layers, images)}
    assert list(got) == [f"blocks.{i}.attn" for i in range(3)]
    assert [c.prefix for c in got.values()] == [0, 0, 1]
    assert all(c.grid == (4, 4) for c in got.values())
    with torch.no_grad():
        x = model.embed(images)
        for index, captured in enumerate(got.values()):
            if index == 2:
                x = torch.cat([model.cls_token.expand(2, -1, -1), x.flatten(1, 2)], dim=1)
            assert torch.equal(captured.x, model.blocks[index].norm1(x))
            x = model.blocks[index](x)
    captured = got["blocks.2.attn"]
    full = captured.parts().full
    assert torch.equal(captured.maps(full, "class"), full[:, :, 0, 1:].reshape(2, 4, 4, 4))
    assert torch.equal(captured.maps(full, (1, 2)), full[:, :, 7, 1:].reshape(2, 4, 4, 4))
    assert not model.blocks[0].attn._forward_pre_hooks


# Non-locality


def loop_nonlocality(weights, height, width):
    total = 0.0
    for i in range(height * width):
        among = weights[i].sum().item()
        for j in range(height * width):
            far = math.hypot(i // width - j // width, i % width - j % width)
            total += weights[i, j].item() / among * far
    return total / (height * width)


SMALL = (Stage(1, 16, 4, spatial_groups=8), Stage(1, 12, num_heads=3))


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [("convit_tiny", TINY, 16), ("test_vit", {}, 64), ("visformer_tiny", {"stages": SMALL}, 32)],
)
def test_nonlocality_is_the_sum_over_pairs(name, kwargs, size):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, num_classes=3, **kwargs).eval()
    for captured in capture(model, attention_layers(model), torch.randn(1, 3, size, size)):
        weights = captured.parts().full[0].double()[:, captured.prefix :, captured.prefix :]
        found = nonlocality_of(captured)[0]
        for head in (0, captured.layer.num_heads - 1):
            expected = loop_nonlocality(weights[head], *captured.grid)
            assert found[head].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("height", "width", "window", "shift"), WINDOWED)
def test_nonlocality_of_windows(height, width, window, shift):
    layer = randomize(WindowAttention2d(8, 2, window, shift))
    x = torch.randn(1, 8, height, width)
    (captured,) = capture(layer, {"attn": layer}, x)
    weights = captured.parts().full
    rows = [layer.weights_of_query(weights, i, height, width) for i in range(height * width)]
    dense = torch.stack(rows, dim=2).flatten(3)[0].double()  # h T T
    for head, found in enumerate(nonlocality_of(captured)[0].tolist()):
        assert found == pytest.approx(loop_nonlocality(dense[head], height, width), rel=1e-4)


def test_strongly_local_heads_look_at_their_offsets():
    """Section 3 of the paper: with a large strength, GPSA's position is a convolution's tap."""
    layer = GPSA(36, 9, locality_strength=40.0)
    maps = positions.centre_positions(layer, 7, 7)
    for (dx, dy), weights in zip(head_offsets(9).tolist(), maps, strict=True):
        assert weights[3 + int(dy), 3 + int(dx)] > 0.999
    assert torch.allclose(maps.sum((1, 2)), torch.ones(9))


# The other numbers


def test_bias_pictures_have_query_minus_key():
    layer = randomize(WindowAttention2d(8, 2, 3))
    pictures, table = positions.bias_pictures(layer), layer.table()
    for query in range(9):
        for key in range(9):
            dy, dx = query // 3 - key // 3, query % 3 - key % 3
            assert torch.equal(pictures[:, 2 + dy, 2 + dx], table[:, query, key])


def test_cosine_similarities():
    embedding = torch.randn(5, 2, 3)
    found = positions.cosine_similarities(embedding)
    one, other = embedding[:, 1, 2].double(), embedding[:, 0, 1].double()
    expected = (one @ other / (one.norm() * other.norm())).item()
    assert found[1, 2, 0, 1].item() == pytest.approx(expected)
    assert found[1, 2, 1, 2].item() == pytest.approx(1.0)


def test_position_embeddings_without_the_class_token():
    model = timm.create_model("test_vit", img_size=64, num_classes=3)
    (found,) = positions.position_embeddings(model).values()
    assert found.shape == (64, 4, 4)
    assert torch.equal(found[:, 1, 2], model.pos_embed[0, 1 + 4 + 2])


def test_principal_colours():
    """Of a map that is made of three orthogonal patterns, the components are these."""
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    patterns = [9 * (x - 1.5), 3 * (y - 1.5), (x - 1.5) * (y - 1.5) / 4]
    directions = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))[0]
    features = sum(d[:, None, None] * p for d, p in zip(directions.T, patterns, strict=True)) + 7
    colours = principal_colours(features)
    for index, pattern in enumerate(patterns):
        scaled = (pattern - pattern.min()) / (pattern.max() - pattern.min())
        found = colours[..., index].float()
        assert torch.allclose(found, scaled, atol=1e-4) or torch.allclose(
            found, 1 - scaled, atol=1e-4
        )
    assert torch.equal(principal_colours(torch.ones(6, 1, 1)), torch.full((1, 1, 3), 0.5))


def impulse_response(function, channels, size):
    """Kernel ``O I k k`` of an affine convolution, from its response to impulses."""
    side, half = 2 * size + 1, size // 2
    x = torch.zeros(channels + 1, channels, side, side, dtype=torch.float64)  # the last is zero
    x[range(channels), range(channels), size, size] = 1.0
    with torch.no_grad():
        y = function(x)
    middle = slice(size - half, size + half + 1)
    return (y[:-1] - y[-1:])[:, :, middle, middle].flip(2, 3).transpose(0, 1)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (RepMixer(4, 3, 0.3), 5),
        (RepMixer(4, 3, None), 5),
        (LargeKernelConv(4, 8, 7, groups=4), 2),
        (ReparamConv(4, 4, 3, num_convs=2), 4),
        (ReparamConv(4, 4, 1), 2),
        (RepConditionalPosEnc(4, 5), 2),
    ],
)
def test_branches_add_up_to_what_the_layer_does(layer, count):
    layer = randomize(layer).double()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    kernels = kernels_of(layer)
    assert len(kernels.branches) == count
    assert kernels.difference < 1e-12
    out, size = len(kernels.total), kernels.total.shape[-1]
    expected = impulse_response(layer.forward_branches, 4, size)
    groups = layer.geometry["groups"]
    for o in range(out):
        first = o // (out // groups) * (4 // groups)
        own = expected[o, first : first + 4 // groups]
        assert torch.allclose(kernels.total[o], own, atol=1e-10)
        assert torch.allclose(kernels.fused[o], own, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_each_branch_of_a_mixer():
    layer = randomize(RepMixer(3, 3, 0.3)).double()
    parts = layer.branch_kernels()
    gamma = layer.layer_scale
    assert isinstance(gamma, LayerScale2d)
    zero = torch.zeros(1, 3, 7, 7, dtype=torch.float64)

    def centred(module):
        return lambda x: gamma(module(x) - module(zero))

    branches = {
        "mixer.conv_kxk.0": centred(layer.mixer.conv_kxk[0]),
        "mixer.conv_scale": centred(layer.mixer.conv_scale),
        "mixer.identity": centred(layer.mixer.identity),
        "-norm": lambda x: -centred(layer.norm.identity)(x),
        "skip": lambda x: x,
    }
    assert parts.keys() == branches.keys()
    for name, branch in branches.items():
        expected = impulse_response(branch, 3, 3)
        own = expected[torch.arange(3), torch.arange(3)]
        assert torch.allclose(own_slices(parts[name][0]), own, atol=1e-12), name
