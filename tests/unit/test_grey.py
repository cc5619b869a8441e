"""--in-chans 1: pixels, augmentation, weights, and a run with every program after it."""

import io

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import call, error_of, read_log, succeed
from exporting import close, export, warm_up_ddp
from loading import files, flags, photograph, refused
from PIL import Image
from small_models import NAMES, meta
from test_bad_images import encode
from test_fast import IMAGE_BOUND, MEAN_BOUND
from timm.models import adapt_input_conv

import datasets
import main
import models
from models import DataConfig, ModelError
from models.data_config import data_config_of
from pipeline.images import decode_image
from pipeline.prefetch import BatchFinalizer
from pipeline.sources.base import Pixels
from samplers import SampleIndex
from tools import convert_checkpoint, predict
from tools.validate import __main__ as validate
from tools.visualize.__main__ import main as visualize

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MEAN, STD = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
RGB = {  # models and arguments that make them small
    "visformer_tiny": {},
    "swin_visformer_tiny_v2": {},
    "convit_tiny": {"embed_dim": 16},
    "fastvit_t8": {},
    "vit_b_32_224": {"depth": 1, "embed_dim": 48},
    "test_vit": {},
    "resnet18": {},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "CMYK", "I;16"])
def test_pixels_are_pillow_s(mode):
    image = photograph(40, 24)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    data = encode(image, "JPEG" if mode == "CMYK" else "PNG")
    found = np.asarray(decode_image(data, "x", is_grey=True))
    expected = Image.open(io.BytesIO(data))
    if mode == "I;16":
        expected = np.asarray(expected).astype(int) // 257
    else:
        expected = np.asarray(expected.convert("RGB").convert("L"))
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, 2))


def test_mean_and_std_are_averages():
    config = DataConfig().with_channels(1)
    assert (config.mean, config.std) == (pytest.approx((MEAN,)), pytest.approx((STD,)))
    assert config.to_timm()["input_size"] == (1, 224, 224) and (
        config.in_chans,
        config.is_grey,
    ) == (1, True)
    assert data_config_of({"data_config": config.record()}, None, "x") == config
    timms = {"input_size": (1, 28, 28), "mean": (0.13,), "std": (0.3,)}
    found = data_config_of({}, timms, "x")
    assert (found.input_size, found.mean, found.std) == ((28, 28), (0.13,), (0.3,))
    refused(lambda: config.with_channels(3), "3", "1", kind=ModelError)
    for wrong in ({"mean": [0.5, 0.5]}, {"mean": [0.5]}):
        with pytest.raises(models.CheckpointError, match=r"x\.pth"):
            data_config_of({"data_config": wrong}, None, "x.pth")


NONE = ["--aa", "", "--reprob", 0, "--color-jitter", 0]
POLICIES = {
    "plain": NONE,
    "rand": ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0],
    "auto": ["--aa", "original", "--reprob", 0],
    "augmix": ["--aa", "augmix-m5-w4", "--reprob", 0],
    "jitter": ["--aa", "", "--reprob", 0, "--color-jitter", 0.4],
    "three": ["--ThreeAugment", "--reprob", 0, "--color-jitter", 0.3, "--src"],
    "rkrc": [*NONE, "--train-crop-mode", "rkrc"],
    "erased": ["--aa", "", "--reprob", 1, "--color-jitter", 0, "--remode", "const"],
}


def batches(folder, is_train, words, source, channels=1):
    """Images of both loaders, and of the fast one as it augments on the device."""
    found = {}
    indices = [SampleIndex(i, epoch) for epoch in range(3) for i in range(len(source))]
    for way in ("timm", "workers", "device"):
        more = ["--loader", "timm"] if way == "timm" else ["--augment-on", way]
        more += ["--data-path", folder, "--in-chans", channels]
        dataset = datasets.augmented(source, is_train, flags(*words, *more))
        batch = dataset.__getitems__(indices)
        found[way] = batch.images if way == "timm" else BatchFinalizer(dataset, CPU)(batch).images
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_makes_one_channel_of_grey_images(policy, tmp_path):
    """The reference's images are those of RGB images of equal channels; the fast ones are alike."""
    source = files(tmp_path, {f"{i}.jpg": encode(photograph(90, 60, i), "JPEG") for i in range(4)})
    words = ["--input-size", 40, *POLICIES[policy], "--train-crop-mode", "rrc"]
    words = words[:-2] if {"--src", "rkrc"} & {*words} else words
    found = batches(tmp_path, True, words, source)
    for images in found.values():
        assert images.shape == (12, 1, 40, 40) and images.dtype == torch.float32
    for way in ("workers", "device"):
        errors = ((found[way] - found["timm"]).abs() * STD * 255).mean((1, 2, 3))
        assert errors.mean() < 2 * MEAN_BOUND and errors.max() < IMAGE_BOUND


def test_evaluation_is_exact(tmp_path):
    image = photograph(90, 60)
    source = files(tmp_path, {"a.png": encode(image, "PNG"), "b.png": encode(image, "PNG")})
    found = batches(tmp_path, False, ["--input-size", 40], source)
    resized = image.convert("L").resize((67, 45), 3).crop((14, 2, 54, 42))
    expected = (torch.from_numpy(np.array(resized)).float() / 255 - MEAN) / STD
    for images in found.values():
        torch.testing.assert_close(images[0, 0], expected)
        assert torch.equal(images, found["timm"])


def test_pixels_in_memory(tmp_path):
    pixels = np.stack([np.asarray(photograph(32, 32, i)) for i in range(4)])
    source = Pixels(pixels, [0, 1, 0, 1], ["a", "b"])
    found = batches(tmp_path, False, ["--input-size", 32], source)
    expected = torch.tensor(np.stack([Image.fromarray(p).convert("L") for p in pixels]))
    expected = (expected.float() / 255 - MEAN) / STD
    for images in found.values():
        torch.testing.assert_close(images[:4, 0], expected)
    assert source.pixels is pixels


@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_noise_has_one_channel(mode, tmp_path):
    source = files(tmp_path, {"a.png": encode(photograph(50, 50), "PNG")})
    words = ["--input-size", 40, "--aa", "", "--color-jitter", 0, "--reprob", 1, "--remode", mode]
    for images in batches(tmp_path, True, words, source).values():
        assert images.shape == (3, 1, 40, 40) and images.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts(layout, tmp_path):
    source = files(tmp_path, {"a.png": encode(photograph(50, 50), "PNG")})
    dataset = datasets.augmented(source, False, flags("--data-path", "x", "--in-chans", 1))
    finalize = BatchFinalizer(dataset, CPU, memory_format=layout)
    images = finalize(dataset.__getitems__([0])).images
    assert images.shape == (1, 1, 224, 224) and images.is_contiguous(memory_format=layout)


def test_decoded_on_the_device(tmp_path):
    source = files(tmp_path, {"a.jpg": encode(photograph(90, 60), "JPEG")})
    words = ["--input-size", 40, *NONE, "--train-crop-mode", "rrc", "--augment-on", "device"]
    found = []
    for more in ([], ["--decode-on-device"]):
        args = flags("--data-path", tmp_path, "--in-chans", 1, *words, *more)
        dataset = datasets.augmented(source, True, args)
        found.append(BatchFinalizer(dataset, CPU)(dataset.__getitems__([SampleIndex(0, 0)])).images)
    assert ((found[0] - found[1]).abs() * STD * 255).mean() < 1


@pytest.mark.parametrize("name", RGB)
def test_weights_of_rgb_are_summed(name, tmp_path):
    """Of grey images, the model computes what the RGB model does of three equal channels."""
    torch.manual_seed(0)
    rgb, path = timm.create_model(name, num_classes=10, **RGB[name]), tmp_path / "rgb.pth"
    rgb = warm_up_ddp(rgb, rgb.pretrained_cfg["input_size"][1:])
    config = data_config_of({}, rgb.pretrained_cfg, "x").to_timm()
    config |= {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    content = {"model_name": name, "model_kwargs": {"num_classes": 10, **RGB[name]}}
    torch.save({"model": rgb.state_dict(), "data_config": config, **content}, path)
    found = models.load_model(path, in_chans=1)
    own, state = rgb.state_dict(), found.model.state_dict()
    changed = [key for key in state if state[key].shape != own[key].shape]
    assert changed and all(torch.equal(state[k], own[k].sum(1, keepdim=True)) for k in changed)
    assert all(torch.equal(state[key], adapt_input_conv(1, own[key])) for key in changed)
    image = torch.randn(2, 1, *found.data_config.input_size)
    with torch.no_grad():
        close(found.model(image), rgb(image.expand(-1, 3, -1, -1)))
    assert (found.data_config.mean, found.kwargs["in_chans"]) == ((0.5,), 1)
    assert found.model.pretrained_cfg["input_size"] == (1, *found.data_config.input_size)
    notes = " ".join(found.report.notes)
    assert not found.report.resampled and all(key in notes for key in changed)


def test_every_model_names_its_first_convolutions():
    for name in NAMES:
        grey, rgb = meta(name, in_chans=1), meta(name)
        names = rgb.pretrained_cfg["first_conv"]
        names = {f"{n}.weight" for n in ([names] if isinstance(names, str) else names)}
        pairs = zip(grey.state_dict().items(), rgb.state_dict().values(), strict=True)
        assert {key for (key, one), other in pairs if one.shape != other.shape} == names


DATA = ["--num_workers", 0, "--device", "cpu", "--batch-size", 4, "--data-path"]
RUN = ["--model", "test_vit", "--input-size", 32, "--in-chans", 1, "--warmup-epochs", 0]
RUN += ["--train-crop-mode", "rrc", "--epochs", 2, *DATA]


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("grey")
    succeed(*RUN, images, "--output_dir", output)
    return output / "checkpoint.pth"


def expected_of(path, image):
    found = models.load_model(path)
    config = found.data_config
    grey = np.asarray(Image.open(image).convert("RGB").convert("L"))
    pixels = (torch.tensor(grey).float() / 255 - config.mean[0]) / config.std[0]
    with torch.no_grad():
        return found.model(pixels[None, None])


def test_a_run_resumes(run, images, tmp_path):
    saved = torch.load(run, weights_only=True)
    assert saved["model_kwargs"]["in_chans"] == 1
    assert saved["data_config"]["input_size"] == (1, 32, 32)
    assert [len(saved["data_config"][key]) for key in ("mean", "std")] == [1, 1]
    assert saved["model"]["patch_embed.proj.weight"].shape[1] == 1
    succeed(*RUN, images, "--output_dir", tmp_path, "--stop-epoch", 1)
    words = [word for word in map(str, RUN) if word not in ("--in-chans", "1")]
    words.insert(words.index("--epochs"), "--warmup-epochs=0")
    words.remove("--warmup-epochs")
    words.remove("0")
    succeed(*words, images, "--output_dir", tmp_path, "--resume", "auto")
    keys = ("train_loss", "test_loss", "ema_loss")
    first, second = ([[x[k] for k in keys] for x in read_log(f)] for f in (run.parent, tmp_path))
    assert first == second


def test_programs_after_a_run(run, images, tmp_path):
    printed = succeed("--eval", "--resume", run, *DATA, images)
    assert f"loss {read_log(run.parent)[-1]['test_loss']:.3f}" in printed
    assert "warning" not in printed
    image, table = images / "val" / "cat" / "0.jpg", tmp_path / "t.csv"
    words = ["--checkpoint", run, "--device", "cpu", "--csv", table]
    assert call(predict.main, image, *words)[0] == 0
    rows = np.genfromtxt(table, delimiter=",", skip_header=1)
    logits = expected_of(run, image)
    odds = logits.softmax(1).sort(descending=True).values[0].numpy()
    np.testing.assert_allclose(rows[:, -1], odds, rtol=1e-4)
    status, *_ = call(validate.main, run, *DATA, images, "--weights", "model", "--csv", table)
    assert status == 0
    for kind in ("features", "attention"):
        picture = tmp_path / f"{kind}.png"
        words = [kind, run, "--image", image, "--output", picture, "--device", "cpu"]
        status, _, errors = call(visualize, *words)
        assert (status, picture.exists()) == (0, True), errors


def test_exported_programs_take_one_channel(run, tmp_path):
    for words, shape in (([], (2, 1, 32, 32)), (["--with-preprocessing"], (2, 32, 32, 1))):
        out = tmp_path / "model.onnx"
        assert export("--checkpoint", run, "--output", out, *words) == 0
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        (taken,) = session.get_inputs()
        assert tuple(taken.shape[1:]) == shape[1:]
        pixels = torch.randint(256, shape, dtype=torch.uint8)
        found = models.load_model(run)
        mean, std = found.data_config.mean[0], found.data_config.std[0]
        image = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std if words else pixels.float()
        given = pixels if words else pixels.float()
        with torch.no_grad():
            close(session.run(None, {taken.name: given.numpy()})[0], found.model(image))
        out.unlink()


def test_folders_of_the_hub(run, tmp_path):
    status, *_ = call(convert_checkpoint.main, run, tmp_path / "hub", "--to", "hub")
    ours = models.load_model(f"local-dir:{tmp_path / 'hub'}")
    timms = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    image = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = models.load_model(run).model(image)
        assert torch.equal(ours.model(image), expected)
        close(timms(image), expected)
    assert status == 0 and ours.data_config == models.load_model(run).data_config


def test_fine_tuning_and_teachers(run, images, tmp_path):
    words = ["--epochs", 1, "--warmup-epochs", 0, *DATA, images, "--output_dir"]
    rgb = tmp_path / "rgb"
    succeed(*words, rgb, "--model", "test_vit", "--input-size", 32)
    weights = torch.load(rgb / "checkpoint.pth", weights_only=True)["model"]
    more = ["--finetune", rgb / "checkpoint.pth", "--in-chans", 1, "--lr", 0, "--warmup-lr", 0]
    more += ["--min-lr", 0, "--distillation-type", "soft", "--teacher-path", rgb / "checkpoint.pth"]
    printed = succeed(*words, tmp_path / "grey", *more)
    assert "--in-chans 1" in printed
    found = torch.load(tmp_path / "grey" / "checkpoint.pth", weights_only=True)
    key = "patch_embed.proj.weight"
    assert torch.equal(found["model"][key], weights[key].sum(1, keepdim=True))
    assert found["data_config"]["mean"] == pytest.approx((MEAN,))
    error = error_of(main.main, *words, tmp_path / "x", "--finetune", run, "--in-chans", 3)
    assert str(run) in error and "in_chans" in error


@pytest.mark.parametrize("value", ["2", "4", "0", "x"])
def test_other_numbers_of_channels(value, capsys):
    with pytest.raises(SystemExit) as caught:
        flags("--in-chans", value)
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--in-chans" in last and value in last
