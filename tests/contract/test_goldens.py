"""Every model equals its original: logits, parameters, operations, and key layout."""

import copy

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import load_checkpoint
from models.layers import set_fused_attention

GOLDENS = {
    "danczs.visformer_tiny": "visformer_tiny",
    "danczs.visformer_small": "visformer_small",
    "danczs.visformer_tiny.qk-0.5": "visformer_tiny",
    "timm.visformer_tiny": "visformer_tiny",
    "danczs.net1.patched": "visformer_net1",
    "danczs.net4": "visformer_net4",
    "danczs.net5": "visformer_net5",
    "danczs.net7": "visformer_net7",
    "danczs.swin_visformer_tiny_v2": "swin_visformer_tiny_v2",
    "danczs.swin_visformer_tiny_v2.qk-0.5": "swin_visformer_tiny_v2",
    "danczs.swin_visformer_small_161010": "swin_visformer_small_161010",
    "convit.convit_tiny": "convit_tiny",
    "convit.convit_small": "convit_small",
    "convit.convit_tiny_plus": "convit_tiny_plus",
    "timm.convit_tiny": "convit_tiny",
    "timm.vit_base_patch32_224": "vit_base_patch32_224",
    "fastvit.fastvit_t8": "fastvit_t8",
    "fastvit.fastvit_sa12": "fastvit_sa12",
    "timm.fastvit_t8": "fastvit_t8",
}


def count(model):
    return sum(p.numel() for p in model.parameters())


def gmacs(model, x):
    set_fused_attention(model, False)  # the counter does not know every fused kernel
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    return counter.get_total_flops() / 2e9


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDENS)
def test_equals_the_original(golden, tmp_path, name):
    description, weights, x = golden(name)
    path = tmp_path / "original.pth"
    indices = {key: torch.zeros(2, 2, dtype=torch.long) for key in description["computed_keys"]}
    torch.save({"model": weights | indices}, path)
    exponent = description["kwargs"].get("qk_scale", -0.25)
    model = timm.create_model(GOLDENS[name], qk_scale_factor=exponent).eval()
    assert type(model).__module__.startswith("models.")
    report = load_checkpoint(model, path)
    assert len(report.ignored) == len(indices)
    assert len(report.loaded) == len(description["keys"]) - len(indices)
    assert count(model) == description["n_params"]
    assert gmacs(model, x) == pytest.approx(description["gmacs"], rel=1e-5)
    reference = torch.tensor(description["logits_f64"], dtype=torch.float64)
    std = description["stats"]["logits_std"]

    def check(model):
        double = copy.deepcopy(model).double()
        for fused in (True, False):
            for one, dtype, tolerance in (
                (model, torch.float32, 1e-5),
                (double, torch.float64, 1e-6),
            ):
                set_fused_attention(one, fused)
                with torch.no_grad():
                    assert (one(x.to(dtype)) - reference).abs().max() < tolerance * std

    check(model)
    if fused := description.get("reparam"):
        check(model.reparameterize())
        assert count(model) == fused["n_params_after_all"]
        assert gmacs(model, x) == pytest.approx(fused["gmacs_after"], rel=1e-5)
        row = torch.tensor(fused["logits_fused_first32_row0"])  # float32
        with torch.no_grad():
            assert (model(x)[0, :32] - row).abs().max() < 1e-5 * std


def test_every_golden_is_looked_at(shared):
    files = {path.stem for path in (shared / "goldens").glob("*.json")}
    elsewhere = {"danczs.det_swin_visformer_small_v2"}
    assert files - elsewhere == set(GOLDENS)
