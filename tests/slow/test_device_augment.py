"""What augmentation asks of a CUDA device that is not there."""

WAITS = ("sync_stream", "sync_event", "sync_device", "sync_copy", "copy_h2d_pageable", "copy_d2h")


def test_augmentation_of_a_batch_is_few_kernels_and_bytes(count_on_device):
    (found,) = count_on_device("augment", "--batch-size", 64, "--input-size", 224)
    assert not {*WAITS} & {*found}, found
    assert found["dtype"] == "float16" and found["shape"] == [64, 3, 224, 224]
    assert found["operations"] <= 150
    assert found["gigabytes"] <= 1
    assert found["gigabytes_float64"] <= 0.01
    assert found["copy_h2d"] <= 4  # images, targets, operations, boxes


def test_no_augmentation_of_resident_images_waits(count_on_device):
    """Nor of other options: both filters, later boxes over earlier ones, float32 coordinates."""
    words = ("--resident", "--input-size", 32, "--train-interpolation", "random", "--vflip", 0.5)
    for more in (("--recount", 3, "--remode", "rand"), ("--aa", "original", "--in-chans", 1)):
        (found,) = count_on_device("augment", *words, *more, "--reprob", 0.9)
        assert not {*WAITS} & {*found}, found
        assert found["operations"] <= 200 and found["copy_h2d"] <= 6
