"""Packed shards: read exactly once; what is wrong is named."""

import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from packing import TRAIN, content, image_folder, pack, run_forked
from torch.utils.data import DataLoader, Dataset

import pipeline.sources.shards
from pipeline.images import CorruptImageError, DataError
from pipeline.sources.shards import open_shards
from samplers import EvalBatchSampler, RASampler
from tools import pack_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed")
    assert pack(folder, output) == 0
    return output


class Numbers(Dataset):
    """Index, class and length of each image, as read from the shards."""

    def __init__(self, shards):
        self.shards = shards

    def __len__(self):
        return len(self.shards)

    def __getitem__(self, index):
        return int(index), int(self.shards.targets[index]), len(self.shards.read(index))


def loaded(dataset, workers, limit=None, **options):
    """Indices that a loader delivers, once what was read with them is proven right."""
    rows = []
    for batch in itertools.islice(DataLoader(dataset, num_workers=workers, **options), limit):
        rows += torch.stack(batch, 1).tolist()
    assert all(dataset.truth[index] == what for index, *what in rows)
    return [index for index, *_ in rows]


@pytest.fixture(scope="module")
def dataset(packed):
    dataset = Numbers(open_shards(packed, True))
    dataset.truth = [list(dataset[index][1:]) for index in range(TRAIN)]
    return dataset


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_each_image_comes_once(dataset, world, workers):
    shards = dataset.shards.shards
    train, evaluation = Counter(), Counter()
    for rank in range(world):
        sampler = RASampler(TRAIN, world, rank, 4, 1, 5, shards, window=2)
        train.update(loaded(dataset, workers, batch_size=4, sampler=sampler))
        batches = EvalBatchSampler(TRAIN, 7, world, rank)
        evaluation.update(loaded(dataset, workers, batch_sampler=batches))
    assert evaluation == Counter(range(TRAIN))
    assert train.keys() == set(range(TRAIN))
    assert train.total() == -(-TRAIN // world) * world  # ranks have equally many


@pytest.mark.parametrize("world", [2, 3])
def test_an_epoch_goes_on_in_its_middle(dataset, world):
    """2 ranks stop after 3 batches; the same or other ranks read what is left, and only that."""

    def samplers(ranks):
        shards = dataset.shards.shards
        for rank in range(ranks):
            sampler = RASampler(TRAIN, ranks, rank, 3, 1, 5, shards, window=2)
            sampler.set_epoch(4)
            yield sampler

    begun = [loaded(dataset, 2, limit=3, batch_size=3, sampler=one) for one in samplers(2)]
    state = next(samplers(2)).state_dict(3)
    rest = []
    for sampler in samplers(world):
        sampler.load_state_dict(pickle.loads(pickle.dumps(state)))
        rest.append(loaded(dataset, 2, batch_size=3, sampler=sampler))
    whole = [[int(draw) for draw in one] for one in samplers(2)]
    everything = Counter(itertools.chain(*whole))
    assert Counter(itertools.chain(*begun, *rest)) == everything
    assert everything.keys() == set(range(TRAIN))
    if world == 2:
        assert [a + b for a, b in zip(begun, rest, strict=True)] == whole


def test_processes_and_threads_have_files_of_their_own(packed, monkeypatch):
    monkeypatch.setattr(pipeline.sources.shards, "OPEN_FILES", 2)
    shards = open_shards(packed, True)
    truth = content(shards)
    before = len(os.listdir("/proc/self/fd"))
    copy = pickle.loads(pickle.dumps(shards))
    assert content(copy) == truth
    assert len(os.listdir("/proc/self/fd")) == before + 2
    with ThreadPoolExecutor(4) as pool:
        order = np.random.default_rng(0).integers(0, TRAIN, 2000).tolist()
        assert list(pool.map(copy.read, order)) == [truth[index][2] for index in order]

    def check():
        os._exit(content(copy) != truth)

    with copy._files._lock:  # held by another thread, as far as the child knows
        assert run_forked(check) == 0


def damage(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_damaged_local_shards_are_noticed(packed, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(packed, output)
    first = output / "train-000000.tar"
    shards = open_shards(output, True)
    damage(first, int(shards._offsets[2]) + 100, b"damage")
    damage(first, int(shards._offsets[3]) - 512, b"\xff" * 512)  # a header is not needed
    with pytest.raises(CorruptImageError) as error:
        shards.read(2)
    assert str(error.value).startswith(f"cannot decode image {shards.name(2)}: its checksum")
    intact = open_shards(packed, True)
    assert all(shards.read(index) == intact.read(index) for index in range(TRAIN) if index != 2)
    size = first.stat().st_size
    os.truncate(first, int(shards._offsets[6]) + 9)
    with pytest.raises(CorruptImageError, match=r"train-000000\.tar/.*has become shorter"):
        shards.read(6)
    text = rf"train-000000\.tar does not match its index: it has [\d,]+ bytes, not {size:,}"
    with pytest.raises(DataError, match=text):
        open_shards(output, True)
    with pytest.raises(DataError, match=text):
        pickle.loads(pickle.dumps(shards)).read(0)
    first.unlink()
    with pytest.raises(DataError, match=r"cannot read shard .*train-000000\.tar: No such file"):
        open_shards(output, True)


# patterns, labels and indices


def test_places(folder, packed, tmp_path):
    every = str(packed / "train-{000000..000005}.tar")
    truth = content(open_shards(packed, True)), content(open_shards(packed, False))
    val = str(packed / "val-{000000..000001}.tar")
    assert content(open_shards(every, True)) == truth[0]
    assert content(open_shards(f"file://{every}", False)) == truth[1]
    assert content(open_shards(val, False)) == truth[1]
    assert content(open_shards(every, False, val_path=val)) == truth[1]
    with pytest.raises(DataError, match=r"differ: only one of them has .*train-000005\.tar"):
        open_shards(str(packed / "train-{000000..000004}.tar"), True)
    with pytest.raises(DataError, match="is a folder of images, not of shards: pack it"):
        open_shards(folder, True)
    with pytest.raises(DataError, match=r"has no train\.json, the index of shards, nor shards"):
        open_shards(tmp_path, True)
    with pytest.raises(DataError, match="names a shard twice"):
        open_shards("a-{1,1}.tar", True)
    with pytest.raises(DataError, match="brace without its other"):
        open_shards("a-{1.tar", True)

    for path in packed.glob("*.tar"):  # without indices
        shutil.copy(path, tmp_path)
    every = every.replace(str(packed), str(tmp_path))
    assert content(open_shards(every, True)) == truth[0]
    assert content(open_shards(every, False)) == truth[1]
    assert open_shards(every, True).classes == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"give the names of its 8 shards as a pattern"):
        open_shards(tmp_path, True)
    with pytest.raises(DataError, match=r"cannot read shard .*train-000006\.tar"):
        open_shards(every.replace("5}", "6}"), True)
    for path in tmp_path.glob("val*"):
        path.unlink()
    with pytest.raises(DataError, match=r"no validation shards beside .*: --val-path says"):
        open_shards(every, False)
    names = tmp_path / "names"
    names.write_text("x\ncat\ndog\n")
    assert pack_dataset.main(["--index", every, "--classes", str(names)]) == 0
    assert open_shards(tmp_path, True).classes == ["x", "cat", "dog"]
    assert content(open_shards(every, True)) == truth[0]
    with pytest.raises(DataError, match=r"val\.json has other classes than .*: __x__"):
        open_shards(every, False, val_path=val)


SOUND = (("a.jpg", b"1"), ("a.cls", b"0"), ("b.c.png", b"2"), ("b.cls", b"1\n"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"three")], "{shard}: label of a is 'three', not the number of a class"),
        ([("a.cls", b"-3")], "{shard}: label of a is '-3', not the number"),
        ([("a.cls", b"")], "{shard}: label of a is '', not the number"),
        ([("d/a.jpg", b"1")], r"{shard}: d/a has no label \(cls\)"),
        ([("d/a.cls", b"1")], "{shard}: d/a has no image"),
        ([("a.jpg", b"1"), ("a.png", b"2")], "{shard}: a has two images"),
        ([*SOUND[:2], ("b.cls", b"1"), *SOUND[:2]], "{shard}: a has two images, or comes twice"),
        ([("a.cls", b"1"), ("a.CLS", b"1")], "{shard}: a has two labels"),
        ([("a.jpg", b"1"), ("a.cls", b"12")], r"{shard}/a\.jpg: its label is 12, but there are 2"),
        ([], "hold no images"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path, members, message):
    shard = tmp_path / "x-0.tar"
    write_tar(shard, members)
    (tmp_path / "train.json").write_text(
        json.dumps(
            {
                "format": "packed shards 1",
                "classes": ["cat", "dog"],
                "members": {"name": "m.npz", "size": 1, "sha256": "0" * 64},
                "shards": [{"name": "s.tar", "size": 1, "sha256": None, "images": 1}],
            }
        )
    )
    with pytest.raises(DataError, match=message.format(shard=shard)):
        open_shards(tmp_path, False, val_path=str(shard))


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_scans_pass_over_what_is_no_image(tmp_path):
    extra = [("a.json", b"{}"), ("__meta__/b.jpg", b"m"), ("plain", b"p"), ("a.txt", b"t")]
    write_tar(tmp_path / "x-0.tar", [SOUND[0], *extra, SOUND[1], ("b.png", b"2"), SOUND[3]])
    shards = open_shards(tmp_path / "x-0.tar", True)
    assert content(shards) == [("a.jpg", 0, b"1"), ("b.png", 1, b"2")]


@pytest.mark.parametrize("cut", ["header", "image", "end", "garbage", "more", "packed", "empty"])
def test_scans_notice_damage(tmp_path, packed, cut):
    path = tmp_path / "x-0.tar"
    data, shards = (packed / "train-000000.tar").read_bytes(), open_shards(packed, True)
    header = int(shards._offsets[4]) - 512
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
    with pytest.raises(DataError, match=r"x-0\.tar is (cut off or damaged at byte|no whole tar)"):
        open_shards(path, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["shards"][0].update(name="../x.tar"), r"'\.\./x\.tar' is no file of its"),
        (lambda i: i["members"].update(name="pipe:touch x"), "'pipe:touch x' is no file of its"),
        (lambda i: i["members"].update(sha256="../../x"), r"'\.\./\.\./x' is no SHA-256"),
        (lambda i: i["members"].update(sha256="0" * 64), r"npz is not the one that .*json was"),
        (lambda i: i["members"].update(size=9), r"npz does not match its index: it has [\d,]+ byt"),
        (lambda i: i["shards"][0].update(size="8"), "has a size that is no number"),
        (lambda i: i["shards"][0].update(size=8), "is damaged: images beyond the shards"),
        (lambda i: i["shards"][0].update(images=9), "is damaged: its parts do not fit"),
        (lambda i: i["shards"].clear(), r"train\.json is no index .*it names no shards"),
        (lambda i: i.update(format="other"), "its format is 'other', not 'packed shards 1'"),
        (lambda i: i.pop("classes"), r"train\.json is no index of shards, or damaged: 'classes'"),
        (lambda i: i["classes"].pop(), "its label is 2, but there are 2 classes, from 0"),
    ],
)
def test_indices_that_lie_are_refused(packed, tmp_path, monkeypatch, change, message):
    output = tmp_path / "out"
    shutil.copytree(packed, output)
    monkeypatch.chdir(output)
    index = json.loads(Path("train.json").read_text())
    change(index)
    Path("train.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=message):
        open_shards("train-{000000..000005}.tar", True)
    assert not Path("x").exists()


def test_an_index_executes_nothing(packed, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(packed, output)
    with np.load(output / "train.npz") as arrays:
        columns = dict(arrays)
    columns["names"] = np.array([print], object)
    np.savez(output / "train.npz", **columns)
    data = (output / "train.npz").read_bytes()
    index = json.loads((output / "train.json").read_text())
    index["members"].update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (output / "train.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"train\.npz is damaged: .*allow_pickle"):
        open_shards(output, True)
