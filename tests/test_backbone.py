"""Detection backbones: the original's outputs, sizes, freezing, weights from everywhere."""

import json

import pytest
import torch

from models.backbone import SwinVisformer

ORIGINAL = {
    "init_channels": 32,
    "embed_dim": 256,
    "depth": [1, 10, 14, 3],
    "num_heads": [2, 4, 8, 16],
    "mlp_ratio": 4.0,
    "group": 8,
    "attn_stage": "0011",
    "spatial_conv": "1100",
    "conv_init": True,
    "qkv_bias": False,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.2,
    "num_classes": 80,
    "out_indices": (0, 1, 2, 3),
    "use_checkpoint": False,
}
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
        first = torch.tensor(level[f"first64{suffix}"], dtype=x.dtype)
        sampled = torch.tensor(level[f"sample256{suffix}"], dtype=x.dtype)
        indices = torch.arange(256) * (x.numel() - 1) // 255
        for found, expected in ((x.flatten()[:64], first), (x.flatten()[indices], sampled)):
            assert (found - expected).abs().max() < tolerance * level["std_f64"]


@pytest.mark.parametrize("exponent", [-0.5, None])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_equals_the_original(original, golden, tmp_path, exponent, prefix):
    description, weights = original
    outputs = description["outputs" if exponent else "outputs_qk_default"]
    path = tmp_path / "detector.pth"
    state = {prefix + key: value for key, value in weights.items()}
    if prefix:
        state["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, path)
    init_cfg = {"type": "Pretrained", "checkpoint": str(path)}
    backbone = SwinVisformer(**ORIGINAL, qk_scale=exponent, init_cfg=init_cfg)
    report = backbone.init_weights()
    assert not report.left
    assert report.dropped == (("neck.lateral_convs.0.conv.weight",) if prefix else ())
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
