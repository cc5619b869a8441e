"""Models by torch.hub: entrypoints, weights, and other packages called models."""

import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT, clean_env
from exporting import CLASSES, VIT, save

import hubconf
import models


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Lists of the hub's entrypoints, as if this repository had come from GitHub."""
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *args, **kwargs: str(ROOT))
    monkeypatch.chdir(tmp_path)
    return torch.hub


def test_hub_has_every_model(hub):
    names = hub.list("someone/visformer")
    module = {n: timm.models.model_entrypoint(n).__module__ for n in timm.list_models()}
    assert names == sorted(n for n, m in module.items() if m.startswith("models."))
    text = hub.help("someone/visformer", "visformer_tiny")
    assert "10.3 M" in text.splitlines()[0]
    assert all(f"{name}: " in text for name in ("pretrained", "checkpoint", "kwargs"))


def test_hub_loads_models_and_weights(hub, tmp_path):
    source = save(tmp_path / "in.pth", "vit_b_32_224", VIT, (32, 32))
    with torch.device("meta"):
        model = hub.load(str(ROOT), "visformer_tiny", source="local", num_classes=3)
    assert type(model) is models.visformer.Visformer
    assert model.head.out_features == 3
    model = hub.load(str(ROOT), "vit_b_32_224", source="local", checkpoint=tmp_path / "in.pth")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), source(x))


def test_arguments_of_entrypoints(tmp_path):
    path = tmp_path / "in.pth"
    save(path, "vit_b_32_224", VIT, (32, 32))
    with pytest.raises(TypeError, match="drop_path_ratee"):
        hubconf.visformer_tiny(drop_path_ratee=0.1)
    for other in ("pretrained", "features_only"):
        with pytest.raises(ValueError, match=f"{path}.* {other}=True"):
            hubconf.vit_b_32_224(checkpoint=path, **{other: True})
    with torch.device("meta"):  # shapes need no weights
        backbone = hubconf.visformer_tiny(features_only=True)
        assert [len(m[0]) for m in backbone(torch.zeros(1, 3, 64, 64))] == [96, 192, 384]
        with pytest.raises(models.CheckpointError, match=f"^{path} "):
            hubconf.visformer_tiny(checkpoint=path)


@pytest.mark.slow
def test_hub_leaves_other_packages_called_models_alone(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "visformer.py").write_text("OTHER = True\n")
    save(tmp_path / "in.pth", "vit_b_32_224", VIT, (32, 32))
    code = f"""
import models, models.visformer, sys, torch
mine = dict(sys.modules)
model = torch.hub.load({str(ROOT)!r}, "vit_b_32_224", source="local", checkpoint="in.pth")
assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, {len(CLASSES)})
assert sys.modules["models"] is models and sys.modules["models.visformer"].OTHER
assert not [name for name in sys.modules if name.startswith("models.") and name not in mine]
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=clean_env(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
