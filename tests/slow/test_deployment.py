"""What docs/DEPLOYMENT.md shows of programs: run as it stands there."""

import base64
import contextlib
import dataclasses
import functools
import http.client
import http.server
import json
import os
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, start_python
from exporting import CLASSES, VIT, close, export, python_block, session_of
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_sample_image

from models import DataConfig
from pipeline.augmentation import Augmentation
from pipeline.images import to_grey

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


# --- docs/serve

PAGE = ROOT / "docs" / "serve"
PHOTOGRAPHS = {"usual": (150, 101), "tall": (40, 57), "long": (900, 70), "small": (20, 31)}
IMAGES = {
    "whole": DataConfig().at_size(32),
    "cropped": DataConfig((64, 64), "bilinear"),
    "oblong": DataConfig((32, 64)),
    "padded": DataConfig((64, 64), crop_pct=0.9, crop_mode="border"),
    "grey": DataConfig((64, 64), mean=(0.4,), std=(0.2,)),
}


class Served(NamedTuple):
    """A running server, and what it should answer."""

    address: str
    model: torch.nn.Module
    images: DataConfig
    names: list[str]

    def expected(self, photograph):
        image = ImageOps.exif_transpose(Image.open(photograph)).convert("RGB")
        image = to_grey(image) if self.images.is_grey else image
        pixels = Augmentation.for_evaluation(self.images).compose()(image)
        with torch.no_grad():
            odds = self.model(pixels[None]).softmax(1)[0]
        return {self.names[i]: odds[i].item() for i in odds.argsort(descending=True)[:5]}

    def answer(self, data, **headers):
        """Status and content of an answer."""
        request = urllib.request.Request(self.address, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


def exported(folder, images, names=CLASSES):
    """A model, and its file for servers and pages."""
    kwargs = VIT | {"img_size": images.size, "in_chans": images.in_chans}
    kwargs["num_classes"] = len(CLASSES)
    model = timm.create_model("vit_b_32_224", **kwargs).eval()
    with torch.no_grad():
        model.head.weight.mul_(100)  # far from equal
    content = {"model": model.state_dict(), "model_name": "vit_b_32_224", "model_kwargs": kwargs}
    torch.save(content | {"classes": names, "data_config": images.record()}, folder / "in.pth")
    path = folder / "model.onnx"
    words = ("--checkpoint", folder / "in.pth", "--output", path, "--with-preprocessing")
    assert export(*words) == 0
    return model, path


@contextlib.contextmanager
def serving(folder, images, names=CLASSES):
    """Run the server with an exported model, without PyTorch."""
    model, path = exported(folder, images, names)
    (folder / "torch.py").write_text("raise ImportError('PyTorch is not needed')\n")
    with start_python(PAGE / "serve.py", path, 0, PYTHONPATH=folder) as process:
        try:
            address = process.stdout.readline().strip()
            yield Served(address, model, images, names or list(map(str, range(len(CLASSES)))))
        finally:
            process.kill()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Files of several shapes, of which the first is turned by its EXIF."""
    folder = tmp_path_factory.mktemp("photographs")
    picture = Image.fromarray(load_sample_image("china.jpg"))
    exif = Image.Exif()
    for name, sides in PHOTOGRAPHS.items():
        exif[ExifTags.Base.Orientation] = 6 if name == "usual" else 1
        picture.resize(sides).save(folder / f"{name}.png", exif=exif)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("kind", IMAGES)
def test_the_server_sees_what_the_evaluation_sees(kind, tmp_path, photographs):
    names = [] if kind == "whole" else CLASSES
    with serving(tmp_path, IMAGES[kind], names) as served:
        for path in photographs:
            status, found = served.answer(path.read_bytes())
            expected = served.expected(path)
            assert status == 200 and list(found) == list(expected)
            assert found == pytest.approx(expected, abs=1e-3), path.name


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served"), IMAGES["cropped"]) as served:
        yield served


def test_what_is_no_image_is_refused(served, photographs):
    data = photographs[0].read_bytes()
    for wrong in (b"no image", b"", data[: len(data) // 2]):
        status, found = served.answer(wrong)
        assert status == 400 and list(found) == ["error"]
    place = urlparse(served.address).netloc
    limit = 20 * 2**20
    assert served.answer(bytes(limit + 1))[0] == 413
    for length, right in ((limit + 1, 413), (5000 * "9", 413), ("-5", 411), ("many", 411)):
        connection = http.client.HTTPConnection(place, timeout=60)
        connection.putrequest("POST", "/")
        connection.putheader("Content-Length", str(length))
        connection.endheaders()  # without a body
        answer = connection.getresponse()
        assert answer.status == right
        connection.close()
    assert served.answer(data)[0] == 200  # afterwards


def test_requests_are_answered_in_parallel(served, photographs):
    expected = {path: served.expected(path) for path in photographs}
    assert len({json.dumps(answer) for answer in expected.values()}) == len(expected)
    data = photographs[0].read_bytes()
    stuck = http.client.HTTPConnection(urlparse(served.address).netloc, timeout=60)
    stuck.putrequest("POST", "/")
    stuck.putheader("Content-Length", str(len(data)))
    stuck.endheaders(data[:100])  # the rest comes after the others are answered
    paths = 8 * photographs
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda path: served.answer(path.read_bytes()), paths))
    for path, (status, answer) in zip(paths, found, strict=True):
        assert status == 200 and answer == pytest.approx(expected[path], abs=1e-3)
    stuck.send(data[100:])
    answer = json.loads(stuck.getresponse().read())
    stuck.close()
    assert answer == pytest.approx(expected[photographs[0]], abs=1e-3)


# --- the page

RUNNER = """\
import { readFileSync, writeFileSync } from "node:fs";
import { metadata, modelInput } from "./image.mjs";
const about = metadata(new Uint8Array(readFileSync("model.onnx")));
writeFileSync("about.json", JSON.stringify(about));
for (const [file, width, height, changes] of JSON.parse(readFileSync("cases.json", "utf8"))) {
  const image = new Uint8ClampedArray(readFileSync(file));
  writeFileSync(`${file}.out`, modelInput(image, width, height, { ...about, ...changes }));
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("kind", IMAGES)
def test_the_page_makes_the_pixels_of_the_evaluation(kind, tmp_path, photographs):
    images = IMAGES[kind]
    _, path = exported(tmp_path, images)
    cases, expected = [], {}
    for photograph in photographs:
        for interpolation in ("bilinear", "bicubic", "lanczos"):
            name = f"{photograph.stem}-{interpolation}"
            image = Image.open(photograph).convert("RGB")
            (tmp_path / name).write_bytes(image.convert("RGBA").tobytes())
            cases.append((name, *image.size, {"interpolation": interpolation}))
            changed = dataclasses.replace(images, interpolation=interpolation)
            stages = Augmentation.for_evaluation(changed).stages()
            image = to_grey(image) if images.is_grey else image
            for step in (*stages.resize, *stages.crop):
                image = step(image)
            expected[name] = np.asarray(image)[..., : images.in_chans]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "run.mjs").write_text(RUNNER)
    shutil.copy(PAGE / "image.js", tmp_path / "image.mjs")
    subprocess.run(["node", "run.mjs"], cwd=tmp_path, check=True, timeout=120)
    about = session_of(path).get_modelmeta().custom_metadata_map
    assert json.loads((tmp_path / "about.json").read_text()) == about
    for name, pixels in expected.items():
        found = np.frombuffer((tmp_path / f"{name}.out").read_bytes(), np.uint8)
        off = np.abs(found.reshape(pixels.shape).astype(int) - pixels)
        assert off.max() <= 2 and off.mean() < 0.5, name  # 0, or Pillow resizes the height first


@pytest.fixture
def browser():
    """Chromium, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def static(folder):
    """The address at which the files of a folder are served."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


DROP = """([data, name, type]) => {
  const files = new DataTransfer();
  files.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
  const event = new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true });
  document.querySelector("label").dispatchEvent(event);
}"""
ROWS = """() => [...document.querySelectorAll("tr")].map(
  (row) => [row.cells[0].textContent, Number(row.dataset.probability)])"""


def test_the_page_classifies_in_a_browser(browser, tmp_path, photographs):
    runtime = PAGE / "node_modules" / "onnxruntime-web"
    if not runtime.is_dir():
        pytest.skip("needs npm install --no-save --prefix docs/serve onnxruntime-web")
    images = IMAGES["cropped"]
    model, _ = exported(tmp_path, images)
    for file in ("index.html", "image.js"):
        shutil.copy(PAGE / file, tmp_path)
    (tmp_path / "node_modules").symlink_to(runtime.parent)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(photographs[0]).resize((151, 101)).save(turned, quality=100, exif=exif)
    page = browser.new_page()
    with static(tmp_path) as address:
        page.goto(address)
        for path in (*photographs[1:3], turned):
            data = base64.b64encode(path.read_bytes()).decode()
            page.evaluate(DROP, [data, path.name, "image/*"])
            page.wait_for_function(f"document.body.innerText.includes('{path.name}: ')")
            found = page.evaluate(ROWS)
            expected = Served(address, model, images, CLASSES).expected(path)
            assert [name for name, _ in found] == list(expected), path.name
            assert dict(found) == pytest.approx(expected, abs=0.02), path.name
        page.evaluate(DROP, ["AAAA", "text.txt", "text/plain"])
        page.wait_for_function("document.body.innerText.includes('text.txt: ')")
        assert page.evaluate(ROWS) == []
