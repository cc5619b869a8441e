"""tools.pack_dataset: images as shards, written whole; errors name what is wrong."""

import json
import os
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import write_images
from loading import refused
from packing import TRAIN, content, files_of, kill_at, pack, run_forked
from PIL import Image

from pipeline.sources.shards import open_shards
from tools import pack_dataset


def test_packed_images_are_the_files(to_pack, packed):
    for split, is_train in (("train", True), ("val", False)):
        shards, paths = open_shards(packed, is_train), list((to_pack / split).rglob("*.*"))
        files, images = {path.read_bytes(): path for path in paths}, content(shards)
        assert len({name for name, _, _ in images}) == len(images) == len(paths)
        for name, target, data in images:
            assert files[data].parent.name == shards.classes[target]
            assert name.removeprefix("x").startswith(shards.classes[target] + "/")
            assert name.count(".") == 1
        assert Counter(data for *_, data in images) == Counter(p.read_bytes() for p in paths)
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


def test_processes_and_seed(to_pack, packed, tmp_path):
    assert pack(to_pack, tmp_path / "a", "--splits", "val", "--num_workers", 2) == 0
    assert pack(to_pack, tmp_path / "b", "--splits", "val", "--seed", 1) == 0
    same, other, reference = map(files_of, (tmp_path / "a", tmp_path / "b", packed))
    assert same == {name: data for name, data in reference.items() if name.startswith("val")}
    assert same["val-000000.tar"] != other["val-000000.tar"]


def test_shards_of_bytes(to_pack, tmp_path):
    words = ["--data-path", to_pack, "--output", tmp_path, "--num_workers", 0]
    words += ["--splits", "train", "--shard-size", 0.004]
    assert pack_dataset.main([str(word) for word in words]) == 0
    shards = open_shards(tmp_path, True)
    sizes = np.array([len(shards.read(index)) for index in range(TRAIN)])
    parts = np.split(sizes, np.cumsum(shards.shards)[:-1])
    assert len(parts) > 2
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
    assert str(bad) in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.json").exists()
    assert pack(root, tmp_path / "out", "--on-corrupt", "skip") == 0
    output = capsys.readouterr()
    assert str(bad) in output.err and {"11", "1"} <= {*output.out.split()}
    assert len(open_shards(tmp_path / "out", True)) == 11
    (left_out,) = json.loads((tmp_path / "out" / "train.json").read_text())["left_out"]
    assert str(bad) in left_out


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder whose 18 training images make 3 shards of 8, and the files of these."""
    root = write_images(tmp_path_factory.mktemp("small"), 9, 1, size=8)
    assert pack(root, root / "out", "--splits", "train") == 0
    return root, files_of(root / "out")


# when the packer is killed, and how many of the 18 images are written again. Renames: of the plan
# (1), of tar, npz and json of each shard (2 to 10), of the shards to their places (11 to 13), of
# the index (14, 15) and to its place (16, 17).
RENAMES = [(1, 18), (2, 18), (3, 18), (4, 18), (7, 10), (10, 2)]
RENAMES += [(number, 0) for number in (12, 15, 16, 17)]
IMAGES = [(1, 18), (5, 18), (12, 10), (18, 2)]


@pytest.mark.parametrize(
    ("owner", "name", "number", "again"),
    [(os, "replace", *row) for row in RENAMES]
    + [(pack_dataset.TarWriter, "write", *row) for row in IMAGES],
)
def test_a_killed_packer_resumes(small, tmp_path, monkeypatch, owner, name, number, again):
    root, reference = small
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, number)
        assert run_forked(pack, root, tmp_path, "--splits", "train") == -signal.SIGKILL
    assert not (tmp_path / "train.json").exists()
    refused(partial(open_shards, tmp_path, True), tmp_path, "train.json")
    assert files_of(tmp_path).items() <= reference.items()
    calls, write = [], pack_dataset.TarWriter.write
    monkeypatch.setattr(pack_dataset.TarWriter, "write", lambda *a: calls.append(write(*a)))
    assert pack(root, tmp_path, "--splits", "train") == 0
    assert files_of(tmp_path) == reference
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert len(calls) == again


def test_shards_are_read_back(small, tmp_path, monkeypatch, capsys):
    write = pack_dataset.TarWriter.write

    def write_wrongly(writer, sample):
        write(writer, {name: b"1" if name == "cls" else data for name, data in sample.items()})

    monkeypatch.setattr(pack_dataset.TarWriter, "write", write_wrongly)
    assert pack(small[0], tmp_path) == 1
    assert "train-000000.tar" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.tar*")) == []


def test_other_shards_are_not_overwritten(small, tmp_path, monkeypatch, capsys):
    root, output = small[0], tmp_path / "out"
    shutil.copytree(root / "out", output)
    flags = ("--splits", "train")
    before = files_of(output)
    assert pack(root, output, *flags) == 0
    assert "train.json" in capsys.readouterr().out
    assert pack(root, output, *flags, "--seed", 3) == 1
    assert str(output / "train.json") in capsys.readouterr().err
    assert files_of(output) == before
    (output / "train.json").unlink()
    assert pack(root, output, *flags) == 1
    errors = capsys.readouterr().err
    assert str(output) in errors and "train-000000.tar" in errors
    with monkeypatch.context() as patch:
        kill_at(patch, os, "replace", 12)  # one shard is in its place already
        run_forked(pack, root, tmp_path / "new", *flags)
    assert pack(root, tmp_path / "new", *flags, "--seed", 3) == 0
    assert files_of(tmp_path / "new").keys() == before.keys()
    assert files_of(tmp_path / "new")["train-000000.tar"] != before["train-000000.tar"]


def test_the_output_is_checked_before_images_are_listed(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert pack(tmp_path / "none", tmp_path / "file") == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert pack(tmp_path / "none", tmp_path / "new") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
