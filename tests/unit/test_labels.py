"""Tables of labels: which are read, how they match images, and what is refused."""

import json
import re
import shutil
from functools import partial

import pytest
from conftest import accuracy_lines, call, succeed
from loading import refused
from PIL import Image

from pipeline.sources.labels import open_labels, sort_classes
from pipeline.sources.shards import open_shards
from pipeline.sources.split import HoldOut
from tools import pack_dataset
from tools.validate import __main__ as validate

FIFTH = HoldOut(0.2)
FEW = ("--num_workers", 0, "--batch-size", 2, "--input-size", 32, "--model", "visformer_tiny")
NAMES = ("a", "b", "c", "d", "e/f")
TABLES = {  # name, and bytes
    "plain.csv": "a.png,x\nb.png,y\nc.png,x\nd.png,y\ne/f.png,x\n",
    "header.csv": "label,file\nx,a.png\ny,b.png\nx,./c.png\ny,d.png\nx,e/f.png\n",
    "other.csv": ",Image Id,Class,width\n0,a,x,5\n1,b,y,5\n2,c,x,5\n3,d,y,5\n4,e/f,x,5\n",
    "semicolon.csv": "filename;target\na.png;x\nb.png;y\nc.png;x\nd.png;y\ne\\f.png;x\n",
    "tabs.TSV": "name\tcategory\na.png\tx\nb.png\ty\nc.png\tx\nd.png\ty\ne/f.png\tx\n",
    "bom.csv": b"\xef\xbb\xbffile,label\r\na,x\r\nb,y\r\nc,x\r\nd,y\r\n\r\ne/f,x",
    "utf16.csv": "file,label\na,x\nb,y\nc,x\nd,y\ne/f,x\n".encode("utf-16"),
    "quoted.csv": '"a.png","x"\n"b.png","y"\n"c.png",x\nd.png,y\n"e/f.png",x\na.png,x\n',
}


def write_labels(root, names, suffix=".png"):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / f"{name}{suffix}")
    return root


def table(folder, text, name="labels.csv"):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    return write_labels(tmp_path_factory.mktemp("loose"), [*NAMES, "z"])


@pytest.mark.parametrize("name", TABLES)
def test_tables(loose, tmp_path, name):
    file = table(tmp_path, TABLES[name], name)
    half = HoldOut(0.5)
    train, val = (open_labels(loose, is_train, file, half) for is_train in (True, False))
    assert train.classes == val.classes == ["x", "y"]
    assert (len(train), len(val)) == (2, 3) or (len(train), len(val)) == (3, 2)
    found = dict(zip(train.names() + val.names(), [*train.targets, *val.targets], strict=True))
    assert found == {"a.png": 0, "b.png": 1, "c.png": 0, "d.png": 1, "e/f.png": 0}
    assert dict(train.left_out.counts) == {"not in the labels": 1}


def test_names_in_quotes_and_absolute_ones(tmp_path):
    data = write_labels(tmp_path / "data", ["a, b", "c;d", "e"])
    file = table(tmp_path, f'"a, b.png","Tench, fish"\n{data}/e,y\n"c;d.png",y\n')
    source = open_labels(data, True, file, whole=True)
    assert source.names() == ["a, b.png", "c;d.png", "e.png"]
    assert source.classes == ["Tench, fish", "y"]


def test_numbers_are_sorted_as_numbers(loose, tmp_path):
    assert sort_classes({"10", "9", "-1", "2"}) == ["-1", "2", "9", "10"]
    assert sort_classes({"1.5", "1", "10"}) == ["1", "1.5", "10"]
    assert sort_classes({"10", "9", "x"}) == ["10", "9", "x"]
    file = table(tmp_path, "a,10\nb,9\nc,9\nd,10\n")
    source = open_labels(loose, True, file, whole=True)
    assert (source.classes, source.targets.tolist()) == (["9", "10"], [1, 0, 0, 1])


FRACTIONS = "".join(f"a,{number / 7}\n" for number in range(1, 30))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("file,label\na,x\nnone.png,y\nmore.png,y\n", ["line 3", "none.png", "2 of 3"]),
        ("id,breed\na,x\n", ["line 1", "id", "DATA.md"]),
        ("a,x\nb,y\na.png,y\n", ["line 1", "line 3", "x", "y"]),
        ("../a.png,x\n", ["line 1", "../a.png"]),
        ("/etc/passwd,x\n", ["line 1", "/etc/passwd"]),
        ("e/../../q,x\n", ["line 1", "e/../../q"]),
        ("a,x\nb,\n", ["line 2"]),
        ("a,x\nb,y,z\n", ["line 2", "3 columns"]),
        ("a,x,y\nb,y,z\n", ["line 1", "label"]),
        ("a\nb\n", ["line 1", "label"]),
        ("a,x;y\nb,x\n", ["line 1", "x;y", "one class"]),
        ("a,x|y\nb,x\n", ["line 1", "x|y", "one class"]),
        ('a,"[1, 2]"\nb,x\n', ["line 1", "[1, 2]", "one class"]),
        (FRACTIONS, ["29", "one class"]),
        ("a,0.5\nb,0.25\n", ["2", "one class"]),
        ("file,label,split\na,x,train\nb,x,odd\n", ["line 3", "odd"]),
        ('a,x\n"b,y\n', ["line"]),
        ("", ["no rows"]),
        ("file,label\n", ["no rows"]),
        (b"\xff\xfea", ["UTF-16"]),
        ("a,x\nb,y\n", ["--val-split", "--k-folds", "2 files"]),
    ],
)
def test_tables_that_do_not_fit_are_named(loose, tmp_path, text, named):
    file = table(tmp_path, text)
    held_out = None if "--val-split" in named else FIFTH
    refused(partial(open_labels, loose, True, file, held_out), file, *named)


def test_a_name_without_suffix_must_be_unique(loose, tmp_path):
    data = shutil.copytree(loose, tmp_path / "data")
    shutil.copy(data / "a.png", data / "a.gif")
    refused(
        partial(open_labels, data, True, table(tmp_path, "a,x\nb,y\n"), FIFTH),
        *("line 1", "a.png", "a.gif"),
    )
    source = open_labels(data, True, table(tmp_path, "a.gif,x\nb,y\n"), whole=True)
    assert source.names() == ["a.gif", "b.png"]


def test_a_table_may_divide_the_images(tmp_path):
    data = write_labels(tmp_path / "data", ["train/a", "train/b", "val/a", "test/c"])
    tables = {
        "paths.csv": "train/a,x\ntrain/b,y\nval/a,x\ntest/c,y\n",
        "column.csv": "file,label,split\ntrain/a,x,Train\ntrain/b,y,training\nval/a,x,val\n"
        "test/c,y,test\n",
    }
    for name, text in tables.items():
        file = table(tmp_path, text, name)
        train, val = (open_labels(data, is_train, file) for is_train in (True, False))
        assert (train.names(), val.names()) == (["train/a.png", "train/b.png"], ["val/a.png"])
        assert train.classes == val.classes == ["x", "y"]
        assert dict(val.left_out.counts) == {"of another split": 1}
        refused(partial(open_labels, data, True, file, FIFTH), file, "0.2")
    file = table(tmp_path, "train/a,x\ntrain/b,y\nval/a,z\n")
    refused(partial(open_labels, data, False, file), "z")


def test_a_run_on_labels(tmp_path):
    names = [f"img/{number:02}" for number in range(12)]
    data = write_labels(tmp_path / "data", [*names, "spare"])
    lines = [f"{name},{number % 2 * 9 + 1}" for number, name in enumerate(names)]
    file = table(tmp_path, "id,label\n" + "\n".join(lines), "labels.csv")
    run = ("--data-path", data, "--labels", file, "--k-folds", 3, "--fold", 1)
    words = (*FEW, "--epochs", 1, "--no-repeated-aug", "--output_dir", tmp_path / "run")
    output = succeed(*run, *words, "--no-model-ema")
    assert "1 not in the labels" in output
    content = json.loads((tmp_path / "run" / "data.json").read_text())
    assert content["labels"] == str(file)
    assert content["splits"]["validation"]["images_per_class"] == {"1": 2, "10": 2}
    assert content["splits"]["train"]["left_out"]["not in the labels"]["count"] == 1
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    found = succeed("--eval", "--resume", checkpoint, "--data-path", data, *FEW[:4])
    assert accuracy_lines(found) == accuracy_lines(output) and "on 4 images" in found
    status, found, errors = call(validate.main, checkpoint, "--data-path", data, "--num_workers", 0)
    assert (status, errors) == (0, "") and re.search(r"\b4 images", found)
    every = tmp_path / "test"
    shutil.copytree(data, every)
    words = (checkpoint, "--data-path", every, "--labels", file, "--num_workers", 0)
    status, found, errors = call(validate.main, *words)
    assert (status, errors) == (0, "") and re.search(r"\b12 images", found)
    packed = ("--output", tmp_path / "out", "--num_workers", 0)
    assert call(pack_dataset.main, *run, *packed)[0] == 0
    assert [len(open_shards(tmp_path / "out", is_train)) for is_train in (True, False)] == [8, 4]
