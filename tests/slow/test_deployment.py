"""What docs/DEPLOYMENT.md shows of programs: run as it stands there."""

import json
import os
import shutil
import urllib.error
import urllib.request

import pytest
import torch
from conftest import start_python
from exporting import CLASSES, VIT, close, export, python_block, save
from PIL import Image

import datasets
from training.flags import parse_args

NO_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)


@pytest.mark.parametrize("format_name", ["exported", pytest.param("aot", marks=NO_COMPILER)])
def test_programs_of_pytorch(format_name, vit, tmp_path, monkeypatch):
    model, path = vit
    output = {"exported": "model.pt2", "aot": "compiled.pt2"}[format_name]
    folder = tmp_path / "output" / "cifar10"
    folder.mkdir(parents=True)
    assert export("--checkpoint", path, "--format", format_name, "--output", folder / output) == 0
    monkeypatch.chdir(tmp_path)
    heading = {"exported": "## A `torch.export` program", "aot": "## An AOTInductor package"}
    names = {}
    exec(python_block(heading[format_name]), names)
    assert json.loads(names["about"]["classes"]) == CLASSES
    program = names["package"] if format_name == "aot" else names["program"].module()
    for batch in (1, 3):
        image = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            close(program(image), model(image))
    with torch.no_grad():
        close(names["logits"], model(torch.zeros(1, 3, 32, 32)))


@pytest.mark.parametrize(("size", "names"), [(32, CLASSES), (64, [])])
def test_the_page_serves_images(size, names, tmp_path, cifar):
    kwargs = VIT | {"img_size": size}
    path = tmp_path / "served.pth"
    model = save(path, "vit_b_32_224", kwargs, (size, size), classes=names)
    out = tmp_path / "served.onnx"
    assert export("--checkpoint", path, "--output", out, "--with-preprocessing") == 0
    script = tmp_path / "serve.py"
    script.write_text(python_block("## Serve with ONNX Runtime"))
    (tmp_path / "torch.py").write_text("raise ImportError('PyTorch is not needed')\n")
    source = next((cifar / "val").rglob("*.*"))
    photograph = tmp_path / "photograph.png"  # oblong, so that the crop is of its middle
    Image.open(source).convert("RGB").resize((150, 101)).save(photograph)
    with start_python(script, out, 0, PYTHONPATH=tmp_path) as process:
        try:
            address = process.stdout.readline().strip()
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(address, b"no image", timeout=60)
            with urllib.request.urlopen(address, photograph.read_bytes(), timeout=60) as answer:
                found = json.loads(answer.read())
        finally:
            process.kill()
    assert refused.value.code == 500
    args, _ = parse_args(["--input-size", str(size)])
    transform = datasets.build_transform(False, args)
    image = transform(Image.open(photograph).convert("RGB"))
    with torch.no_grad():
        odds = model(image[None]).softmax(1)[0]
    names = names or list(map(str, range(len(CLASSES))))
    expected = {names[i]: odds[i].item() for i in odds.argsort(descending=True)[:5]}
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=2e-3)
