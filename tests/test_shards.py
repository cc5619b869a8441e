"""Packed shards: written whole, read exactly once, fetched once; what is wrong is named."""

import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tarfile
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import write_images
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import pipeline.shards
from pipeline import fetch
from pipeline.fetch import Cache
from pipeline.images import CorruptImageError, DataError
from pipeline.shards import open_shards
from samplers import EvalBatchSampler, RASampler
from tools import pack_dataset

FORK = multiprocessing.get_context("fork")
TRAIN = 41  # images; an odd number, in 6 shards of up to 8


def pack(folder, output, *flags):
    words = ["--data-path", folder, "--output", output, "--num_workers", 0, "--shard-images", 8]
    return pack_dataset.main([str(word) for word in (*words, *flags)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """41 training and 15 validation images of 3 classes, some with names that need care."""
    root = write_images(tmp_path_factory.mktemp("folder"), 12, 5, ("cat", "dog", "__x__"), 16)
    picture = Image.open(root / "train" / "cat" / "0.jpg")
    for name in ("a.b.jpg", "a_b.jpg", "a_b.PNG", "é 1.webp", "n" * 150 + ".jpg"):
        picture.save(root / "train" / "dog" / name)
    return root


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed")
    assert pack(folder, output) == 0
    return output


def content(shards):
    """Name within its shard, class and bytes of each image."""
    names = [shards.name(index).partition(".tar/")[2] for index in range(len(shards))]
    data = [shards.read(index) for index in range(len(shards))]
    return list(zip(names, shards.targets.tolist(), data, strict=True))


def whole_files(output):
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


# writing


def test_packed_images_are_the_files(folder, packed):
    for split, is_train in (("train", True), ("val", False)):
        shards = open_shards(packed, is_train)
        files = {path.read_bytes(): path for path in (folder / split).rglob("*.*")}
        images = content(shards)
        names = [name for name, _, _ in images]
        assert len(set(names)) == len(images) == len(list((folder / split).rglob("*.*")))
        for name, target, data in images:
            assert files[data].parent.name == shards.classes[target]
            assert name.removeprefix("x").startswith(shards.classes[target] + "/")
            assert name.count(".") == 1
        assert Counter(data for *_, data in images) == Counter(
            path.read_bytes() for path in (folder / split).rglob("*.*")
        )
        assert shards.open(3).size == (16, 16)
    assert shards.classes == ["__x__", "cat", "dog"]
    assert open_shards(packed, True).shards == (8, 8, 8, 8, 8, 1)
    expected = {f"train-{i:06d}.tar" for i in range(6)} | {f"val-{i:06d}.tar" for i in range(2)}
    assert {path.name for path in packed.iterdir()} == expected | {
        f"{split}.{kind}" for split in ("train", "val") for kind in ("json", "npz")
    }


def test_the_webdataset_library_reads_them(packed):
    pattern = str(packed / "train-{000000..000005}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False))
    read = []
    for sample in samples:
        (suffix,) = sample.keys() - {"cls", "__key__", "__url__", "__local_path__"}
        read.append((f"{sample['__key__']}.{suffix}", int(sample["cls"]), sample[suffix]))
    assert read == content(open_shards(packed, True))


def test_processes_and_seed(folder, packed, tmp_path):
    assert pack(folder, tmp_path / "a", "--splits", "val", "--num_workers", 2) == 0
    assert pack(folder, tmp_path / "b", "--splits", "val", "--seed", 1) == 0
    (same, other), reference = (
        map(whole_files, (tmp_path / "a", tmp_path / "b")),
        whole_files(packed),
    )
    assert all(reference[name] == data for name, data in same.items())
    assert same["val-000000.tar"] != other["val-000000.tar"]


def test_shards_of_bytes(folder, tmp_path, packed):
    assert (
        pack_dataset.main(
            ["--data-path", str(folder), "--output", str(tmp_path), "--shard-size", "0.004"]
        )
        == 0
    )
    shards = open_shards(tmp_path, True)
    sizes = np.array([len(shards.read(index)) for index in range(TRAIN)])
    parts = np.split(sizes, np.cumsum(shards.shards)[:-1])
    assert all(part.sum() >= 4000 > part[:-1].sum() for part in parts[:-1])


def test_large_images_are_resized_and_small_ones_kept(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (200, 330, 1), np.uint8)
    noise = Image.fromarray(grey.repeat(3, 2))
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        noise.save(tmp_path / split / "one" / "wide.png")
        noise.rotate(90, expand=True).save(tmp_path / split / "one" / "high.png")
        noise.crop((0, 0, 330, 64)).save(tmp_path / split / "one" / "small.png")
    assert pack(tmp_path, tmp_path / "out", "--short-side", 64, "--quality", 95) == 0
    shards = open_shards(tmp_path / "out", True)
    found = {Path(shards.name(index)).name: shards.open(index) for index in range(3)}
    assert {name: image.size for name, image in found.items()} == {
        "wide.jpg": (105, 64),
        "high.jpg": (64, 105),
        "small.png": (330, 64),
    }
    expected = np.asarray(noise.resize((105, 64), Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(found["wide.jpg"], float) - expected).mean() < 3


def test_corrupt_images_are_named_or_left_out(tmp_path, capsys):
    root = write_images(tmp_path / "folder", 6, 1, size=16)
    bad = root / "train" / "dog" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    assert pack(root, tmp_path / "out") == 1
    assert f"error: cannot decode image {bad}: " in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.json").exists()
    assert pack(root, tmp_path / "out", "--on-corrupt", "skip") == 0
    output = capsys.readouterr()
    assert f"left out: cannot decode image {bad}: " in output.err
    assert "train: 11 images in 2 shards, 1 corrupt ones left out" in output.out
    assert len(open_shards(tmp_path / "out", True)) == 11
    assert str(bad) in json.loads((tmp_path / "out" / "train.json").read_text())["left_out"][0]


def run_forked(function, *args):
    """Run ``function`` in a forked process; returns its exit code."""
    process = FORK.Process(target=function, args=args, daemon=True)
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode


def kill_at(monkeypatch, owner, name, number):
    """Let the process kill itself when it calls a function for the ``number``-th time."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


RENAMES = (
    1,
    2,
    3,
    4,
    17,
    19,
    20,
    22,
    25,
    26,
    27,
    28,
    29,
)  # of the plan, shards, their move, the index


@pytest.mark.parametrize(
    ("owner", "name", "numbers"),
    [(os, "replace", RENAMES), (pack_dataset.TarWriter, "write", (1, 5, 12, 41))],
)
def test_a_killed_packer_goes_on(
    folder, packed, tmp_path, monkeypatch, capfd, owner, name, numbers
):
    reference = {n: data for n, data in whole_files(packed).items() if n.startswith("train")}
    publish = pack_dataset.Split._publish

    def publish_tidily(split, records):
        assert not list(split.partial.glob(".*"))
        publish(split, records)

    monkeypatch.setattr(pack_dataset.Split, "_publish", publish_tidily)
    for number in numbers:
        output = tmp_path / str(number)
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, number)
            status = run_forked(pack, folder, output, "--splits", "train")
        assert status == -signal.SIGKILL, number
        assert not (output / "train.json").exists()
        with pytest.raises(DataError, match=r"has no train\.json"):
            open_shards(output, True)
        for shard in output.glob("*.tar"):
            assert shard.read_bytes() == reference[shard.name]
        assert pack(folder, output, "--splits", "train") == 0
        assert whole_files(output) == reference
        assert [path.name for path in output.iterdir() if path.is_dir()] == []
    assert "going on after 5 shards" in capfd.readouterr().out


def test_shards_are_read_back(folder, tmp_path, monkeypatch, capsys):
    write = pack_dataset.TarWriter.write

    def write_wrongly(writer, sample):
        write(writer, {name: b"1" if name == "cls" else data for name, data in sample.items()})

    monkeypatch.setattr(pack_dataset.TarWriter, "write", write_wrongly)
    assert pack(folder, tmp_path) == 1
    assert "train-000000.tar: the disk does not hold what was written" in capsys.readouterr().err
    assert list(tmp_path.glob("*.tar")) == []


def test_other_shards_are_not_overwritten(folder, packed, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    shutil.copytree(packed, output)
    assert pack(folder, output) == 0
    assert "train.json is whole: nothing to do" in capsys.readouterr().out
    assert pack(folder, output, "--seed", 3) == 1
    assert "packed from other images or with other flags" in capsys.readouterr().err
    (output / "train.json").unlink()
    assert pack(folder, output) == 1
    assert "has shards without an index, as train-000000.tar" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        kill_at(patch, os, "replace", 9)
        run_forked(pack, folder, tmp_path / "new")
    assert pack(folder, tmp_path / "new", "--seed", 3) == 0
    assert "starting over" in capsys.readouterr().out
    assert len(open_shards(tmp_path / "new", True)) == TRAIN


# reading


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
    monkeypatch.setattr(pipeline.shards, "OPEN_FILES", 2)
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


# remote shards


class Server(ThreadingHTTPServer):
    """Serves a folder on the loopback, with the faults it is told of.

    Attributes:
        folder: What is served.
        faults: For each file name, what becomes of the requests for it, in turn: a status,
            ``("cut", N)`` to end the connection after N bytes, ``"drop"`` before any,
            ``"no ranges"``, ``"chunks"`` to end amid the first of unknown number, or a
            function that is called with the handler after half of it.
        requests: File name and ``Range`` of each request.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests = folder, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def count(self, suffix=".tar"):
        return Counter(name for name, _ in self.requests if name.endswith(suffix))


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        wanted = self.headers.get("Range")
        self.server.requests.append((name, wanted))
        fault = next(iter(self.server.faults.get(name, ())), None)
        if fault is not None:
            self.server.faults[name] = self.server.faults[name][1:]
        path = self.server.folder / name
        if fault == "drop":
            return
        if isinstance(fault, int) or not path.exists():
            self.send_error(fault or 404)
            return
        data = path.read_bytes()
        if fault == "chunks":
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.close_connection = True
            self.wfile.write(b"%x\r\n" % len(data) + data[:2000])
            return
        start = int(wanted[6:-1]) if wanted and fault != "no ranges" else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:8]}"')
        self.end_headers()
        if callable(fault):
            self.wfile.write(data[start : len(data) // 2])
            self.wfile.flush()
            return fault(self)
        stop = fault[1] if isinstance(fault, tuple) else len(data)
        self.wfile.write(data[start:stop])


@pytest.fixture
def server(packed, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(packed, tmp_path / "served")
    with Server(tmp_path / "served") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", pause=0.0)


EVERY = "train-{000000..000005}.tar"
FIRST = "train-000000.tar"


def cached(cache):
    return sorted(path.name[33:] for path in cache.folder.glob("*.tar"))


def test_remote_shards_are_local_ones(packed, server, cache, monkeypatch, tmp_path):
    truth = content(open_shards(packed, True)), content(open_shards(packed, False))
    for place in (server.url, f"{server.url}/", f"{server.url}/{EVERY}?token=1"):
        assert content(open_shards(place, True, cache=cache)) == truth[0]
        assert content(open_shards(place, False, cache=cache)) == truth[1]
    assert set(server.count().values()) == {1}
    monkeypatch.setattr(fetch.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    mine = open_shards(f"{server.url}/{EVERY}", False, val_path=str(packed))
    assert content(mine) == truth[1]
    assert content(open_shards(server.url, False)) == truth[1]
    (folder,) = (tmp_path / "temporary").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (server.folder / "val.json").unlink()
    with pytest.raises(DataError, match=r"has no val\.json"):
        open_shards(server.url, False, cache=cache)
    with pytest.raises(DataError, match="no validation shards beside"):
        open_shards(f"{server.url}/{EVERY}", False, cache=cache)
    secret = open_shards(f"{server.url}/{EVERY}?token=1", True, cache=Cache(tmp_path / "other"))
    assert secret.name(0).startswith(f"{server.url}/{FIRST}/")
    (server.folder / FIRST).unlink()
    with pytest.raises(DataError, match=rf"{server.url}/{FIRST}: the server says 404"):
        secret.read(0)


def test_remote_shards_without_an_index(packed, server, cache, tmp_path):
    truth = content(open_shards(packed, True))
    assert pack_dataset.main(["--index", f"{server.url}/{EVERY}"]) == 1  # where to write it
    flags = ["--output", str(tmp_path / "index"), "--shard-cache", str(cache.folder)]
    assert pack_dataset.main(["--index", f"{server.url}/{EVERY}", *flags]) == 0
    index = [(tmp_path / "index" / f"train.{kind}").read_bytes() for kind in ("json", "npz")]
    reference = json.loads((packed / "train.json").read_text())["shards"]
    assert json.loads(index[0])["shards"] == reference
    for path in server.folder.glob("*.json"):
        path.unlink()
    whole = (server.folder / FIRST).read_bytes()
    (server.folder / FIRST).write_bytes(whole[:-2000].rstrip(b"\0"))
    other = Cache(tmp_path / "other", pause=0.0)
    with pytest.raises(DataError, match=r"train-000000\.tar is (cut off|no whole)"):
        open_shards(f"{server.url}/{EVERY}", True, cache=other)
    assert cached(other) == []
    (server.folder / FIRST).write_bytes(whole)
    assert content(open_shards(f"{server.url}/{EVERY}", True, cache=other)) == truth


@pytest.mark.parametrize(
    "faults",
    [
        [("cut", 3000)],
        [("cut", 3000), ("cut", 5000), ("cut", 5001)],
        [("cut", 3000), "no ranges"],
        [500, 503, 429],
        ["drop", ("cut", 0), 500, ("cut", 99), "drop"],
        ["chunks", ("cut", 99)],
    ],
)
def test_transfers_that_break_go_on(packed, server, cache, faults):
    truth = content(open_shards(packed, True))
    server.faults[FIRST] = faults
    server.faults["train.json"] = [500, ("cut", 100)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert content(open_shards(server.url, True, cache=cache)) == truth
    messages = [str(warning.message) for warning in caught if FIRST in str(warning.message)]
    broken = [fault for fault in faults if fault != "no ranges"]
    assert len(messages) == len(broken)
    assert all(f"(try {i} of 6); trying again" in text for i, text in enumerate(messages, 1))
    ranges = [wanted for name, wanted in server.requests if name == FIRST]
    assert len(ranges) == len(broken) + 1
    if faults[0] == ("cut", 3000):
        assert ranges[1] == "bytes=3000-"


def fill_with(byte):
    def change(path):
        path.write_bytes(byte * path.stat().st_size)

    return change


@pytest.mark.parametrize(
    ("change", "faults", "message"),
    [
        (lambda path: os.truncate(path, 4000), [], "does not match its index: it has 4,000 bytes,"),
        (fill_with(b"x"), [], "does not match its index: its SHA-256 is another"),
        (Path.unlink, [], "cannot fetch .*: the server says 404"),
        (None, [401], "cannot fetch .*: the server says 401"),
        (None, [500] * 6, r"the server says 500 .* after 0 bytes \(try 6 of 6\)"),
        (None, [("cut", 7)] + ["drop"] * 5, r"after 7 bytes \(try 6 of 6\)"),
        (None, [("cut", 9)] * 6, "the connection ended before .* after 9 bytes"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*trying again")
def test_shards_that_cannot_be_had_are_named(packed, server, cache, change, faults, message):
    if change:
        change(server.folder / FIRST)
    server.faults[FIRST] = faults
    shards = open_shards(server.url, True, cache=cache)
    assert len(shards.read(8)) > 0
    with pytest.raises(DataError, match=message) as error:
        shards.read(0)
    assert f"{server.url}/{FIRST}" in str(error.value)
    assert not isinstance(error.value, CorruptImageError)  # --on-corrupt skip must not hide it
    assert cached(cache) == ["train-000001.tar"]
    shutil.copy(packed / FIRST, server.folder)
    server.faults.clear()
    assert content(shards) == content(open_shards(packed, True))


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_file_that_changes_under_way_is_not_mixed(packed, server, cache):
    def change(handler):
        fill_with(b"x")(server.folder / FIRST)
        handler.connection.close()

    server.faults[FIRST] = [change, "no ranges"]  # If-Range: the tag is another, so all of it
    with pytest.raises(DataError, match="its SHA-256 is another"):
        open_shards(server.url, True, cache=cache).read(0)
    assert cached(cache) == []


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_server_that_vanishes(server, cache):
    shards = open_shards(server.url, True, cache=cache)
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"Connection refused.* after 0 bytes \(try 6 of 6\)"):
        shards.read(0)


def test_processes_fetch_a_shard_once(packed, server, cache):
    truth = content(open_shards(packed, True))

    def read():
        os._exit(content(open_shards(server.url, True, cache=cache)) != truth)

    processes = [FORK.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(server.count()) == 6 and set(server.count().values()) == {1}
    assert set(server.count(".npz").values()) == {1}


def test_a_killed_fetcher_leaves_nothing_whole(packed, server, cache):
    sent, killed = threading.Event(), threading.Event()

    def stall(handler):
        sent.set()
        killed.wait(60)

    server.faults[FIRST] = [stall]
    shards = open_shards(server.url, True, cache=cache)
    process = FORK.Process(target=shards.read, args=(0,))
    process.start()
    assert sent.wait(60)
    process.kill()
    process.join()
    killed.set()
    assert cached(cache) == []
    assert [path.name[33:] for path in cache.folder.glob("*.part")] == [f"{FIRST}.part"]
    assert content(shards) == content(open_shards(packed, True))
    assert len(cached(cache)) == 6
    assert list(cache.folder.glob("*.part")) == []


def test_commands(packed, cache):
    truth = content(open_shards(packed, True))
    shards = open_shards(f"pipe:cat {packed}/{EVERY}", True, cache=cache)
    assert content(shards) == truth
    with pytest.raises(DataError, match=r"no validation shards beside pipe:cat"):
        open_shards(f"pipe:cat {packed}/{EVERY}", False, cache=cache)
    val = open_shards(
        f"pipe:cat {packed}/{EVERY}", False, f"pipe:cat {packed}/val-{{000000..000001}}.tar", cache
    )
    assert content(val) == content(open_shards(packed, False))
    half = f"pipe:head -c 3000 {packed}/{FIRST}; echo no more >&2; exit 3"
    with pytest.raises(DataError, match=r"ended with status 3: no more"):
        open_shards(half, True, cache=cache)
    with pytest.raises(DataError, match=r"is (cut off|no whole)"):
        open_shards(half.replace("exit 3", "exit 0"), True, cache=cache)
    assert pack_dataset.main(["--index", f"pipe:cat {packed}/{EVERY}"]) == 1


def test_a_bounded_cache_keeps_what_was_used_last(packed, server, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.shards, "OPEN_IN_BOUNDED_CACHE", 1)
    sizes = [(packed / f"train-{i:06d}.tar").stat().st_size for i in range(6)]
    bound = 2 * max(sizes) + (packed / "train.npz").stat().st_size
    cache = Cache(tmp_path / "cache", max_bytes=bound, pause=0.0)
    reader, holder = (open_shards(server.url, True, cache=cache) for _ in range(2))
    holder.read(0)  # and keeps its shard open
    for number in (1, 2, 3, 1):
        reader.read(8 * number)
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= bound
        assert FIRST in cached(cache)
    assert cached(cache) == [FIRST, "train-000001.tar"]
    assert server.count() == {FIRST: 1, **{f"train-00000{i}.tar": 2 - (i > 1) for i in (1, 2, 3)}}
    third = open_shards(server.url, True, cache=cache)
    with pytest.warns(UserWarning, match="more than the bound of .* as all of them are in use"):
        third.read(32)
    assert len(cached(cache)) == 3
    remnant, other = cache.folder / f"{'0' * 32}-x.tar.part", cache.folder / "notes.txt"
    for path in (remnant, other):
        path.write_bytes(b"x" * 1000)
        os.utime(path, (0, 0))
    del holder, third
    reader.read(16)
    assert (remnant.exists(), other.exists()) == (False, True)


def test_what_was_opened_last_stays(server, tmp_path, packed):
    bound = 2 * (packed / FIRST).stat().st_size + 5
    cache, names = (
        Cache(tmp_path / "cache", bound, pause=0.0),
        [f"train-00000{i}.tar" for i in range(3)],
    )
    for number in (0, 1, 0, 2):
        os.close(cache.open(f"{server.url}/{names[number]}"))
    assert cached(cache) == [names[0], names[2]]


def test_a_full_disk_and_a_foreign_folder(server, cache, tmp_path, monkeypatch):
    shards = open_shards(server.url, True, cache=cache)

    def fail(download, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(fetch._Download, "write", fail)
        with pytest.raises(DataError, match=f"cannot keep .* in {cache.folder}: No space left"):
            shards.read(0)
    assert list(cache.folder.glob("*.part")) == []
    monkeypatch.setattr(fetch.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / f"shards-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(DataError, match="belongs to somebody else: name a folder"):
        open_shards(server.url, True)
