"""The pixels of an image are the same in training's evaluation, in every tool and in timm."""

import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, call, succeed
from exporting import VIT, export, session_of
from loading import eval_feed, flags
from PIL import Image
from sources import photograph, timms_transform, transform_of
from torchvision.datasets import ImageFolder
from validating import read

import datasets
import models
from models import DataConfig
from tools import cli, predict
from tools.export.__main__ import get_parser
from tools.export.source import load_source
from tools.validate import __main__ as validate
from tools.validate.eval_models import eval_models

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FILES = {  # models of every family, in files that say nothing of images, and of a small run
    "visformer_tiny": {},
    "swin_visformer_tiny_v2": {},
    "convit_tiny": {"model_kwargs": {"depth": 2, "local_up_to_layer": 1}},
    "fastvit_t8": {},
    "vit_b_32_224": {"model_kwargs": {**VIT, "img_size": 224}},
    "vit_b_16_224": {
        "model_kwargs": {**VIT, "num_classes": 1000},
        "input_size": 32,
        "args": {"eval_crop_ratio": 0.875},
    },
    "test_vit": {"data_config": DataConfig((96, 96), "lanczos", crop_mode="border").to_timm()},
}
HALF = (0.5, 0.5, 0.5)
CONFIGS = {  # what these models expect
    "visformer_tiny": DataConfig(crop_pct=0.9),
    "swin_visformer_tiny_v2": DataConfig(crop_pct=0.9),
    "convit_tiny": DataConfig(),
    "fastvit_t8": DataConfig((256, 256), crop_pct=0.9),
    "vit_b_32_224": DataConfig(mean=HALF, std=HALF, crop_pct=0.9),
    "vit_b_16_224": DataConfig((32, 32), crop_pct=1.0, crop_mode="squash"),
    "test_vit": DataConfig((96, 96), "lanczos", crop_mode="border"),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of images, one wide, one high, and one without any scale."""
    root = tmp_path_factory.mktemp("photographs")
    for name, size in (("a", (301, 180)), ("b", (120, 211)), ("c", (32, 32))):
        (root / "val" / name).mkdir(parents=True)
        photograph(root / "val" / name / "0.png", size)
    return root


@pytest.fixture(params=FILES)
def file(request, tmp_path):
    """A checkpoint with random weights, its images, and timm's transform for the loaded model."""
    name, more = request.param, FILES[request.param]
    model = timm.create_model(name, **more.get("model_kwargs", {}))
    path = tmp_path / "net.pth"
    torch.save({"model": model.state_dict(), "model_name": name, **more}, path)
    return path, CONFIGS[name], timms_transform(models.load_model(path).model)


def same(found, expected, exact=True):
    tolerance = 0 if exact else 3e-6  # mean and std in another order, in float32
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_pixels_are_the_same_everywhere(file, photographs):
    path, config, transform = file
    files = ImageFolder(photographs / "val")
    expected = torch.stack([transform(image) for image, _ in files])
    assert models.find_model(str(path)).data_config == config
    size = config.size
    assert expected.shape == (3, 3, size, size)

    for loader in ("timm", "fast"):
        words = ["--data-path", photographs, "--loader", loader, "--input-size", size]
        dataset, _ = datasets.build_dataset(False, flags(*words), images=config)
        ((images, targets, *_),) = eval_feed(dataset)
        assert targets.tolist() == [0, 1, 2]
        same(images, expected, exact=loader == "timm")

    paths = [Path(where) for where, _ in files.samples]
    args = cli.parse(predict.get_parser, [*map(str, paths), "--checkpoint", str(path)])
    subject = next(eval_models([str(path)], Namespace(**vars(args) | {"fuse": False}), CPU))
    ((_, images),) = predict.read_batches(paths, subject.args, subject.images, [])
    same(images, expected)

    words = ["--output", "x.onnx", "--checkpoint", str(path), "--with-preprocessing"]
    program = load_source(get_parser().parse_args(words), CPU)
    crop = transform_of(program.metadata, normalize=False)
    pixels = torch.stack([crop(image) for image, _ in files])
    assert pixels.dtype == torch.uint8
    seen = []
    program.exported.model.register_forward_pre_hook(lambda _, inputs: seen.append(*inputs))
    program.exported(pixels.permute(0, 2, 3, 1))
    same(seen[0], expected, exact=False)


def write_rings(root, train=24, val=12):
    """Noisy images of two classes, which a ring at the border tells apart."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for k, name in enumerate(("cold", "warm")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(128, 50, (64, 64, 3))
                ring = np.ones((64, 64), bool)
                ring[14:50, 14:50] = False
                pixels[ring] += generator.normal((20, -20)[k], 30, 1) * np.array([1, 0, -1])
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


NET = ["--model", "vit_b_16_224", "--model-kwargs", "depth=1", "embed_dim=32", "num_heads=2"]
PLAIN = ["--std-aug", "--src", "--reprob", 0, "--mixup", 0, "--cutmix", 0, "--no-repeated-aug"]
PLAIN += ["--num_workers", 0, "--batch-size", 8, "--no-model-ema", "--warmup-epochs", 0]


@pytest.fixture(scope="module")
def rings(tmp_path_factory):
    """Images, and the checkpoint of a run that crops nothing off."""
    root = tmp_path_factory.mktemp("rings")
    data = write_rings(root / "images")
    run = [*NET, *PLAIN, "--data-path", data, "--input-size", 64, "--eval-crop-ratio", 1]
    run += ["--epochs", 4, "--cooldown-epochs", 0, "--lr", 3e-3, "--unscale-lr"]
    succeed(*run, "--output_dir", root)
    return data, root / "checkpoint.pth"


def right_of(answers, data):
    """The number of images whose class is right; of all images, each in its folder."""
    targets = ImageFolder(data / "val").targets
    assert len(answers) == len(targets)
    return sum(int(found == k) for found, k in zip(answers, targets, strict=True))


def counted_by_programs(data, path, tmp_path, *more):
    """Right images by main.py, tools.validate and tools.predict; and their warnings."""
    output = succeed("--eval", "--resume", path, "--data-path", data, "--num_workers", 0, *more)
    accuracy, count = re.search(r"Acc@1 ([\d.]+) .* on (\d+)", output).groups()
    found, warned = [round(float(accuracy) * int(count) / 100)], [output]
    words = ["--data-path", data, "--num_workers", 0, "--csv", tmp_path / "rows.csv"]
    status, output, _ = call(validate.main, path, *words, *more)
    (row,) = read(tmp_path / "rows.csv")
    found.append(round(float(row["top1"]) * int(row["images"]) / 100))
    paths = [where for where, _ in ImageFolder(data / "val").samples]
    words = ["--checkpoint", path, "--topk", 1, "--csv", tmp_path / "p.csv"]
    predicted, told, _ = call(predict.main, *paths, *words, *more)
    assert (status, predicted) == (0, 0)
    found.append(right_of([int(row["class"]) for row in read(tmp_path / "p.csv")], data))
    warned += [output, told]
    return found, [re.findall("^warning: .*--eval-crop-ratio.*", text, re.M) for text in warned]


def test_a_run_without_a_crop_is_evaluated_without(rings, tmp_path):
    data, path = rings
    counts, warned = counted_by_programs(data, path, tmp_path)
    assert warned == [[], [], []]

    model = torch.hub.load(str(ROOT), NET[1], source="local", checkpoint=str(path)).eval()
    files = ImageFolder(data / "val", timms_transform(model))
    with torch.no_grad():
        counts.append(right_of([int(model(x[None]).argmax()) for x, _ in files], data))

    others, warned = counted_by_programs(data, path, tmp_path, "--eval-crop-ratio", 0.5)
    assert all(len(lines) == 1 and re.search(r" 0\.5\b.* 1\b", lines[0]) for lines in warned)
    assert len({*counts}) == len({*others}) == 1
    assert counts[0] >= 16 and others[0] != counts[0]


@pytest.mark.slow
def test_an_exported_program_gets_its_images_by_its_metadata(rings, tmp_path):
    data, path = rings
    counts, _ = counted_by_programs(data, path, tmp_path)
    assert export("--checkpoint", path, "--output", tmp_path / "net.onnx") == 0
    session = session_of(tmp_path / "net.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert (json.loads(about["crop_pct"]), about["short_side"]) == (1.0, "64")
    files = ImageFolder(data / "val", transform_of(about))
    answers = [session.run(None, {"image": x[None].numpy()})[0].argmax() for x, _ in files]
    assert right_of(answers, data) == counts[0]
