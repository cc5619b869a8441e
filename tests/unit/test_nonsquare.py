"""Inputs of different height and width: flags, crops, position embeddings, and a whole run."""

from itertools import product

import numpy as np
import pytest
import torch
from conftest import call, error_of, read_log, succeed
from loading import eval_feed, files, flags, photograph, seed_all
from PIL import Image
from small_models import small
from test_bad_images import encode
from test_fast import IMAGE_BOUND, MEAN_BOUND, difference
from timm.data import create_transform
from timm.layers import resample_abs_pos_embed

import datasets
import main
import models
from models import DataConfig
from models.layers.gpsa import positional_attention, positional_tables
from pipeline.augmentation import Augmentation
from pipeline.fast import FastDataset
from pipeline.reference import AugmentedDataset
from samplers import SampleIndex
from tools import predict
from training.parser import Parser, add_input_size

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("224", 224),
        ("224 224", 224),
        ("224 160", (224, 160)),
        ("3 224 160", (224, 160)),
        ("224x160", (224, 160)),
    ],
)
def test_sizes_of_flags_and_recipes(tmp_path, words, size):
    assert flags("--input-size", *words.split()).input_size == size
    path = tmp_path / "recipe.yaml"
    path.write_text(f"input-size: [{', '.join(words.split())}]")
    assert flags("--config", path).input_size == size
    parser = Parser()
    add_input_size(parser)
    parser.add_argument("images", nargs="+")
    parsed = parser.parse_args(["--input-size", *words.split(), "a.png", "b.png"])
    assert (parsed.input_size, parsed.images) == (size, ["a.png", "b.png"])


@pytest.mark.parametrize("words", ["0", "-3", "224.5", "1 224 160", "1 2 3 4", "x", "224 0"])
def test_sizes_that_are_none(words, capsys):
    with pytest.raises(SystemExit) as caught:
        flags("--input-size", *words.split())
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert all(word in last for word in ["--input-size", *words.split()])


@pytest.mark.parametrize("size", [8, (3, 8, 6, 1), (1, 8, 6), (8, True), (8, 0), ()])
def test_sizes_of_data(size):
    if size == 8:
        assert DataConfig().at_size(size).size == 8
        return
    with pytest.raises(models.ModelError):
        DataConfig().at_size(size)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_evaluation_is_timm_s(mode):
    for size, ratio in product([(96, 64), (50, 81), (64, 64)], [0.875, 1.0]):
        ours = Augmentation(size, mode, ratio).compose()
        theirs = create_transform(size, crop_mode=mode, crop_pct=ratio, interpolation="bicubic")
        for image in (photograph(120, 90), photograph(70, 130), photograph(40, 41)):
            found = ours(image)
            assert found.shape == (3, *size)
            assert torch.equal(found, theirs(image))


def test_random_resized_crops_are_timm_s():
    args = flags("--data-path", "x", "--input-size", 96, 64, "--aa", "rand-m9-mstd0.5-inc1")
    ours = datasets.build_transform(True, args)
    theirs = create_transform(
        (96, 64), True, auto_augment=args.aa, interpolation="bicubic", re_prob=0.25, re_mode="pixel"
    )
    for seed in range(8):
        seed_all(seed)
        found = ours(image := photograph(140, 110, seed))
        seed_all(seed)
        assert torch.equal(found, theirs(image))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    sizes = [(250, 187), (187, 250), (100, 80), (900, 600), (64, 64), (30, 400)]
    named = {f"{i}.jpg": encode(photograph(*s, i), "JPEG") for i, s in enumerate(sizes)}
    return files(tmp_path_factory.mktemp("photographs"), named)


@pytest.mark.parametrize("size", [(128, 96), (90, 160), (32, 24)])
@pytest.mark.parametrize("words", [(), ("--src",), ("--std-aug",)])
def test_the_fast_loader_is_the_reference(photographs, size, words):
    args = flags("--data-path", "x", "--input-size", *size, *words)
    made = photographs, datasets.build_augmentation(True, args), True
    draws = [SampleIndex(i, epoch) for i in range(len(photographs)) for epoch in range(2)]
    expected = AugmentedDataset(*made, seed=3).__getitems__(draws).images
    assert expected.shape[2:] == size
    for on_workers in (True, False):
        fast = FastDataset(*made, seed=3, augment=on_workers)
        raw = fast.__getitems__(draws)
        error = difference(eval_feed(fast).finalize(raw).images, expected, raw.boxes)
        assert error.mean() < MEAN_BOUND and error.mean((1, 2, 3)).max() < IMAGE_BOUND
    made = photographs, datasets.build_augmentation(False, args), False
    pairs = (eval_feed(loader(*made)) for loader in (AugmentedDataset, FastDataset))
    assert torch.equal(*(torch.cat([batch.images for batch in feed]) for feed in pairs))


def test_images_on_the_device(image_folder):
    args = flags("--input-size", 32, 24, "--augment-on", "device", "--reprob", 0)
    fast, _ = datasets.build_dataset(True, args)
    args.loader = "timm"
    reference, _ = datasets.build_dataset(True, args)
    draws = [SampleIndex(i) for i in range(20)]
    raw = fast.__getitems__(draws)
    assert fast.resident.shape[1:] == (32, 24, 3)
    expected = reference.__getitems__(draws).images
    assert difference(eval_feed(fast).finalize(raw).images, expected, raw.boxes).max() < 1.1


@pytest.mark.parametrize("name", ["visformer_tiny", "swin_visformer_tiny_v2", "fastvit_sa12"])
def test_gradients(name):
    options = {} if name.startswith("fastvit") else {"img_size": (96, 64)}
    model = small(name, **options).train()
    model(torch.randn(2, 3, 96, 64)).square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)


TOKENS = [("convit_tiny", 16, 0), ("vit_b_16_224", 16, 1)]


@pytest.mark.parametrize(("name", "patch", "prefix"), TOKENS)
@pytest.mark.parametrize("new_head", [False, True])
def test_position_embeddings_are_resampled_from_the_grid_of_the_file(name, patch, prefix, new_head):
    """6 tokens are of 3x2 or of 2x3 patches, and 16 of 4x4 or of 8x2: the file's size tells."""
    for old, new in product([(3, 2), (4, 4), (8, 2), (2, 3)], repeat=2):
        old_size, size = ([patch * side for side in grid] for grid in (old, new))
        source, target = small(name, img_size=old_size), small(name, img_size=size)
        if new_head:
            target.reset_classifier(7)
        saved = {"model": source.state_dict(), "model_name": name, "input_size": old_size}
        report = models.load_weights(target, saved, "x", new_head=new_head)
        expected = resample_abs_pos_embed(source.pos_embed, new, old, prefix)
        assert torch.equal(target.pos_embed, expected)
        assert ("pos_embed" in report.resampled) == (old != new)


def test_gpsa_positions_on_a_grid_of_two_sides():
    """The paper's score of a key at (dx, dy): w . (dx, dy, dx^2 + dy^2)."""
    height, width, weight = 3, 2, torch.randn(4, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    cells = list(product(range(height), range(width)))
    offsets = [[(u - j, v - i) for v, u in cells] for i, j in cells]
    features = [[(dx, dy, dx**2 + dy**2) for dx, dy in row] for row in offsets]
    features = torch.tensor(features, dtype=torch.float64)  # N N 3
    expected = (torch.einsum("qkf,hf->hqk", features, weight)).softmax(-1)
    torch.testing.assert_close(positional_attention(weight, bias, height, width), expected)
    rows, columns = positional_tables(weight, bias, height, width)
    found = torch.einsum("hiu,hjv->hijuv", rows, columns).reshape(expected.shape)
    torch.testing.assert_close(found, expected)


def test_a_size_that_does_not_fit_is_named_before_data_is_read(tmp_path):
    words = ("--data-path", tmp_path / "none", "--device", "cpu", "--input-size", 50, 30)
    for name, right in (("visformer_tiny", "64x32"), ("vit_b_16_224", "48x32")):
        error = error_of(main.main, "--model", name, *words)
        assert "50x30" in error and right in error


RUNS = {"convit_tiny": "embed_dim=16", "test_vit": "depth=1"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_every_program_after_it(image_folder, tmp_path, name):
    output, again = tmp_path / "run", tmp_path / "again"
    data = ["--data-path", image_folder, "--num_workers", 0, "--device", "cpu", "--batch-size", 4]
    words = [*data, "--model", name, "--model-kwargs", RUNS[name]]
    words += ["--input-size", 48, 32, "--epochs", 2, "--warmup-epochs", 0]
    succeed(*words, "--output_dir", output)
    path = output / "checkpoint.pth"
    saved = torch.load(path, weights_only=True)
    assert saved["data_config"]["input_size"] == (3, 48, 32)
    assert tuple(saved["model_kwargs"]["img_size"]) == (48, 32)
    succeed(*words, "--output_dir", again, "--stop-epoch", 1)
    succeed(*words, "--output_dir", again, "--resume", "auto")
    keys = ("train_loss", "test_loss", "ema_loss")
    first, second = ([[line[k] for k in keys] for line in read_log(f)] for f in (output, again))
    assert first == second

    printed = succeed("--eval", "--resume", path, *data)
    assert f"loss {read_log(output)[-1]['test_loss']:.3f}" in printed and "warning" not in printed
    image = image_folder / "val" / "cat" / "0.jpg"
    table = tmp_path / "t.csv"
    status, *_ = call(predict.main, image, "--checkpoint", path, "--device", "cpu", "--csv", table)
    found = models.load_model(path)
    assert (status, found.data_config.input_size) == (0, (48, 32))
    transform = create_transform(**found.data_config.to_timm())
    with torch.no_grad():
        logits = found.model(transform(Image.open(image).convert("RGB"))[None])
    rows = np.genfromtxt(table, delimiter=",", skip_header=1)
    expected = logits.softmax(1).sort(descending=True).values[0].numpy()
    np.testing.assert_allclose(rows[:, -1], expected, rtol=1e-4)
