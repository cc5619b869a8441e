"""Checkpoint files: read safely, loaded strictly, written whole or not at all."""

import argparse
import os
import pickle
import resource
import signal
import threading
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from models import CheckpointError, load_checkpoint, normalization_of, read_checkpoint
from training import checkpoints, files, run_state


def tiny(**kwargs):
    return timm.create_model("visformer_tiny", **{"img_size": 32, "num_classes": 3} | kwargs)


def original_layout(state):
    """timm's keys -> the original's, which wraps every BatchNorm."""
    norms = {key.rsplit(".", 1)[0] for key in state if key.endswith("running_mean")}
    return {
        f"{norm}.bn.{last}" if (norm := key.rpartition(".")[0]) in norms else key: value
        for key, value in state.items()
        for last in [key.rpartition(".")[2]]
    }


@pytest.mark.parametrize(
    "form", ["ours", "flat", "ddp", "original", "safetensors", "legacy", "timm"]
)
def test_layouts(tmp_path, form):
    source, target = tiny().eval(), tiny().eval()
    state = source.state_dict()
    path = tmp_path / "weights.bin"  # the name says nothing
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    elif form == "flat":
        torch.save(state, path)
    elif form == "ddp":
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path)
    elif form == "timm":
        torch.save({"state_dict": state}, path)
    elif form == "ours":
        torch.save({"model": state, "epoch": 3}, path)
    else:
        content = {"model": original_layout(state), "args": argparse.Namespace(lr=1.0)}
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    report = load_checkpoint(target, path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(source(x), target(x))
    renamed = {"original", "legacy"} & {form}
    assert bool(report.renamed) == bool(renamed)
    assert f"{len(state)} tensors loaded" in str(report)


def test_position_embeddings_are_resampled(tmp_path):
    path = tmp_path / "large.pth"
    torch.save(tiny(img_size=64).state_dict(), path)
    report = load_checkpoint(tiny(), path)
    assert report.resampled == ("pos_embed1", "pos_embed2", "pos_embed3")


def test_any_timm_model_loads_its_own(tmp_path):
    source = timm.create_model("test_vit", num_classes=3)
    path = tmp_path / "vit.pth"
    torch.save({"model": source.state_dict()}, path)
    target = timm.create_model("test_vit", num_classes=3)
    load_checkpoint(target, path)
    assert torch.equal(source.head.weight, target.head.weight)


def test_moving_average_is_chosen(tmp_path):
    raw, average = tiny(), tiny()
    path = tmp_path / "both.pth"
    torch.save({"model": raw.state_dict(), "model_ema": average.state_dict()}, path)
    model = tiny()
    load_checkpoint(model, path, ema=True)
    assert torch.equal(model.head.weight, average.head.weight)
    torch.save({"model": raw.state_dict(), "model_ema": None}, path)
    with pytest.raises(CheckpointError, match="no weights under 'model_ema'"):
        load_checkpoint(model, path, ema=True)


def test_another_model_s_weights_are_refused_and_change_nothing(tmp_path):
    path = tmp_path / "other.pth"
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = tiny(num_classes=5).state_dict()
    state["extra.weight"] = state.pop("norm.weight")
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    message = str(caught.value)
    assert "1 missing: norm.weight" in message
    assert "1 not in the model: extra.weight" in message
    assert "2 of another shape: head.weight ((5, 384) for (3, 384)), head.bias" in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def good_file(tmp_path):
    path = tmp_path / "good.pth"
    torch.save({"model": {"a": torch.arange(1000.0)}}, path)
    return path.read_bytes()


def bad_contents(tmp_path):
    trap = Trap(tmp_path / "sprung")
    good = good_file(tmp_path)
    torch.save({"model": trap}, tmp_path / "trap.pth")
    torch.save({"model": trap}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    header = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
    return {
        "trap": ((tmp_path / "trap.pth").read_bytes(), "refused: it asks for posix.system"),
        "old trap": ((tmp_path / "old.pth").read_bytes(), "refused: it asks for posix.system"),
        "bare trap": (pickle.dumps({"model": trap}), "not a checkpoint"),
        "cut": (good[: len(good) // 2], "damaged or cut short"),
        "cut at the end": (good[:-1], "damaged or cut short"),
        "text": (b"no checkpoint at all " * 40, "not a checkpoint"),
        "empty": (b"", "is empty"),
        "list": ((tmp_path / "list.pth").read_bytes(), "holds a list"),
        "no weights": ((tmp_path / "none.pth").read_bytes(), "no weights under"),
        "cut safetensors": (len(header).to_bytes(8, "little") + header, "damaged or cut short"),
        "lying safetensors": ((1 << 40).to_bytes(8, "little") + header, "damaged or cut short"),
    }


BAD = ["trap", "old trap", "bare trap", "cut", "cut at the end", "text", "empty", "list"]
BAD += ["no weights", "cut safetensors", "lying safetensors"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_and_nothing_runs(tmp_path, kind):
    content, message = bad_contents(tmp_path)[kind]
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tiny(), path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_missing_file_is_named():
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint /none.pth: No such file"):
        read_checkpoint("/none.pth")


@pytest.fixture
def server(tmp_path):
    """A web server of ``tmp_path / 'web'``."""
    (tmp_path / "web").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield tmp_path / "web", f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_addresses_are_fetched_and_their_hash_checked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder, address = server
    content = good_file(tmp_path)
    good, bad = f"net-{sha256(content).hexdigest()[:8]}.pth", "net-0123abcd.pth"
    for name in (good, bad):
        (folder / name).write_bytes(content)
    assert read_checkpoint(f"{address}/{good}")["model"]["a"].shape == (1000,)
    (folder / good).unlink()
    assert read_checkpoint(f"{address}/{good}")  # from the cache
    with pytest.raises(CheckpointError, match="invalid hash value"):
        read_checkpoint(f"{address}/{bad}")
    with pytest.raises(CheckpointError, match=r"cannot download.*404"):
        read_checkpoint(f"{address}/none.pth")


def test_damaged_copy_of_an_address_is_fetched_again(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder, address = server
    content = good_file(tmp_path)
    name = f"net-{sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    copy = tmp_path / "home" / "hub" / "checkpoints" / name
    read_checkpoint(f"{address}/{name}")
    damaged = content[:500] + bytes([content[500] ^ 1]) + content[501:]
    copy.write_bytes(damaged)
    read_checkpoint(f"{address}/{name}")
    assert copy.read_bytes() == content
    copy.write_bytes(damaged)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"cannot download.*404"):
        read_checkpoint(f"{address}/{name}")


@pytest.mark.parametrize("path", ["", "/", "/.."])
def test_addresses_must_name_a_file(path):
    with pytest.raises(CheckpointError, match="it names no file"):
        read_checkpoint(f"http://127.0.0.1:1{path}")


def test_checkpoints_hold_plain_values_only(tmp_path):
    path = tmp_path / "state.pth"
    state = {"a": (1, [np.float64(2.5)]), "b": {"c": tmp_path}, "d": None, "e": torch.ones(2)}
    checkpoints.save_checkpoint(state, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["a"] == (1, [2.5])
    assert type(loaded["a"][1][0]) is float
    assert loaded["b"] == {"c": str(tmp_path)}
    with pytest.raises(TypeError, match="cannot hold a Namespace"):
        checkpoints.save_checkpoint({"args": argparse.Namespace()}, path)
    assert torch.load(path, weights_only=True)["d"] is None


def test_failed_write_keeps_the_previous_file(tmp_path):
    path = tmp_path / "state.pth"
    checkpoints.save_checkpoint({"a": torch.zeros(3)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(files.OutputError, match=f"cannot write {path}: File too large"):
            checkpoints.save_checkpoint({"a": torch.zeros(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert torch.load(path, weights_only=True)["a"].shape == (3,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pth"]


def test_optimizer_of_other_shapes_is_refused():
    def optimizer(width):
        layer = torch.nn.Linear(width, 2)
        built = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(1, width)).sum().backward()
        built.step()
        return built

    run_state.restore_optimizer(optimizer(3), optimizer(3).state_dict(), "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth: the optimizer's exp_avg of shape \(2, 4\)"):
        run_state.restore_optimizer(optimizer(3), optimizer(4).state_dict(), "x.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        run_state.restore_optimizer(optimizer(3), {"state": {}, "param_groups": []}, "x.pth")


@pytest.mark.parametrize(
    ("content", "is_imagenets"),
    [
        ({"args": {"lr": 1.0}, "model_name": "vit"}, True),  # of this repository
        ({"args": argparse.Namespace(lr=1.0)}, True),  # of DeiT
        ({"mindspore": {"head.weight": torch.zeros(2)}}, True),  # of MindCV
        ({"args": argparse.Namespace(lr=1.0), "arch": "vit"}, False),  # of timm
        ({"state_dict": {}}, False),
        ({}, False),
    ],
)
def test_images_that_weights_were_trained_on(content, is_imagenets):
    own = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    found = normalization_of(content, {"mean": list(own[0]), "std": list(own[1])})
    assert found == (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if is_imagenets else own)
