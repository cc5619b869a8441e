"""--exif: the EXIF orientation through decoding, both loaders, runs and tools."""

import io
import json
import pickle
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from conftest import call, read_log, succeed
from loading import files, flags, photograph, refused
from packing import pack
from PIL import ExifTags, Image, ImageOps

import datasets
import models
from models import CheckpointError, DataConfig
from models.data_config import data_config_of
from pipeline.fast import EncodedImages
from pipeline.images import decode_image, orientation_of
from pipeline.prefetch import BatchFinalizer
from pipeline.sources.shards import open_shards
from pipeline.sources.subset import share_of
from pipeline.sources.summary import orientation_lines
from samplers import SampleIndex
from tools import convert_checkpoint, predict
from tools.validate import __main__ as validate
from tools.visualize.loading import load_images, load_model

pytestmark = pytest.mark.usefixtures("one_thread")
ORIENTATIONS = range(1, 9)


def tagged(orientation, image, kind="JPEG"):
    """An encoded image with this EXIF orientation."""
    tags, file = Image.Exif(), io.BytesIO()
    tags[ExifTags.Base.Orientation] = orientation
    image.save(file, kind, exif=tags)
    return file.getvalue()


def upright(data):
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pair(folder, count=8):
    """Sources of JPEGs of all orientations, and of PNGs of their pixels after turning."""
    jpegs = [tagged(1 + i % 8, photograph(75, 50, i)) for i in range(count)]
    first = files(folder, {f"{i}.jpg": data for i, data in enumerate(jpegs)})
    second = files(folder, {f"{i}.png": png(upright(data)) for i, data in enumerate(jpegs)})
    second.classes = first.classes
    return first, second


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pixels_are_pillow_s(orientation, kind):
    data = tagged(orientation, photograph(40, 24), kind)
    assert orientation_of(data) == orientation
    for is_upright in (True, False):
        expected = upright(data) if is_upright else Image.open(io.BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(decode_image(data, "x", is_upright), expected)


def test_orientations_that_are_none():
    assert orientation_of(png(photograph(4, 4))) == 1
    assert orientation_of(tagged(9, photograph(4, 4))) == 1
    assert orientation_of(b"\xff\xd8\xff\xe1\0\x10Exif\0\0II") == 0


TRAIN = ["--input-size", 24, "--train-crop-mode", "rrc", "--aa", "", "--reprob", 0]
TRAIN += ["--color-jitter", 0]
WAYS = {
    "evaluation": (False, ["--input-size", 40]),
    "small": (True, ["--input-size", 32]),
    "crops": (True, TRAIN),
    "whole": (True, [*TRAIN, "--train-crop-mode", "rkrc"]),
    "reflected": (True, ["--input-size", 40, "--src"]),
    "decoded on the device": (True, [*TRAIN, "--augment-on", "device", "--decode-on-device"]),
}


@pytest.mark.parametrize("loader", ["fast", "timm"])
@pytest.mark.parametrize("way", WAYS)
def test_loaders_see_upright_images(way, loader, tmp_path):
    is_train, words = WAYS[way]
    if loader == "timm" and "--augment-on" in words:
        return
    found = []
    for source, more in zip(pair(tmp_path), (["--exif"], []), strict=True):
        args = flags("--data-path", tmp_path, "--loader", loader, *words, *more)
        dataset = datasets.augmented(source, is_train, args)
        batch = dataset.__getitems__([SampleIndex(i, epoch) for i in range(8) for epoch in (0, 1)])
        if loader == "fast":
            if isinstance(batch.pixels, EncodedImages):  # those that need not be turned
                assert batch.pixels.crops[:, 0].nonzero().flatten().tolist() == [0, 1]
            batch = BatchFinalizer(dataset, torch.device("cpu"))(batch)
        found.append(batch.images)
    limit = 0.2 if way == "decoded on the device" else 0  # resized in float there
    assert (found[0] - found[1]).abs().max() <= limit


def test_sources_keep_it(tmp_path):
    source, _ = pair(tmp_path)
    turned = source.decoded_as(True)
    assert (source.is_upright, turned.is_upright) == (False, True)
    assert turned.open(5).size == (50, 75) and source.open(5).size == (75, 50)
    for copied in (share_of(turned, 0.5), pickle.loads(pickle.dumps(turned))):
        assert copied.open(5).size == (50, 75)


def test_the_notice_counts_turned_images(tmp_path):
    source, others = pair(tmp_path, 16)
    (line,) = orientation_lines(source, others)
    assert "14 of 32" in line and "--exif" in line
    assert orientation_lines(source.decoded_as(True), others) == []
    (tmp_path / "3.jpg").write_bytes(b"")
    (tmp_path / "4.jpg").unlink()
    (line,) = orientation_lines(source, others)
    assert "12 of 30" in line


def test_weights_know_theirs(tmp_path):
    turned = DataConfig(exif=True)
    assert turned.record() == DataConfig().record() | {"exif": True}
    assert "exif" not in turned.to_timm() and str(turned) != str(DataConfig())
    assert data_config_of({"data_config": turned.record()}, None, "x") == turned
    wrong = {"data_config": {"exif": "yes"}}
    refused(lambda: data_config_of(wrong, None, "x.pth"), "x.pth", "exif", kind=CheckpointError)
    for words, own, exif in (
        ([], True, True),
        (["--exif"], False, True),
        (["--no-exif"], True, False),
    ):
        told = []
        own = DataConfig(exif=own)
        found = datasets.choose_images(flags(*words), own, "x.pth", told.append)
        assert found.exif == exif and len(told) == len(words)
        assert all(word in told[0] for word in words)
    assert datasets.choose_images(flags("--exif")).exif and not datasets.choose_images(flags()).exif


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Image folders: JPEGs of all orientations, and the same images, upright, as PNGs."""
    root = tmp_path_factory.mktemp("turned")
    for split, count in (("train", 8), ("val", 8)):
        for number, name in enumerate(("cat", "dog")):
            for i in range(count):
                data = tagged(1 + i, photograph(60, 40, 100 * number + i))
                for kind, content in (("jpg", data), ("png", png(upright(data)))):
                    path = root / kind / split / name / f"{i}.{kind}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
    return root


RUN = ["--model", "test_vit", "--num_workers", 0, "--device", "cpu", "--batch-size", 4]
RUN += ["--epochs", 1, "--warmup-epochs", 0, "--input-size", 32, "--train-crop-mode", "rrc"]


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    root, printed = tmp_path_factory.mktemp("runs"), {}
    for kind, more in (("jpg", ["--exif"]), ("png", [])):
        words = ["--data-path", folders / kind, *more, "--output_dir", root / kind]
        printed[kind] = succeed(*RUN, *words)
    return root, printed


def test_a_run_is_that_of_upright_images(runs, folders):
    root, printed = runs
    logs = [read_log(root / kind)[-1] for kind in ("jpg", "png")]
    lines = [[log["train_loss"], log["test_loss"]] for log in logs]
    assert lines[0] == lines[1]
    assert "notice" not in printed["jpg"]
    path = root / "jpg" / "checkpoint.pth"
    data = ["--num_workers", 0, "--device", "cpu", "--batch-size", 4, "--data-path"]
    loss = f"loss {lines[0][1]:.3f}"
    found = succeed("--eval", "--resume", path, *data, folders / "jpg")
    assert loss in found and "warning" not in found and "notice" not in found
    found = succeed("--eval", "--resume", path, *data, folders / "jpg", "--no-exif")
    assert "--no-exif" in found and "14 of 16" in found


def table(program, path, *words):
    status, printed, errors = call(program, *words, "--device", "cpu", "--csv", path)
    assert (status, errors) == (0, ""), errors
    return path.read_text().splitlines(), printed


def test_tools_turn_as_the_weights_do(runs, folders, tmp_path):
    path, csv = runs[0] / "jpg" / "checkpoint.pth", tmp_path / "t.csv"
    rows = []
    for kind in ("jpg", "png"):
        words = [folders / kind / "val" / "cat", "--checkpoint", path]
        rows.append([line.split(",")[1:] for line in table(predict.main, csv, *words)[0]])
    assert rows[0] == rows[1]
    words = [folders / "jpg" / "val" / "cat", "--checkpoint", path, "--no-exif"]
    lines, printed = table(predict.main, csv, *words)
    assert [line.split(",")[1:] for line in lines] != rows[0] and "7 of 8" in printed
    scores = []
    for kind in ("jpg", "png"):
        words = [path, "--data-path", folders / kind, "--num_workers", 0, "--weights", "model"]
        head, line = (row.split(",") for row in table(validate.main, csv, *words)[0])
        row = dict(zip(head, line, strict=True))
        scores.append([value for key, value in row.items() if "rate" not in key])
    assert scores[0] == scores[1]
    args = dict.fromkeys(("model", "input_size", "device", "exif"))
    args = Namespace(**args, pretrained=False, weights="model", seed=0)
    seen = load_images(load_model(str(path), args), [folders / "jpg" / "val" / "cat" / "5.jpg"])
    other = load_images(load_model(str(path), args), [folders / "png" / "val" / "cat" / "5.png"])
    assert torch.equal(seen, other)


def test_folders_of_the_hub(runs, tmp_path):
    folder, words = tmp_path / "hub", [runs[0] / "jpg" / "checkpoint.pth", tmp_path / "hub"]
    status, *_ = call(convert_checkpoint.main, *words, "--to", "hub")
    assert status == 0 and json.loads((folder / "config.json").read_text())["exif"] is True
    assert models.find_model(f"local-dir:{folder}").data_config.exif
    timm.create_model(f"local-dir:{folder}", pretrained=True)
    again = tmp_path / "again.pth"
    status, *_ = call(convert_checkpoint.main, f"local-dir:{folder}", again)
    assert status == 0 and models.find_model(str(again)).data_config.exif


def test_packing(folders, tmp_path):
    for name, words in (("turned", ["--exif"]), ("stored", [])):
        assert pack(folders / "jpg", tmp_path / name, "--short-side", 20, *words) == 0
        shards = open_shards(tmp_path / name, False)
        plan = json.loads((tmp_path / name / "val.json").read_text())["plan"]
        assert plan.get("exif", False) == (name == "turned")
        for index in range(len(shards)):
            number = 1 + int(shards.name(index).rpartition("/")[2].removesuffix(".jpg"))
            data = shards.read(index)
            is_tall = name == "turned" and number >= 5
            assert Image.open(io.BytesIO(data)).size == ((20, 30) if is_tall else (30, 20))
            assert orientation_of(data) == 1
    assert pack(folders / "jpg", tmp_path / "same", "--exif") == 0
    shards = open_shards(tmp_path / "same", False)
    assert sorted(orientation_of(shards.read(i)) for i in range(16)) == sorted([*ORIENTATIONS] * 2)
