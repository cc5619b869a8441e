"""Datasets of Hugging Face's library, which is named like our module ``datasets``."""

import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_images
from loading import refused
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import datasets
from pipeline.images import CorruptImageError
from pipeline.sources.hf_datasets import _targets, open_hub

# pyarrow comes with the library; here the name of the library itself means our module
HAS_LIBRARY = importlib.util.find_spec("pyarrow") is not None and any(
    Path(folder, "datasets", "load.py").is_file() for folder in sys.path
)


def library(test):
    """Mark a test that asks the library, a program of seconds."""
    needs = pytest.mark.skipif(not HAS_LIBRARY, reason="needs Hugging Face's datasets")
    return pytest.mark.slow(needs(test))


FAKE = """
import os, sys
print("noise on the output")
def load_dataset(name, **options):
    facts = [name, options["cache_dir"], os.environ.get("HF_DATASETS_OFFLINE"), __file__]
    raise ValueError("|".join(map(str, facts)))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package called as the library, the first that another process finds."""
    (tmp_path / "site" / "datasets").mkdir(parents=True)
    (tmp_path / "site" / "datasets" / "__init__.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path / 'site'}")
    return tmp_path / "site" / "datasets" / "__init__.py"


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, number, number)).save(file, "PNG")
    return file.getvalue()


def write_parquet(folder, images=None, labels=(0, 1, 2, 0, 1), names="abc", split="train"):
    """A split of PNG images 0, 1, ...: as the library writes it, or plain if there are no names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if images is None:
        images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": list(labels)})
    if names:
        label = {"names": list(names), "_type": "ClassLabel"}
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / f"{split}.parquet", row_group_size=2)
    return folder


def pixel(source, index):
    return np.asarray(source.open(index))[0, 0, 0]


@pytest.mark.parametrize("folder", [ROOT, "/"])
def test_another_process_finds_the_package_and_not_our_module(fake, monkeypatch, capfd, folder):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    here, data = str(fake.parent), fake.parent.parent
    refused(partial(open_hub, "a/b", None, True, True), f"a/b|None|None|{fake}")
    refused(partial(open_hub, here, data, True, False), f"{here}|{data}|1|{fake}")
    message = refused(partial(open_hub, "a/b", "cache", True, False), f"a/b|cache|1|{fake}")
    assert "--download" in message
    assert capfd.readouterr().out == ""  # what the package prints goes to the other stream
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    message = refused(partial(open_hub, "a/b", None, True, True), f"a/b|None|1|{fake}")
    assert "--download" not in message
    assert sys.modules["datasets"] is datasets and datasets.__file__ == str(ROOT / "datasets.py")


def test_package_that_ends_the_process(fake):
    fake.write_text("import os; os._exit(3)")
    refused(partial(open_hub, "x", None, True, False), "hfds/x", "status 3")


@pytest.mark.parametrize("data_folder", [False, True])
def test_without_the_library(tmp_path, monkeypatch, data_folder):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no installed packages
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    if data_folder:
        (tmp_path / "datasets").mkdir()  # could be imported, as a package without a file
    refused(partial(open_hub, "x", None, True, False), "hfds/x", "pip install datasets")


@library
def test_parquet(tmp_path):
    folder = write_parquet(tmp_path / "set")
    write_parquet(folder, labels=(2, 1), split="validation")
    write_parquet(folder, labels=(0,), split="test")  # of the Hub's, many have no labels
    for is_train, targets in ((True, [0, 1, 2, 0, 1]), (False, [2, 1])):
        source = open_hub(str(folder), tmp_path / "cache", is_train, False)
        assert source.classes == ["a", "b", "c"]
        assert (source.targets.dtype, source.targets.tolist()) == (np.int64, targets)
        assert [source.read(i) for i in range(len(source))] == [png(i) for i in range(len(targets))]
    assert source.name(1) == f"hfds/{folder} validation[1] (1.png)"
    assert pixel(source, 1) == 1


@library
def test_images_in_folders_are_not_copied(tmp_path):
    root = write_images(tmp_path / "set")
    source = open_hub(str(root), tmp_path / "cache", False, False)
    assert source.classes == ["cat", "dog"]
    assert source.targets.tolist() == [0] * 3 + [1] * 3
    path = root / "val" / "dog" / "0.jpg"
    assert source.read(3) == path.read_bytes()
    assert source.name(3) == f"hfds/{root} validation[3] ({path})"
    path.unlink()
    refused(partial(source.read, 3), path, kind=CorruptImageError)


@library
def test_arrow_files_of_many_batches(tmp_path):
    import pyarrow as pa

    (tmp_path / "set").mkdir()
    kind, rows = pa.struct({"bytes": pa.binary(), "path": pa.string()}), iter(range(99))
    schema = pa.schema({"image": kind, "label": pa.int32()})
    for name in ("train-0", "train-1"):
        path = str(tmp_path / "set" / f"{name}.arrow")
        with pa.OSFile(path, "w") as file, pa.ipc.new_stream(file, schema) as stream:
            for size in (3, 1, 0, 4):
                labels = list(itertools.islice(rows, size))
                images = [{"bytes": png(label), "path": None} for label in labels]
                arrays = [pa.array(images, kind), pa.array(labels, pa.int32())]
                stream.write_batch(pa.record_batch(arrays, schema=schema))
    source = open_hub(str(tmp_path / "set"), tmp_path / "cache", True, False)
    assert source.targets.tolist() == list(range(16))
    assert [pixel(source, i) for i in range(16)] == list(range(16))
    assert source.name(9) == f"hfds/{tmp_path / 'set'} train[9]"
    assert source.classes == [str(i) for i in range(16)]


@library
@pytest.mark.parametrize("kind", ["bytes", "path", "none"])
def test_plain_columns(tmp_path, kind):
    """Without the library's own types, and without names of classes."""
    (tmp_path / "7.png").write_bytes(png(7))
    image = {"bytes": png(7), "path": str(tmp_path / "7.png"), "none": None}[kind]
    images = [image] * 3 if image else [{"bytes": None, "path": None}] * 3
    folder = write_parquet(tmp_path / "set", images, (0, 2, 0), names=None)
    write_parquet(folder, images, (-1, 4, 1), names=None, split="test")
    source = open_hub(str(folder), tmp_path / "cache", True, False)
    assert source.classes == ["0", "1", "2", "3", "4"]  # of both splits
    if image:
        assert pixel(source, 1) == 7
    else:
        refused(partial(source.open, 1), "train[1]: ", kind=CorruptImageError)
    refused(partial(open_hub, str(folder), tmp_path / "cache", False, False), "test", "row 0")


@library
def test_what_is_missing_is_named_with_what_is_there(tmp_path):
    folder = write_parquet(tmp_path / "set")

    def wrong(*values, is_train=True, **keys):
        call = partial(open_hub, str(folder), tmp_path / "cache", is_train, False, **keys)
        return refused(call, f"hfds/{folder}", *values)

    columns = ("image (struct<", "label (int64)")
    wrong(" img;", *columns, image_key="img")
    wrong(" fine;", *columns, label_key="fine")
    wrong(" label ", "int64", image_key="label")
    wrong(" image ", *columns, label_key="image")
    wrong("validation, val, test", "train", is_train=False)
    write_parquet(folder, labels="xyz", names=None)
    wrong(" label ", "string", columns[0])
    write_parquet(folder, labels=(0, None), names=None)
    wrong("row 1")
    (folder / "train.parquet").write_bytes(b"PAR1 and no more")
    assert "--download" not in wrong()
    call = partial(open_hub, "no/where", tmp_path / "cache", True, False)
    refused(call, "hfds/no/where", "--download")


@library
def test_prepared_files_that_go_are_named(tmp_path):
    source = open_hub(str(write_parquet(tmp_path / "set")), tmp_path / "cache", True, False)
    copy = pickle.dumps(source)
    (file,) = (tmp_path / "cache").rglob("*.arrow")
    file.write_bytes(b"")
    refused(partial(pickle.loads, copy), file)
    file.unlink()
    refused(partial(pickle.loads, copy), file)


@library
def test_prepared_dataset_of_the_hub_needs_no_network(tmp_path):
    folder, cache = write_parquet(tmp_path / "set"), tmp_path / "cache"
    open_hub(str(folder), cache, True, False)
    (cache / "set").rename(cache / "user___set")  # as the library keeps what it fetched
    (prepared,) = (cache / "user___set" / "default" / "0.0.0").glob("*/")
    prepared.rename(prepared.with_name("0123456789" * 4))
    shutil.rmtree(folder)
    source = open_hub("user/set", cache, True, False)
    assert source.classes == ["a", "b", "c"]
    assert [pixel(source, i) for i in range(5)] == list(range(5))


class Reads(Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        assert Path(datasets.__file__).parent == ROOT
        return [self.source.read(index), int(self.source.targets[index])]


@library
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_loaders_however_started(tmp_path, method):
    source = open_hub(str(write_parquet(tmp_path / "set")), tmp_path / "cache", True, False)
    assert len(pickle.dumps(source)) < 2000
    loader = DataLoader(
        Reads(source), batch_size=None, num_workers=2, multiprocessing_context=method
    )
    assert list(loader) == [[png(i), target] for i, target in enumerate([0, 1, 2, 0, 1])]


@pytest.mark.parametrize("values", [[0.5, 1.0], [[0, 1], [2]]])
def test_columns_of_other_tasks_are_refused(values):
    table = pytest.importorskip("pyarrow").table({"label": values})
    refused(partial(_targets, table, "label", "set"), "label", "one class")
