"""One contract for every model that this repository registers."""

import copy
import pickle

import pytest
import safetensors.torch
import timm
import torch
from conftest import run_python
from torch import nn

import datasets
import models
from models.layers import set_fused_attention
from tools.flops import our_models
from training.flags import parse_args

NAMES = our_models()
# one of every kind of network, small enough to run
SMALL = {
    "visformer_tiny": {"img_size": 64},
    "visformer_net1": {"img_size": 64},
    "visformer_net7": {"img_size": 64},
    "swin_visformer_tiny_v2": {"img_size": 64},
    "convit_tiny": {"img_size": 64, "depth": 4, "local_up_to_layer": 2},
    "fastvit_t8": {},
    "fastvit_sa12": {},
    "vit_b_32_224": {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3},
}


def meta(name, **kwargs):
    """The model without memory: shapes alone."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def image(*shape):
    return torch.zeros(*shape, device="meta")


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name] | {"num_classes": 10} | kwargs).eval()


def native(model):
    return model.pretrained_cfg["input_size"][-1]


def test_every_small_model_is_ours():
    assert set(SMALL) <= set(NAMES)
    families = {timm.models.model_entrypoint(name).__module__ for name in NAMES}
    assert families == {timm.models.model_entrypoint(name).__module__ for name in SMALL}


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name):
    model = meta(name, num_classes=1000)
    size = native(model)
    assert model.default_cfg["input_size"][-1] == size
    x = image(2, 3, size, size)
    features = model.forward_features(x)
    assert model.forward_head(features).shape == (2, 1000)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.get_classifier().out_features == 1000
    with torch.device("meta"):
        model.reset_classifier(10)
    assert model(x).shape == (2, 10)
    with torch.device("meta"):
        model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    for in_chans in (1, 4):
        assert (
            meta(name, in_chans=in_chans, num_classes=0)(image(1, in_chans, size, size)).ndim == 2
        )
    with pytest.raises(TypeError):
        meta(name, drop_path_ratee=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps(name):
    indices = (-2, -1) if len(meta(name).feature_info) > 1 else (-1,)
    model = meta(name, features_only=True, out_indices=indices)
    size = native(meta(name))
    maps = model(image(1, 3, size, size))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [size // m.shape[-1] for m in maps] == model.feature_info.reduction()
    assert all(m.ndim == 4 and m.shape[-1] == m.shape[-2] for m in maps)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups(name):
    model = meta(name)
    names = {key for key, _ in model.named_parameters()}
    special = ("pos_embed", "cls_token", "relative_position_bias_table", "gating_param")
    assert {n for n in names if n.rpartition(".")[2].startswith(special)} <= model.no_weight_decay()
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sorted(key for group in groups.values() for key in group) == sorted(names)
    assert len(groups) > 2


@pytest.mark.parametrize("name", SMALL)
def test_runs_in_every_form(name):
    model = small(name, drop_path_rate=0.1)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        scale = expected.std().item()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)
        torch.testing.assert_close(small(name)(x), expected)  # the same seed
        exact = copy.deepcopy(model).double()
        fused = exact(x.double())
        set_fused_attention(exact, False)
        torch.testing.assert_close(exact(x.double()), fused, rtol=1e-9, atol=1e-9 * scale)
        exported = torch.export.export(model, (x,)).module()(x)
        torch.testing.assert_close(exported, expected, rtol=1e-3, atol=1e-3 * scale)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-3 * scale)
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                low = model(x)
            assert (low.float() - expected).norm() < 0.2 * expected.norm()


@pytest.fixture(scope="module")
def photographs(cifar):
    """32 training images of CIFAR-10 as ``B 3 64 64``, and their classes."""
    args, _ = parse_args(["--data-path", str(cifar), "--input-size", "64"])
    dataset = datasets.build_dataset(False, args)[0]
    feed = datasets.build_prefetcher(datasets.build_eval_loader(dataset, args, 1, 0))
    return feed.batch(range(0, len(dataset), len(dataset) // 32)[:32])[:2]


@pytest.mark.parametrize("name", SMALL)
def test_learns_photographs(name, photographs):
    model = small(name).train()
    x, y = photographs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


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
    names = [name for name in SMALL if "net" not in name]
    done = run_python("-c", code, *names)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_changes_nothing(name):
    model = small(name).train()
    saving = copy.deepcopy(model)
    saving.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    saving(x).square().mean().backward()
    model(x).square().mean().backward()
    for ours, theirs in zip(saving.parameters(), model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-7
    for ours, theirs in zip(saving.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", SMALL)
def test_other_sizes(name, tmp_path):
    source = small(name)
    with torch.no_grad():
        assert source(torch.randn(1, 3, 96, 128)).shape == (1, 10)
    path = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, path)
    kwargs = {"img_size": (96, 128)} if "img_size" in SMALL[name] else {}
    target = small(name, **kwargs)
    models.load_checkpoint(target, path)
    with torch.no_grad():
        assert target(torch.randn(1, 3, 96, 128)).isfinite().all()
    other = small(name, num_classes=7)
    with pytest.raises(models.CheckpointError, match="of another shape"):
        models.load_checkpoint(other, path)
    report = models.load_checkpoint(other, path, new_head=True)
    assert report.missing
    assert all("head" in key or "fc" in key for key in report.missing)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other.forward_features(x), source.forward_features(x))


@pytest.mark.parametrize("name", SMALL)
def test_exponent_travels_with_the_checkpoint(name, tmp_path):
    source = small(name, qk_scale_factor=-0.5)
    path = tmp_path / "weights.pth"
    kwargs = {"qk_scale_factor": -0.5}
    torch.save({"model": source.state_dict(), "model_kwargs": kwargs, "gelu": "tanh"}, path)
    target = small(name)
    report = models.load_checkpoint(target, path)
    assert target.qk_scale_factor == -0.5
    assert "pre-scale exponent -0.5, as trained" in str(report)
    assert "tanh GELU, as trained" in str(report)
    gelus = [m for m in target.modules() if isinstance(m, nn.GELU)]
    assert gelus
    assert all(m.approximate == "tanh" for m in gelus)
    models.layers.set_gelu(source, "tanh")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize("name", SMALL)
def test_pretrained_goes_through_timms_machinery(name, tmp_path):
    source = small(name, num_classes=1000)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    overlay = {"file": str(path), "hf_hub_id": None}
    model = small(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), source.forward_features(x))
    assert model.get_classifier().out_features == 5
