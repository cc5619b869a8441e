"""Detection backbones: the original's outputs, sizes, freezing, weights from everywhere."""

import json
import re
import weakref

import pytest
import timm
import torch
from loading import refused
from small_models import shrunk
from torch import nn

import models
from models.detection_backbone import Backbone, SwinVisformer, VisionBackbone
from models.layers import Mlp2d, set_recompute_activations

ORIGINAL = {"init_channels": 32, "embed_dim": 256, "depth": [1, 10, 14, 3], "num_classes": 80}
ORIGINAL |= {"num_heads": [2, 4, 8, 16], "mlp_ratio": 4.0, "group": 8, "conv_init": True}
ORIGINAL |= {"attn_stage": "0011", "spatial_conv": "1100", "qkv_bias": False, "drop_rate": 0.0}
ORIGINAL |= {"attn_drop_rate": 0.0, "drop_path_rate": 0.2, "use_checkpoint": False}
ORIGINAL |= {"out_indices": (0, 1, 2, 3)}
SMALL = {"embed_dim": 32, "depth": [1, 1, 2, 1], "num_heads": 2, "init_channels": 8}
SMALL |= {"attn_stage": "0011", "spatial_conv": "1100"}


@pytest.fixture(scope="module")
def original(golden, shared):
    """Description and weights of the original's detection backbone."""
    path = shared / "goldens" / "danczs.det_swin_visformer_small_v2.json"
    description = json.loads(path.read_text())
    return description, golden.weights(description)


def check_levels(maps, levels, suffix, tolerance):
    for x, level in zip(maps, levels, strict=True):
        assert list(x.shape) == level["shape"]
        assert x.mean().item() == pytest.approx(level["mean_f64"], abs=1e-9)
        first = torch.tensor(level[f"first64{suffix}"], dtype=x.dtype)
        sampled = torch.tensor(level[f"sample256{suffix}"], dtype=x.dtype)
        indices = torch.arange(256) * (x.numel() - 1) // 255
        for found, expected in ((x.flatten()[:64], first), (x.flatten()[indices], sampled)):
            assert (found - expected).abs().max() < tolerance * level["std_f64"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exponent", "prefix", "given"),
    [(-0.5, "backbone.", None), (-0.5, "backbone.", "backbone"), (None, "", "")],
)
def test_equals_the_original(original, golden, tmp_path, exponent, prefix, given):
    description, weights = original
    outputs = description["outputs" if exponent else "outputs_qk_default"]
    path = tmp_path / "detector.pth"
    state = {prefix + key: value for key, value in weights.items()}
    if prefix:
        state["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, path)
    init_cfg = {"type": "Pretrained", "checkpoint": str(path), "prefix": given}
    backbone = SwinVisformer(**ORIGINAL, qk_scale=exponent, init_cfg=init_cfg)
    report = backbone.init_weights()
    assert not report.missing
    neck = ("neck.lateral_convs.0.conv.weight",) if prefix else ()
    assert (report.unexpected, report.ignored) == (((), neck) if given else (neck, ()))
    backbone.double().eval()
    for output in outputs:
        batch, _, height, width = output["input_shape"]
        image = golden.make_input(batch, height, width).double()
        with torch.no_grad():
            maps = backbone(image)
            check_levels(maps, output["levels"], "_f64", 1e-6)
            fused = backbone.fuse()(image)
        for one, other in zip(maps, fused, strict=True):
            assert (one - other).abs().max() < 1e-12 * one.abs().max()


@pytest.mark.parametrize(
    ("name", "strides", "dims"),
    [
        ("swin_visformer_tiny_v2", [4, 8, 16, 32], [48, 96, 192, 384]),
        ("visformer_tiny", [8, 16, 32], [96, 192, 384]),
        ("convit_tiny", [4, 8, 16, 32], [48, 96, 192, 192]),
        ("fastvit_t8", [4, 8, 16, 32], [48, 96, 192, 384]),
        ("vit_tiny_patch16_224", [4, 8, 16, 32], [48, 96, 192, 192]),
        ("resnet18", [4, 8, 16, 32], [64, 128, 256, 512]),
    ],
)
def test_levels_of_images_of_any_size(name, strides, dims):
    backbone = VisionBackbone(name, drop_path_rate=0.1)
    assert (backbone.strides, backbone.num_features) == (strides, dims)
    maps = backbone(torch.randn(2, 3, 71, 106))
    for x, stride, dim in zip(maps, strides, dims, strict=True):
        assert x.shape[:2] == (2, dim)
        assert all(
            size // stride <= side <= -(-padded // stride)
            for side, size, padded in zip(x.shape[2:], (71, 106), (80, 112), strict=True)
        )
    sum(x.square().mean() for x in maps).backward()
    unused = [key for key, value in backbone.named_parameters() if value.grad is None]
    assert unused == []  # DistributedDataParallel would wait for them
    assert backbone.eval()(torch.randn(1, 3, 64, 64))[0].shape[-1] == 64 // strides[0]


def test_features_are_the_classifiers():
    torch.manual_seed(0)
    backbone = VisionBackbone(
        "swin_visformer_tiny_v2", model_kwargs={"clamp_shift": True}, level_norm="none"
    )
    backbone.double().eval()
    classifier = timm.create_model("swin_visformer_tiny_v2", use_pos_embed=False).double().eval()
    state = {key.removeprefix("net."): value for key, value in backbone.state_dict().items()}
    missing, unexpected = classifier.load_state_dict(state, strict=False)
    assert (sorted({key.split(".")[0] for key in missing}), unexpected) == (["head", "norm"], [])
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = classifier.forward_intermediates(image, intermediates_only=True)
        for one, other in zip(backbone(image), expected, strict=True):
            assert (one - other).abs().max() < 1e-7 * other.std()


def test_global_attention_becomes_windows():
    backbone = VisionBackbone("visformer_tiny")
    windows = [[block.attn.window for block in stage] for stage in (backbone.net.stage2,)]
    assert windows == [[14] * 4]
    assert {block.attn.window for block in backbone.net.stage3} == {7}
    resampled = VisionBackbone("visformer_tiny", model_kwargs={"use_pos_embed": True})
    assert resampled(torch.randn(1, 3, 64, 96))[0].shape == (1, 96, 8, 12)


FROZEN = {
    "swin_visformer_tiny_v2": ["stem", "patch_embed0", "stage0", "patch_embed1", "stage1"],
    "convit_tiny": ["cls_token", "pos_embed", "patch_embed", "blocks.0", "blocks.1"],
    "fastvit_t8": ["stem", "stages.0", "stages.1"],
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_stages_rest(name):
    backbone = VisionBackbone(name, frozen_stages=2, drop_path_rate=0.1).train()
    parts = tuple(f"net.{part}" for part in FROZEN[name])

    def is_frozen(key):
        return any(key == part or key.startswith(f"{part}.") for part in parts)

    for key, parameter in backbone.named_parameters():
        assert parameter.requires_grad != is_frozen(key), key
    for key, module in backbone.named_modules():
        assert module.training != is_frozen(key), key
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1.0)
    sum(x.square().mean() for x in backbone(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert not any(map(is_frozen, changed))
    backbone.eval().train()
    assert not backbone.net.get_submodule(FROZEN[name][-1]).training


def test_norm_eval_and_stem():
    backbone = VisionBackbone("swin_visformer_tiny_v2", frozen_stages=0, norm_eval=True).train()
    norms = [m for m in backbone.net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert backbone.norm0.training
    assert not backbone.net.stem[0].weight.requires_grad
    assert backbone.net.stage0[0].mlp.conv1.weight.requires_grad
    assert backbone.net.stage0[0].training


@pytest.mark.parametrize("name", ["swin_visformer_tiny_v2", "convit_tiny", "fastvit_t8"])
def test_recomputed_blocks_give_the_same_gradients(name):
    plain, recomputing, kept = (
        VisionBackbone(name, with_cp=with_cp, model_kwargs=shrunk(name)).double()
        for with_cp in (False, True, False)
    )
    for backbone in (recomputing, kept):
        backbone.load_state_dict(plain.state_dict())
    set_recompute_activations(kept, False)
    image = torch.randn(2, 3, 72, 104, dtype=torch.float64)
    for backbone in (plain, recomputing, kept):
        sum(x.square().mean() for x in backbone.train()(image)).backward()
    for other in (plain, recomputing):
        for (key, one), two in zip(kept.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-9, atol=1e-12, msg=key)
        for (key, one), two in zip(kept.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize("enabled", [True, False])
def test_activations_are_not_kept(enabled):
    mlp = Mlp2d(8, 16, spatial_groups=2)
    set_recompute_activations(mlp, enabled)
    outputs = []
    for act in (mlp.act1, mlp.act2):
        act.register_forward_hook(lambda _, inputs, output: outputs.append(weakref.ref(output)))
    result = mlp(torch.randn(1, 8, 5, 5))
    storages = [reference() is None for reference in outputs]
    result.sum().backward()
    assert storages == [enabled, enabled]


def save(tmp_path, content, name="weights.pth"):
    path = tmp_path / name
    torch.save(content, path)
    return {"type": "Pretrained", "checkpoint": str(path)}


def test_weights_of_a_classifier(tmp_path):
    source = timm.create_model("swin_visformer_tiny_v2", num_classes=3)
    init_cfg = save(tmp_path, {"model": source.state_dict(), "qk_scale_factor": -0.5})
    backbone = VisionBackbone("swin_visformer_tiny_v2", out_indices=(1, 2), init_cfg=init_cfg)
    report = backbone.init_weights()
    dropped = {key.removeprefix("net.").split(".")[0] for key in report.unexpected}
    assert dropped == {
        *("pos_embed0", "pos_embed1", "pos_embed2", "pos_embed3", "head", "norm"),
        *("patch_embed3", "stage3"),
    }
    assert {key.split(".")[0] for key in report.missing} == {"norm1", "norm2"}
    assert backbone.qk_scale_factor == backbone.net.qk_scale_factor == -0.5
    assert backbone.net.stage2[0].attn.scale == 32**-0.5
    assert torch.equal(backbone.net.stage1[0].mlp.conv1.weight, source.stage1[0].mlp.conv1.weight)
    assert all(part in str(report) for part in ("norm1", "norm2", "net.stage3", "net.head"))


def test_weights_of_other_layouts(tmp_path, golden):
    _, weights, _ = golden("danczs.visformer_tiny")
    report = VisionBackbone("visformer_tiny", init_cfg=save(tmp_path, weights)).init_weights()
    tables = {key for key in report.missing if key.endswith("relative_position_bias_table")}
    assert len(tables) == 8
    _, weights, _ = golden("fastvit.fastvit_t8")
    fastvit = VisionBackbone("fastvit_t8", init_cfg=save(tmp_path, {"state_dict": weights}))
    assert not [key for key in fastvit.init_weights().missing if key.startswith("net.")]
    resnet = timm.create_model("resnet18")
    backbone = VisionBackbone("resnet18", init_cfg=save(tmp_path, resnet.state_dict()))
    assert backbone.init_weights().unexpected == ("net.fc.weight", "net.fc.bias")


def test_weights_of_a_detector_of_ours(tmp_path):
    kwargs = {"model": "swin_visformer_tiny_v2", "model_kwargs": shrunk("swin_visformer_tiny_v2")}
    source = VisionBackbone(**kwargs)
    state = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    state["rpn_head.rpn_conv.weight"] = torch.zeros(1)
    backbone = VisionBackbone(**kwargs, init_cfg=save(tmp_path, state))
    report = backbone.init_weights()
    assert (report.missing, report.unexpected) == ((), ("rpn_head.rpn_conv.weight",))
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


@pytest.mark.parametrize("prefix", ["student", "student.", "module.teacher"])
def test_weights_below_a_prefix(tmp_path, prefix):
    kwargs = {"model": "swin_visformer_tiny_v2", "model_kwargs": shrunk("swin_visformer_tiny_v2")}
    source, other = VisionBackbone(**kwargs), VisionBackbone(**kwargs)
    state = {f"{prefix.rstrip('.')}.{k}": value for k, value in source.state_dict().items()}
    state |= {f"backbone.{key}": value for key, value in other.state_dict().items()}
    init_cfg = save(tmp_path, {"state_dict": {}, "ema": state}) | {"ema": True}
    backbone = VisionBackbone(**kwargs, init_cfg=init_cfg | {"prefix": prefix})
    report = backbone.init_weights()
    assert (report.missing, report.unexpected) == ((), ())
    assert set(report.ignored) == {f"backbone.{key}" for key in other.state_dict()}
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])
    unknown = VisionBackbone(**kwargs, init_cfg=init_cfg | {"prefix": "neck"})
    first = prefix.partition(".")[0]
    values = ("weights.pth", "neck.", first, "backbone")
    refused(unknown.init_weights, *values, kind=models.CheckpointError)
    classifier = timm.create_model(**kwargs["model_kwargs"], model_name=kwargs["model"])
    state = {f"{prefix.rstrip('.')}.{k}": v for k, v in classifier.state_dict().items()}
    init_cfg = save(tmp_path, state) | {"prefix": prefix}
    report = VisionBackbone(**kwargs, init_cfg=init_cfg).init_weights()
    assert {key.split(".")[0] for key in report.missing} == {"norm0", "norm1", "norm2", "norm3"}


def test_a_whole_detector_loads_the_originals_names():
    source = SwinVisformer(**SMALL)
    detector = nn.ModuleDict({"backbone": SwinVisformer(**SMALL), "neck": nn.Linear(1, 1)})
    state = {f"neck.{key}": value for key, value in detector["neck"].state_dict().items()}
    for key, value in source.state_dict().items():
        key = key.removeprefix("net.")
        for norm in ("norm.", "norm0.", "norm1.", "norm2.", "norm3.", "stem.1."):
            key = key.replace(norm, f"{norm}bn.") if f".{norm}" in f".{key}" else key
        state[f"backbone.{key}"] = value
    assert "backbone.stem.1.bn.weight" in state
    assert "backbone.stage2.0.norm1.bn.weight" in state
    detector.load_state_dict(state)
    for key, value in detector["backbone"].state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"model": "swin_visformer_tiny_v3"}, ["swin_visformer_tiny_v3", "swin_visformer_tiny_v2"]),
        ({"model_kwargs": {"embed_dim": 3}}, ["embed_dim"]),
        ({"out_indices": [4]}, ["(4,)", "(0, 1, 2, 3)"]),
        ({"out_indices": (2, 1)}, ["(2, 1)"]),
        ({"frozen_stages": 5}, ["5", "4"]),
        ({"level_norm": "GN"}, ["'GN'", "BN, LN, none"]),
        ({"init_cfg": {"type": "Xavier"}}, ["Xavier", "Pretrained"]),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "a", "prefix": 1}}, ["'prefix': 1"]),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "none.pth"}}, ["none.pth"]),
    ],
)
def test_bad_arguments_of_any_model(kwargs, words):
    kwargs = {"model": "swin_visformer_tiny_v2"} | kwargs
    refused(lambda: VisionBackbone(**kwargs).init_weights(), *words, kind=models.ModelError)


@pytest.mark.parametrize(
    ("name", "value"),
    [("depth", [1, 2]), ("num_heads", [1]), ("attn_stage", "011"), ("norm_layer", "GN")],
)
def test_bad_arguments_of_the_originals(name, value):
    with pytest.raises(models.ModelError, match=re.escape(f"{name} {value!r}")):
        SwinVisformer(**{name: value})


def test_models_that_cannot(tmp_path):
    init_cfg = save(tmp_path, {"a": torch.zeros(1)})
    with pytest.raises(models.CheckpointError, match=re.escape(init_cfg["checkpoint"])):
        VisionBackbone("swin_visformer_tiny_v2", init_cfg=init_cfg).init_weights()
    with pytest.raises(models.ModelError, match="ResNet"):
        VisionBackbone("resnet18").fuse()
    for kwargs in ({}, {"with_cp": True}):
        with pytest.raises(models.ModelError, match="Linear"):
            Backbone(nn.Linear(1, 1), **kwargs)
