"""Flags of crops, flips and resizes: the boxes, rates and pixels that they make."""

import numpy as np
import pytest
import timm.data.transforms_factory
import torch
from loading import eval_feed, files, flags, photograph, refused
from PIL import Image
from test_bad_images import encode
from test_fast import IMAGE_BOUND, MEAN_BOUND, augmentation, difference, draws_of
from torchvision import transforms

import datasets
from models import DataConfig
from pipeline.fast import EncodedImages, FastDataset, ResidentImages
from pipeline.reference import AugmentedDataset, seed_generators
from pipeline.sources.base import Pixels
from training.launch import USER_ERRORS

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = ("--std-aug", "--hflip", 0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    sizes = [(500, 375), (375, 500), (100, 80), (1200, 900), (64, 64), (33, 500)]
    named = {f"{i}.jpg": encode(photograph(*s, i), "JPEG") for i, s in enumerate(sizes)}
    named["x.png"] = encode(photograph(200, 150, 5), "PNG")
    return files(tmp_path_factory.mktemp("photographs"), named)


def ramps(height, width):
    """An image whose red is the row and whose green is the column, in percent of 2.5."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([250 * rows / height, 250 * columns / width, np.zeros_like(rows)], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def boxes_of(words, count=300, size=64, shape=(400, 600)):
    """Share of the area and aspect ratio of the crops that the fast loader makes of one image."""
    image = ramps(*shape)
    source = Pixels(np.asarray(image)[None], [0], ["x"])
    fast = FastDataset(source, augmentation("--input-size", size, *PLAIN, *words), True)
    raw = fast.__getitems__(draws_of(source, count)).pixels.numpy().astype(float)
    margin = size / (size - 1)  # between the centres of the outermost pixels
    height = np.abs(raw[:, -1, size // 2, 0] - raw[:, 0, size // 2, 0]) / 250 * margin
    width = np.abs(raw[:, size // 2, -1, 1] - raw[:, size // 2, 0, 1]) / 250 * margin
    return height * width, width * shape[1] / (height * shape[0])


def test_crops_have_the_areas_and_ratios_of_the_flags():
    words = ("--scale", 0.25, 0.5, "--ratio", 0.7, 0.9)
    areas, ratios = boxes_of(words, shape=(500, 600))  # no such box exceeds the image
    assert 0.23 < areas.min() < 0.27 and 0.48 < areas.max() < 0.52
    assert abs(areas.mean() - 0.375) < 0.02  # uniform
    assert 0.68 < ratios.min() < 0.72 and 0.88 < ratios.max() < 0.92
    areas, ratios = boxes_of(())
    assert areas.min() < 0.15 and areas.max() > 0.8
    assert 0.7 < ratios.min() < 0.85 and 1.25 < ratios.max() < 1.4


@pytest.mark.parametrize("mode", ["rrc", "rkrc", "rkrr"])
@pytest.mark.parametrize("ranges", [{}, {"scale": (0.3, 0.9), "ratio": (0.7, 1.2)}])
def test_crop_modes_are_timm_s(mode, ranges):
    words = [word for flag, pair in ranges.items() for word in (f"--{flag}", *pair)]
    words += ["--hflip", 0.3, "--vflip", 0.6, "--input-size", 48, "--train-crop-mode", mode]
    ours = datasets.build_transform(True, flags("--data-path", "x", "--std-aug", *words))
    theirs = timm.data.transforms_factory.transforms_imagenet_train(
        48,
        train_crop_mode=mode,
        hflip=0.3,
        vflip=0.6,
        color_jitter=None,
        interpolation="bicubic",
        **ranges,
    )
    seen = set()
    for seed in range(20):
        image = photograph(90 + seed, 130 - 2 * seed, seed)
        found = []
        for transform in (ours, theirs):
            seed_generators(seed)
            found.append(transform(image))
        torch.testing.assert_close(*found)
        seen.add(found[0].mean().item())
    assert len(seen) == 20


def test_crops_keep_the_ratio_but_for_half_of_the_images():
    """And the scale; at the centre, or anywhere."""
    words = ("--train-crop-mode", "rkrc", "--scale", 0.25, 0.25, "--ratio", 0.5, 0.5)
    areas, ratios = boxes_of(words, shape=(300, 300))
    is_stretched = np.abs(ratios - 1) > 0.1
    whole = np.abs(areas[~is_stretched] - 1) < 0.02
    assert abs(is_stretched.mean() - 0.5) < 0.1 and abs(whole.mean() - 0.5) < 0.1
    np.testing.assert_allclose(areas[~is_stretched][~whole], 0.25, atol=0.02)


FLAGS = [
    ("--hflip", 0.3, "--vflip", 0.6),
    ("--scale", 0.3, 0.6, "--ratio", 1, 2),
    ("--scale", 0.001, 0.01, "--ratio", 0.1, 10),
    ("--train-crop-mode", "rkrc"),
    ("--train-crop-mode", "rkrr", "--scale", 0.5, 2, "--train-interpolation", "random"),
    ("--train-crop-mode", "rkrr", "--aa", "", "--vflip", 0.5),
]


@pytest.mark.parametrize("words", FLAGS, ids=lambda words: " ".join(map(str, words)))
@pytest.mark.parametrize("on_workers", [True, False])
def test_images_are_the_reference_s(photographs, words, on_workers):
    made = photographs, augmentation("--input-size", 96, *words), True
    draws = draws_of(photographs, 3)
    expected = AugmentedDataset(*made, seed=3).__getitems__(draws).images
    fast = FastDataset(*made, seed=3, augment=on_workers)
    raw = fast.__getitems__(draws)
    error = difference(eval_feed(fast).finalize(raw).images, expected, raw.boxes)
    assert error.mean() < MEAN_BOUND and error.mean((1, 2, 3)).max() < IMAGE_BOUND


def test_small_images_can_have_random_resized_crops():
    pixels = np.stack([np.asarray(photograph(32, 32, seed)) for seed in range(30)])
    source = Pixels(pixels, range(30), map(str, range(30)))
    words = ("--input-size", 32, "--train-crop-mode", "rrc", "--scale", 0.2, 0.4, "--reprob", 0)
    made = source, augmentation(*words), True
    expected = AugmentedDataset(*made).__getitems__(draws_of(source, 1)).images
    fast = FastDataset(*made, resident=True)
    raw = fast.__getitems__(draws_of(source, 1))
    error = difference(eval_feed(fast).finalize(raw).images, expected, raw.boxes)
    assert error.mean() < MEAN_BOUND and error.mean((1, 2, 3)).max() < IMAGE_BOUND
    assert (made[1].crop, augmentation("--input-size", 32).crop) == ("random-resized", "padded")


def flipped(batch):
    """Whether images of :func:`ramps`, ``B 3 H W``, are flipped horizontally and vertically."""
    inner = batch[..., 9:-9, 9:-9]  # a padded crop has a black border
    left, right = inner[:, 1, :, 0].mean(1), inner[:, 1, :, -1].mean(1)
    top, bottom = inner[:, 0, 0].mean(1), inner[:, 0, -1].mean(1)
    return left > right, top > bottom


@pytest.mark.parametrize("kind", ["workers", "decoded on the device", "resident", "reference"])
def test_flips_have_the_rates_of_the_flags(tmp_path, kind):
    image = ramps(40, 40)
    source = files(tmp_path, {"x.jpg": encode(image, "JPEG", quality=99)})
    size = 40
    if kind == "resident":
        source, size = Pixels(np.asarray(image.resize((32, 32)))[None], [0], ["x"]), 32
    words = ("--std-aug", "--hflip", 0.2, "--vflip", 0.7, "--input-size", size)
    made = source, augmentation(*words), True
    options = {
        "decoded on the device": {"decode": False, "augment": False},
        "resident": {"resident": True},
    }
    kinds = {"decoded on the device": EncodedImages, "resident": ResidentImages}
    if kind == "reference":
        images = AugmentedDataset(*made).__getitems__(draws_of(source, 400)).images
    else:
        fast = FastDataset(*made, **options.get(kind, {}))
        raw = fast.__getitems__(draws_of(source, 400))
        assert isinstance(raw.pixels, kinds.get(kind, torch.Tensor))
        images = eval_feed(fast).finalize(raw).images
    horizontal, vertical = flipped(images)
    assert abs(horizontal.float().mean() - 0.2) < 0.05
    assert abs(vertical.float().mean() - 0.7) < 0.06
    both = (horizontal & vertical).float().mean()
    assert abs(both - 0.14) < 0.05  # independent of each other
    certain = flags("--hflip", 1, "--vflip", 0)
    assert (certain.hflip, datasets.build_augmentation(True, certain).hflip) == (1, 1)  # digits


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (7, 3), (40, 2)])
@pytest.mark.parametrize("loader", [AugmentedDataset, FastDataset])
@pytest.mark.parametrize(
    "words",
    [
        ("--scale", 0.001, 0.002),
        ("--ratio", 0.1, 0.1),
        ("--ratio", 10, 10, "--scale", 0.001, 1),
        ("--train-crop-mode", "rkrr", "--scale", 0.01, 4, "--ratio", 0.1, 10),
        ("--train-crop-mode", "rkrc", "--scale", 4, 4, "--ratio", 10, 10),
    ],
)
def test_tiny_images_and_extreme_crops(tmp_path, size, loader, words):
    source = files(tmp_path, {"x.jpg": encode(Image.new("RGB", size, (200, 100, 50)), "JPEG")})
    dataset = loader(source, augmentation("--input-size", 40, "--std-aug", *words), True)
    images = eval_feed(dataset).finalize(dataset.__getitems__(draws_of(source, 20))).images
    pixels = datasets.denormalize(images) * 255
    assert (pixels - torch.tensor([200, 100, 50]).view(3, 1, 1)).abs().max() < 4


@pytest.mark.parametrize("name", ["nearest", "bilinear", "lanczos"])
def test_evaluation_resizes_by_the_filter_of_the_flag(photographs, name):
    words = ("--interpolation", name, "--input-size", 56)
    made = photographs, augmentation(*words, is_train=False), False
    mode = transforms.InterpolationMode(name)
    image = photographs.open(0)
    resized = transforms.CenterCrop(56)(transforms.Resize(64, mode)(image))
    for loader in (AugmentedDataset, FastDataset):
        dataset = loader(*made)
        found = eval_feed(dataset).finalize(dataset.__getitems__([0])).images
        assert torch.equal((datasets.denormalize(found)[0] * 255).round().byte(), pixels(resized))
    told = []
    own = DataConfig(interpolation="bicubic")
    assert datasets.choose_images(flags(), own, "w.pth").interpolation == "bicubic"
    config = datasets.choose_images(flags(*words[:2]), own, "w.pth", told.append)
    assert config.interpolation == name
    assert len(told) == 1 and {name, "w.pth", "bicubic"} <= set(told[0].replace(",", "").split())


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


BAD = {
    "--scale 0.5": "--scale 0.5",
    "--scale 0.9 0.1": "--scale 0.9 0.1",
    "--scale 0 1": "--scale 0.0 1.0",
    "--scale 0.5 1.5": "--scale 0.5 1.5",
    "--scale nan 1": "--scale nan",
    "--ratio 0 1": "--ratio 0.0",
    "--ratio 1 2 3": "--ratio 1.0 2.0 3.0",
    "--train-crop-mode rkrc --scale 1e-9 1": "--scale 1e-09",
    "--hflip 1.5": "--hflip 1.5",
    "--vflip -0.1": "--vflip -0.1",
    "--src --train-crop-mode rkrr": "--train-crop-mode rkrr",
    "--input-size 32 --scale 0.5 1": "--scale 0.5 1",
    "--src --input-size 64 --ratio 0.5 1": "--ratio 0.5 1",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_values_are_named(words):
    named = BAD[words]
    refused(lambda: augmentation(*words.split()), named, kind=USER_ERRORS)
