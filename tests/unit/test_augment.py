"""timm's augmentation as recorded draws, applied by image on the host or by batch."""

import functools
import pickle
import random

import numpy as np
import pytest
import torch
from loading import decoded, real_photographs, seed_all
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import functional

from pipeline import augment_device, augment_host
from pipeline.augment_ops import (
    ENCODED,
    ErasingRecorder,
    Kind,
    Operation,
    PolicyRecorder,
    UnsupportedPolicy,
    encode,
    rotation,
)
from pipeline.augmentation import Augmentation

pytestmark = pytest.mark.usefixtures("one_thread")
FILL = (124, 116, 104)  # ImageNet's mean
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
POLICIES = (
    "rand-m9-mstd0.5-inc1",
    "rand-m10-n3-mstd1-inc0",
    "rand-m9-n4-mstd101-tweights",
    "original",
    "v0",
    "v0r-mstd0.5",
)
SIZES = ((88, 64), (50, 83), (40, 32))  # width, height


@functools.cache
def pixels_of(width, height, seed=0):
    """A read-only image ``H W 3`` with smooth parts, noise, and flat black and white."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    pixels = np.clip(smooth + generator.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)
    pixels[: height // 4, : width // 4] = 255
    pixels[-height // 4 :, : width // 4] = 0
    pixels.flags.writeable = False
    return pixels


def policy_of(name, interpolation="bicubic"):
    """A policy that shifts images by up to 30 pixels."""
    size = int(30 / 0.45) + 1
    augmentation = Augmentation(size, "padded", interpolation=interpolation, policy=name)
    (policy,) = augmentation.stages().color
    return policy


def states():
    """The states of all generators, in a form that can be compared."""
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()


def to_batch(images):
    """Images ``H W 3`` as ``B 3 H W``, channels last."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def from_batch(batch):
    return batch.permute(0, 2, 3, 1).numpy()


def check_host(found, expected, operations):
    """The host has Pillow's results, but for a unit in a few pixels of large images it moved.

    An operation after that may make more of a unit: equalize, most.
    """
    large = expected.shape[0] * expected.shape[1] >= augment_host.SLIDE_PIXELS
    if not large or not any(operation.kind == Kind.AFFINE for operation in operations):
        return np.testing.assert_array_equal(found, expected, str(operations))
    difference = np.abs(found.astype(int) - expected)
    assert difference.mean() < (0.02 if len(operations) == 1 else 0.1), str(operations)
    assert difference.max() <= 1 or len(operations) > 1, str(operations)


def check_policy(policy, images, seeds):
    """Compare what is drawn and both ways to apply it with the policy itself."""
    height, width, _ = images[0].shape
    recorder = PolicyRecorder(policy, width, height)
    sources, expected, drawn = [], [], []
    for seed in seeds:
        source = images[seed % len(images)]
        seed_all(seed)
        wanted = np.asarray(policy(Image.fromarray(source)))
        after = states()
        seed_all(seed)
        operations = recorder.sample()
        assert states() == after
        check_host(augment_host.apply(source, operations, recorder.fill), wanted, operations)
        sources.append(source)
        expected.append(wanted)
        drawn.append(operations)
    encoded = np.stack([encode(operations, recorder.slots) for operations in drawn])
    batch = augment_device.augment(to_batch(sources), torch.from_numpy(encoded), recorder.fill)
    np.testing.assert_array_equal(from_batch(batch), np.stack(expected))
    return {kind for operations in drawn for kind, *_ in operations}


@pytest.mark.parametrize(
    ("name", "interpolation"),
    [*((name, "random") for name in POLICIES), *((POLICIES[0], one) for one in FILTERS)],
)
def test_policies_are_those_of_timm(name, interpolation):
    for size in SIZES:
        images = [pixels_of(*size, seed) for seed in range(4)]
        kinds = check_policy(policy_of(name, interpolation), images, range(24))
        assert len(kinds) >= 4


def test_policies_on_photographs(shared):
    images = [np.asarray(decoded(data).resize((160, 120))) for data in real_photographs(shared, 8)]
    assert len(check_policy(policy_of(POLICIES[0], "random"), images, range(96))) == 11


def geometric(width, height):
    for values in (
        (1, 0.27, 0, 0, 1, 0),
        (1, -0.2993, 0, 0, 1, 0),
        (1, 0, 0, 0.1234, 1, 0),
        (1, 0, 0, -0.3, 1, 0),
        (1, 0, 0.405 * width, 0, 1, 0),
        (1, 0, -7.5, 0, 1, 0),
        (1, 0, 6, 0, 1, 0),
        (1, 0, 0, 0, 1, -0.405 * height),
        (1, 0, 0, 0, 1, 0.25),
        (1, 0, 0, 0, 1, height - 0.75),
        (1, 0, -width - 1, 0, 1, 0),  # nothing is left
        (1, 0, 0, 0, 1, 250),
        rotation(-29.7, width, height),
        rotation(180, width, height),
    ):
        yield from (Operation(Kind.AFFINE, values, bicubic) for bicubic in (True, False))


def pointwise():
    for kind in (Kind.AUTO_CONTRAST, Kind.EQUALIZE, Kind.INVERT):
        yield Operation(kind)
    for threshold in (0, 1, 77, 255, 256):
        yield Operation(Kind.SOLARIZE, (threshold,))
    for addend in (0, 60, 128):
        yield Operation(Kind.SOLARIZE_ADD, (addend, 128))
    yield Operation(Kind.SOLARIZE_ADD, (100, 200))
    for bits in range(1, 8):
        yield Operation(Kind.POSTERIZE, (bits,))
    for kind in (Kind.COLOR, Kind.CONTRAST, Kind.BRIGHTNESS, Kind.SHARPNESS):
        yield from (Operation(kind, (factor,)) for factor in (0, 0.1, 0.731, 1, 1.37, 1.9))


BY_PILLOW = {
    Kind.AUTO_CONTRAST: auto_augment.auto_contrast,
    Kind.EQUALIZE: auto_augment.equalize,
    Kind.INVERT: auto_augment.invert,
    Kind.SOLARIZE: auto_augment.solarize,
    Kind.SOLARIZE_ADD: auto_augment.solarize_add,
    Kind.POSTERIZE: auto_augment.posterize,
    Kind.COLOR: auto_augment.color,
    Kind.CONTRAST: auto_augment.contrast,
    Kind.BRIGHTNESS: auto_augment.brightness,
    Kind.SHARPNESS: auto_augment.sharpness,
}


def by_pillow(pixels, operation):
    image = Image.fromarray(pixels)
    if operation.kind == Kind.AFFINE:
        resample = FILTERS["bicubic" if operation.bicubic else "bilinear"]
        method = Image.Transform.AFFINE
        image = image.transform(image.size, method, operation.values, resample, fillcolor=FILL)
    else:
        image = BY_PILLOW[operation.kind](image, *operation.values)
    return np.asarray(image)


def odd_images():
    """Images on which special cases of histograms and borders matter."""
    yield pixels_of(70, 61)
    yield pixels_of(7, 3)
    yield pixels_of(1, 1)
    yield pixels_of(2, 5)
    yield np.full((66, 70, 3), (0, 9, 255), np.uint8)
    yield np.where(pixels_of(80, 72) < 100, 20, 90).astype(np.uint8)


@pytest.mark.parametrize(
    "pixels", list(odd_images()), ids=lambda pixels: "x".join(map(str, pixels.shape))
)
def test_each_operation_is_pillows(pixels):
    height, width, _ = pixels.shape
    operations = [*geometric(width, height), *pointwise()]
    encoded = np.stack([encode([operation], 2) for operation in operations])
    batch = to_batch([pixels] * len(operations))
    result = from_batch(augment_device.augment(batch, torch.from_numpy(encoded), FILL))
    for operation, image in zip(operations, result, strict=True):
        expected = by_pillow(pixels, operation)
        applied = augment_host.apply(pixels, [operation], FILL)
        check_host(applied, expected, [operation])
        np.testing.assert_array_equal(image, expected, str(operation))
    assert torch.equal(batch, to_batch([pixels] * len(operations)))  # not changed


def test_any_memory_format_and_no_operation():
    images = to_batch([pixels_of(33, 20, seed) for seed in range(3)])
    operations = [[], [Operation(Kind.INVERT)], [Operation(Kind.SHARPNESS, (1.9,))]]
    encoded = torch.from_numpy(np.stack([encode(draw, 2) for draw in operations]))
    result = augment_device.augment(images, encoded, FILL)
    assert torch.equal(result, augment_device.augment(images.contiguous(), encoded, FILL))
    assert torch.equal(result[0], images[0])
    assert torch.equal(result[1], 255 - images[1])
    assert result.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"\[2, 2, 8\]"):
        augment_device.augment(images, encoded[:2], FILL)
    with pytest.raises(ValueError, match=r"\bmeta\b"):
        augment_device.augment(images, encoded.to("meta"), FILL)


def test_encoding():
    operations = [Operation(Kind.AFFINE, (1, 0.5, 3, 0, 1, 2), True), Operation(Kind.COLOR, (0.5,))]
    rows = encode(operations, 3)
    assert rows.dtype == np.float64
    assert rows.tolist() == [[1, 1, 0.5, 3, 0, 1, 2, 1], [8, 0.5, 0, 0, 0, 0, 0, 0], [0] * ENCODED]
    with pytest.raises(ValueError, match=r"\b2\b.*\b1\b"):
        encode(operations, 1)


def test_a_policy_is_not_changed_by_recording():
    policy = policy_of(POLICIES[0])
    before = [vars(operation).copy() for operation in policy.ops]
    recorder = pickle.loads(pickle.dumps(PolicyRecorder(policy, 48, 32)))  # as for workers
    assert (recorder.fill, recorder.slots) == (FILL, 2)
    for _ in range(50):
        recorder.sample()
    assert [vars(operation) for operation in policy.ops] == before


def test_operations_without_effect_are_not_recorded():
    still = [("Rotate", 0), ("ShearX", 0), ("TranslateYRel", 0), ("PosterizeOriginal", 10)]
    parts = [[auto_augment.AugmentOp(name, 1.0, level) for name, level in still]]
    assert PolicyRecorder(auto_augment.AutoAugment(parts), 32, 32).sample() == []


def test_desaturate_is_a_colour_enhancement():
    operation = auto_augment.AugmentOp("Desaturate", 1.0, 5)
    policy = auto_augment.RandAugment([operation], 1)
    assert check_policy(policy, [pixels_of(30, 20)], range(2)) == {Kind.COLOR}


def test_what_cannot_be_recorded_is_named():
    augment_op = auto_augment.AugmentOp
    lanczos = augment_op("ShearX", hparams={"interpolation": Image.Resampling.LANCZOS})
    colours = [augment_op("Invert", hparams={"img_mean": fill}) for fill in (FILL, (1, 2, 3))]
    for policy, named in (
        (auto_augment.auto_augment_transform("3a"), "GaussianBlurRand"),
        (auto_augment.rand_augment_transform("rand-t3a"), r"GaussianBlur\b"),
        (auto_augment.augment_and_mix_transform("augmix-m3"), "AugMixAugment"),
        (auto_augment.RandAugment([lanczos]), "ShearX"),
        (auto_augment.AutoAugment([colours[:1], colours[1:]]), r"Invert.*\(1, 2, 3\)"),
    ):
        with pytest.raises(UnsupportedPolicy, match=named):
            PolicyRecorder(policy, 32, 32)
    black = auto_augment.RandAugment([augment_op("PosterizeIncreasing", 1.0, 10)])
    with pytest.raises(ValueError, match=r"\b0\b"):
        PolicyRecorder(black, 32, 32).sample()


SINGLY = pytest.mark.parametrize("singly", [True, False], ids=["singly", "together"])


def to_tensor(draws, slots):
    """Boxes of each image as ``B K 4``."""
    boxes = torch.zeros(len(draws), slots, 4, dtype=torch.long)
    for sample, drawn in enumerate(draws):
        for slot, box in enumerate(drawn):
            boxes[sample, slot] = torch.tensor(box)
    return boxes


@pytest.mark.parametrize("is_batch", [False, True])
@pytest.mark.parametrize("counts", [(1, None), (1, 3), (2, 2)])
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@SINGLY
def test_boxes_are_those_of_timm(mode, counts, is_batch, singly):
    erasing = RandomErasing(0.5, mode=mode, min_count=counts[0], max_count=counts[1], device="cpu")
    recorder = ErasingRecorder(erasing, 40, 56)
    assert recorder.slots == (counts[1] or counts[0])
    images = torch.full((64, 3, 40, 56), 7.0)
    seed_all(3)
    expected = images.clone()
    if is_batch:
        expected = erasing(expected)
    else:
        expected = torch.stack([erasing(image) for image in expected])
    after = random.getstate()
    seed_all(3)
    draws = [recorder.sample() for _ in images]
    assert random.getstate() == after
    assert erasing.device == "cpu"
    generator = torch.Generator().manual_seed(0)
    boxes = to_tensor(draws, recorder.slots)
    result = augment_device.erase(images, boxes, mode, generator, singly)
    assert result is images
    assert torch.equal(result != 7, expected != 7)
    assert 0.3 < (result != 7).flatten(1).any(1).float().mean() < 0.7
    if mode == "const":
        assert torch.equal(result, expected)


@SINGLY
def test_noise_of_pixels_is_normal_and_independent(singly):
    erase = functools.partial(augment_device.erase, singly=singly)
    images = torch.full((32, 3, 30, 50), 7.0)
    boxes = to_tensor([[(5, 10, 20, 30)]] * 32, 1)
    generator = torch.Generator().manual_seed(0)
    result = erase(images.clone(), boxes, "pixel", generator)
    noise = result[:, :, 5:25, 10:40]
    assert (result == 7).sum() == images.numel() - noise.numel()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs(noise.pow(4).mean() - 3) < 0.2
    assert noise.flatten().unique().numel() > 0.98 * noise.numel()
    correlations = torch.corrcoef(noise.flatten(1))
    assert correlations.triu(1).abs().max() < 0.12  # 1800 numbers each
    assert not torch.equal(result, erase(images.clone(), boxes, "pixel", generator))
    again = erase(images.clone(), boxes, "pixel", generator.manual_seed(0))
    assert torch.equal(result, again)


@SINGLY
def test_noise_of_boxes_is_one_colour_each_and_later_boxes_lie_over_earlier_ones(singly):
    erase = functools.partial(augment_device.erase, singly=singly)
    images = torch.full((2000, 3, 6, 9), 7.0)
    boxes = to_tensor([[(0, 0, 4, 6), (2, 3, 4, 6)]] * 2000, 2)
    result = erase(images, boxes, "rand", torch.Generator().manual_seed(0))
    first, second = result[:, :, 0, 0], result[:, :, 5, 8]
    assert (result[:, :, 2:, 3:] == second[:, :, None, None]).all()
    assert (result[:, :, :2, :6] == first[:, :, None, None]).all()
    assert (result[:, :, :2, 6:] == 7).all()
    colours = torch.cat([first, second], 1)
    assert colours.mean(0).abs().max() < 0.1
    assert (colours.std(0) - 1).abs().max() < 0.1
    assert torch.corrcoef(colours.T).triu(1).abs().max() < 0.1
    with pytest.raises(ValueError, match="noise"):
        erase(images, boxes, "noise")


def test_crop_and_flip_are_torchvisions():
    images = to_batch([pixels_of(33, 20, seed) for seed in range(9)])
    offsets = torch.tensor([(0, 0), (8, 8), (4, 4), (0, 8), (3, 5), (8, 1), (7, 7), (2, 0), (4, 3)])
    crops = augment_device.crop_padded(images, offsets, 4)
    for image, (top, left), crop in zip(images, offsets.tolist(), crops, strict=True):
        expected = functional.crop(functional.pad(image, 4), top, left, 20, 33)
        assert torch.equal(crop, expected)
    mask = torch.arange(9) % 2 == 0
    flipped = augment_device.flip(images, mask)
    assert torch.equal(flipped[mask], functional.hflip(images[mask]))
    assert torch.equal(flipped[~mask], images[~mask])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_the_same_and_is_not_waited_for():
    pixels = pixels_of(70, 61)
    operations = [*geometric(70, 61), *pointwise()]
    encoded = torch.from_numpy(np.stack([encode([operation], 2) for operation in operations]))
    batch = to_batch([pixels] * len(operations))
    boxes, offsets = torch.zeros(len(batch), 2, 4).long(), torch.full((len(batch), 2), 3)
    moved = batch.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmented = augment_device.augment(moved, encoded, FILL)
        cropped = augment_device.flip(
            augment_device.crop_padded(moved, offsets, 4), torch.ones(len(batch)) > 0
        )
        erased = augment_device.erase(moved.float(), boxes, "pixel", torch.Generator("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (augmented.cpu().int() - augment_device.augment(batch, encoded, FILL)).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3
    assert torch.equal(cropped.cpu(), augment_device.crop_padded(batch, offsets, 4).flip(3))
    assert torch.equal(erased, moved.float())
