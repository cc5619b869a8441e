"""The fast loader against the reference: the same draws, and the same images but for rounding."""

import io
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_images import CORPUS, encode

import datasets
from pipeline.augment_ops import Box
from pipeline.crop import decode_crop, is_readable, read_header
from pipeline.fast import FastDataset, resize, take_apart
from pipeline.images import CorruptImageError, DataError
from pipeline.prefetch import Memory
from pipeline.reference import AugmentedDataset
from pipeline.sources.base import Files, Pixels
from pipeline.sources.cifar import open_digits
from samplers import SampleIndex
from training.flags import parse_args

CPU = torch.device("cpu")
MEAN_BOUND = 0.35  # of 255: mean absolute difference over many images
IMAGE_BOUND = 4.0  # of one image


def flags(*words):
    return parse_args([str(word) for word in words])[0]


def photograph(width, height, seed=0):
    """Smooth shapes under some noise, as photographs have them."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(a * x + b * y + c) for a, b, c in generator.normal(size=(9, 3)) * 2]
    pixels = 128 + 40 * np.stack([sum(waves[i::3]) for i in range(3)], -1)
    pixels += generator.normal(size=pixels.shape) * 6
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


KINDS = {
    "420": {"subsampling": 2},
    "422": {"subsampling": 1},
    "444": {"subsampling": 0},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True, "quality": 30},
    "restart markers": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("kind", [*KINDS, "grey"])
def test_a_crop_has_the_pixels_of_the_whole(kind):
    image = photograph(203, 157)
    image = image.convert("L") if kind == "grey" else image
    data = encode(image, "JPEG", **KINDS.get(kind, {}))
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    header = read_header(data)
    assert header[:2] == (157, 203) and is_readable(header)
    assert header.is_baseline == (kind != "progressive")
    for box in [(0, 0, 157, 203), (0, 0, 1, 1), (3, 5, 40, 60), (100, 7, 57, 9), (8, 0, 8, 203)]:
        top, left, height, width = box
        expected = whole[top : top + height, left : left + width]
        np.testing.assert_array_equal(decode_crop(data, header, Box(*box), 224), expected)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_large_crop_is_decoded_at_a_fraction_of_its_size(scale):
    image = photograph(900, 700)
    data = encode(image, "JPEG", quality=95)
    size = 600 // (2 * scale)
    box = Box(16, 32, 600, 800)  # whole pixels of the reduced image
    crop = decode_crop(data, read_header(data), box, size)
    assert crop.shape == (600 // scale, 800 // scale, 3)
    expected = Image.open(io.BytesIO(data)).crop((32, 16, 832, 616)).resize((size, size), 3)
    difference = np.abs(resize(crop, size, "bicubic").astype(int) - np.asarray(expected))
    assert difference.mean() < 1


@pytest.mark.parametrize("box", [Box(0, 0, 300, 400), Box(20, 30, 55, 47), Box(9, 9, 1, 200)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resize_is_pillow_s(box, mode):
    image = photograph(400, 300)
    crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    expected = np.asarray(crop.resize((96, 96), method)).astype(int)
    difference = np.abs(resize(np.array(crop), 96, mode) - expected)
    assert difference.mean() < 0.3 and difference.max() <= 8


def files(tmp_path, named):
    """A source of these files, ``{name: bytes}``, of one class."""
    for name, data in named.items():
        (tmp_path / name).write_bytes(data)
    return Files([tmp_path / name for name in named], [0] * len(named), ["class"])


def outcome(read):
    try:
        read()
    except CorruptImageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("words", [(), ("--std-aug",), ("--src",)])
def test_the_outcome_of_odd_files_is_the_reference_s(tmp_path, words):
    source = files(tmp_path, {name: data for name, data, _ in CORPUS})
    transform = datasets.build_transform(
        True, flags("--data-path", "x", "--input-size", 48, *words)
    )
    fast = FastDataset(source, transform, True, 48)
    reference = AugmentedDataset(source, transform, True)
    for index in range(len(source)):
        draws = [SampleIndex(index, epoch) for epoch in range(4)]
        expected = {outcome(lambda d=d: reference.__getitems__([d])) for d in draws}
        assert {outcome(lambda d=d: fast.__getitems__([d])) for d in draws} == expected


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 4), (5, 1)])
def test_tiny_jpegs_can_be_cropped_at_random(tmp_path, size):
    source = files(tmp_path, {"x.jpg": encode(Image.new("RGB", size, (200, 100, 50)), "JPEG")})
    args = flags("--data-path", "x", "--input-size", 40, "--std-aug")
    fast = FastDataset(source, datasets.build_transform(True, args), True, 40)
    images = fast.__getitems__([SampleIndex(0, epoch) for epoch in range(50)]).images
    difference = images.int() - torch.tensor([200, 100, 50])
    assert difference.abs().max() < 4


@pytest.mark.parametrize("loader", [AugmentedDataset, FastDataset])
def test_every_draw_of_an_image_has_numbers_of_its_own(tmp_path, loader):
    source = files(tmp_path, {"x.jpg": encode(photograph(90, 80), "JPEG")})
    args = flags("--data-path", "x", "--input-size", 40)
    transform = datasets.build_transform(True, args)
    size = (40,) if loader is FastDataset else ()
    images = []
    for seed in (0, 1):
        dataset = loader(source, transform, True, *size, seed=seed)
        for draw in (SampleIndex(0), SampleIndex(0, epoch=1), SampleIndex(0, copy=1)):
            first, second = (dataset.__getitems__([draw]).images for _ in range(2))
            assert torch.equal(first, second)
            images.append(first.numpy().tobytes())
    assert len(set(images)) == 6


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twelve files of many sizes, formats and kinds of JPEG."""
    folder = tmp_path_factory.mktemp("photographs")
    sizes = [(500, 375), (375, 500), (100, 80), (1500, 1100), (64, 64), (333, 500)]
    named = {f"{i}.jpg": encode(photograph(*s, i), "JPEG") for i, s in enumerate(sizes)}
    named |= {
        f"{kind}.jpg": encode(photograph(300, 280, 9), "JPEG", **options)
        for kind, options in KINDS.items()
    }
    named["grey.jpg"] = encode(photograph(300, 280, 9).convert("L"), "JPEG")
    named["x.png"] = encode(photograph(200, 150, 5), "PNG")
    return files(folder, named)


POLICIES = [
    (),
    ("--std-aug",),
    ("--train-interpolation", "random"),
    ("--train-interpolation", "bilinear"),
    ("--aa", "rand-m5-n3"),
    ("--aa", "original"),
    ("--aa", "v0", "--recount", 3, "--reprob", 1),
    ("--aa", ""),  # colour jitter
    ("--aa", "augmix-m3"),
    ("--ThreeAugment",),
    ("--ThreeAugment", "--src"),
    ("--src",),
]


def erased(boxes, height, width):
    """Where a batch of images was erased, as ``B 1 H W``."""
    mask = torch.zeros(len(boxes), 1, height, width, dtype=torch.bool)
    for image, drawn in zip(mask, boxes.tolist(), strict=True):
        for top, left, h, w in drawn:
            image[:, top : top + h, left : left + w] = True
    return mask


@pytest.mark.parametrize("words", POLICIES, ids=lambda words: " ".join(map(str, words)) or "DeiT")
@pytest.mark.parametrize("where", ["workers", "device"])
def test_images_are_the_reference_s(photographs, words, where):
    """For the same numbers: the same boxes, mirroring, operations and magnitudes."""
    args = flags("--data-path", "x", "--augment-on", where, *words)
    transform = datasets.build_transform(True, args)
    reference = AugmentedDataset(photographs, transform, True, seed=3)
    fast = FastDataset(photographs, transform, True, 224, seed=3, augment=where == "workers")
    feed = feed_of(fast, args)
    draws = [SampleIndex(i, epoch) for epoch in range(3) for i in range(len(photographs))]
    expected = datasets.denormalize(reference.__getitems__(draws).images) * 255
    raw = fast.__getitems__(draws)
    found = datasets.denormalize(feed.finish(raw).images) * 255
    difference = (found - expected).abs().masked_fill(erased(raw.boxes, 224, 224), 0)
    assert difference.mean() < MEAN_BOUND
    assert difference.mean((1, 2, 3)).max() < IMAGE_BOUND
    assert (raw.operations.shape[1] > 0) == (where == "device" and fast.recipe.policy is not None)


def feed_of(dataset, args):
    return datasets.build_prefetcher(datasets.build_eval_loader(dataset, args, 1, 0), args)


def test_erased_boxes_hold_the_reference_s_noise_in_distribution(photographs):
    args = flags("--data-path", "x", "--aa", "", "--color-jitter", 0, "--reprob", 1)
    transform = datasets.build_transform(True, args)
    draws = [SampleIndex(i, epoch) for epoch in range(4) for i in range(len(photographs))]
    fast = FastDataset(photographs, transform, True, 224, seed=3)
    raw = fast.__getitems__(draws)
    found = feed_of(fast, args).finish(raw).images
    expected = AugmentedDataset(photographs, transform, True, seed=3).__getitems__(draws).images
    mask = erased(raw.boxes, 224, 224).expand_as(found)
    assert mask.any((1, 2, 3)).all()
    outside = (found - expected).abs()[~mask]
    assert outside.mean() < 0.01
    for values in (found[mask], expected[mask]):  # at least a million numbers
        assert abs(values.mean()) < 0.005 and abs(values.std() - 1) < 0.005
        assert abs((values**4).mean() - 3) < 0.05
    again = feed_of(fast, args).finish(fast.__getitems__(draws)).images
    other = feed_of(fast, args).finish(raw._replace(seed=raw.seed + 1)).images
    assert torch.equal(again, found) and not (other == found)[mask].any()
    assert raw.seed != fast.__getitems__(draws[1:]).seed


@pytest.mark.parametrize("name", ["DIGITS", "CIFAR10"])
def test_images_on_the_device_are_the_reference_s(name):
    pixels = np.stack([np.asarray(photograph(32, 32, seed)) for seed in range(40)])
    source = Pixels(pixels, range(40), map(str, range(40)))
    if name == "DIGITS":
        source = open_digits(None, True, False)
    for is_train in (True, False):
        words = ("--data-set", name, "--input-size", 32)
        transform = datasets.build_transform(is_train, flags(*words))
        reference = AugmentedDataset(source, transform, is_train)
        resident = datasets.resized(source, transform.transforms[0], 32)
        fast = FastDataset(resident, transform, is_train, 32, resident=True)
        draws = [SampleIndex(i, epoch) for epoch in range(8 if is_train else 1) for i in range(40)]
        raw = fast.__getitems__(draws)
        assert raw.images is None
        found = feed_of(fast, flags(*words)).finish(raw).images
        expected = reference.__getitems__(draws).images
        mask = erased(raw.boxes, 32, 32) if is_train else torch.zeros(len(draws), 1, 32, 32) > 0
        assert mask.any() == is_train
        if not is_train:
            assert torch.equal(found, expected)
        difference = (found - expected).abs().masked_fill(mask, 0) * 255 * 0.23
        assert difference.mean() < 0.05 and difference.mean((1, 2, 3)).max() < 1


def test_small_sets_are_on_the_device_if_they_are_augmented_there(image_folder):
    there = ("--augment-on", "device")
    for words, resident in (
        ((), False),
        (there, True),
        ((*there, "--input-size", 48), False),
        ((*there, "--data-path", image_folder, "--input-size", 32), False),
        ((*there, "--aa", ""), False),  # colour jitter is for PIL images
    ):
        dataset, _ = datasets.build_dataset(True, flags(*words))
        assert dataset.resident == resident
        assert (dataset.__getitems__([SampleIndex(0)]).images is None) == resident


@pytest.mark.parametrize("kind", ["memory", "files of the size", "other files"])
def test_small_images_of_the_workers_are_the_reference_s(tmp_path, kind):
    images = [photograph(32, 32, seed) for seed in range(10)]
    if kind == "other files":
        images = [photograph(50, 41, seed) for seed in range(10)]
    if kind == "memory":
        source = Pixels(np.stack([np.asarray(image) for image in images]), range(10), range(10))
    else:
        named = {f"{i}.jpg": encode(image, "JPEG") for i, image in enumerate(images)}
        source = files(tmp_path, named | {"x.png": encode(images[0], "PNG")})
    args = flags("--data-set", "CIFAR10", "--input-size", 32, "--reprob", 0)
    transform = datasets.build_transform(True, args)
    fast = FastDataset(source, transform, True, 32)
    draws = [SampleIndex(i, epoch) for epoch in range(20) for i in range(len(source))]
    found = feed_of(fast, args).finish(fast.__getitems__(draws)).images
    expected = AugmentedDataset(source, transform, True).__getitems__(draws).images
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [32, 56])
def test_evaluation_is_the_reference_s_to_the_last_bit(photographs, size):
    images = []
    for loader in ("fast", "timm"):
        args = flags("--data-path", "x", "--input-size", size, "--loader", loader)
        transform = datasets.build_transform(False, args)
        made = (photographs, transform, False)
        dataset = AugmentedDataset(*made) if loader == "timm" else FastDataset(*made, size)
        images.append(torch.cat([batch.images for batch in feed_of(dataset, args)]))
    assert torch.equal(*images)


def test_jpegs_may_be_decoded_where_the_network_is(photographs):
    with pytest.raises(DataError, match="--decode-on-device needs --augment-on device"):
        datasets.build_dataset(True, flags("--decode-on-device", "--augment-on", "workers"))
    args = flags("--data-path", "x", "--decode-on-device", "--reprob", 0)
    transform = datasets.build_transform(True, args)
    draws = [SampleIndex(i) for i in range(len(photographs))]
    there = FastDataset(photographs, transform, True, 224, augment=False, decode=False)
    here = FastDataset(photographs, transform, True, 224, augment=False)
    raw = there.__getitems__(draws)
    assert (raw.crops[:, 0] > 0).sum() == len(photographs) - 1  # a PNG is decoded by the loader
    feed = feed_of(there, args)
    found, expected = feed.finish(raw).images, feed.finish(here.__getitems__(draws)).images
    difference = (found - expected).abs().mean((1, 2, 3)) * 255 * 0.23
    assert difference.max() < 5 and difference.median() < 0.3
    raw.encoded[:99] = 7  # the first is no JPEG
    with pytest.raises(CorruptImageError, match="cannot decode image"):
        feed.finish(raw)


@pytest.mark.parametrize("words", [(), ("--ThreeAugment",), ("--src",)])
def test_datasets_travel_to_processes_that_are_not_forked(image_folder, words):
    args = flags("--data-path", image_folder, "--input-size", 40, *words)
    dataset, _ = datasets.build_dataset(True, args)
    copy = pickle.loads(pickle.dumps(dataset))
    first, second = (d.__getitems__([SampleIndex(3), SampleIndex(9)]) for d in (dataset, copy))
    assert torch.equal(first.images, second.images) and torch.equal(first.boxes, second.boxes)


@pytest.mark.parametrize("loader", ["fast", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batches_have_the_type_and_layout_of_the_network(image_folder, loader, dtype):
    args = flags("--data-path", image_folder, "--input-size", 40, "--loader", loader)
    dataset, _ = datasets.build_dataset(True, args)
    batch = datasets.build_eval_loader(dataset, args, 1, 0)
    feed = datasets.build_prefetcher(batch, args, CPU, dtype, torch.channels_last)
    images = feed.batch([SampleIndex(0), SampleIndex(1)]).images
    assert images.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)
    plain = (
        datasets.build_prefetcher(batch, args, CPU, dtype)
        .batch([SampleIndex(0), SampleIndex(1)])
        .images
    )
    assert plain.is_contiguous() and torch.equal(plain, images)


@pytest.mark.parametrize("kind", ["files", "memory"])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (3, 0), (3, 2)])
def test_every_image_once_over_ranks_and_workers(tmp_path, kind, ranks, workers):
    """41 images, each its own class."""
    pixels = np.stack([np.asarray(photograph(32, 32, seed)) for seed in range(41)])
    source = Pixels(pixels, range(41), map(str, range(41)))
    if kind == "files":
        named = {
            f"{i}.jpg": encode(Image.fromarray(image), "JPEG") for i, image in enumerate(pixels)
        }
        found = files(tmp_path, named)
        source = Files([found.name(i) for i in range(41)], range(41), map(str, range(41)))
    words = ("--batch-size", 2, "--num_workers", workers, "--no-repeated-aug")
    args = flags("--data-set", "CIFAR10", "--input-size", 32, *words)
    for is_train in (True, False):
        transform = datasets.build_transform(is_train, args)
        dataset = FastDataset(source, transform, is_train, 32, resident=kind == "memory")
        build = datasets.build_train_loader if is_train else datasets.build_eval_loader
        feeds = [
            datasets.build_prefetcher(build(dataset, args, ranks, r), args) for r in range(ranks)
        ]
        for epoch in range(2 if is_train else 1):
            if is_train:
                [feed.sampler.set_epoch(epoch) for feed in feeds]
            seen = Counter(t for feed in feeds for batch in feed for t in batch.targets.tolist())
            # ranks train on as many images each, so that one comes twice on three of them; and a
            # rank on whole batches, so that one is left out on one
            total = 41 if not is_train else 40 if ranks == 1 else 42
            assert (sum(seen.values()), len(seen)) == (total, min(total, 41))


def test_parts_of_deit_s_transform():
    args = flags("--data-path", "x")
    recipe = take_apart(datasets.build_transform(True, args), 224)
    assert (recipe.crop.scale, recipe.hflip, recipe.slots, recipe.boxes) == ((0.08, 1.0), 0.5, 2, 1)
    assert not recipe.before and not recipe.others
    small = take_apart(datasets.build_transform(True, flags("--input-size", 32)), 32)
    assert (small.crop, small.padding, small.hflip) == (None, 4, 0)
    jitter = take_apart(datasets.build_transform(True, flags("--data-path", "x", "--aa", "")), 224)
    assert jitter.policy is None and len(jitter.others) == 1
    val = take_apart(datasets.build_transform(False, args), 224)
    assert len(val.before) == 3 and not val.others and val.erasing is None


def test_paths_of_any_kind(tmp_path):
    names = [
        "a b.png",
        "ü.png",
        b"\xff\xfe.png".decode("utf-8", "surrogateescape"),
        "x" * 99 + ".png",
    ]
    source = files(tmp_path, {name: encode(photograph(5, 6), "PNG") for name in names})
    assert [source.name(i) for i in range(4)] == [str(tmp_path / name) for name in names]
    assert all(source.open(i).size == (5, 6) for i in range(4))


def test_real_images(shared, tmp_path):
    with tarfile.open(shared / "data" / "imagenet_sample.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    paths = sorted((tmp_path / "imagenet_sample" / "val").glob("*/*"))[::4]
    source = Files(paths, [0] * len(paths), ["x"])
    args = flags("--data-path", "x", "--reprob", 0)
    transform = datasets.build_transform(True, args)
    draws = [SampleIndex(i, 1) for i in range(len(paths))]
    fast = FastDataset(source, transform, True, 224)
    found = feed_of(fast, args).finish(fast.__getitems__(draws)).images
    expected = AugmentedDataset(source, transform, True).__getitems__(draws).images
    difference = (found - expected).abs().mean((1, 2, 3)) * 255 * 0.225
    assert difference.mean() < MEAN_BOUND and difference.max() < IMAGE_BOUND


def test_memory_is_taken_again_only_when_nobody_holds_it():
    memory, wanted = Memory(), torch.empty(3, 4, dtype=torch.uint8)
    first = memory.like(wanted)
    view = first.view(2, 6)[1:].fill_(5)
    place = first.data_ptr()
    del first
    others = [memory.like(wanted) for _ in range(9)]  # more than are kept
    assert len({place, *(other.data_ptr() for other in others)}) == 10
    assert all(other.dtype == torch.float32 and other.shape == (3, 4) for other in others)
    [other.fill_(7) for other in others]
    assert (view == 5).all()
    del view
    assert memory.like(wanted).data_ptr() == place
    assert memory.like(torch.empty(5)).shape == (5,)


def test_batches_that_are_kept_stay_as_they_are(image_folder):
    args = flags("--data-path", image_folder, "--input-size", 40, "--batch-size", 2)
    feed = feed_of(datasets.build_dataset(False, args)[0], args)
    kept = [(batch.images, batch.images.clone()) for batch in feed]
    assert len(kept) == 2 and all(torch.equal(*pair) for pair in kept)
