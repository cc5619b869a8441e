"""Checkpoint files: read safely, loaded strictly, written whole or not at all."""

import argparse
import errno
import io
import os
import re
import stat
import threading
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from loading import refused
from saving import fail, numbers, run, state, temporaries, warnings_of

from models import CheckpointError, UnreadableFileError, load_checkpoint, read_checkpoint
from models.data_config import data_config_of
from models.visformer import Stage, Visformer
from training import checkpoints, optimizers
from training.files import OutputError

STAGES = (Stage(1, 8, 4, spatial_groups=2), Stage(1, 16, num_heads=2), Stage(1, 32, num_heads=2))


def tiny(img_size=32, num_classes=3):
    return Visformer(STAGES, 8, img_size=img_size, num_classes=num_classes)


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
    assert len(report.loaded) == len(state)
    assert f"{path}: {len(state)} " in str(report)


def test_any_timm_model_loads_its_own(tmp_path):
    source = timm.create_model("test_vit", num_classes=3)
    path = tmp_path / "vit.pth"
    computed = "blocks.0.attn.relative_position_index"
    torch.save({"model": source.state_dict() | {computed: torch.zeros(2)}}, path)
    target = timm.create_model("test_vit", num_classes=3)
    assert load_checkpoint(target, path).ignored == (computed,)
    assert torch.equal(source.head.weight, target.head.weight)


def test_moving_average_is_chosen(tmp_path):
    raw, average = tiny(), tiny()
    path = tmp_path / "both.pth"
    torch.save({"model": raw.state_dict(), "model_ema": average.state_dict()}, path)
    model = tiny()
    load_checkpoint(model, path, ema=True)
    assert torch.equal(model.head.weight, average.head.weight)
    torch.save({"model": raw.state_dict(), "model_ema": None}, path)
    with pytest.raises(CheckpointError, match=f"^{path} .*'model_ema'"):
        load_checkpoint(model, path, ema=True)


def test_another_model_s_weights_are_refused_and_change_nothing(tmp_path):
    path = tmp_path / "other.pth"
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = tiny(num_classes=5).state_dict()
    state["extra.weight"] = state.pop("norm.weight")
    torch.save({"model": state}, path)
    named = ("norm.weight", "extra.weight", "head.weight ((5, 32) for (3, 32))", "head.bias")
    refused(partial(load_checkpoint, model, path), path, *named, kind=CheckpointError)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def good_file():
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.arange(1000.0)}}, buffer)
    return buffer.getvalue()


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


def test_addresses_are_fetched_once_and_verified(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder, address = server
    content = good_file()
    good, bad = f"net-{sha256(content).hexdigest()[:8]}.pth", "net-0123abcd.pth"
    for name in (good, bad):
        (folder / name).write_bytes(content)
    assert read_checkpoint(f"{address}/{good}")["model"]["a"].shape == (1000,)
    copy = tmp_path / "home" / "hub" / "checkpoints" / good
    damaged = content[:500] + bytes([content[500] ^ 1]) + content[501:]
    copy.write_bytes(damaged)
    read_checkpoint(f"{address}/{good}")  # fetched again
    assert copy.read_bytes() == content
    (folder / good).unlink()
    assert read_checkpoint(f"{address}/{good}")  # from the cache
    copy.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=f"{address}/{good}.*404"):
        read_checkpoint(f"{address}/{good}")
    with pytest.raises(CheckpointError, match=f"{address}/{bad}.*0123abcd"):
        read_checkpoint(f"{address}/{bad}")


def test_addresses_of_one_name_are_two_files(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder, address = server
    for number in (1, 2):
        (folder / str(number)).mkdir()
        torch.save({"model": {"a": torch.full((3,), number)}}, folder / str(number) / "best.pth")
    for number in (1, 2, 1):
        found = read_checkpoint(f"{address}/{number}/best.pth")
        assert found["model"]["a"].tolist() == [number] * 3


def test_addresses_must_name_a_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for path in ("", "/", "/.."):  # a server may answer
        with pytest.raises(CheckpointError, match=f"{server[1]}{path}:"):
            read_checkpoint(f"{server[1]}{path}")
    assert not (tmp_path / "home").exists()


def test_checkpoints_hold_plain_values_only(tmp_path):
    path = tmp_path / "state.pth"
    state = {"a": (1, [np.float64(2.5)]), "b": {"c": tmp_path}, "d": None, "e": torch.ones(2)}
    checkpoints.save_checkpoint(state, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["a"] == (1, [2.5])
    assert type(loaded["a"][1][0]) is float
    assert loaded["b"] == {"c": str(tmp_path)}
    with pytest.raises(TypeError, match="Namespace"):
        checkpoints.save_checkpoint({"args": argparse.Namespace()}, path)
    assert torch.load(path, weights_only=True)["d"] is None


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_scalars_become_python_numbers(tmp_path, zipped):
    path, copy = tmp_path / "timm.pth", tmp_path / "copy.pth"
    scalars = [np.float64(81.5), np.float32(0.1), np.float16(-2), np.complex64(1 + 2j)]
    scalars += [np.complex128(3j), np.bool_(True), np.bool_(False), np.bool_(True), np.float64(3)]
    scalars += [np.dtype(name).type(7) for name in np.typecodes["AllInteger"]]
    scalars += [np.int64(-(2**63)), np.uint64(2**64 - 1), np.int8(-1)]
    content = {"state_dict": {}, "metric": scalars[0], "scalars": scalars * 2}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = read_checkpoint(path)
    wanted = [scalar.item() for scalar in scalars] * 2
    assert loaded["scalars"] == wanted and loaded["metric"] == 81.5
    assert [*map(type, loaded["scalars"])] == [*map(type, wanted)]
    loaded["scalars"] = [value for value in wanted if not isinstance(value, complex)]
    checkpoints.save_checkpoint(loaded, copy)
    assert torch.load(copy, weights_only=True) == loaded


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("flags", [b"\x89\x88", b"K\x00K\x01"])
@pytest.mark.parametrize(("order", "number"), [("<", 0x102), (">", 0x02010000)])
def test_numpy_scalars_of_other_versions_and_machines(tmp_path, core, flags, order, number):
    buffer, value = io.BytesIO(), np.int32(0x102)
    torch.save({"epoch": value}, buffer, _use_new_zipfile_serialization=False)
    data, name = buffer.getvalue(), value.__reduce__()[0].__module__.encode()
    for own, other in (
        (b"c" + name, f"cnumpy.{core}.multiarray".encode()),
        (b"\x89\x88", flags),
        (b"X\1\0\0\0<", b"X\1\0\0\0" + order.encode()),
    ):
        assert own in data
        data = data.replace(own, other)
    (tmp_path / "old.pth").write_bytes(data)
    assert read_checkpoint(tmp_path / "old.pth")["epoch"] == number


def test_numpy_s_own_scalars_where_the_caller_allows_them(tmp_path):
    path, value = tmp_path / "any.pth", np.float64(2.5)
    torch.save({"dtype": value.dtype, "metric": value}, path)
    with torch.serialization.safe_globals([np.dtype, type(value.dtype), value.__reduce__()[0]]):
        loaded = read_checkpoint(path)
    assert (type(loaded["metric"]), loaded["dtype"]) == (np.float64, value.dtype)
    assert loaded["metric"] == value


def test_optimizer_of_other_shapes_is_refused():
    def optimizer(width):
        layer = torch.nn.Linear(width, 2)
        built = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(1, width)).sum().backward()
        built.step()
        return built

    optimizers.restore(optimizer(3), optimizer(3).state_dict(), "x.pth")
    with pytest.raises(CheckpointError, match=r"^x.pth.* exp_avg .*\(2, 4\)"):
        optimizers.restore(optimizer(3), optimizer(4).state_dict(), "x.pth")
    with pytest.raises(CheckpointError, match=r"^x.pth"):
        optimizers.restore(optimizer(3), {"state": {}, "param_groups": []}, "x.pth")


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
    found = data_config_of(content, {"mean": list(own[0]), "std": list(own[1])}, "x.pth")
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert (found.mean, found.std) == (imagenet if is_imagenets else own)


# --- damage ---------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


UNREADABLE = (errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


def fail_with(error, *_):
    raise error


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "folder": replace_by_folder,
}


def save_three(folder):
    for number in range(3):
        best = [folder / "best.pth"] if number == 0 else []
        keep = folder / "previous.pth"
        checkpoints.save_checkpoint(state(number), folder / "checkpoint.pth", also=best, keep=keep)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage):
    save_three(tmp_path)
    newest = tmp_path / "checkpoint.pth"
    damage(newest)
    for set_aside in (False, True):
        path, content = checkpoints.find_checkpoint(tmp_path, set_aside)
        assert (path.name, content["number"]) == ("previous.pth", 1)
        assert warnings_of(capsys.readouterr().out, newest)
        assert newest.exists() is not set_aside
    assert (tmp_path / "checkpoint.pth.damaged").exists()
    run(tmp_path, 3)
    assert numbers(tmp_path) == {"checkpoint.pth": 3, "previous.pth": 1, "best.pth": 0}


def test_damaged_ones_are_never_deleted(tmp_path):
    save_three(tmp_path)
    for path in tmp_path.glob("*.pth"):
        flip(path)
    names = {"checkpoint.pth.damaged", "previous.pth.damaged", "best.pth.damaged"}
    for _ in range(2):  # nor is the run ever started from its beginning
        with pytest.raises(CheckpointError, match=f"{tmp_path}.*checkpoint.pth.damaged"):
            checkpoints.find_checkpoint(tmp_path, set_aside=True)
        assert {path.name for path in tmp_path.iterdir()} == names
    first = (tmp_path / "checkpoint.pth.damaged").read_bytes()
    checkpoints.save_checkpoint(state(7), tmp_path / "previous.pth")
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    path, _ = checkpoints.find_checkpoint(tmp_path, set_aside=True)
    assert path.name == "previous.pth"
    assert (tmp_path / "checkpoint.pth.damaged").read_bytes() == first
    assert (tmp_path / "checkpoint.pth.damaged1").read_bytes() == b"damaged"


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in UNREADABLE),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=str,
)
def test_what_cannot_be_read_now_is_not_damaged(error, tmp_path, monkeypatch):
    save_three(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("models.checkpoint.read.verify_archive", partial(fail_with, error))
    with pytest.raises(UnreadableFileError, match=f"{tmp_path}/checkpoint.pth"):
        checkpoints.find_checkpoint(tmp_path, set_aside=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_file_that_lost_its_end_on_the_disk_is_not_used(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoints.save_checkpoint(state(0), path)
    monkeypatch.setattr(os, "fsync", lambda file: os.ftruncate(file, 600))
    with pytest.raises(OutputError, match=re.escape(str(path))):
        checkpoints.save_checkpoint(state(1), path, also=[tmp_path / "best.pth"])
    assert numbers(tmp_path) == {"checkpoint.pth": 0}
    assert not temporaries(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch, links):
    calls, fsync, replace = [], os.fsync, os.replace

    def name_of(file):
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        return re.sub(r"-\w+\.tmp", "", name)

    save_three(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append(f"sync {name_of(f)}"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"name {b.name}"), replace(a, b)))
    if not links:
        monkeypatch.setattr(os, "link", partial(fail, errno.EPERM))
    best, previous = tmp_path / "best.pth", tmp_path / "previous.pth"
    checkpoints.save_checkpoint(state(3), tmp_path / "checkpoint.pth", also=[best], keep=previous)
    assert numbers(tmp_path) == {"checkpoint.pth": 3, "previous.pth": 2, "best.pth": 3}
    names = ["name best.pth", "name previous.pth", "name checkpoint.pth"]
    if not links:  # each copy is on the disk before it gets its name
        names = ["sync .best.pth", names[0], "sync .previous.pth", *names[1:]]
    assert calls == ["sync .checkpoint.pth", *names, f"sync {tmp_path.name}"]


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def sync_files(file):
        return fail(errno.EINVAL) if stat.S_ISDIR(os.fstat(file).st_mode) else fsync(file)

    monkeypatch.setattr(os, "fsync", sync_files)
    checkpoints.save_checkpoint(state(0), tmp_path / "checkpoint.pth")
    assert numbers(tmp_path) == {"checkpoint.pth": 0}
