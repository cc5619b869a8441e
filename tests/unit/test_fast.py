"""The fast loader against the reference: the same draws, and the same images but for rounding."""

import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from loading import decoded, eval_feed, files, flags, photograph, real_photographs, train_feed
from PIL import Image
from test_bad_images import CORPUS, encode

import datasets
from pipeline.augment_ops import Box
from pipeline.augmentation import Augmentation
from pipeline.crop import decode_crop, is_readable, read_header, resize
from pipeline.fast import EncodedImages, FastDataset, ResidentImages
from pipeline.images import CorruptImageError, DataError
from pipeline.prefetch import Memory
from pipeline.reference import AugmentedDataset
from pipeline.sources.base import Pixels
from pipeline.sources.cifar import open_digits
from samplers import SampleIndex

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MEAN_BOUND = 0.35  # of 255: mean absolute difference over many images
IMAGE_BOUND = 4.0  # of one image
KINDS = {
    "420": {"subsampling": 2},
    "422": {"subsampling": 1},
    "444": {"subsampling": 0},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True, "quality": 30},
    "restart markers": {"restart_marker_rows": 1},
}


def augmentation(*words, is_train=True):
    return datasets.build_augmentation(is_train, flags("--data-path", "x", *words))


def draws_of(source, epochs):
    return [SampleIndex(i, epoch) for epoch in range(epochs) for i in range(len(source))]


@pytest.mark.parametrize("kind", [*KINDS, "grey"])
def test_a_crop_has_the_pixels_of_the_whole(kind):
    image = photograph(203, 157)
    image = image.convert("L") if kind == "grey" else image
    data = encode(image, "JPEG", **KINDS.get(kind, {}))
    whole = np.asarray(decoded(data))
    header = read_header(data)
    assert header[:2] == (157, 203) and is_readable(header, data)
    assert header.is_baseline == (kind != "progressive")
    for box in [(0, 0, 157, 203), (0, 0, 1, 1), (3, 5, 40, 60), (100, 7, 57, 9), (8, 0, 8, 203)]:
        top, left, height, width = box
        expected = whole[top : top + height, left : left + width]
        np.testing.assert_array_equal(decode_crop(data, header, Box(*box), (224, 224)), expected)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_large_crop_is_decoded_at_a_fraction_of_its_size(scale):
    data = encode(photograph(900, 700), "JPEG", quality=95)
    size = 600 // (2 * scale)
    box = Box(16, 32, 600, 800)  # whole pixels of the reduced image
    crop = decode_crop(data, read_header(data), box, (size, size))
    assert crop.shape == (600 // scale, 800 // scale, 3)
    expected = decoded(data).crop((32, 16, 832, 616)).resize((size, size), 3)
    difference = np.abs(resize(crop, (size, size), "bicubic").astype(int) - np.asarray(expected))
    assert difference.mean() < 1


@pytest.mark.parametrize("box", [Box(0, 0, 300, 400), Box(20, 30, 55, 47), Box(9, 9, 1, 200)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resize_is_pillow_s(box, mode):
    image = photograph(400, 300)
    crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    expected = np.asarray(crop.resize((96, 96), Image.Resampling[mode.upper()])).astype(int)
    difference = np.abs(resize(np.array(crop), (96, 96), mode) - expected)
    assert difference.mean() < 0.3 and difference.max() <= 8


def outcome(read):
    try:
        read()
    except CorruptImageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("words", [(), ("--std-aug",), ("--src",)])
def test_the_outcome_of_odd_files_is_the_reference_s(tmp_path, words):
    source = files(tmp_path, {name: data for name, data, _ in CORPUS})
    made = source, augmentation("--input-size", 40, *words), True
    fast, reference = FastDataset(*made), AugmentedDataset(*made)
    for index in range(len(source)):
        draws = [SampleIndex(index, epoch) for epoch in range(2)]
        expected = {outcome(lambda d=d: reference.__getitems__([d])) for d in draws}
        assert {outcome(lambda d=d: fast.__getitems__([d])) for d in draws} == expected


LOADERS = pytest.mark.parametrize("loader", [AugmentedDataset, FastDataset])


@LOADERS
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (2, 2), (1, 4), (5, 1)])
def test_tiny_images_can_be_cropped_at_random(tmp_path, size, loader):
    source = files(tmp_path, {"x.jpg": encode(Image.new("RGB", size, (200, 100, 50)), "JPEG")})
    dataset = loader(source, augmentation("--input-size", 40, "--std-aug"), True)
    images = eval_feed(dataset).finalize(dataset.__getitems__(draws_of(source, 50))).images
    pixels = datasets.denormalize(images) * 255
    assert (pixels - torch.tensor([200, 100, 50]).view(3, 1, 1)).abs().max() < 4


@LOADERS
def test_every_draw_of_an_image_has_numbers_of_its_own(tmp_path, loader):
    source = files(tmp_path, {"x.jpg": encode(photograph(90, 80), "JPEG")})
    images = []
    for seed in (0, 1):
        dataset = loader(source, augmentation("--input-size", 40), True, seed=seed)
        for draw in (SampleIndex(0), SampleIndex(0, epoch=1), SampleIndex(0, copy=1)):
            first, second = (dataset.__getitems__([draw])[0] for _ in range(2))
            assert torch.equal(first, second)
            images.append(first.numpy().tobytes())
    assert len(set(images)) == 6


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Fourteen files of many sizes, formats and kinds of JPEG."""
    sizes = [(500, 375), (375, 500), (100, 80), (1200, 900), (64, 64), (333, 500)]
    named = {f"{i}.jpg": encode(photograph(*s, i), "JPEG") for i, s in enumerate(sizes)}
    image = photograph(300, 280, 9)
    named |= {f"{kind}.jpg": encode(image, "JPEG", **options) for kind, options in KINDS.items()}
    named["grey.jpg"] = encode(image.convert("L"), "JPEG")
    named["x.png"] = encode(photograph(200, 150, 5), "PNG")
    return files(tmp_path_factory.mktemp("photographs"), named)


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
PIL_ONLY = ("augmix-m3", "--ThreeAugment", "")


def erased(boxes, height, width):
    """Where a batch of images was erased, as ``B 1 H W``."""
    mask = torch.zeros(len(boxes), 1, height, width, dtype=torch.bool)
    for image, drawn in zip(mask, boxes.tolist(), strict=True):
        for top, left, h, w in drawn:
            image[:, top : top + h, left : left + w] = True
    return mask


def difference(found, expected, boxes):
    """Absolute difference of images, 0 to 255, outside of erased boxes."""
    found, expected = (datasets.denormalize(images) * 255 for images in (found, expected))
    return (found - expected).abs().masked_fill(erased(boxes, *found.shape[2:]), 0)


@pytest.mark.parametrize("words", POLICIES, ids=lambda words: " ".join(map(str, words)) or "DeiT")
def test_images_are_the_reference_s(photographs, words):
    """For the same numbers: the same boxes, flips, operations and magnitudes."""
    size = 128 if words else 224
    made = photographs, augmentation("--input-size", size, *words), True
    draws = draws_of(photographs, 2)
    expected = AugmentedDataset(*made, seed=3).__getitems__(draws).images
    has_ops = not {*PIL_ONLY, "--std-aug"} & {*words}
    for on_workers in (True, False):
        fast = FastDataset(*made, seed=3, augment=on_workers)
        raw = fast.__getitems__(draws)
        found = eval_feed(fast).finalize(raw)
        error = difference(found.images, expected, raw.boxes)
        assert error.mean() < MEAN_BOUND and error.mean((1, 2, 3)).max() < IMAGE_BOUND
        assert (raw.operations.shape[1] > 0) == (has_ops and not on_workers)
        assert found.targets.tolist() == [int(draw) for draw in draws]
        if on_workers and not has_ops:
            break  # the device has nothing to do


def test_noise_in_erased_boxes_follows_from_the_draws(photographs):
    fast = FastDataset(photographs, augmentation("--aa", "", "--reprob", 1), True, seed=3)
    draws = draws_of(photographs, 1)
    feed, raw = eval_feed(fast), fast.__getitems__(draws)
    found, again, other = (
        feed.finalize(one).images
        for one in (raw, fast.__getitems__(draws), raw._replace(seed=raw.seed + 1))
    )
    mask = erased(raw.boxes, 224, 224).expand_as(found)
    assert mask.any((1, 2, 3)).all()
    assert abs(found[mask].mean()) < 0.02 and abs(found[mask].std() - 1) < 0.02
    assert torch.equal(again, found) and not (other == found)[mask].any()
    assert raw.seed != fast.__getitems__(draws[1:]).seed


@pytest.mark.parametrize("name", ["DIGITS", "CIFAR10"])
@pytest.mark.parametrize("is_train", [True, False])
def test_images_on_the_device_are_the_reference_s(name, is_train):
    pixels = np.stack([np.asarray(photograph(32, 32, seed)) for seed in range(40)])
    source = Pixels(pixels, range(40), map(str, range(40)))
    if name == "DIGITS":
        source = open_digits(None, True, False)
    words = ("--data-set", name, "--input-size", 32)
    made = source, datasets.build_augmentation(is_train, flags(*words)), is_train
    fast = FastDataset(*made, resident=True)
    draws = [SampleIndex(i, epoch) for epoch in range(4 if is_train else 1) for i in range(40)]
    raw = fast.__getitems__(draws)
    assert isinstance(raw.pixels, ResidentImages)
    found = eval_feed(fast).finalize(raw).images
    expected = AugmentedDataset(*made).__getitems__(draws).images
    error = difference(found, expected, raw.boxes)
    assert error.mean() < 0.05 and error.mean((1, 2, 3)).max() < 1
    assert (raw.boxes.any().item(), torch.equal(found, expected)) == (is_train, not is_train)


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
        raw = dataset.__getitems__([SampleIndex(0)])
        assert isinstance(raw.pixels, ResidentImages) == resident


@pytest.mark.parametrize("kind", ["memory", "files of the size", "other files"])
def test_small_images_of_the_workers_are_the_reference_s(tmp_path, kind):
    size = (50, 41) if kind == "other files" else (32, 32)
    images = [photograph(*size, seed) for seed in range(10)]
    if kind == "memory":
        source = Pixels(np.stack([np.asarray(image) for image in images]), range(10), range(10))
    else:
        named = {f"{i}.jpg": encode(image, "JPEG") for i, image in enumerate(images)}
        source = files(tmp_path, named | {"x.png": encode(images[0], "PNG")})
    args = flags("--data-set", "CIFAR10", "--input-size", 32, "--reprob", 0)
    made = source, datasets.build_augmentation(True, args), True
    fast, draws = FastDataset(*made), draws_of(source, 10)
    found = eval_feed(fast).finalize(fast.__getitems__(draws)).images
    assert torch.equal(found, AugmentedDataset(*made).__getitems__(draws).images)


@pytest.mark.parametrize("size", [32, 56])
def test_evaluation_is_the_reference_s_to_the_last_bit(photographs, size):
    made = photographs, augmentation("--input-size", size, is_train=False), False
    images = [
        torch.cat([batch.images for batch in eval_feed(loader(*made))])
        for loader in (AugmentedDataset, FastDataset)
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_jpegs_may_be_decoded_where_the_network_is(photographs, interpolation):
    words = ("--input-size", 128, "--reprob", 0, "--train-interpolation", interpolation)
    made = photographs, augmentation(*words), True
    draws = draws_of(photographs, 1)
    there = FastDataset(*made, augment=False, decode=False)
    here = FastDataset(*made, augment=False)
    raw = there.__getitems__(draws)
    assert isinstance(raw.pixels, EncodedImages)
    assert (raw.pixels.crops[:, 0] > 0).sum() == len(photographs) - 1  # not the PNG
    feed = eval_feed(there)
    found, expected = (feed.finalize(batch).images for batch in (raw, here.__getitems__(draws)))
    error = difference(found, expected, raw.boxes).mean((1, 2, 3))
    assert error.max() < 5 and error.median() < 0.3
    raw.pixels.data[:99] = 7  # the first is no JPEG
    with pytest.raises(CorruptImageError):
        feed.finalize(raw)


def test_decoding_on_the_device_needs_augmentation_there():
    with pytest.raises(DataError, match=r"--decode-on-device.*--augment-on"):
        datasets.build_dataset(True, flags("--decode-on-device", "--augment-on", "workers"))


@pytest.mark.parametrize("words", [(), ("--ThreeAugment",), ("--src",)])
def test_datasets_travel_to_processes_that_are_not_forked(image_folder, words):
    args = flags("--data-path", image_folder, "--input-size", 40, *words)
    dataset, _ = datasets.build_dataset(True, args)
    copy = pickle.loads(pickle.dumps(dataset))
    first, second = (d.__getitems__([SampleIndex(3), SampleIndex(9)]) for d in (dataset, copy))
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.boxes, second.boxes)


@pytest.mark.parametrize("loader", ["fast", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batches_have_the_type_and_layout_of_the_network(image_folder, loader, dtype):
    args = flags("--data-path", image_folder, "--input-size", 40, "--loader", loader)
    dataset, _ = datasets.build_dataset(True, args)
    batches = datasets.build_eval_loader(dataset, args, 1, 0)
    images, plain = (
        datasets.build_prefetcher(batches, CPU, dtype, layout).batch(draws_of(range(2), 1)).images
        for layout in (torch.channels_last, torch.contiguous_format)
    )
    assert images.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous() and torch.equal(plain, images)


@pytest.mark.parametrize("kind", ["files", "memory"])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (3, 0)])
def test_every_image_once_over_ranks_and_workers(tmp_path, kind, ranks, workers):
    pixels = np.stack([np.asarray(photograph(32, 32, seed)) for seed in range(41)])
    source = Pixels(pixels, range(41), map(str, range(41)))
    if kind == "files":
        images = {f"{i}.jpg": encode(Image.fromarray(p), "JPEG") for i, p in enumerate(pixels)}
        source = files(tmp_path, images)
    words = ("--batch-size", 2, "--num_workers", workers, "--no-repeated-aug")
    args = flags("--data-set", "CIFAR10", "--input-size", 32, *words)
    for is_train in (True, False):
        augmentation = datasets.build_augmentation(is_train, args)
        dataset = FastDataset(source, augmentation, is_train, resident=kind == "memory")
        build = datasets.build_train_loader if is_train else datasets.build_eval_loader
        feeds = [datasets.build_prefetcher(build(dataset, args, ranks, r)) for r in range(ranks)]
        for epoch in range(2 if is_train else 1):
            if is_train:
                [feed.sampler.set_epoch(epoch) for feed in feeds]
            seen = Counter(t for feed in feeds for batch in feed for t in batch.targets.tolist())
            # ranks train on as many images each, so that one comes twice on three of them; and a
            # rank on whole batches, so that one is left out on one
            total = 41 if not is_train else 40 if ranks == 1 else 42
            assert (sum(seen.values()), len(seen)) == (total, min(total, 41))


def test_augmentation_of_the_flags():
    assert augmentation() == Augmentation(
        *(224, "random-resized"),
        hflip=0.5,
        policy="rand-m9-mstd0.5-inc1",
        color_jitter=0.4,
        erase_prob=0.25,
    )
    words = ("--input-size", 80, "--train-interpolation", "random", "--recount", 2)
    src = augmentation("--src", "--ThreeAugment", "--remode", "const", "--reprob", 1, *words)
    assert src == Augmentation(*(80, "reflected", 1.0, "random", 0.5, "3a", 0.4, 1, "const", 2))
    plain = augmentation("--std-aug", "--src", "--input-size", 32)
    assert plain == Augmentation(32, "padded", hflip=0.5)
    digits = datasets.build_augmentation(True, flags("--aa", "original", "--color-jitter", 0.1))
    assert (digits.size, digits.crop, digits.hflip) == (32, "padded", 0)
    assert (digits.policy, digits.color_jitter) == ("original", 0.1)
    words = ("--input-size", 96, "--eval-crop-ratio", 0.75)
    assert augmentation(*words, is_train=False) == Augmentation(96, "center", 0.75)
    assert augmentation("--input-size", 32, is_train=False).crop == "squash"


def test_paths_of_any_kind(tmp_path):
    names = ["a b.png", "ü.png", os.fsdecode(b"\xff\xfe.png"), "x" * 99 + ".png"]
    source = files(tmp_path, {name: encode(photograph(5, 6), "PNG") for name in names})
    assert [source.name(i) for i in range(4)] == [str(tmp_path / name) for name in names]
    assert all(source.open(i).size == (5, 6) for i in range(4))


def test_real_images(shared, tmp_path):
    source = files(tmp_path, {f"{i}.jpg": x for i, x in enumerate(real_photographs(shared, 64))})
    made = source, augmentation("--reprob", 0), True
    fast, draws = FastDataset(*made), draws_of(source, 1)
    raw = fast.__getitems__(draws)
    expected = AugmentedDataset(*made).__getitems__(draws).images
    error = difference(eval_feed(fast).finalize(raw).images, expected, raw.boxes)
    assert error.mean() < MEAN_BOUND and error.mean((1, 2, 3)).max() < IMAGE_BOUND


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
    feed = train_feed(datasets.build_dataset(True, args)[0], args)
    kept = [(batch.images, batch.images.clone()) for batch in feed]
    assert len(kept) == 8 and all(torch.equal(*pair) for pair in kept)
