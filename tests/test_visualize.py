"""Pictures of what is within nets: first that their numbers are true, then that they come out."""

import csv
import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import write_images
from PIL import Image
from timm.layers import Attention as TimmAttention
from torch import nn

from models import vit
from models.fastvit import MapAttention
from models.layers import Attention2d, WindowAttention2d
from models.layers.gpsa import GPSA, SelfAttention, head_offsets
from models.layers.reparam import (
    LargeKernelConv,
    LayerScale2d,
    ReparamConv,
    RepConditionalPosEnc,
    RepMixer,
)
from tools.visualize import __main__ as visualize
from tools.visualize import measures
from tools.visualize.attention import _row, parse_query
from tools.visualize.branches import kernels_of, own_slices
from tools.visualize.capture import attention_layers, attention_parts, capture
from tools.visualize.loading import load_subject
from tools.visualize.logs import read_log

TINY = {"embed_dim": 16, "depth": 3, "num_heads": 4, "local_up_to_layer": 2, "patch_size": 4}


def randomize(module, scale=0.5):
    """Weights that make attention uneven, gates differ, and norms do something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype), alpha=scale)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.eval()


def heads_to_output(layer, out, x):
    """Heads' outputs ``B h N d`` through a token layer's projection, in the shape of ``x``."""
    tokens = layer.proj(out.transpose(1, 2).flatten(2))
    return tokens.reshape(x.shape)


def by_head(v, heads):
    return torch.stack(v.chunk(heads, -1), dim=1)


# The weights that pictures show are those that the layers apply


def check_rows(weights):
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert weights.min() >= 0


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_gpsa_weights_reproduce_its_output(size):
    layer = randomize(GPSA(16, 4))
    x = torch.randn(2, *size, 16)
    with torch.no_grad():
        parts = attention_parts(layer, x)
        for weights in parts:
            check_rows(weights)
        v = by_head(layer.v(x.flatten(1, 2)), 4)
        assert layer.fused_attn  # the output is that of the separable path
        assert torch.allclose(heads_to_output(layer, parts.full @ v, x), layer(x), atol=1e-5)
        share = torch.sigmoid(layer.gating_param)[:, None, None]
        mixed = (1 - share) * parts.content + share * parts.position
        assert torch.allclose(parts.full, mixed, atol=1e-6)
        # the position's part is the formula of the paper, written out pair by pair
        height, width = size
        w, b = layer.pos_proj.weight, layer.pos_proj.bias
        scores = torch.empty(4, height * width, height * width)
        for i in range(height * width):
            for j in range(height * width):
                dy, dx = j // width - i // width, j % width - i % width
                scores[:, i, j] = w @ torch.tensor([dx, dy, dx**2 + dy**2]).float() + b
        assert torch.allclose(parts.position[0], scores.softmax(-1), atol=1e-5)
        assert torch.equal(layer.attention_maps(x), parts.full)


@pytest.mark.parametrize(
    "layer",
    [
        SelfAttention(16, 4, qkv_bias=True),
        vit.Attention(16, 4, qkv_bias=True),
        vit.Attention(16, 4, qk_norm=True, norm_layer=nn.LayerNorm, qk_scale_factor=-0.5),
        TimmAttention(16, 4, qkv_bias=True),
    ],
)
def test_token_attention_weights_reproduce_its_output(layer):
    layer = randomize(layer)
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        parts = attention_parts(layer, x)
        check_rows(parts.full)
        assert parts.position is None
        v = by_head(layer.qkv(x).chunk(3, -1)[-1], 4)
        assert torch.allclose(heads_to_output(layer, parts.full @ v, x), layer(x), atol=1e-5)


@pytest.mark.parametrize("layer", [Attention2d(16, 4, qkv_bias=True), MapAttention(32, 2)])
def test_map_attention_weights_reproduce_its_output(layer):
    layer = randomize(layer)
    x = torch.randn(2, 16 if isinstance(layer, Attention2d) else 32, 3, 5)
    with torch.no_grad():
        weights = attention_parts(layer, x).full
        check_rows(weights)
        tokens = x.flatten(2).transpose(1, 2)
        if isinstance(layer, Attention2d):
            v = layer.qkv(x).chunk(3, 1)[-1].flatten(2).transpose(1, 2)
        else:
            v = layer.qkv(tokens).chunk(3, -1)[-1]
        out = (weights @ by_head(v, layer.num_heads)).transpose(1, 2).flatten(2)  # B N C
        if isinstance(layer, Attention2d):
            expected = layer.proj(out.transpose(1, 2).unflatten(2, (3, 5)))
        else:
            expected = layer.proj(out).transpose(1, 2).unflatten(2, (3, 5))
        assert torch.allclose(layer(x), expected, atol=1e-5)


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


def test_nonlocality_by_hand():
    distances = measures.grid_distances(1, 3, torch.zeros(1))
    assert distances.tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    weights = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    # (0.25 * 1 + 0.25 * 2) + 1 + 0, over three
    assert measures.nonlocality(weights[None, None], distances).item() == pytest.approx(1.75 / 3)
    halved = weights * torch.tensor([[1.0], [0.5], [0.1]])  # what a class token takes away
    assert measures.nonlocality(halved[None, None], distances).item() == pytest.approx(1.75 / 3)


def loop_nonlocality(weights, height, width):
    total = 0.0
    for i in range(height * width):
        among = weights[i].sum().item()
        for j in range(height * width):
            far = math.hypot(i // width - j // width, i % width - j % width)
            total += weights[i, j].item() / among * far
    return total / (height * width)


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [("convit_tiny", TINY, 16), ("test_vit", {}, 64), ("visformer_tiny", {}, 64)],
)
def test_nonlocality_is_the_sum_over_pairs(name, kwargs, size):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, num_classes=3, **kwargs).eval()
    for captured in capture(model, attention_layers(model), torch.randn(1, 3, size, size)):
        weights = captured.parts().full[0].double()[:, captured.prefix :, captured.prefix :]
        found = measures.nonlocality_of(captured)[0]
        for head in (0, captured.num_heads - 1):
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
    for head, found in enumerate(measures.nonlocality_of(captured)[0].tolist()):
        assert found == pytest.approx(loop_nonlocality(dense[head], height, width), rel=1e-4)


def test_strongly_local_heads_look_at_their_offsets():
    """Section 3 of the paper: with a large strength, GPSA's position is a convolution's tap."""
    layer = GPSA(36, 9, locality_strength=40.0)
    maps = measures.centre_positions(layer, 7, 7)
    for (dx, dy), weights in zip(head_offsets(9).tolist(), maps, strict=True):
        assert weights[3 + int(dy), 3 + int(dx)] > 0.999
    assert torch.allclose(maps.sum((1, 2)), torch.ones(9))


# The other numbers


def test_gates():
    model = timm.create_model("convit_tiny", img_size=16, num_classes=3, **TINY)
    with torch.no_grad():
        model.blocks[1].attn.gating_param.copy_(torch.tensor([0.0, 2.0, -2.0, math.log(3)]))
    found = measures.gates(model)
    assert list(found) == ["blocks.0.attn", "blocks.1.attn"]
    expected = [0.5, 0.8807970779778823, 0.11920292202211755, 0.75]
    assert found["blocks.1.attn"].tolist() == pytest.approx(expected, rel=1e-5)


def test_bias_pictures_have_query_minus_key():
    layer = randomize(WindowAttention2d(8, 2, 3))
    pictures, table = measures.bias_pictures(layer), layer.table()
    for query in range(9):
        for key in range(9):
            dy, dx = query // 3 - key // 3, query % 3 - key % 3
            assert torch.equal(pictures[:, 2 + dy, 2 + dx], table[:, query, key])


def test_cosine_similarities():
    embedding = torch.randn(5, 2, 3)
    found = measures.cosine_similarities(embedding)
    one, other = embedding[:, 1, 2].double(), embedding[:, 0, 1].double()
    expected = (one @ other / (one.norm() * other.norm())).item()
    assert found[1, 2, 0, 1].item() == pytest.approx(expected)
    assert found[1, 2, 1, 2].item() == pytest.approx(1.0)


def test_position_embeddings_without_the_class_token():
    model = timm.create_model("test_vit", img_size=64, num_classes=3)
    (found,) = measures.position_embeddings(model).values()
    assert found.shape == (64, 4, 4)
    assert torch.equal(found[:, 1, 2], model.pos_embed[0, 1 + 4 + 2])


def test_principal_colours():
    """Of a map that is made of three orthogonal patterns, the components are these."""
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    patterns = [9 * (x - 1.5), 3 * (y - 1.5), (x - 1.5) * (y - 1.5) / 4]
    directions = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))[0]
    features = sum(d[:, None, None] * p for d, p in zip(directions.T, patterns, strict=True)) + 7
    colours = measures.principal_colours(features)
    for index, pattern in enumerate(patterns):
        scaled = (pattern - pattern.min()) / (pattern.max() - pattern.min())
        found = colours[..., index].float()
        assert torch.allclose(found, scaled, atol=1e-4) or torch.allclose(
            found, 1 - scaled, atol=1e-4
        )
    assert torch.equal(measures.principal_colours(torch.ones(6, 1, 1)), torch.full((1, 1, 3), 0.5))


def impulse_response(function, channels, out, size):
    """Kernel ``O I k k`` and bias of an affine convolution, from what it makes of impulses."""
    side = 2 * size + 1
    with torch.no_grad():
        bias = function(torch.zeros(1, channels, side, side, dtype=torch.float64))[0]
        kernel = torch.empty(out, channels, size, size, dtype=torch.float64)
        for c in range(channels):
            x = torch.zeros(1, channels, side, side, dtype=torch.float64)
            x[0, c, size, size] = 1.0
            y = function(x)[0] - bias
            half = size // 2
            around = y[:, size - half : size + half + 1, size - half : size + half + 1]
            kernel[:, c] = around.flip(1, 2)
    return kernel, bias[:, size, size]


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
    expected, _ = impulse_response(layer.forward_branches, 4, out, size)
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
        expected, _ = impulse_response(branch, 3, 3, 3)
        own = expected[torch.arange(3), torch.arange(3)]
        assert torch.allclose(own_slices(parts[name][0]), own, atol=1e-12), name


# Logs


def line(epoch, **values):
    numbers = {"train_loss": 2.0, "train_lr": 1e-3, "test_loss": 1.5}
    return json.dumps(numbers | {"test_acc1": 10.0, "test_acc5": 50.0, "epoch": epoch} | values)


def test_the_last_line_of_an_epoch_counts(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("\n".join([line(0), line(1, test_acc1=1.0), line(2), line(1, test_acc1=7.0)]))
    rows = read_log(log)
    assert [(row["epoch"], row["test_acc1"]) for row in rows] == [(0, 10.0), (1, 7.0), (2, 10.0)]


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images, checkpoints of three epochs of a small ConViT, and one of Visformer V2."""
    root = tmp_path_factory.mktemp("visualize")
    write_images(root / "images", train=2, val=1, size=40)
    kwargs = {"num_classes": 3, "img_size": 16, **TINY}
    for epoch in (2, 0, 1):
        torch.manual_seed(epoch)
        model = randomize(timm.create_model("convit_tiny", **kwargs), 0.1)
        with torch.no_grad():
            for block in model.blocks[:2]:
                block.attn.gating_param.fill_(float(epoch))
        state = {"model": model.state_dict(), "model_ema": model.state_dict()}
        state |= {"model_name": "convit_tiny", "model_kwargs": kwargs, "input_size": 16}
        torch.save(state | {"epoch": epoch}, root / f"epoch{epoch}.pth")
    average = {k: v + 1.0 if k.endswith("gating_param") else v for k, v in state["model"].items()}
    torch.save(state | {"model_ema": average, "epoch": 5}, root / "ema.pth")
    run = root / "some run"
    run.mkdir()
    (run / "log.txt").write_text("\n".join([line(0), line(1, ema_acc1=3.0, ema_loss=9.0)]))
    return root


@pytest.fixture
def picture(files, tmp_path, capsys):
    """``picture(*words) -> (size, rows)``: a picture that was made without complaint."""

    def make(*words):
        words = [
            str(files / word[1:]) if str(word).startswith("@") else str(word) for word in words
        ]
        out, table = tmp_path / "out.png", tmp_path / "out.csv"
        status = visualize.main([*words, "--output", str(out), "--csv", str(table)])
        assert status == 0, capsys.readouterr().err
        with Image.open(out) as image, table.open(newline="") as file:
            pixels = np.asarray(image.convert("RGB"))
            assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # not blank
            return image.size, list(csv.DictReader(file))

    return make


IMAGE = "@images/val/cat/0.jpg"
CLASS = ("--query", "class")


def test_gates_over_epochs_and_of_the_average(picture):
    _, rows = picture("gates", "@epoch2.pth", "@epoch0.pth", "@epoch1.pth")
    assert [int(row["epoch"]) for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    for row in rows:
        assert float(row["gate"]) == pytest.approx(1 / (1 + math.exp(-int(row["epoch"]))), rel=1e-5)
    for weights, value in (("model", 1.0), ("ema", 2.0)):
        _, rows = picture("gates", "@ema.pth", "--weights", weights)
        assert {row["epoch"] for row in rows} == {"5"}
        assert float(rows[0]["gate"]) == pytest.approx(1 / (1 + math.exp(-value)), rel=1e-5)


def test_of_two_files_of_an_epoch_the_first_counts(files, tmp_path, capsys):
    words = [str(files / name) for name in ("epoch0.pth", "ema.pth", "epoch0.pth")]
    assert visualize.main(["gates", *words, "--csv", str(tmp_path / "a.csv")]) == 0
    assert "epoch0.pth left out: of epoch 0" in capsys.readouterr().out
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 2 * 8


def test_nonlocality_command(picture):
    _, rows = picture("nonlocality", "@epoch1.pth", "--data-path", "@images", "--count", "3")
    assert len(rows) == 3 * 4
    assert all(0 < float(row["nonlocality"]) < 3 * math.sqrt(2) for row in rows)
    _, several = picture("nonlocality", "@epoch0.pth", "@epoch1.pth", "--image", "@images/val/cat")
    _, one = picture("nonlocality", "@epoch1.pth", "--image", IMAGE)
    assert several[12:] == one  # a folder stands for its first image


def test_attention_command(picture):
    _, rows = picture(
        "attention",
        "--checkpoint",
        "@epoch1.pth",
        "--image",
        IMAGE,
        "--part",
        "all",
        "--heads",
        "0",
        "3",
    )
    shown = {(row["layer"], row["part"]) for row in rows}
    assert ("blocks.0.attn", "position") in shown
    assert ("blocks.2.attn", "position") not in shown
    sums = {}
    for row in rows:
        key = row["layer"], row["part"], row["head"]
        sums[key] = sums.get(key, 0.0) + float(row["weight"])
    for (layer, _, _), total in sums.items():
        if layer == "blocks.2.attn":
            assert 0.5 < total < 1.0  # the class token has the rest
        else:
            assert total == pytest.approx(1.0, abs=1e-5)
    _, rows = picture("attention", "--checkpoint", "@epoch1.pth", "--image", IMAGE, *CLASS)
    assert {row["layer"] for row in rows} == {"blocks.2.attn"}
    words = [
        "attention",
        "--model",
        "swin_visformer_tiny_v2",
        "--input-size",
        "64",
        "--image",
        IMAGE,
    ]
    _, rows = picture(*words, "--layers", "0", "6", "--heads", "1", "--query", "63,0")
    assert {(row["layer"], row["head"]) for row in rows} == {
        ("stage2.0.attn", "1"),
        ("stage3.0.attn", "1"),
    }


def test_the_query_is_the_patch_under_the_pixel(files):
    """A head that looks at its own patch alone shows which one that is."""
    assert parse_query("centre", 16) == (8, 8)
    args = visualize.get_parser().parse_args(
        ["attention", "--checkpoint", str(files / "epoch1.pth"), "--image", "x"]
    )
    subject = load_subject(args.checkpoint, args)
    layer = subject.model.blocks[0].attn
    with torch.no_grad():
        layer.pos_proj.weight.copy_(torch.tensor([0.0, 0.0, -100.0]).expand(4, 3))
        layer.gating_param.fill_(100.0)
    layers = {"blocks.0.attn": layer}
    (captured,) = capture(subject.model, layers, torch.zeros(1, 3, 16, 16))
    row = _row(captured, (13, 6), ("full",), None, 16)
    assert row.place == (1, 3)  # x = 13 of 16 pixels is in the last of four columns
    assert torch.all(row.maps["full"][:, 1, 3] > 0.999)


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        (["@epoch1.pth"], {"weight"}),
        (["@epoch1.pth", "--show", "embedding"], {"similarity"}),
        (["swin_visformer_tiny_v2", "--input-size", "64", "--layers", "0", "8"], {"bias", "dx"}),
    ],
)
def test_bias_command(picture, words, columns):
    _, rows = picture("bias", *words)
    assert columns <= rows[0].keys()


def test_kernels_and_features_commands(picture):
    _, rows = picture("kernels", "fastvit_t8", "--input-size", "32", "--channels", "1")
    assert {row["branch"] for row in rows} >= {"skip", "mixer.conv_scale", "sum", "fused"}
    _, rows = picture(
        "kernels", "fastvit_t8", "--input-size", "32", "--layer", "stem.0", "--channels", "1"
    )
    assert "identity" not in {row["branch"] for row in rows}
    words = ["--image", IMAGE, "--channels", "3", "--pick", "variance"]
    _, rows = picture("features", "@epoch1.pth", *words)
    assert len(rows) == 3 * 3 * 16
    by_channel = {}
    for row in rows[: 3 * 16]:
        by_channel.setdefault(row["channel"], []).append(float(row["value"]))
    spreads = [np.var(values) for values in by_channel.values()]
    assert len(spreads) == 3
    assert spreads == sorted(spreads, reverse=True)


def test_curves_command_and_tensorboard(picture, files, tmp_path):
    _, rows = picture("curves", "@some run", "--tensorboard", tmp_path / "events")
    assert [(row["run"], row["epoch"], row["ema_acc1"]) for row in rows] == [
        ("some run", "0", ""),
        ("some run", "1", "3.0"),
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events")).Reload()
    (event,) = events.Images("visualize/curves")
    assert event.step == 1
    assert event.width > 500


def test_the_fused_net_says_that_its_branches_are_gone(tmp_path, capsys):
    kwargs = {"num_classes": 3, "inference_mode": True}
    model = timm.create_model("fastvit_t8", **kwargs)
    torch.save(
        {
            "model": model.state_dict(),
            "model_name": "fastvit_t8",
            "model_kwargs": kwargs,
            "input_size": 32,
        },
        tmp_path / "in.pth",
    )
    out = tmp_path / "out.png"
    assert visualize.main(["kernels", str(tmp_path / "in.pth"), "--output", str(out)]) == 1
    assert "reparameterised already" in capsys.readouterr().err
    assert not out.exists()


WRONG = [
    (["gates", "test_vit"], "no gates"),
    (["gates", "@none.pth"], "neither a checkpoint file nor a model"),
    (["gates", "@epoch0.pth", "--pretrained"], "--pretrained goes with the name"),
    (["gates", "@broken.pth"], "not a checkpoint"),
    (["gates", "@epoch0.pth", "@no_epoch.pth"], "does not say its epoch"),
    (["gates", "@epoch0.pth", "--input-size", "18"], "multiples of 4"),
    (["nonlocality", "@epoch0.pth"], "either --image IMG ... or --data-path"),
    (
        ["nonlocality", "@epoch0.pth", "--data-path", "@images", "--count", "99"],
        "has 6 images, 99 are wanted",
    ),
    (["nonlocality", "fastvit_t8", "--image", IMAGE], "no attention layer"),
    (["attention", "--image", IMAGE], "give --checkpoint CKPT or --model NAME"),
    (["attention", "--model", "test_vit", "--image", "@broken.jpg"], "cannot decode image"),
    (["attention", "--model", "test_vit", "--image", IMAGE, "--query", "160,0"], "160x160 pixels"),
    (["attention", "--model", "test_vit", "--image", IMAGE, "--query", "a"], "none of X,Y, centre"),
    (["attention", "--model", "test_vit", "--image", IMAGE, "--layers", "6"], "they are 0..5"),
    (["attention", "--model", "test_vit", "--image", IMAGE, "--heads", "2"], "they are 0..1"),
    (["attention", "--model", "test_vit", "--image", IMAGE, "--part", "position"], "by position"),
    (
        ["attention", "--checkpoint", "@epoch0.pth", "--image", IMAGE, *CLASS, "--layers", "0"],
        "no class token",
    ),
    (["bias", "fastvit_t8"], "it learns no positions"),
    (["bias", "test_vit", "--show", "table"], "has only embedding"),
    (["kernels", "test_vit"], "FastViT has"),
    (["kernels", "fastvit_t8", "--layer", "stem"], "is none of stem.0"),
    (["features", "test_vit", "--image", IMAGE, "--channels", "0"], "1 at least"),
    (["features", "test_vit", "--image", IMAGE, "--layers", "9"], "there is no stage 9"),
    (["curves", "@images"], "there is no log"),
    (["curves", "@empty.txt"], "is empty"),
    (["curves", "@cut.txt"], "cut.txt line 2 is broken"),
    (["curves", "@lacking.txt"], "lacking.txt line 1 lacks test_acc5"),
    (["curves", "@words.txt"], "line 1: test_loss is 'low', not a number"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_says_what_is_wrong(words, message, files, tmp_path, capsys):
    (files / "broken.pth").write_bytes(b"nothing")
    (files / "broken.jpg").write_bytes(b"nothing")
    (files / "empty.txt").write_text("\n")
    (files / "cut.txt").write_text(line(0) + "\n" + line(1)[:30])
    (files / "lacking.txt").write_text(line(0).replace("test_acc5", "other"))
    (files / "words.txt").write_text(line(0, test_loss="low"))
    state = torch.load(files / "epoch0.pth", weights_only=True)
    torch.save({key: v for key, v in state.items() if key != "epoch"}, files / "no_epoch.pth")
    words = [str(files / word[1:]) if word.startswith("@") else word for word in words]
    out = tmp_path / "out.png"
    assert visualize.main([*words, "--output", str(out)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert list(tmp_path.iterdir()) == []


def test_targets(files, tmp_path, capsys, monkeypatch):
    words = ["curves", str(files / "some run")]
    for more, message in (
        ([], "give --output FILE.png"),
        (["--output", "a.jpg"], "must end in .png"),
        (["--output", str(tmp_path / "no" / "a.png")], "there is no folder"),
        (["--tensorboard", str(files / "epoch0.pth")], "is no folder"),
    ):
        assert visualize.main([*words, *more]) == 1
        assert message in capsys.readouterr().err
    # what was written before something else failed does not stay
    (tmp_path / "b.csv").mkdir()
    both = ["--output", str(tmp_path / "a.png"), "--csv", str(tmp_path / "b.csv")]
    monkeypatch.setattr(visualize, "check_targets", lambda args: None)
    assert visualize.main([*words, *both]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_without_matplotlib(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = str(tmp_path / "a.png")
    assert visualize.main(["gates", str(files / "epoch0.pth"), "--output", out]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
