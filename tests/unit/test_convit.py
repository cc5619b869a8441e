"""ConViT's own: gated positional self-attention and how it starts, the late class token."""

import copy
import itertools

import pytest
import timm
import torch

from models.convit import checkpoint_filter_fn
from models.layers import set_fused_attention
from models.layers.gpsa import GPSA, head_offsets, positional_attention, positional_tables
from tools.visualize.capture import attention_parts

SIZES = {
    "convit_tiny": (192, 4),
    "convit_small": (432, 9),
    "convit_base": (768, 16),
    "convit_tiny_plus": (256, 4),
    "convit_small_plus": (576, 9),
    "convit_base_plus": (1024, 16),
}


def tiny(**kwargs):
    defaults = {"img_size": 64, "num_classes": 10, "depth": 4, "local_up_to_layer": 3}
    return timm.create_model("convit_tiny", **defaults | kwargs)


def shaken(module, dtype=torch.float64):
    """``module`` away from its initial state, where many things cancel."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module.to(dtype)


@pytest.mark.parametrize("name", SIZES)
def test_widths_and_heads(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    heads = {block.attn.num_heads for block in model.blocks}
    assert (model.num_features, *heads) == SIZES[name]
    kinds = [isinstance(block.attn, GPSA) for block in model.blocks]
    assert kinds == [True] * 10 + [False] * 2


def test_gpsa_is_the_formula():
    layer = shaken(GPSA(12, 3, qkv_bias=True, qk_scale_factor=-0.4))
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    tokens = x.reshape(2, 15, 12)
    q, k = layer.qk(tokens).reshape(2, 15, 2, 3, 4).permute(2, 0, 3, 1, 4)
    v = layer.v(tokens).reshape(2, 15, 3, 4).transpose(1, 2)
    place = torch.tensor(list(itertools.product(range(3), range(5))), dtype=torch.float64)
    dy, dx = (place[None] - place[:, None]).unbind(-1)  # key minus query
    scores = layer.pos_proj(torch.stack([dx, dy, dx**2 + dy**2], -1)).permute(2, 0, 1)
    gate = layer.gating_param.sigmoid()[:, None, None]
    content = (q @ k.transpose(-2, -1) * 4**-0.8).softmax(-1)
    weights = (1 - gate) * content + gate * scores.softmax(-1)
    expected = layer.proj((weights @ v).transpose(1, 2).reshape(2, 3, 5, 12))
    parts = attention_parts(layer, x)
    for found, wanted in zip(parts, (weights, content, scores.softmax(-1)), strict=True):
        torch.testing.assert_close(found, wanted.expand_as(found), rtol=1e-12, atol=1e-13)
    assert torch.equal(layer.attention_maps(x), parts.full)
    for fused in (True, False):
        set_fused_attention(layer, fused)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-13)


def test_paths_agree_with_their_gradients_on_a_rectangle():
    model = shaken(tiny(img_size=(64, 96), qkv_bias=True))
    other = copy.deepcopy(model)
    set_fused_attention(other, False)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        layer, grid = model.blocks[1].attn, torch.randn(2, 4, 6, 192, dtype=torch.float64)
        separable, explicit = layer(grid), other.blocks[1].attn(grid)
    assert (separable - explicit).abs().max() < 1e-13 * max(1, explicit.abs().max())
    torch.testing.assert_close(model(x), other(x), rtol=1e-10, atol=1e-11)
    model(x).square().mean().backward()
    other(x).square().mean().backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # DDP waits for every one
        scale = theirs[name].grad.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-10 * max(1, scale)
        )


def test_separable_path_makes_no_square_table():
    layer = GPSA(8, 4)
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            first = out[0] if isinstance(out, tuple | list) else out
            shapes.append(tuple(first.shape))
            return out

    with torch.no_grad(), Watch():
        layer(torch.randn(1, 8, 9, 8))
    assert not any(shape.count(72) > 1 for shape in shapes)


@pytest.mark.parametrize("heads", [4, 9, 16, 6])
def test_heads_start_at_their_offsets(heads):
    layer = GPSA(heads * 2, heads, locality_strength=1.0)
    offsets = head_offsets(heads)
    assert offsets.unique(dim=0).shape == (heads, 2)
    torch.testing.assert_close(offsets.mean(0), torch.zeros(2))
    side = 15
    weight, bias = layer.pos_proj.weight.detach().double(), layer.pos_proj.bias.double()
    maps = positional_attention(weight, bias, side, side)
    middle = maps[:, side * side // 2].reshape(heads, side, side)
    axis = torch.arange(side).double() - side // 2
    centre = torch.stack([(middle.sum(1) * axis).sum(-1), (middle.sum(2) * axis).sum(-1)], 1)
    torch.testing.assert_close(centre, offsets.double(), rtol=0, atol=1e-3)
    for head, (dx, dy) in enumerate(offsets.tolist()):
        if dx % 1 == dy % 1 == 0:  # others lie between patches
            x, y = int(dx) + side // 2, int(dy) + side // 2
            assert middle[head].argmax() == y * side + x
    torch.testing.assert_close(layer.v.weight, torch.eye(heads * 2))
    torch.testing.assert_close(layer.gating_param, torch.ones(heads))


def test_model_starts_local_and_by_its_strength():
    model = tiny(locality_strength=2.5)
    for block in model.blocks[:3]:
        expected = torch.cat([5 * head_offsets(4), torch.full((4, 1), -2.5)], 1)
        torch.testing.assert_close(block.attn.pos_proj.weight, expected)
        torch.testing.assert_close(block.attn.v.weight, torch.eye(192))
    assert 0.015 < model.blocks[0].attn.qk.weight.std() < 0.025


def test_positional_attention_is_exact_under_autocast():
    weight, bias = torch.randn(4, 3) * 0.3, torch.randn(4)
    full = positional_attention(weight, bias, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(positional_attention(weight, bias, 6, 5), full)
        rows, _ = positional_tables(weight, bias, 6, 5)
    assert rows.dtype == full.dtype == torch.float32
    half = weight.half(), bias.half()  # of a model in half precision
    assert positional_attention(*half, 6, 5).dtype == torch.float32
    assert all(table.dtype == torch.float32 for table in positional_tables(*half, 6, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_low_precision(dtype, fused):
    model, x = tiny().eval(), torch.randn(2, 3, 64, 64)
    set_fused_attention(model, fused)
    with torch.no_grad():
        full = model(x)
        low = model.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1 * full.std().item())


@pytest.mark.parametrize(
    "kwargs",
    [{"num_heads": 5}, {"local_up_to_layer": 4}, {"global_pool": "tokens"}, {"img_size": (64, 65)}],
)
def test_wrong_arguments_raise(kwargs):
    value = "64x65" if "img_size" in kwargs else next(iter(kwargs.values()))
    with pytest.raises(ValueError, match=str(value)):
        tiny(**kwargs)


def test_the_class_token_joins_late():
    model, x = tiny().eval(), torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(x, norm=True)
        options = {"return_prefix_tokens": True, "norm": True, "intermediates_only": True}
        pairs = model.forward_intermediates(x, indices=[2, 3], output_fmt="NLC", **options)
        assert [prefix.shape[1] for _, prefix in pairs] == [0, 1]
        torch.testing.assert_close(pairs[1][1], tokens[:, :1])
        for (patches, _), level in zip(pairs, maps[2:], strict=True):
            torch.testing.assert_close(patches, level.flatten(2).transpose(1, 2))
        torch.testing.assert_close(pairs[1][0], tokens[:, 1:])
        torch.testing.assert_close(model(x), model.head(tokens[:, 0]))
        model.reset_classifier(5, global_pool="avg")
        torch.testing.assert_close(model(x), model.head(tokens[:, 1:].mean(1)))
        model.reset_classifier(5, global_pool="")
        torch.testing.assert_close(model(x), model.head(tokens))
        assert tiny(use_pos_embed=False)(x).shape == (2, 10)


def test_indices_of_the_original_are_left_out():
    source = tiny()
    indices = {"blocks.0.attn.rel_indices": torch.zeros(1, 16, 16, 3)}
    same = checkpoint_filter_fn(source.state_dict() | indices, source)
    assert same.keys() == source.state_dict().keys()
    assert torch.equal(same["pos_embed"], source.pos_embed)


def kept_for_backward(model, batch):
    """Bytes that a forward pass keeps for the backward pass, parameters apart."""
    parameters, kept = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randn(batch, 3, 224, 224))
        return sum(kept.values()) if output.requires_grad else 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convit_tiny", "convit_small"])
def test_training_keeps_little_more_than_a_plain_transformer(name):
    ours = timm.create_model(name).train()
    theirs = getattr(timm.models.convit, name)().train()
    plain = timm.models.VisionTransformer(
        embed_dim=ours.embed_dim, num_heads=ours.blocks[0].attn.num_heads, qkv_bias=False
    )
    per_image = [kept_for_backward(m, 2) - kept_for_backward(m, 1) for m in (ours, theirs, plain)]
    assert per_image[0] < 0.6 * per_image[1]
    assert per_image[0] < 1.1 * per_image[2]
