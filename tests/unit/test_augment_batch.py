"""What batches on a GPU get instead of Pillow's own arithmetic, tried on the CPU."""

import numpy as np
import pytest
import torch
from loading import eval_feed, flags, seed_all
from test_augment import (
    FILL,
    POLICIES,
    geometric,
    odd_images,
    pixels_of,
    policy_of,
    to_batch,
)

import datasets
from pipeline import augment_device
from pipeline.augment_ops import Kind, Operation, PolicyRecorder, encode
from pipeline.fast import FastDataset
from pipeline.prefetch import BatchFinalizer
from pipeline.sources.base import Pixels
from pipeline.upload import upload

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def differences(images, draws, slots):
    """Absolute differences of sampling in float32 from Pillow's, and Pillow's pixels."""
    batch = to_batch(images)
    encoded = torch.from_numpy(np.stack([encode(operations, slots) for operations in draws]))
    exact, found = (
        augment_device.augment(batch, encoded, FILL, exact=exact).int() for exact in (True, False)
    )
    return (exact - found).abs(), exact


@pytest.mark.parametrize(
    "pixels", list(odd_images()), ids=lambda pixels: "x".join(map(str, pixels.shape))
)
def test_affine_sampling_in_float32_is_pillows_but_for_a_unit(pixels):
    """Positions that are rational numbers often give whole values, rounded by chance."""
    height, width, _ = pixels.shape
    operations = list(geometric(width, height))
    error, expected = differences([pixels] * len(operations), [[o] for o in operations], 1)
    assert error.max() <= 1 and (error > 0).float().mean() < 2e-3
    fill = torch.tensor(FILL).view(3, 1, 1)
    assert ((expected == fill).all(1) <= (error == 0).all(1)).all()  # what is outside is the fill
    if len(np.unique(pixels.reshape(-1, 3), axis=0)) == 1:
        assert error.max() == 0


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_affine_sampling_in_float32_of_sampled_operations(interpolation):
    """Of operations and magnitudes that a policy samples, one value in 2000, or 1000 (bilinear)."""
    recorder = PolicyRecorder(policy_of(POLICIES[0], interpolation), 96, 80)
    seed_all(0)
    draws = [recorder.sample() for _ in range(200)]
    draws = [[o for o in draw if o.kind == Kind.AFFINE][:1] for draw in draws]
    draws = [draw for draw in draws if draw]
    limit = 5e-4 if interpolation == "bicubic" else 1e-3
    error, _ = differences([pixels_of(96, 80, i % 4) for i in range(len(draws))], draws, 1)
    assert len(draws) > 60
    assert error.max() <= 1 and (error > 0).float().mean() < limit


def test_slots_are_done_in_order():
    """Of images that a batch sorts, each slot in its own way, each keeps its place."""
    invert, solarize = Operation(Kind.INVERT), Operation(Kind.SOLARIZE, (100,))
    shift = Operation(Kind.AFFINE, (1, 0, 3, 0, 1, 0), True)
    draws = [[shift, invert], [], [invert, solarize], [solarize, shift], [invert, shift], [shift]]
    images = [pixels_of(40, 32, seed) for seed in range(len(draws))]
    together, _ = differences(images, draws, 3)
    assert together.max() == 0
    encoded = [torch.from_numpy(encode(draw, 3))[None] for draw in draws]
    found = augment_device.augment(to_batch(images), torch.cat(encoded), FILL, exact=False)
    for image, rows, one in zip(images, encoded, found, strict=True):
        assert torch.equal(one, augment_device.augment(to_batch([image]), rows, FILL)[0])


@pytest.mark.parametrize("words", [(), ("--in-chans", 1)], ids=["rgb", "grey"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_normalizes_to_the_last_bit(words, dtype):
    args = flags("--data-set", "CIFAR10", "--input-size", 32, *words)
    pixels = np.arange(3 * 32 * 32, dtype=np.uint8).reshape(1, 32, 32, 3)
    source = Pixels(pixels, [0], ["a"])
    dataset = FastDataset(source, datasets.build_augmentation(False, args), False)
    finalize = BatchFinalizer(dataset, CPU, dtype)
    images = to_batch(pixels)[:, : len(dataset.augmentation.mean)]
    assert len(images.unique()) == 256 or images.shape[1] == 1
    expected = finalize.normalized(images).to(dtype)
    found = finalize.looked_up(images)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert eval_feed(dataset).finalize(dataset.__getitems__([0])).images.shape == images.shape


def test_upload_keeps_values_types_and_shapes():
    arrays = {
        "bytes": np.uint8([1, 2, 255]),
        ("a", 1): np.arange(12.0).reshape(3, 4),
        "scalar": np.int32(7) + np.zeros((), np.int32),
        "none": np.zeros((0, 4), np.float32),
        "turned": np.arange(6, dtype=np.int64).reshape(2, 3).T,
        "mask": np.array([[True], [False]]),
    }
    moved = upload(arrays, CPU)
    assert list(moved) == list(arrays)
    for key, array in arrays.items():
        assert moved[key].dtype == torch.from_numpy(np.array(array)).dtype
        assert moved[key].shape == np.shape(array)
        np.testing.assert_array_equal(moved[key].numpy(), array)
    assert upload({}, CPU) == {}
