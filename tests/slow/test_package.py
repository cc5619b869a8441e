"""The package ``visformer`` in other projects: built, installed, next to their own modules."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, clean_env
from exporting import CLASSES, save
from PIL import Image

import datasets
from training.flags import parse_args

PROGRAM = """\
import sys
import visformer

checkpoint, file = sys.argv[1:]
found = visformer.load_model(checkpoint)
images = found.data_config
transform = visformer.Augmentation.for_evaluation(images).compose()
image = visformer.load_image(file, images.exif, images.is_grey)
probabilities = found.model(transform(image)[None])[0].softmax(0)
print(found.classes[probabilities.argmax()], probabilities.max().item())
"""
NEIGHBOURS = """\
import datasets, models, pipeline, samplers, utils
import timm, visformer
assert [m.MINE for m in (datasets, models, pipeline, samplers, utils)] == 5 * [True]
import models.visformer
assert models.visformer.MINE and visformer.models.visformer is not models.visformer
assert type(timm.create_model("visformer_tiny")) is visformer.models.visformer.Visformer
assert type(timm.create_model("fastvit_t8")) is visformer.models.fastvit.FastViT
assert visformer.models.is_own_model("convit_tiny.fb_in1k")
backbone = visformer.models.VisionBackbone("swin_visformer_tiny_v2")
assert hasattr(backbone, "norm0")  # as of our own models
"""
MINE = ("datasets.py", "models/__init__.py", "models/visformer.py", "pipeline.py", "samplers.py")
MINE += ("utils.py",)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package, built without an index."""
    pytest.importorskip("setuptools", "77")
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("models", "package", "pipeline"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", place, source)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory):
    """A folder with the installed package."""
    folder = tmp_path_factory.mktemp("library")
    pip("install", "--target", folder, wheel)
    return folder


def pip(*words):
    command = [sys.executable, "-m", "pip", *map(str, words), "--quiet", "--no-deps", "--no-index"]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"PIP_NO_INPUT": "1"})


def run_there(program, folder, library, *words):
    """Run a program in a folder, which it finds first, and return its output."""
    (folder / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py", *map(str, words)],
        cwd=folder,
        env=clean_env(PYTHONPATH=str(library)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_wheel_has_one_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        text = next(archive.read(n).decode() for n in names if n.endswith("METADATA"))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"visformer"}
    ours = {f"visformer/{path.relative_to(ROOT)}" for path in (ROOT / "models").rglob("*.py")}
    assert ours <= set(names)
    needs = re.findall(r"^Requires-Dist: (\w+)", text, re.M)
    assert {"torch", "torchvision", "timm"} <= set(needs)


def test_a_program_elsewhere_classifies_an_image(library, tmp_path):
    kwargs = {"img_size": 64, "drop_path_rate": 0.1}
    model = save(tmp_path / "in.pth", "visformer_tiny", kwargs, (64, 64))
    pixels = torch.randint(0, 256, (90, 120, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    name, probability = run_there(PROGRAM, tmp_path, library, "in.pth", "image.png").split()
    transform = datasets.build_transform(False, parse_args(["--input-size", "64"])[0])
    with torch.no_grad():
        expected = model(transform(Image.fromarray(pixels))[None])[0].softmax(0)
    assert name == CLASSES[expected.argmax()]
    assert float(probability) == pytest.approx(expected.max().item(), rel=1e-5)
    (tmp_path / "output/digits").mkdir(parents=True)
    (tmp_path / "in.pth").rename(tmp_path / "output/digits/best.pth")
    (tmp_path / "image.png").rename(tmp_path / "digit.png")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "visformer.load_model" in block]
    assert run_there(block, tmp_path, library) == f"{name}\n"


def test_modules_of_the_same_names_stay_the_users(library, tmp_path):
    for name in MINE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("MINE = True\n")
    assert run_there(NEIGHBOURS, tmp_path, library) == ""


def test_hugging_face_datasets_is_next_to_it(library, tmp_path):
    try:
        importlib.metadata.version("datasets")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face datasets is not installed")
    program = "import visformer, datasets\nprint(datasets.Value('int64').dtype)"
    assert run_there(program, tmp_path, library) == "int64\n"


def test_the_version_is_that_of_the_installed_package(library, tmp_path):
    program = "import importlib.metadata as m, visformer as v\n"
    program += "print(v.__version__, m.version('visformer'))"
    ours, installed = run_there(program, tmp_path, library).split()
    assert ours == installed
