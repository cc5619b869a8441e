"""One contract for every model that this repository registers."""

import copy
import itertools
import pickle
from functools import cache

import pytest
import safetensors.torch
import timm
import torch
from conftest import run_python
from small_models import NAMES, attention_layers, blocks_of, meta, relative, shrunk, small, stir
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import nn

import datasets
import models
from models.layers import set_fused_attention, set_gelu, set_qk_scale_factor
from training.flags import parse_args

# one of every kind, for what takes longer
KINDS = ["visformer_tiny", "visformer_net1", "visformer_net3", "visformer_net7"]
KINDS += ["swin_visformer_tiny_v2", "convit_tiny", "fastvit_t8", "fastvit_sa12", "vit_b_32_224"]
# one of every layout that small models have
LAYOUTS = [*KINDS, *(f"visformer_net{i}" for i in (2, 4, 5, 6)), "visformer_small", "convit_small"]
LAYOUTS += ["swin_visformer_small", "swin_visformer_small_v2", "swin_visformer_medium_v2"]
LAYOUTS += ["vit_b_16_224", "vit_l_16_224", "vit_l_32_224", "fastvit_mci0", "fastvit_mci3"]
SPECIAL = {"convit", "vit"}  # families that spare these from weight decay
SPARED = ("pos_embed", "cls_token")


def images(*shape):
    return torch.randn(shape or (2, 3, 64, 64), generator=torch.Generator().manual_seed(2))


@cache
def layout(name):
    model = small(name)
    return type(model), *((key, value.shape) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_small_models_have_one_of_the_layouts(name):
    assert layout(name) in map(layout, LAYOUTS)
    with pytest.raises(TypeError, match="drop_path_ratee"):
        meta(name, drop_path_ratee=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_native_shapes(name):
    model = meta(name, num_classes=1000)
    size = model.default_cfg["input_size"][-1]
    features = model.forward_features(torch.zeros(2, 3, size, size, device="meta"))
    assert model.forward_head(features).shape == (2, 1000)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    module, weight = model.default_cfg["first_conv"], f"{model.default_cfg['classifier']}.weight"
    for conv in [module] if isinstance(module, str) else module:
        assert model.get_submodule(conv).weight.shape[1] == 3
    assert model.get_parameter(weight).shape[0] == 1000


@pytest.mark.parametrize("name", KINDS)
def test_heads(name):
    model, x = small(name, num_classes=0), images()
    assert model(x).shape == (2, model.num_features)
    pools = ["max", "avg" if hasattr(model, "cls_token") else "catavgmax", None]
    for num_classes, pool in zip((7, 5, 3), pools, strict=True):
        model.reset_classifier(num_classes, pool)
        head = model.get_classifier()
        assert head.out_features == model.num_classes == num_classes
        assert (head.weight.std() < 0.05) or name.startswith("vit")  # timm leaves PyTorch's
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert torch.equal(model(x), head(pooled))
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    for in_chans in (1, 4):
        model = small(name, in_chans=in_chans)
        assert model(images(1, in_chans, 64, 64)).shape == (1, 10)
    if not name.startswith("vit"):  # timm's new head is in float32
        model = model.double()
        model.reset_classifier(3)
        assert model(images(1, 4, 64, 64).double()).dtype == torch.float64


@pytest.mark.parametrize("name", LAYOUTS)
def test_feature_maps(name):
    model, x = stir(small(name)), images(2, 3, 64, 96)
    info = model.feature_info
    last = len(info) - 1
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        for level, y in zip(info, maps, strict=True):
            height, width = (side // level["reduction"] for side in (64, 96))
            assert y.shape == (2, level["num_chs"], height, width)
        calls = []
        blocks_of(model)[-1].register_forward_pre_hook(lambda *_: calls.append(1))
        options = {"stop_early": True, "intermediates_only": True}
        early = model.forward_intermediates(x, indices=[0], **options)
        assert torch.equal(early[0], maps[0])
        assert bool(calls) == (last == 0)
    with pytest.raises((ValueError, AssertionError), match="NLC"):
        model.forward_intermediates(x, output_fmt="NLCX")

    features = small(name, features_only=True, out_indices=sorted({0, last}))
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    assert not features.load_state_dict(state, strict=False).missing_keys
    assert features.feature_info.channels() == [info[i]["num_chs"] for i in {0, last}]
    assert features.feature_info.reduction() == [info[i]["reduction"] for i in {0, last}]
    if len(info) > 2 or name == "visformer_net1":  # by default, at least the last three
        default = small(name, features_only=True)
        assert default.feature_info.channels() == [level["num_chs"] for level in info]
    outputs = features(x)
    torch.testing.assert_close(outputs, [maps[i] for i in sorted({0, last})])
    sum(y.square().mean() for y in outputs).backward()
    assert all(p.grad is not None for p in features.parameters())  # DDP waits for every one

    assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    with torch.no_grad():
        pruned = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert torch.equal(pruned[0], maps[0])
    assert len(blocks_of(model)) < len(blocks_of(small(name))) or not last
    assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameter_groups(name):
    model = small(name)
    parameters = dict(model.named_parameters())
    spared = SPARED if name.split("_")[0] in SPECIAL else ()
    assert model.no_weight_decay() & parameters.keys() == parameters.keys() & {*spared}
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(itertools.chain(*groups.values())) == sorted(parameters)
    optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.1, layer_decay=0.5)
    names, scales = {id(p): key for key, p in parameters.items()}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            key = names[id(p)]
            scales[key] = group["lr_scale"]
            assert (group["weight_decay"] > 0) == (p.ndim > 1 and key not in spared), key
    in_order = [scales[key] for key in parameters if "." in key]
    assert in_order == sorted(in_order)
    first_of_blocks = (next(block.parameters()) for block in blocks_of(model))
    ascending = [in_order[0], *(scales[names[id(p)]] for p in first_of_blocks), in_order[-1]]
    assert ascending == sorted(set(ascending))
    for key in parameters:
        if "." not in key:  # embeddings learn as fast as what is before the blocks of a stage
            stem = key.replace("pos_embed", "patch_embed").replace("cls_token", "patch_embed")
            assert scales[key] == scales[f"{stem}.proj.weight"]


@pytest.mark.parametrize("name", KINDS)
def test_drop_rates(name):
    model = small(name, drop_path_rate=0.3)
    rates = [
        {m.drop_prob for m in block.modules() if isinstance(m, DropPath)} or {0.0}
        for block in blocks_of(model)
    ]
    assert [len(of_block) for of_block in rates] == [1] * len(rates)
    expected = torch.linspace(0, 0.3, len(rates)).tolist()
    assert [rate for (rate,) in rates] == pytest.approx(expected)
    x = images()
    for option in ("drop_rate", "proj_drop_rate", "attn_drop_rate"):
        model = stir(small(name, **{option: 0.5}))
        used = option != "attn_drop_rate" or attention_layers(model)
        for fused in (True, False) if option == "attn_drop_rate" else (True,):
            set_fused_attention(model, fused)
            model.train()
            assert torch.equal(model(x), model(x)) != bool(used)
            model.eval()
            assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_precisions(name):
    model, x = stir(small(name)), images()
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), stir(small(name))):
            assert torch.equal(twin(x), expected)
        twin = small(name)
        assert all(
            torch.equal(p, twin.state_dict()[k]) for k, p in small(name).state_dict().items()
        )
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x), expected)
        for fused, dtype in ((True, torch.float16), (False, torch.bfloat16)):
            set_fused_attention(twin, fused)
            with torch.autocast("cpu", dtype):
                low = twin(x)
            assert low.dtype == dtype
            assert relative(low, expected) < 0.1
        assert relative(twin(x), expected) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_the_exponent_is_the_models(name):
    usual, other = stir(small(name)), stir(small(name, qk_scale_factor=-0.5))
    assert (usual.qk_scale_factor, other.qk_scale_factor) == (-0.25, -0.5)
    assert all(layer.scale == layer.head_dim**-0.5 for layer in attention_layers(other))
    x = images()
    with torch.no_grad():
        expected = other(x)
        assert torch.equal(usual(x), expected) != bool(attention_layers(usual))
        set_qk_scale_factor(usual, -0.5)
        assert usual.qk_scale_factor == -0.5
        assert torch.equal(usual(x), expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fused_models_keep_their_function(name):
    model, x = stir(small(name)), images(1, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    fused = model.fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert not fused.training
    assert not any(p.requires_grad for p in fused.parameters())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with torch.inference_mode():
        features = model.forward_features(x)
        expected = model.double()(x.double())
        assert relative(model.fuse()(x.double()), expected) < 1e-12
        assert relative(fused(x).double(), expected) < 1e-5
        for twin in (fused.fuse(), pickle.loads(pickle.dumps(fused))):
            torch.testing.assert_close(twin(x), fused(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(x).dtype == torch.bfloat16
        last = copy.deepcopy(fused).to(memory_format=torch.channels_last)
        assert relative(last.forward_features(x), features) < 1e-5
        set_fused_attention(fused, False)
        assert relative(fused(x).double(), expected) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_changes_nothing(name):
    plain = small(name).double().train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    calls = []
    for block in blocks_of(saving):
        block.register_forward_pre_hook(lambda module, _: calls.append(id(module)))
    x = images().double()
    for model in (saving, plain):
        model(x).square().mean().backward()
    assert {calls.count(id(block)) for block in blocks_of(saving)} == {2}  # forward and backward
    for (key, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=key)
    for (key, ours), theirs in zip(saving.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)  # statistics are counted once


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["trained form", "fused form"])
@pytest.mark.parametrize("name", KINDS)
def test_exports_and_compiles(name, fused):
    model, x = stir(small(name)), images(2, 3, 64, 96)  # position embeddings are resampled
    forms = [model.fuse()] if fused else [model, copy.deepcopy(model)]
    set_fused_attention(forms[-1], fused)
    for form in forms:
        with torch.no_grad():
            expected = form(x)
            batch = ({0: torch.export.Dim("batch")},)
            exported = torch.export.export(copy.deepcopy(form), (x,), dynamic_shapes=batch).module()
            for y in (x, x[:1].repeat(3, 1, 1, 1)):
                torch.testing.assert_close(exported(y)[0], expected[0], rtol=1e-4, atol=1e-4)
            compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "saving"),
    [(name, False) for name in KINDS] + [("visformer_tiny", True), ("convit_tiny", True)],
)
def test_trains_compiled(name, saving):
    plain = small(name).train()
    compiled = copy.deepcopy(plain)
    compiled.set_grad_checkpointing(saving)
    x = images()
    plain(x).square().mean().backward()
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    for (key, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6, key


@pytest.fixture(scope="module")
def photographs(cifar):
    """32 training images of CIFAR-10 as ``B 3 64 64``, and their classes."""
    args, _ = parse_args(["--data-path", str(cifar), "--input-size", "64"])
    dataset = datasets.build_dataset(False, args)[0]
    feed = datasets.build_prefetcher(datasets.build_eval_loader(dataset, args, 1, 0))
    return feed.batch(range(0, len(dataset), len(dataset) // 32)[:32])[:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_learns_photographs(name, photographs):
    width = {"embed_dim": 96} if name == "convit_tiny" else {}
    model, (x, y) = small(name, **width).train(), photographs
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", KINDS)
def test_gradients_in_channels_last(name):
    plain = stir(small(name)).train()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    plain(images()).square().sum().backward()
    last(images().to(memory_format=torch.channels_last)).square().sum().backward()
    for (key, ours), theirs in zip(last.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-5, key


@pytest.mark.slow
def test_training_in_channels_last_survives():
    # at the native sizes, and in a process of its own: PyTorch 2.15 corrupts memory in the
    # backward of a strided 1x1 convolution on an image
    code = """
import sys, timm, torch, models
for name in sys.argv[1:]:
    model = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()), name
print("alive")
"""
    names = [name for name in KINDS if "net" not in name]
    done = run_python("-c", code, *names)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.parametrize("name", KINDS)
def test_other_sizes(name, tmp_path):
    source = stir(small(name))
    path = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, path)
    large = {"img_size": (96, 128)} if "img_size" in shrunk(name) else {}
    target = small(name, **large)
    report = models.load_checkpoint(target, path)
    positions = {key for key, _ in source.named_parameters() if key.startswith("pos_embed")}
    assert set(report.resampled) == (positions if large else set())
    for size in ((96, 128), (64, 32)):
        x = images(1, 3, *size)
        with torch.no_grad():
            ours, theirs = source(x), target(x)
        assert ours.shape == (1, 10)
        assert (ours - theirs).norm() < 0.3 * ours.norm()  # embeddings are resampled twice


@pytest.mark.parametrize("name", ["visformer_tiny", "convit_tiny", "vit_b_16_224", "vit_b_32_224"])
def test_sizes_that_do_not_fit_are_named(name):
    stride = 32 if name == "visformer_tiny" else int(name.split("_")[2]) if "vit_b" in name else 16
    for height, width in ((33, 64), (64, 65), (8, 64)):
        with pytest.raises((ValueError, AssertionError), match=str(stride)) as error:
            small(name)(torch.zeros(1, 3, height, width))
        wrong = height if height % stride or height < stride else width
        assert str(wrong) in str(error.value)


@pytest.mark.parametrize("name", KINDS)
def test_a_head_of_other_classes(name, tmp_path):
    source, path = stir(small(name)), tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, path)
    other = small(name, num_classes=7)
    with pytest.raises(models.CheckpointError, match="head"):
        models.load_checkpoint(other, path)
    report = models.load_checkpoint(other, path, new_head=True)
    classifier = other.default_cfg["classifier"]
    assert set(report.missing) == {f"{classifier}.weight", f"{classifier}.bias"}
    with torch.no_grad():
        assert torch.equal(other.forward_features(images()), source.forward_features(images()))


@pytest.mark.parametrize("name", KINDS)
def test_settings_travel_with_the_checkpoint(name, tmp_path):
    source, path = stir(small(name, qk_scale_factor=-0.5)), tmp_path / "weights.pth"
    kwargs = {"qk_scale_factor": -0.5}
    torch.save({"model": source.state_dict(), "model_kwargs": kwargs, "gelu": "tanh"}, path)
    target = small(name)
    report = models.load_checkpoint(target, path)
    assert target.qk_scale_factor == -0.5
    assert "-0.5" in str(report)
    assert "tanh" in str(report)
    gelus = [m for m in target.modules() if isinstance(m, nn.GELU)]
    assert {m.approximate for m in gelus} == {"tanh"}
    set_gelu(source, "tanh")
    with torch.no_grad():
        assert torch.equal(target(images()), source(images()))


@pytest.mark.parametrize("name", KINDS)
def test_pretrained_goes_through_timms_machinery(name, tmp_path):
    source = stir(small(name, num_classes=1000))
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    overlay = {"file": str(path), "hf_hub_id": None, "custom_load": False}
    options = {"pretrained": True, "num_classes": 5, "pretrained_cfg_overlay": overlay}
    model = small(name, **options)
    with torch.no_grad():
        assert torch.equal(model.forward_features(images()), source.forward_features(images()))
    assert model.get_classifier().out_features == 5
    gray = small(name, in_chans=1, **options)
    assert gray(images(1, 1, 64, 64)).isfinite().all()
