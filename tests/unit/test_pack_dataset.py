"""tools.pack_dataset: images as shards, written whole; what is wrong is named."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import write_images
from packing import TRAIN, content, image_folder, kill_at, pack, run_forked, whole_files
from PIL import Image

from pipeline.images import DataError
from pipeline.sources.shards import open_shards
from tools import pack_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed")
    assert pack(folder, output) == 0
    return output


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
