"""Packed shards: read as they were written; errors name what is wrong."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from loading import refused
from packing import TRAIN, content, run_forked

import pipeline.sources.shards
from pipeline.images import CorruptImageError
from pipeline.sources.shards import open_shards
from tools import pack_dataset

FIRST = "train-000000.tar"
EVERY = "train-{000000..000005}.tar"


@pytest.fixture
def copied(packed, tmp_path):
    """A copy of the shards, to be damaged."""
    return shutil.copytree(packed, tmp_path / "out")


def test_copies_threads_and_forked_processes_read_the_same(packed, monkeypatch):
    monkeypatch.setattr(pipeline.sources.shards, "OPEN_FILES", 2)
    shards = open_shards(packed, True)
    truth = content(shards)
    before = len(os.listdir("/proc/self/fd"))
    copy = pickle.loads(pickle.dumps(shards))
    assert content(copy) == truth
    assert len(os.listdir("/proc/self/fd")) == before + 2
    with ThreadPoolExecutor(4) as pool:
        order = np.random.default_rng(0).integers(0, TRAIN, 1000).tolist()
        found = pool.map(copy.read, order)
        # forked while the other threads read, so that one may be at any point of it
        assert run_forked(lambda: os._exit(content(copy) != truth)) == 0
        assert list(found) == [truth[index][2] for index in order]


def damage(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_damaged_local_shards_are_noticed(packed, copied):
    first, size = copied / FIRST, (copied / FIRST).stat().st_size
    with np.load(copied / "train.npz") as columns:
        offsets = columns["offsets"].tolist()
    shards, intact = open_shards(copied, True), open_shards(packed, True)
    damage(first, offsets[2] + 100, b"damage")
    damage(first, offsets[3] - 512, b"\xff" * 512)  # a header is not needed
    refused(partial(shards.read, 2), shards.name(2), kind=CorruptImageError)
    assert all(shards.read(index) == intact.read(index) for index in range(TRAIN) if index != 2)
    os.truncate(first, offsets[6] + 9)
    refused(partial(shards.read, 6), shards.name(6), kind=CorruptImageError)
    values = [first, f"{offsets[6] + 9:,}", f"{size:,}"]
    refused(partial(open_shards, copied, True), *values)
    refused(lambda: pickle.loads(pickle.dumps(shards)).read(0), *values)
    first.unlink()
    refused(partial(open_shards, copied, True), first, os.strerror(2))


# patterns, labels and indices


def test_places_with_an_index(to_pack, packed, tmp_path):
    every, val = str(packed / EVERY), str(packed / "val-{000000..000001}.tar")
    truth = content(open_shards(packed, True)), content(open_shards(packed, False))
    assert content(open_shards(every, True)) == truth[0]
    assert content(open_shards(f"file://{every}", False)) == truth[1]
    assert content(open_shards(val, False)) == truth[1]
    assert content(open_shards(every, False, val_path=val)) == truth[1]
    fewer = str(packed / "train-{000000..000004}.tar")
    refused(partial(open_shards, fewer, True), packed / "train.json", fewer, "train-000005.tar")
    refused(partial(open_shards, to_pack, True), to_pack, "tools.pack_dataset", "--data-set")
    refused(partial(open_shards, tmp_path, True), tmp_path, "train.json")
    for pattern in ("a-{1,1}.tar", "a-{1.tar"):
        refused(partial(open_shards, pattern, True), pattern)


def test_places_without_an_index(packed, tmp_path):
    truth = content(open_shards(packed, True)), content(open_shards(packed, False))
    for path in packed.glob("*.tar"):
        shutil.copy(path, tmp_path)
    every = str(tmp_path / EVERY)
    assert content(open_shards(every, True)) == truth[0]
    assert content(open_shards(every, False)) == truth[1]
    assert open_shards(every, True).classes == ["0", "1", "2"]
    refused(partial(open_shards, tmp_path, True), tmp_path, "train.json", "8 shards", "--index")
    more = every.replace("5}", "6}")
    refused(partial(open_shards, more, True), tmp_path / "train-000006.tar")
    for path in tmp_path.glob("val*"):
        path.unlink()
    refused(partial(open_shards, every, False), every, "--val-path")
    names = tmp_path / "names"
    names.write_text("x\ncat\ndog\n")
    assert pack_dataset.main(["--index", every, "--classes", str(names)]) == 0
    assert open_shards(tmp_path, True).classes == ["x", "cat", "dog"]
    assert content(open_shards(every, True)) == truth[0]
    refused(partial(open_shards, every, False, str(packed)), packed / "val.json", "__x__")


SOUND = (("a.jpg", b"1"), ("a.cls", b"0"), ("b.c.png", b"2"), ("b.cls", b"1\n"))


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("members", "values"),
    [
        ([("a.cls", b"three")], [": label of a ", "'three'"]),
        ([("a.cls", b"-3")], [": label of a ", "'-3'"]),
        ([("a.cls", b"")], [": label of a ", "''"]),
        ([("d/a.jpg", b"1")], [": d/a ", "(cls)"]),
        ([("d/a.cls", b"1")], [": d/a "]),
        ([("a.jpg", b"1"), ("a.png", b"2")], [": a ", "images"]),
        ([*SOUND[:2], ("b.cls", b"1"), *SOUND[:2]], [": a ", "images"]),
        ([("a.cls", b"1"), ("a.CLS", b"1")], [": a ", "labels"]),
        ([("a.jpg", b"1"), ("a.cls", b"12")], ["/a.jpg: ", "12", "2 classes"]),
        ([], []),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path, members, values):
    shard = write_tar(tmp_path / "x-0.tar", members)
    index = {"format": "packed shards 1", "classes": ["cat", "dog"]}
    index["members"] = {"name": "m.npz", "size": 1, "sha256": "0" * 64}
    index["shards"] = [{"name": "s.tar", "size": 2048, "sha256": None, "images": 1}]
    (tmp_path / "train.json").write_text(json.dumps(index))
    message = refused(partial(open_shards, tmp_path, False, val_path=str(shard)), *values)
    assert message.startswith(str(shard))


def test_scans_pass_over_what_is_no_image(tmp_path):
    extra = [("a.json", b"{}"), ("__meta__/b.jpg", b"m"), ("plain", b"p"), ("a.txt", b"t")]
    members = [SOUND[0], *extra, SOUND[1], ("b.png", b"2"), SOUND[3]]
    shards = open_shards(write_tar(tmp_path / "x-0.tar", members), True)
    assert content(shards) == [("a.jpg", 0, b"1"), ("b.png", 1, b"2")]


@pytest.mark.parametrize("cut", ["header", "image", "end", "garbage", "more", "packed", "empty"])
def test_scans_notice_damage(tmp_path, packed, cut):
    path, data = tmp_path / "x-0.tar", (packed / FIRST).read_bytes()
    with np.load(packed / "train.npz") as columns:
        header = int(columns["offsets"][4]) - 512
    stop = len(data.rstrip(b"\0"))
    path.write_bytes(
        {
            "header": data[: header + 100],
            "image": data[: header + 700],
            "end": data[: stop + -stop % 512],
            "garbage": data[:header] + b"\xff" * 512 + data[header + 512 :],
            "more": data + data,
            "packed": b"\x1f\x8b" + data,
            "empty": b"",
        }[cut]
    )
    refused(partial(open_shards, path, True), path)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (lambda i: i["shards"][0].update(name="../x.tar"), ["train.json", "'../x.tar'"]),
        (lambda i: i["members"].update(name="pipe:touch x"), ["train.json", "'pipe:touch x'"]),
        (lambda i: i["members"].update(sha256="../../x"), ["train.json", "'../../x'"]),
        (lambda i: i["members"].update(sha256="0" * 64), ["train.npz", "train.json"]),
        (lambda i: i["members"].update(size=9), ["train.npz", " 9"]),
        (lambda i: i["shards"][0].update(size="8"), ["train.json", "'size': '8'"]),
        (lambda i: i["shards"][0].update(size=os.truncate(FIRST, 8) or 8), [FIRST]),
        (lambda i: i["shards"][0].update(images=9), [FIRST]),
        (lambda i: i["shards"].clear(), ["train.json"]),
        (lambda i: i.update(format="other"), ["train.json", "'other'", "'packed shards 1'"]),
        (lambda i: i.pop("classes"), ["train.json", "'classes'"]),
        (lambda i: i["classes"].pop(), ["label is 2", "2 classes"]),
    ],
)
def test_indices_that_lie_are_refused(copied, monkeypatch, change, values):
    monkeypatch.chdir(copied)
    index = json.loads(Path("train.json").read_text())
    change(index)
    Path("train.json").write_text(json.dumps(index))
    refused(partial(open_shards, EVERY, True), *values)
    assert not Path("x").exists()


def test_an_index_executes_nothing(copied):
    with np.load(copied / "train.npz") as arrays:
        columns = dict(arrays)
    columns["names"] = np.array([print], object)
    np.savez(copied / "train.npz", **columns)
    data = (copied / "train.npz").read_bytes()
    index = json.loads((copied / "train.json").read_text())
    index["members"].update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (copied / "train.json").write_text(json.dumps(index))
    refused(partial(open_shards, copied, True), copied / "train.npz", "allow_pickle")
