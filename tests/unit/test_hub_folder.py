"""Folders in the Hub's layout: to plain timm and back, model cards, and pushing."""

import json
import re
from argparse import Namespace

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import yaml
from conftest import error_of, read_log, run_python, succeed, write_images
from exporting import CLASSES, close, save
from sources import ONCE, convert, web_server
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import models
from models import DataConfig, load_model
from tools import convert_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = DataConfig((64, 64), "bilinear", (0.4, 0.5, 0.6), (0.3, 0.2, 0.25), 0.7, "border")
FAMILIES = {  # that timm has, too
    "visformer_tiny": {"img_size": 64},
    "convit_tiny": {"img_size": 64, "depth": 2, "local_up_to_layer": 1},
    "fastvit_t8": {},
    "test_vit": {"img_size": 64, "depth": 2},
}
PLAIN_TIMM = """
import importlib.util, sys, timm, torch
assert importlib.util.find_spec("models") is None
found = {}
for folder in sys.argv[1:]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(torch.load("images.pt"))
    config = timm.data.resolve_data_config({}, model=model)
    found[folder] = type(model).__module__, logits, config, model.pretrained_cfg["label_names"]
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """Models, their folders, and what plain timm makes of them."""
    root = tmp_path_factory.mktemp("exchanged")
    found = {}
    for name, kwargs in FAMILIES.items():
        path = root / f"{name}.pth"
        found[name] = save(path, name, kwargs, (64, 64), data_config=IMAGES.to_timm())
        convert(path, root / name, "--to", "hub")
        path.unlink()
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, root / "images.pt")
    folders = [root / name for name in FAMILIES]
    code = f"import os; os.chdir({str(root)!r})\n{PLAIN_TIMM}"
    done = run_python("-P", "-c", code, *folders, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    return found, images, root, torch.load(root / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_to_plain_timm_and_back(name, exchanged, tmp_path):
    found, images, root, timms = exchanged
    module, logits, config, labels = timms[str(root / name)]
    with torch.no_grad():
        expected = found[name](images)
    assert module.startswith("timm.")
    close(logits, expected)
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()} == (
        IMAGES.to_timm()
    )
    assert list(labels) == CLASSES
    convert(f"local-dir:{root / name}", tmp_path / "back.pth")
    back = load_model(tmp_path / "back.pth")
    assert (back.data_config, back.classes) == (IMAGES, tuple(CLASSES))
    with torch.no_grad():
        assert torch.equal(back.model(images), expected)


def test_what_timm_does_not_have_says_so(tmp_path):
    """Another exponent of the pre-scale: the same keys and shapes, another function."""
    images = torch.randn(2, 3, 64, 64)
    for name, kwargs in (
        ("convit_tiny", FAMILIES["convit_tiny"] | {"qk_scale_factor": -0.5}),
        ("vit_b_32_224", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 64}),
    ):
        model = save(tmp_path / f"{name}.pth", name, kwargs, (64, 64), gelu="tanh")
        models.layers.set_gelu(model, "tanh")
        convert(tmp_path / f"{name}.pth", tmp_path / name, "--to", "hub")
        card = (tmp_path / name / "README.md").read_text()
        assert "models.load_model" in card and "timm.create_model" not in card
        with torch.no_grad():
            assert torch.equal(load_model(tmp_path / name).model(images), model(images))


# Files of other trainers


def small_vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3, depth=1, img_size=64).eval()


def compiled(model, path):
    torch.save({"model": torch.compile(model).state_dict()}, path)


def distributed(model, path):
    """Of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.compile(DistributedDataParallel(model))
        torch.save({"state_dict": wrapped.state_dict(), "epoch": 3}, path)
    finally:
        dist.destroy_process_group()


def accelerate(model, path):
    safetensors.torch.save_file(model.state_dict(), path, metadata={"format": "pt"})


def torchvision_reference(model, path):
    """As torchvision's references/classification/train.py."""
    other = nn.Module.state_dict(timm.create_model("test_vit", num_classes=3, depth=1, img_size=64))
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    flags = {"val_crop_size": 64, "val_resize_size": 93, "interpolation": "bilinear", "epochs": 9}
    content = {"model": other, "model_ema": average.state_dict(), "epoch": 8}
    content |= {"optimizer": optimizer.state_dict(), "args": Namespace(**flags)}
    torch.save(content, path)


TRAINERS = {
    compiled: ("in.pth", "model"),
    distributed: ("in.pt", "model"),
    accelerate: ("model.safetensors", "model"),
    torchvision_reference: ("in.pth", "ema"),
}


@pytest.mark.parametrize("write", TRAINERS, ids=lambda write: write.__name__)
def test_files_of_other_trainers(write, tmp_path):
    file, weights = TRAINERS[write]
    model, images = small_vit(), torch.randn(2, 3, 64, 64)
    write(model, tmp_path / file)
    found = load_model(tmp_path / file, "test_vit", weights=weights, depth=1, input_size=64)
    with torch.no_grad():
        assert torch.equal(found.model(images), model(images))


def test_images_of_torchvisions_references(tmp_path):
    torchvision_reference(small_vit(), tmp_path / "in.pth")
    found = models.find_model(str(tmp_path / "in.pth"), "test_vit").data_config
    assert found == DataConfig((64, 64), "bilinear", crop_pct=found.crop_pct)
    assert int(64 / found.crop_pct) == 93
    for sizes in ({"val_crop_size": 0}, {"val_resize_size": "93"}):
        flags = {"val_crop_size": 64, "val_resize_size": 93, "input_size": 96} | sizes
        config = models.data_config.data_config_of({"args": flags}, None, "")
        assert config == DataConfig((96, 96))


def write_folder(folder, **config):
    folder.mkdir()
    model = small_vit()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    own = {"architecture": "test_vit", "num_classes": 3, "model_args": {"depth": 1, "img_size": 64}}
    (folder / "config.json").write_text(json.dumps(own | {"pretrained_cfg": config}))
    return folder


@pytest.mark.parametrize(
    "config",
    [{}, {"crop_pct": 0.7, "mean": None}, {"input_size": [3, 64, 64], "std": [0.1, 0.2, 0.3]}],
    ids=str,
)
def test_a_config_that_leaves_things_out_means_what_timm_takes_it_for(config, tmp_path):
    folder = write_folder(tmp_path / "hub", **config)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    expected = timm.data.resolve_data_config({}, model=theirs)
    found = models.find_model(str(folder)).data_config.to_timm()
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in expected.items()} == found


# Model cards


def read_card(folder):
    """The front matter, and the text."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def numbers(text, kind):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| validation, {kind}"))
    return tuple(map(float, re.findall(r"(\d+\.\d+) %", line))), int(
        re.search(r"\d+\)", line)[0][:-1]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder of a run with a teacher, from a folder for its architecture alone."""
    root = tmp_path_factory.mktemp("secret-place")
    data = write_images(root / "images", train=8, val=5, size=64)
    model = ["--model", f"local-dir:{write_folder(root / 'parent')}", "--input-size", 64]
    run = [*model, "--data-path", data, *ONCE, "--epochs", 2, "--output_dir"]
    succeed(*run, root / "teacher")
    teacher = ["--teacher-path", root / "teacher" / "best.pth", "--distillation-type", "hard"]
    succeed(*run, root / "run", *teacher, "--lr", 0.02, "--unscale-lr")
    return root / "run"


def test_a_card_tells_the_run(run, tmp_path):
    log = read_log(run)
    with (run / "log.txt").open("a") as file:  # as of a run that was resumed, and cut off
        file.write(json.dumps(log[1] | {"epoch": 7, "test_acc1": 99.0}) + "\n")
        file.write(json.dumps(log[0] | {"test_acc1": 12.5, "ema_acc1": 37.5}) + '\n{"epo')
    first = torch.load(run / "checkpoint.pth", weights_only=True) | {"epoch": 0}
    torch.save(first, run / "first.pth")
    torch.save(first | {"step": 1}, run / "within.pth")
    convert(run / "first.pth", tmp_path / "first", "--to", "hub")
    convert(run / "first.pth", tmp_path / "average", "--to", "hub", "--ema")
    convert(run / "checkpoint.pth", tmp_path / "last", "--to", "hub")
    convert(run / "within.pth", tmp_path / "within", "--to", "hub")
    front, text = read_card(tmp_path / "last")
    assert numbers(text, "raw") == (
        (
            pytest.approx(log[1]["test_acc1"], abs=1e-3),
            pytest.approx(log[1]["test_acc5"], abs=1e-3),
        ),
        1,
    )
    assert numbers(read_card(tmp_path / "first")[1], "raw")[0][0] == 12.5
    assert numbers(read_card(tmp_path / "average")[1], "moving")[0][0] == 37.5
    for folder, other in (("average", "raw"), ("first", "moving"), ("within", "raw")):
        assert f"validation, {other}" not in read_card(tmp_path / folder)[1]
    assert (front["library_name"], front["license"]) == ("timm", "apache-2.0")
    assert {"timm", "image-classification"} <= set(front["tags"])
    flags = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert (flags["lr"], flags["distillation-type"], flags["input-size"]) == (0.02, "hard", 64)


def test_a_card_names_no_place(run, tmp_path):
    convert(run / "checkpoint.pth", tmp_path / "out", "--to", "hub")
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        for place in (run, run.parent, tmp_path, tmp_path.parent.parent, "secret-place"):
            assert str(place).encode() not in content, file


def license_of(folder, *source):
    convert(*source[:1], folder, "--to", "hub", *source[1:])
    return read_card(folder)[0]["license"]


def test_licences_are_those_of_the_weights(run, tmp_path):
    foreign = timm.create_model("test_vit", num_classes=3).state_dict()
    torch.save(foreign, tmp_path / "foreign.pth")
    content = torch.load(run / "checkpoint.pth", weights_only=True)
    content["args"] |= {"finetune": "https://example.com/a/x.pth?token=SECRET"}
    torch.save(content, tmp_path / "tuned.pth")
    theirs = write_folder(tmp_path / "theirs", license="cc-by-nc-4.0")
    again = tmp_path / "again"
    words = [tmp_path / "foreign.pth", "--model", "test_vit"]
    assert license_of(tmp_path / "foreign", *words) == "unknown"
    assert license_of(again, theirs) == "cc-by-nc-4.0"
    assert license_of(tmp_path / "thrice", again) == "cc-by-nc-4.0"
    assert license_of(tmp_path / "tuned", tmp_path / "tuned.pth") == "unknown"
    assert "SECRET" not in read_card(tmp_path / "tuned")[1]
    assert "x.pth" in read_card(tmp_path / "tuned")[1]


# Pushing


class Api:
    """Of the Hub; keeps what it is asked for."""

    def __init__(self, error=None):
        self.error, self.created, self.uploaded = error, [], {}

    def create_repo(self, repo_id, **options):
        self.created.append((repo_id, options.get("exist_ok")))

    def upload_folder(self, *, repo_id, folder_path, **options):
        if self.error:
            raise self.error
        files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        self.uploaded[repo_id] = files


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return ``answer(error=None) -> Api``, and a checkpoint."""
    save(tmp_path / "in.pth", "test_vit", {"depth": 1, "img_size": 32}, (32, 32))
    (tmp_path / "web").mkdir()

    def answer(error=None):
        api = Api(error)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda *args, **kwargs: api)
        return api

    with web_server(tmp_path / "web") as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield answer, tmp_path / "in.pth", address


FILES = {"README.md", "config.json", "model.safetensors"}


def test_pushing(hub, tmp_path):
    answer, path, address = hub
    api = answer()
    output = convert(path, tmp_path / "out", "--to", "hub", "--push", "someone/net")
    assert api.created == [("someone/net", True)]
    assert api.uploaded == {
        "someone/net": {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    }
    assert api.uploaded["someone/net"].keys() == FILES
    assert f"{address}/someone/net" in output


@pytest.mark.parametrize("error", [RuntimeError("401\n\nlog in first"), OSError(28, "full")])
def test_a_push_that_fails_leaves_the_folder(error, hub, tmp_path):
    answer, path, _ = hub
    answer(error)
    words = [path, tmp_path / "out", "--to", "hub", "--push", "someone/net"]
    message = error_of(convert_checkpoint.main, *words)
    assert "someone/net" in message and str(tmp_path / "out") in message
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    assert load_model(tmp_path / "out").name == "test_vit"


def test_a_hub_that_does_not_answer(hub, tmp_path, monkeypatch):
    answer, path, _ = hub
    api = answer()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    words = [path, tmp_path / "out", "--to", "hub", "--push", "someone/net"]
    assert "someone/net" in error_of(convert_checkpoint.main, *words)
    assert api.created == []
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
