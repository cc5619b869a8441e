"""The commands of README and docs that are marked runnable do run, as they are written.

Page by page, in order, on small data, and in this process. Trainings stop after an epoch.
"""

import glob
import os
import re
import runpy
import shlex
import shutil
import sys
import tarfile
import warnings

import pytest
import torch
from conftest import ROOT, THREADS, clean_env
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = "<!-- runnable -->"
BLOCK = re.compile(rf"^{MARK}\n```sh\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#([^)]*))?\)")
TRAINED = {
    "cifar10": ["-c", "configs/cifar10_scratch.yaml"],
    "convit": ["--model", "convit_tiny", "--input-size", "64", "--batch-size", "8"],
    "fastvit": ["--model", "fastvit_t8", "--input-size", "64", "--batch-size", "8"],
}


def commands(page):
    """The commands of a page's runnable blocks, as lists of words.

    Without AOTInductor's, whose compilation takes long: test_deployment.py runs it.
    """
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and "aot" not in words:
                yield words


def run(words, capsys):
    """Run a Python command as the shell would."""
    assert words[0] == "python"
    words = [name for word in words[1:] for name in (sorted(glob.glob(word)) or [word])]
    target, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if target == "main.py" and "--eval" not in arguments:
        arguments += ["--stop-epoch", "1", "--num_workers", "0"]
    before, sys.argv = sys.argv, [target, *arguments]
    torch.set_num_threads(1)
    try:
        with pytest.raises(SystemExit) as done, warnings.catch_warnings():
            # modules are there already: this process is used again
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
            if words[0] == "-m":
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / target), run_name="__main__")
    finally:
        sys.argv = before
        torch.set_num_threads(THREADS)
    assert done.value.code in (0, None), f"{shlex.join(words)}\n{capsys.readouterr().err}"


@pytest.fixture(scope="module")
def place(shared, cifar, tmp_path_factory):
    """A folder with ``configs/``, small data under ``data/`` and runs under ``output/``."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    for split, count in (("train", 20), ("val", 4)):
        for source in sorted((cifar / split).iterdir()):
            target = folder / "data/cifar10" / split / source.name
            target.mkdir(parents=True)
            for image in sorted(source.iterdir())[:count]:
                (target / image.name).symlink_to(image)
    with tarfile.open(shared / "data" / "imagenet_sample.tar") as archive:
        members = [m for m in archive if m.isfile() and m.name.endswith("JPEG")][::64]
        archive.extractall(folder / "data", members, filter="data")
    (folder / "data/photos").mkdir()
    for name in ("bird", "cat", "dog"):
        (folder / "data/photos" / name).symlink_to(folder / "data/cifar10/train" / name)
    (folder / "data/imagenet").mkdir()
    for split in ("train", "val"):
        (folder / "data/imagenet" / split).symlink_to(folder / "data/imagenet_sample/val")
    yield folder
    shutil.rmtree(folder)  # of a gigabyte and more


@pytest.fixture
def there(place, monkeypatch, capsys):
    """In that folder, with models of every family trained for an epoch; digits are few."""
    digits = load_digits()
    few = Bunch(images=digits.images[::6], target=digits.target[::6])
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: few)
    monkeypatch.chdir(place)
    for key in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(key)
    for name, flags in TRAINED.items():
        if not (place / "output" / name).exists():
            data = ["--data-path", "data/cifar10", "--output_dir", f"output/{name}"]
            run(["python", "main.py", *flags, *data, "--epochs", "1"], capsys)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_runnable_commands_run(page, there, capsys):
    for words in commands(page):
        run(words, capsys)


def test_pages_are_marked():
    marked = {page.stem for page in PAGES if MARK in page.read_text()}
    assert {"README", "DATA", "DEPLOYMENT", "EVALUATION", "RECIPES", "VISUALIZE"} <= marked
    for page in PAGES:
        assert page.read_text().count(MARK) == len(BLOCK.findall(page.read_text())), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        path = page.parent / target
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"
