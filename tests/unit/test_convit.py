"""ConViT: equal to the original by either path of its attention, and a good citizen of timm."""

import copy
import itertools
import pickle

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from models.convit import checkpoint_filter_fn
from models.layers import set_fused_attention, set_qk_scale_factor
from models.layers.gpsa import GPSA, head_offsets, positional_attention, positional_tables

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
    torch.testing.assert_close(layer.attention_maps(x), weights, rtol=1e-12, atol=1e-13)
    for fused in (True, False):
        set_fused_attention(layer, fused)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-13)


def test_tables_are_the_factors_of_positional_attention():
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3, dtype=torch.float64) * 0.3, torch.randn(4).double()
    rows, columns = positional_tables(weight, bias, 4, 7)
    assert (rows.shape, columns.shape) == ((4, 4, 4), (4, 7, 7))
    outer = torch.einsum("hiu,hjv->hijuv", rows, columns).reshape(4, 28, 28)
    full = positional_attention(weight, bias, 4, 7)
    torch.testing.assert_close(outer, full, rtol=0, atol=1e-14)
    torch.testing.assert_close(full.sum(-1), torch.ones(4, 28).double())
    low = positional_attention(weight.half(), bias.half(), 4, 7)
    assert low.dtype == torch.float32


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


def test_attention_maps():
    model = shaken(tiny()).eval()
    seen = {}
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_pre_hook(lambda m, x, i=index: seen.update({i: (m, x[0])}))
    model(torch.randn(2, 3, 64, 32, dtype=torch.float64))
    for index, (attn, x) in seen.items():
        maps = attn.attention_maps(x)
        count = 8 if index < 3 else 9
        assert maps.shape == (2, 4, count, count)
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))


def test_attention_dropout_acts_in_training_only():
    model = tiny(attn_drop_rate=0.5)
    x = torch.randn(1, 3, 64, 64)
    for fused in (True, False):
        set_fused_attention(model, fused)
        for block in model.train().blocks[::3]:
            grid = torch.randn(1, 4, 4, 192) if block is model.blocks[0] else torch.ones(1, 5, 192)
            assert not torch.equal(block.attn(grid), block.attn(grid))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_exponent_is_the_models():
    model = shaken(tiny(qk_scale_factor=-0.5)).eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert model.qk_scale_factor == -0.5
    assert {block.attn.scale for block in model.blocks} == {48**-0.5}
    before = model(x)
    set_qk_scale_factor(model, -0.25)
    assert (model(x) - before).abs().max() > 1e-6
    assert model.blocks[0].attn.scale == 48**-0.25


def test_drop_path_grows_linearly():
    blocks = tiny(drop_path_rate=0.3).blocks
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("size", [(32, 32), (48, 96), (16, 16)])
def test_other_sizes_resample_position_embeddings(size):
    model = tiny().eval()
    count = size[0] * size[1] // 256
    assert model.forward_features(torch.randn(1, 3, *size)).shape == (1, 1 + count, 192)
    assert tiny(use_pos_embed=False)(torch.randn(1, 3, *size)).shape == (1, 10)


@pytest.mark.parametrize("size", [(33, 64), (64, 65), (8, 64)])
def test_sizes_that_do_not_fit_are_named(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} does not fit.*multiples of 16"):
        tiny().eval()(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match="does not fit"):
        tiny(img_size=size)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"drop_path_ratee": 0.1}, TypeError, "drop_path_ratee"),
        ({"num_heads": 5}, ValueError, "embed_dim 192 is not a multiple of num_heads 5"),
        ({"local_up_to_layer": 4}, ValueError, "local_up_to_layer 4 must be from 0 to 3"),
        ({"global_pool": "tokens"}, ValueError, "global_pool 'tokens'"),
    ],
)
def test_wrong_arguments_raise(kwargs, error, message):
    with pytest.raises(error, match=message):
        tiny(**kwargs)


def test_intermediates():
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, norm=True)
        assert [tuple(m.shape) for m in maps] == [(2, 192, 4, 2)] * 4
        torch.testing.assert_close(maps[3].flatten(2).transpose(1, 2), final[:, 1:])
        torch.testing.assert_close(final, model.forward_features(x))
        pairs = model.forward_intermediates(
            x,
            indices=[2, 3],
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        assert [prefix.shape[1] for _, prefix in pairs] == [0, 1]
        torch.testing.assert_close(pairs[1][1], final[:, :1])
        torch.testing.assert_close(pairs[0][0], maps[2].flatten(2).transpose(1, 2))
        calls = []
        model.blocks[2].register_forward_pre_hook(lambda *_: calls.append(1))
        model.forward_intermediates(x, indices=[1], stop_early=True)
        assert not calls
        with pytest.raises(ValueError, match="NHWC"):
            model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("out_indices", [(0, 3), (0, 2), 2])
def test_features(out_indices):
    kwargs = {"img_size": 64, "depth": 4, "local_up_to_layer": 3}
    model = timm.create_model("convit_tiny", features_only=True, out_indices=out_indices, **kwargs)
    full = tiny().eval()
    model.model.load_state_dict(full.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = model.eval()(x)
        every = full.forward_intermediates(x, intermediates_only=True)
    assert model.feature_info.channels() == [m.shape[1] for m in maps] == [192, 192]
    assert model.feature_info.reduction() == [16, 16]
    assert maps[0].shape == (2, 192, 4, 6)
    for ours, index in zip(maps, (2, 3) if out_indices == 2 else out_indices, strict=True):
        torch.testing.assert_close(ours, every[index])
    assert all(p.requires_grad for p in model.parameters())
    model(x)[-1].sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # nothing unused is left


def test_pruning_keeps_what_is_asked_for():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    whole = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    pruned = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    torch.testing.assert_close(pruned, whole)
    assert len(model.blocks) == 2
    assert model(x).shape == (1, 16, 192)


def test_heads():
    model = tiny(num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 192)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == 7
    tokens = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    torch.testing.assert_close(model(x), model.head(tokens[:, 0]))
    model.reset_classifier(5, global_pool="avg")
    torch.testing.assert_close(model(x), model.head(tokens[:, 1:].mean(1)))
    assert tiny(global_pool="")(x).shape == (2, 17, 10)
    assert model.head_hidden_size == model.num_features == 192


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(in_chans):
    assert tiny(in_chans=in_chans)(torch.randn(2, in_chans, 64, 64)).shape == (2, 10)


def test_gradient_checkpointing_changes_no_gradient():
    plain = tiny()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    calls = []
    hook = saving.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    plain(x).sum().backward()
    saving(x).sum().backward()
    hook.remove()
    assert len(calls) == 2  # once forward, once more in the backward pass
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    compiled = torch.compile(saving, fullgraph=True, backend="aot_eager")
    assert torch.isfinite(compiled(x)).all()


def test_positional_attention_is_exact_under_autocast():
    weight, bias = torch.randn(4, 3) * 0.3, torch.randn(4)
    full = positional_attention(weight, bias, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(positional_attention(weight, bias, 6, 5), full)
        rows, _ = positional_tables(weight, bias, 6, 5)
    assert rows.dtype == full.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_low_precision(dtype, fused):
    model = tiny().eval()
    set_fused_attention(model, fused)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", dtype):
            low = model(x)
        pure = model.to(dtype)(x.to(dtype))
    for ours in (low, pure):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), full, rtol=0.1, atol=0.1 * full.std().item())


def test_copies_pickles_and_seeds():
    torch.manual_seed(3)
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)
    torch.manual_seed(3)
    first = model.state_dict()
    assert all(torch.equal(value, first[key]) for key, value in tiny().state_dict().items())


@pytest.mark.parametrize("fused", [True, False])
def test_exports_and_compiles_without_graph_breaks(fused):
    model = tiny().eval()
    set_fused_attention(model, fused)
    x = torch.randn(2, 3, 64, 96)  # resamples the position embeddings too
    with torch.no_grad():
        expected = model(x)
        batch = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(model, (x,), dynamic_shapes=batch).module()
        torch.testing.assert_close(exported(x[:1].repeat(3, 1, 1, 1))[2], expected[0])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(compiled, expected)


def test_weight_decay_and_layer_groups():
    model = tiny()
    gates = {f"blocks.{index}.attn.gating_param" for index in range(3)}
    assert model.no_weight_decay() == {"pos_embed", "cls_token"} | gates
    optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            scales[name] = group["lr_scale"]
            decays = p.ndim > 1 and name not in ("pos_embed", "cls_token")
            assert (group["weight_decay"] > 0) == decays, name
    assert scales["cls_token"] == scales["pos_embed"] == scales["patch_embed.proj.weight"]
    order = ["cls_token", "blocks.0.attn.v.weight", "blocks.3.attn.qkv.weight", "head.weight"]
    assert [scales[a] < scales[b] for a, b in itertools.pairwise(order)] == [True] * 3


def test_pretrained_goes_through_timms_machinery(tmp_path):
    source = timm.create_model("convit_tiny")
    path = tmp_path / "model.pth"
    indices = {"blocks.0.attn.rel_indices": torch.zeros(1, 196, 196, 3)}
    torch.save(source.state_dict() | indices, path)
    model = timm.create_model(
        "convit_tiny.fb_in1k",
        pretrained=True,
        img_size=(64, 96),
        num_classes=5,
        in_chans=1,
        pretrained_cfg_overlay={"file": str(path)},
    )
    assert torch.equal(model.blocks[0].attn.qk.weight, source.blocks[0].attn.qk.weight)
    assert model.pos_embed.shape == (1, 24, 192)
    assert model.pretrained_cfg["hf_hub_id"] == "timm/convit_tiny.fb_in1k"
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
