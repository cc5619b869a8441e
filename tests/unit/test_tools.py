"""The command-line tools, each as a user runs it."""

import json

import pytest
import safetensors
import safetensors.torch
import timm
import torch

import models
from tools import convert_checkpoint


def test_convert_checkpoint(tmp_path, capsys):
    source = timm.create_model("visformer_tiny", num_classes=3, qk_scale_factor=-0.5)
    average = timm.create_model("visformer_tiny", num_classes=3)
    original = {k.replace("norm.", "norm.bn."): v for k, v in average.state_dict().items()}
    content = {"model": source.state_dict(), "model_ema": original}
    torch.save(content, tmp_path / "in.pth")
    run = [str(tmp_path / "in.pth")]
    ours = tmp_path / "ours.safetensors"
    flags = ["--model", "visformer_tiny", "--ema", "--qk-scale-factor", "-0.5"]
    assert convert_checkpoint.main([*run, str(ours), *flags]) == 0
    assert "renamed" in capsys.readouterr().out
    with safetensors.safe_open(ours, "pt") as file:
        metadata = file.metadata()
    assert metadata["model_name"] == "visformer_tiny"
    assert json.loads(metadata["model_kwargs"])["qk_scale_factor"] == -0.5
    loaded = timm.create_model("visformer_tiny", num_classes=3)
    models.load_checkpoint(loaded, ours)
    assert loaded.qk_scale_factor == -0.5
    assert torch.equal(loaded.head.weight, average.head.weight)

    plain = tmp_path / "timm.safetensors"
    assert convert_checkpoint.main([str(ours), str(plain), "--to", "timm"]) == 0
    assert safetensors.torch.load_file(plain).keys() == average.state_dict().keys()
    theirs = timm.models.visformer.visformer_tiny(num_classes=3)
    theirs.load_state_dict(safetensors.torch.load_file(plain))
    back = tmp_path / "back.pth"
    assert convert_checkpoint.main([str(plain), str(back), "--model", "visformer_tiny"]) == 0
    assert torch.load(back, weights_only=True)["model_name"] == "visformer_tiny"


def test_what_a_run_says_of_its_images_is_kept(tmp_path, capsys):
    source = timm.create_model("visformer_tiny", num_classes=2, img_size=32)
    content = {"model": source.state_dict(), "model_name": "visformer_tiny"}
    content |= {"model_kwargs": {"num_classes": 2, "img_size": 32}, "classes": ["cat", "dog"]}
    content |= {"input_size": 48, "args": {"eval_crop_ratio": 0.9, "lr": 1.0}}
    torch.save(content, tmp_path / "in.pth")
    for suffix in ("pth", "safetensors"):
        out = tmp_path / f"out.{suffix}"
        assert convert_checkpoint.main([str(tmp_path / "in.pth"), str(out)]) == 0
        found = models.read_checkpoint(out)
        assert models.class_names(found, str(out)) == ["cat", "dog"]
        assert (found["input_size"], found["args"]) == (48, {"eval_crop_ratio": 0.9})
        assert models.flags_of_run(found) is not None
    foreign = tmp_path / "foreign.safetensors"  # whose header may say anything
    safetensors.torch.save_file(source.state_dict(), foreign, metadata={"classes": "cat, dog"})
    with pytest.raises(models.CheckpointError, match="classes must be a list of names"):
        models.class_names(models.read_checkpoint(foreign), str(foreign))


def test_convert_for_detection(tmp_path, capsys):
    source = timm.create_model("swin_visformer_tiny_v2", num_classes=3, qk_scale_factor=-0.5)
    path = tmp_path / "classifier.pth"
    torch.save({"model": source.state_dict(), "qk_scale_factor": -0.5}, path)
    for name in ("detector.pth", "detector.safetensors"):
        words = [str(path), str(tmp_path / name), "--model", "swin_visformer_tiny_v2"]
        assert convert_checkpoint.main([*words, "--to", "detection"]) == 0
        assert "missing: norm0, norm1" in capsys.readouterr().out
        init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / name)}
        backbone = models.VisionBackbone("swin_visformer_tiny_v2", init_cfg=init_cfg)
        report = backbone.init_weights()
        assert {key.split(".")[0] for key in report.missing} == {"norm0", "norm1", "norm2", "norm3"}
        assert report.unexpected == ()
        assert backbone.qk_scale_factor == -0.5
        own = source.state_dict()
        assert all(
            torch.equal(value, own[key.removeprefix("net.")])
            for key, value in backbone.state_dict().items()
            if key.startswith("net.")
        )
    keys = torch.load(tmp_path / "detector.pth", weights_only=True)["state_dict"]
    assert all(key.startswith("backbone.net.") for key in keys)


def test_convert_checkpoint_says_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "in.pth"
    torch.save({"model": timm.create_model("test_vit").state_dict()}, path)
    for words, message in (
        ([tmp_path / "none.pth", tmp_path / "out.pth"], "cannot read checkpoint"),
        ([path, tmp_path / "out.pth"], "give --model NAME"),
        ([path, tmp_path / "out.txt", "--model", "test_vit"], "must end in .safetensors or .pth"),
        ([path, tmp_path / "out.pth", "--model", "visformer_tiny"], "does not fit the model"),
        ([path, tmp_path / "out.pth", "--model", "visformer_tinyy"], "the nearest are"),
    ):
        assert convert_checkpoint.main([str(word) for word in words]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
