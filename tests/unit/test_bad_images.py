"""Damaged, unusual and hostile images: the outcome of each, and of the runs that read it.

``CORPUS`` is the table: file name, bytes, outcome. Where Pillow defines the outcome (garbage in
the middle of a JPEG still decodes), the table says so.
"""

import gzip
import io
import os
import struct
import warnings
import zlib
from collections import Counter
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from loading import refused
from PIL import Image, ImageFile
from torchvision import transforms

import datasets
from pipeline.images import CorruptImageError, load_image
from training.flags import parse_args

ORANGE = (200, 100, 50)
SIZE = (48, 40)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8))


class Converted(NamedTuple):
    """Decodes to RGB of this size, with this pixel in the corner where it is defined."""

    size: tuple[int, int] = SIZE
    pixel: tuple[int, int, int] | None = None
    tolerance: int = 0


class Error(NamedTuple):
    """Is refused with a CorruptImageError that names ``value``."""

    value: str = ""


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def flat(mode, colour, size=(8, 6)):
    return Image.new(mode, size, colour)


def cut(data, share):
    return data[: int(len(data) * share)]


def patched(data, offset, patch):
    return data[:offset] + patch + data[offset + len(patch) :]


def sof(offset, patch):
    """A JPEG with ``patch`` at ``offset`` of its start-of-frame segment.

    The segment: marker (2 bytes), length (2), precision (1), height (2), width (2), components.
    """
    return patched(JPEG, JPEG.index(b"\xff\xc0") + offset, patch)


def exif(payload):
    """A JPEG with an EXIF segment of these bytes."""
    body = b"Exif\0\0" + payload
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + JPEG[2:]


def oriented(image):
    tags = Image.Exif()
    tags[0x0112] = 6  # shown turned by 90 degrees
    return encode(image, "JPEG", exif=tags)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


IEND = chunk(b"IEND", b"")


def png(width, height, depth, colour, rows, *chunks, interlace=0, end=b""):
    """A PNG of ``rows``, each with its filter byte, after ``chunks``; colour type as in IHDR."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + data + end + IEND


def tiff(tags, pixels=bytes(48), endian="<", next_page=0):
    """A TIFF of 8x6 pixels in one strip at byte 8; ``tags`` is ``{tag: value below 2**16}``."""
    usual = {256: 8, 257: 6, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 6, 279: len(pixels)}
    tags = sorted((usual | tags).items())
    fields = b"".join(struct.pack(endian + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    start = (b"II" if endian == "<" else b"MM") + struct.pack(endian + "HI", 42, 8 + len(pixels))
    directory = struct.pack(endian + "H", len(tags)) + fields + struct.pack(endian + "I", next_page)
    return start + pixels + directory


def icon(data):
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 8, 6, 0, 0, 1, 16, len(data), 22) + data


def integers(values, kind="<i4", sample_format=2):
    """A TIFF of one grey channel with 32-bit values."""
    pixels = np.resize(np.asarray(values, kind), 48).tobytes()
    return tiff({258: 32, 339: sample_format}, pixels)


def frames(file_format, mode="RGB", **options):
    images = [flat("RGB", colour).convert(mode) for colour in (ORANGE, "blue", "green")]
    return encode(images[0], file_format, save_all=True, append_images=images[1:], **options)


JPEG = encode(NOISE, "JPEG", quality=90)
PNG = encode(NOISE, "PNG")
SHEER = flat("RGBA", (*ORANGE, 9))
CMYK = (10, 120, 200, 30)  # by hand: (255 - c) (255 - k) / 255 each, rounded as below
INK = (216, 119, 49)
CMYK_JPEG = encode(flat("CMYK", CMYK), "JPEG", quality=100)  # values inverted, as Adobe does
ADOBE = CMYK_JPEG.index(b"Adobe")
# Y 200 without chroma is 55 in each of inverted C, M and Y, thus 200, under 30 of black.
YCCK = encode(flat("CMYK", (55, 127, 127, 30)), "JPEG", quality=100)
GREY16 = np.tile(np.array([25700, 0, 128, 129, 32768, 65535, 257, 256], np.uint16), (6, 1))
GREY16_IN_8 = [100, 0, 0, 1, 128, 255, 1, 1]
GIF_START = b"GIF89a\x08\0\x06\0\0\0\0"
SIX = b"\xc8" * 6
PALETTE = chunk(b"PLTE", bytes([*ORANGE, 0, 0, 255]))
BOMB = b"a\0\0" + zlib.compress(bytes(10**7))
REFUSED = Error()
ORANGE_8X6 = Converted((8, 6), ORANGE)
GREY_8X6 = Converted((8, 6), (100,) * 3)
DARK_8X6 = Converted((8, 6), (99,) * 3)
INK_8X6 = Converted((8, 6), INK, 2)
WHITE_8X6 = Converted((8, 6), (255,) * 3, 1)
ORANGE_8X1, ORANGE_2X1, ORANGE_1X1 = (Converted((n, 1), ORANGE) for n in (8, 2, 1))
GREY_1X1 = Converted((1, 1), (100,) * 3)
CORNER = Converted(SIZE, NOISE.getpixel((0, 0)))

CORPUS = [
    # no image at all
    ("nothing.jpg", b"", Error("empty")),
    ("one_byte.jpg", b"\xff", REFUSED),
    ("zeros.png", bytes(4096), REFUSED),
    ("text.jpg", b"not an image\n" * 99, REFUSED),
    ("page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", REFUSED),
    ("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='6'/>", REFUSED),
    ("gzip.png", gzip.compress(PNG), REFUSED),
    ("hdf5.jpg", b"\x89HDF\r\n\x1a\n" + bytes(99), REFUSED),
    ("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EOF\n", REFUSED),
    ("pcx.png", encode(NOISE, "PCX"), REFUSED),  # Pillow reads it, but not among our formats
    # truncated
    ("jpeg_10.jpg", cut(JPEG, 0.1), REFUSED),
    ("jpeg_50.jpg", cut(JPEG, 0.5), REFUSED),
    ("jpeg_last_byte.jpg", JPEG[:-1], REFUSED),
    ("jpeg_progressive_50.jpg", cut(encode(NOISE, "JPEG", progressive=True), 0.5), REFUSED),
    ("png_10.png", cut(PNG, 0.1), REFUSED),
    ("png_50.png", cut(PNG, 0.5), REFUSED),
    ("png_last_byte.png", PNG[:-1], CORNER),
    ("png_without_iend.png", PNG[:-12], CORNER),
    ("gif_10.jpg", cut(encode(NOISE, "GIF"), 0.1), REFUSED),
    ("gif_50.jpg", cut(encode(NOISE, "GIF"), 0.5), REFUSED),
    ("webp_50.webp", cut(encode(NOISE, "WEBP"), 0.5), REFUSED),
    ("bmp_50.bmp", cut(encode(NOISE, "BMP"), 0.5), REFUSED),
    ("tiff_50.tif", cut(encode(NOISE, "TIFF"), 0.5), REFUSED),
    ("tiff_deflate_50.tif", cut(encode(NOISE, "TIFF", compression="tiff_deflate"), 0.5), REFUSED),
    ("ppm_50.ppm", cut(encode(NOISE, "PPM"), 0.5), REFUSED),
    # damaged JPEG
    ("jpeg_trailing_garbage.jpg", JPEG + b"garbage" * 99, Converted()),
    ("jpeg_zeros_within.jpg", patched(JPEG, len(JPEG) // 2, bytes(40)), Converted()),
    ("jpeg_early_end.jpg", patched(JPEG, len(JPEG) // 2, b"\xff\xd9" * 20), Converted()),
    ("jpeg_start_only.jpg", JPEG[:2], REFUSED),
    ("jpeg_no_quantisation.jpg", JPEG.replace(b"\xff\xdb", b"\xff\xfe"), REFUSED),
    ("jpeg_arithmetic.jpg", sof(1, b"\xc9"), Converted()),  # garbage: the data are Huffman's
    ("jpeg_lossless.jpg", sof(1, b"\xc3"), REFUSED),
    ("jpeg_12_bits.jpg", sof(4, b"\x0c"), REFUSED),
    ("jpeg_no_height.jpg", sof(5, bytes(2)), REFUSED),
    ("jpeg_no_width.jpg", sof(7, bytes(2)), REFUSED),
    ("jpeg_no_components.jpg", sof(9, b"\0"), REFUSED),
    ("jpeg_5_components.jpg", sof(9, b"\5"), REFUSED),
    ("jpeg_bomb.jpg", sof(5, b"\xff\xdc\xff\xdc"), Error("4290250000 pixels")),
    # unusual JPEG
    ("jpeg_grey.jpg", encode(flat("L", 99), "JPEG"), Converted((8, 6), (99, 99, 99), 1)),
    ("jpeg_cmyk.jpg", CMYK_JPEG, INK_8X6),
    # Pillow takes the values as inverted all the same
    ("jpeg_cmyk_unmarked.jpg", CMYK_JPEG[: ADOBE - 4] + CMYK_JPEG[ADOBE + 12 :], INK_8X6),
    ("jpeg_ycck.jpg", patched(YCCK, ADOBE + 11, b"\2"), Converted((8, 6), (49, 49, 49), 2)),
    ("jpeg_rotated.jpg", oriented(NOISE), Converted()),  # the orientation is not applied
    ("jpeg_huge_exif.jpg", exif(bytes(65000)), Converted()),
    ("jpeg_broken_exif.jpg", exif(b"II*\0\xff\xff\xff\xff" + b"\xff" * 40), Converted()),
    ("jpeg_broken_profile.jpg", encode(NOISE, "JPEG", icc_profile=b"broken"), Converted()),
    # damaged PNG
    ("png_header_crc.png", patched(PNG, 29, bytes(4)), REFUSED),
    ("png_data_crc.png", patched(PNG, len(PNG) - 16, bytes(4)), Converted()),
    ("png_data.png", patched(PNG, 60, b"\xff" * 40), REFUSED),
    ("png_no_width.png", png(0, 6, 8, 2, b""), REFUSED),
    ("png_no_height.png", png(8, 0, 8, 2, b""), REFUSED),
    ("png_too_few_rows.png", png(8, 6, 8, 0, bytes(9)), Converted((8, 6))),
    ("png_filter.png", png(8, 1, 8, 0, b"\x09" + bytes(8)), REFUSED),
    ("png_without_palette.png", png(8, 1, 8, 3, bytes(9)), Converted((8, 1))),
    ("png_bomb.png", png(60000, 60000, 8, 2, bytes(99)), Error("3600000000 pixels")),
    ("png_text_bomb.png", png(8, 1, 8, 0, bytes(9), chunk(b"zTXt", BOMB)), REFUSED),
    ("png_profile_bomb.png", png(8, 1, 8, 0, bytes(9), chunk(b"iCCP", BOMB)), REFUSED),
    ("png_trailing_text_bomb.png", png(8, 1, 8, 0, bytes(9), end=chunk(b"zTXt", BOMB)), REFUSED),
    # unusual PNG
    ("png_1_bit.png", encode(flat("1", 1), "PNG"), Converted((8, 6), (255, 255, 255))),
    ("png_2_bits.png", png(4, 1, 2, 0, b"\0\x9b"), Converted((4, 1), (170, 170, 170))),
    ("png_4_bits.png", png(2, 1, 4, 0, b"\0\x9b"), Converted((2, 1), (153, 153, 153))),
    ("png_16_bits.png", encode(Image.fromarray(GREY16), "PNG"), GREY_8X6),
    ("png_16_bits_clear.png", png(1, 1, 16, 0, b"\0dd", chunk(b"tRNS", b"dd")), GREY_1X1),
    # Pillow keeps the upper byte of each value
    ("png_rgb_16_bits.png", png(1, 1, 16, 2, b"\0\xc8\xffd\0002\x80"), ORANGE_1X1),
    ("png_rgb_16_clear.png", png(1, 1, 16, 2, b"\0\xc8\xc8dd22", chunk(b"tRNS", SIX)), ORANGE_1X1),
    ("png_grey_alpha.png", encode(flat("LA", (99, 0)), "PNG"), DARK_8X6),
    ("png_rgba.png", encode(SHEER, "PNG"), ORANGE_8X6),
    ("png_palette.png", png(8, 1, 1, 3, b"\0\x55", PALETTE), ORANGE_8X1),
    ("png_p_alpha.png", png(8, 1, 1, 3, b"\0U", PALETTE, chunk(b"tRNS", b"\0\x80")), ORANGE_8X1),
    # seven passes, of which 2x1 pixels have two: one pixel each
    ("png_interlaced.png", png(2, 1, 8, 2, b"\0\xc8d2" + bytes(4), interlace=1), ORANGE_2X1),
    ("png_animated.png", frames("PNG"), ORANGE_8X6),
    # other formats; the name does not matter
    ("bmp.jpg", encode(NOISE, "BMP"), CORNER),
    ("webp.jpg", encode(NOISE, "WEBP", lossless=True), CORNER),
    ("webp_animated.webp", frames("WEBP", lossless=True), ORANGE_8X6),
    ("gif.png", encode(flat("RGB", ORANGE), "GIF"), ORANGE_8X6),
    ("gif_animated.png", frames("GIF"), ORANGE_8X6),
    ("gif_without_frames.jpg", GIF_START + b";", REFUSED),
    ("gif_no_width.jpg", b"GIF89a\0\0\x06\0\0\0\0;", REFUSED),
    ("icon.png", encode(flat("RGBA", (*ORANGE, 255)), "ICO", sizes=[(8, 6)]), ORANGE_8X6),
    ("icon_16_bits.png", icon(encode(Image.fromarray(GREY16), "PNG")), GREY_8X6),
    ("jpeg2000.jpg", encode(flat("RGB", ORANGE), "JPEG2000"), ORANGE_8X6),
    ("avif.jpg", encode(flat("RGB", ORANGE), "AVIF"), Converted((8, 6), ORANGE, 3)),
    ("ppm.jpg", encode(flat("RGB", ORANGE), "PPM"), ORANGE_8X6),
    ("ppm_lies.ppm", b"P6 800 600 255\n" + bytes(144), REFUSED),
    ("ppm_bomb.ppm", b"P6 60000 60000 255\n" + bytes(144), Error("3600000000 pixels")),
    ("ppm_without_size.ppm", b"P6\n", REFUSED),
    ("pgm_16_bits.pgm", b"P5 1 1 65535\n\x64\x64", GREY_1X1),
    ("pfm_float.ppm", b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5), Error("mode F")),
    ("bmp_no_width.bmp", patched(encode(NOISE, "BMP"), 18, bytes(4)), REFUSED),
    # TIFF
    ("tiff_cmyk.tif", encode(flat("CMYK", CMYK), "TIFF"), Converted((8, 6), INK)),
    ("tiff_ycbcr.tif", encode(flat("YCbCr", (99, 128, 128)), "TIFF"), DARK_8X6),
    ("tiff_lab.tif", encode(flat("LAB", (255, 128, 128)), "TIFF"), WHITE_8X6),
    ("tiff_palette_alpha.tif", encode(SHEER.convert("PA"), "TIFF"), ORANGE_8X6),
    ("tiff_rgbx.tif", encode(flat("RGBX", (*ORANGE, 9)), "TIFF"), ORANGE_8X6),
    ("tiff_pages.tif", frames("TIFF"), ORANGE_8X6),
    ("tiff_circular.tif", tiff({}, bytes([99] * 48), next_page=56), DARK_8X6),
    ("tiff_tiled.tif", tiff({322: 16, 323: 16, 324: 8, 325: 256}, bytes([99] * 256)), DARK_8X6),
    ("tiff_16_bits.tif", encode(Image.fromarray(GREY16), "TIFF"), GREY_8X6),
    ("tiff_16_bits_big_endian.tif", tiff({258: 16}, GREY16.astype(">u2").tobytes(), ">"), GREY_8X6),
    ("tiff_32_bits_of_16.tif", integers([25700, 65535]), Converted((8, 6), (100, 100, 100))),
    ("tiff_32_bits.tif", integers([25700, 65536]), Error("25700..65536")),
    ("tiff_negative.tif", integers([-1, 5]), Error("-1..5")),
    ("tiff_float.tif", integers([0.5], "<f4", 3), Error("mode F")),
    ("tiff_nan.tif", integers([np.nan], "<f4", 3), Error("mode F")),
    ("tiff_no_width.tif", tiff({256: 0}), REFUSED),
    ("tiff_strip_beyond_end.tif", tiff({273: 60000}), REFUSED),
    ("tiff_12_bits.tif", tiff({258: 12}, b"\x64\x66\x46" * 24), GREY_8X6),
    # sizes
    ("one_pixel.png", encode(flat("RGB", ORANGE, (1, 1)), "PNG"), ORANGE_1X1),
    ("one_by_two.png", encode(flat("RGB", ORANGE, (1, 2)), "PNG"), Converted((1, 2), ORANGE)),
    ("one_by_many.png", encode(flat("RGB", ORANGE, (1, 999)), "PNG"), Converted((1, 999), ORANGE)),
    ("wide.png", encode(flat("RGB", ORANGE, (30000, 10)), "PNG"), Converted((30000, 10), ORANGE)),
    ("high.png", encode(flat("RGB", ORANGE, (10, 30000)), "PNG"), Converted((10, 30000), ORANGE)),
]


REFUSED_NAMES = {name for name, _, outcome in CORPUS if isinstance(outcome, Error)}


@pytest.mark.parametrize(("name", "data", "outcome"), CORPUS, ids=[row[0] for row in CORPUS])
def test_outcome_of(tmp_path, capfd, name, data, outcome):
    path = tmp_path / name
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if isinstance(outcome, Error):
            refused(partial(load_image, path), path, outcome.value, kind=CorruptImageError)
        else:
            image = load_image(path)
            assert (image.mode, image.size) == ("RGB", outcome.size)
            if outcome.pixel is not None:
                errors = np.abs(np.subtract(image.getpixel((0, 0)), outcome.pixel))
                assert errors.max() <= outcome.tolerance
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["png_16_bits.png", "tiff_16_bits.tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path, name):
    (path := tmp_path / name).write_bytes(dict(row[:2] for row in CORPUS)[name])
    pixels = np.asarray(load_image(path))
    np.testing.assert_array_equal(pixels, np.tile(np.array(GREY16_IN_8)[:, None], (6, 1, 3)))


@pytest.mark.parametrize(("limit", "passes"), [(1920, True), (960, True), (959, False)])
def test_many_pixels(tmp_path, monkeypatch, limit, passes):
    """1,920 pixels, with Pillow's limit at, at half of and below half of them."""
    (path := tmp_path / "x.png").write_bytes(PNG)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if passes:
            assert load_image(path).size == SIZE
            return
        monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # is not reached: nothing is held
        refused(partial(load_image, path), path, "1920 pixels", kind=CorruptImageError)


def arguments(folder, *words):
    words = ("--data-path", folder, "--input-size", 48, "--on-corrupt", "skip", *words)
    return parse_args([str(word) for word in words])[0]


BATCH = 8
MIXED = len(CORPUS) + 2  # with a link to nothing and a named pipe
SOUND = -MIXED % BATCH + BATCH  # whole batches, so that training leaves none out
REFUSED_FILES = REFUSED_NAMES | {"link.jpg", "pipe.jpg"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """An image folder of the corpus in both splits, as one of two classes."""
    folder = tmp_path_factory.mktemp("corpus")
    for split in ("train", "val"):
        for name in ("mixed", "sound"):
            (folder / split / name).mkdir(parents=True)
        for name, data, _ in CORPUS:
            (folder / split / "mixed" / name).write_bytes(data)
        (folder / split / "mixed" / "link.jpg").symlink_to(folder / "none.jpg")
        os.mkfifo(folder / split / "mixed" / "pipe.jpg")
        for i in range(SOUND):
            (folder / split / "sound" / f"{i}.png").write_bytes(PNG)
    return folder


@pytest.fixture(scope="module")
def read(corpus):
    """``read(loader, workers) -> (training batches, evaluation batches)``, each read once."""

    @lru_cache
    def read(loader, workers):
        words = ("--num_workers", workers, "--no-repeated-aug", "--loader", loader)
        args = arguments(corpus, "--batch-size", BATCH, *words)
        train, _ = datasets.build_dataset(True, args)
        feed = datasets.build_prefetcher(datasets.build_train_loader(train, args, 1, 0))
        feed.sampler.set_epoch(1)
        val, _ = datasets.build_dataset(False, args)
        evaluated = datasets.build_prefetcher(datasets.build_eval_loader(val, args, 1, 0))
        return list(feed), list(evaluated)

    return read


def test_workers_do_not_change_what_is_read(read):
    for batches, again in zip(read("fast", 0), read("fast", 1), strict=True):
        for batch, other in zip(batches, again, strict=True):
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.targets, other.targets)
            assert batch.corrupt == other.corrupt


@pytest.mark.parametrize(("loader", "workers"), [("fast", 0), ("timm", 1)])
def test_runs_over_the_corpus(corpus, read, loader, workers):
    trained, evaluated = read(loader, workers)
    for split, batches in (("train", trained), ("val", evaluated)):
        messages = {message for batch in batches for message in batch.corrupt}
        start = f"{corpus}/{split}/mixed/"
        assert {m.partition(start)[2].partition(":")[0] for m in messages} == REFUSED_FILES
    targets = Counter(torch.cat([batch.targets for batch in trained]).tolist())
    assert targets == {0: MIXED, 1: SOUND}
    assert all(batch.images.shape == (BATCH, 3, 48, 48) for batch in trained)
    left_out = sum(len(batch.corrupt) for batch in evaluated)
    assert left_out == len(REFUSED_FILES)
    assert sum(len(batch.images) for batch in evaluated) + left_out == MIXED + SOUND


def test_replacement_is_the_next_sound_image_of_the_class(corpus):
    train, _ = datasets.build_dataset(True, arguments(corpus, "--loader", "timm"))
    train.transform = transforms.ToTensor()
    first = np.flatnonzero(train.targets == 0)
    names = [os.path.basename(train.source.name(index)) for index in first]
    sound = [i for i, name in enumerate(names) if name not in REFUSED_FILES]
    for index in set(range(len(names))) - set(sound):
        after = next((i for i in sound if i > index), sound[0])
        sample, expected = train[index], train[after]
        assert torch.equal(sample.image, expected.image)
        assert len(sample.corrupt) == (after - index) % len(names)
        assert (sample.target, expected.corrupt) == (0, ())
    assert names[-1] in REFUSED_FILES  # the first follows the last
