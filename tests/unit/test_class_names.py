"""Lists of class names, and names of members of shards made elsewhere."""

import codecs
import shutil
import tarfile
from functools import partial

import pytest
from conftest import error_of
from loading import refused
from validating import random_vit, save

from pipeline.sources.class_names import read_class_names
from pipeline.sources.listing import image_suffixes
from pipeline.sources.shards import open_shards
from tools import pack_dataset, predict

# shards made elsewhere


def write_tar(path, *names):
    (path.parent / "member").write_bytes(b"1")
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(path.parent / "member", name)
    return path


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (["lens 3.5mm.jpg", "lens 3.5mm.cls"], ["lens 3.5mm.jpg", "lens 3_5mm.jpg"]),
        (["a.jpg", "a.cls", "a.5mm.jpg", "a.5mm.cls"], ["a.5mm.jpg", "a_5mm.jpg"]),
        (["d/a.jpg", "d/a.cls", "d/a.v2.CLS"], ["d/a.v2.CLS", "d/a_v2.CLS"]),
        (["a.jpg", "a.cls", "a.png"], [": a "]),
        (["a.jpg", "a.cls", "b.heic", "b.cls"], [": b "]),
    ],
)
def test_names_that_a_shard_would_lose(tmp_path, names, values):
    shard = write_tar(tmp_path / "train-0.tar", *names)
    message = refused(partial(open_shards, shard, True), shard, *values)
    assert "\n" not in message


def test_all_suffixes_of_images_count_in_shards(tmp_path):
    suffixes = sorted(image_suffixes())
    names = [f"{n}{end}" for n, suffix in enumerate(suffixes) for end in (suffix, ".cls")]
    assert len(open_shards(write_tar(tmp_path / "train-0.tar", *names), True)) == len(suffixes)


# class lists


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_class_lists(tmp_path, encoding, end):
    names = ["ant", "bee\x0cwasp", "cat\u2028kitten", "é"]
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    file = tmp_path / "names.txt"
    for tail in ("", end, f"{end}{end} {end}"):
        text = end.join(names) + tail
        file.write_bytes(marks.get(encoding, b"") + text.encode(encoding))
        assert read_class_names(file) == names


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b"ant\n\ncat\n", [" 2 "]),
        (b"ant\ncat\nbee\ncat\n", [" 2 ", " 4 ", "'cat'"]),
        (b"", []),
        (b"\n\n", []),
        (b"\xff", ["UTF-8"]),
        ("ant\nbee\n".encode("utf-16-le"), ["UTF-16"]),  # without its mark
        (codecs.BOM_UTF16_LE + b"a", ["UTF-16"]),
    ],
)
def test_class_lists_that_are_refused(tmp_path, data, values):
    file = tmp_path / "names.txt"
    file.write_bytes(data)
    refused(partial(read_class_names, file), file, *values)
    shard = write_tar(tmp_path / "train-0.tar", "a.jpg", "a.cls")
    assert str(file) in error_of(pack_dataset.main, "--index", shard, "--classes", file)
    checkpoint = save(tmp_path / "two.pth", random_vit(2))
    shutil.copy(shard, tmp_path / "x.jpg")
    words = (tmp_path / "x.jpg", "--checkpoint", checkpoint, "--classes", file)
    assert str(file) in error_of(predict.main, *words)
