"""Shared data and helpers of the tests."""

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Rank, free_port

# oneDNN's bfloat16 convolutions for AMX are wrong for some shapes (PyTorch issue 169688)
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
LARGE = 1 << 20  # bytes of a file that is not kept after its test
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # two cores, whoever shares them


# the longest files: first, so that no process is left alone with one of them
LONGEST = ("docs", "torchvision_rcnn", "mmdet_commands", "main", "crash", "attack", "nodes", "fsdp")
LONGEST += ("watchdog", "submit", "benchmark", "distributed", "mmdet", "recipes")
MARKED = {
    "distributed": ("agreement", "distributed", "fsdp", "nodes"),
    "detection": ("coco", "export_detector", "mmdet", "mmdet_commands", "torchvision_rcnn"),
}


def pytest_collection_modifyitems(items):
    """Mark the tests in ``slow/`` by their files, and begin with the longest files."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))
    for item in items:
        if item.path.parent.name == "slow":
            name = item.path.stem.removeprefix("test_")
            for marker in ("slow", *(key for key, names in MARKED.items() if name in names)):
                item.add_marker(marker)


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    """Leave no thread to contend with the processes that tests start."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors only: a second thread, on a core that others use, would be waited for."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def tmp_path(tmp_path):
    """pytest's, without large files after the test: checkpoints would add up to gigabytes.

    The folders stay, as mmengine goes on writing to those of runs that have ended.
    """
    yield tmp_path
    for file in tmp_path.rglob("*"):
        if not file.is_symlink() and file.is_file() and file.stat().st_size > LARGE:
            file.unlink()


@pytest.fixture(scope="session")
def shared():
    """The folder of goldens and real images."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} with goldens and real images is not here")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared):
    """``golden(name) -> (description, weights, input)`` of an original implementation."""
    spec = importlib.util.spec_from_file_location("fill", shared / "goldens" / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)

    def weights(description):
        arrays, _ = fill.fill(description["keys"])
        return {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}

    def make_input(*shape):
        return torch.from_numpy(fill.make_input(*shape))

    def load(name):
        description = json.loads((shared / "goldens" / f"{name}.json").read_text())
        batch, _, height, width = description["input"]["shape"]
        return description, weights(description), make_input(batch, height, width)

    load.weights, load.make_input = weights, make_input
    return load


@pytest.fixture(scope="session")
def cifar(shared, tmp_path_factory):
    """2,000 training and 500 validation images of CIFAR-10 as folders of JPEG files."""
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared / "data" / "cifar10_small.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "cifar10"


@pytest.fixture(scope="session")
def pennfudan(shared, tmp_path_factory):
    """Pedestrians with masks, as polygons and as RLE."""
    folder = tmp_path_factory.mktemp("pennfudan")
    with tarfile.open(shared / "data" / "pennfudan_coco.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "pennfudan_coco"


@pytest.fixture(scope="session")
def few(pennfudan, tmp_path_factory):
    """5 of the images for training and 5 for validation, as a folder of their own."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "images").symlink_to(pennfudan / "images")
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        name = f"instances_{split}.json"
        content = json.loads((pennfudan / "annotations" / name).read_text())
        content["images"] = content["images"][:5]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        (folder / "annotations" / name).write_text(json.dumps(content))
    return folder


def write_images(root, train=8, val=3, classes=("cat", "dog"), size=32):
    """An image folder of random JPEG files, ``train`` and ``val`` of each class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture
def image_folder(tmp_path):
    """8 training and 3 validation images of each of two classes."""
    return write_images(tmp_path / "images")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """12 training and 5 validation images of each of two classes; do not change them."""
    return write_images(tmp_path_factory.mktemp("data") / "images", train=12, val=5)


@pytest.fixture(scope="session")
def to_pack(tmp_path_factory):
    """An image folder with names that need care in shards."""
    from packing import write_odd_names

    return write_odd_names(tmp_path_factory.mktemp("to_pack"))


@pytest.fixture(scope="session")
def packed(to_pack, tmp_path_factory):
    """The shards of these images, to be copied by tests that change them."""
    from packing import pack

    output = tmp_path_factory.mktemp("packed")
    assert pack(to_pack, output) == 0
    return output


# the variables of launchers, which are read when a run begins
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "OMPI_", "PMI_", "MPI_")


def clean_env(**extra):
    """This process's environment without a launcher's variables."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def start_python(*words, run=subprocess.Popen, **env):
    """Start Python with ``words`` in the project's folder, its output in pipes of text."""
    return run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=clean_env(**{key: str(value) for key, value in env.items()}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(*words, timeout=300, **env):
    """Run :func:`start_python`'s process to its end; returns the completed process."""
    return start_python(*words, run=partial(subprocess.run, timeout=timeout), **env)


def start_rank(*words, **env):
    """Start ``main.py`` or another program of ours, without its imports; see :class:`Rank`."""
    env = clean_env(**{key: str(value) for key, value in env.items()})
    return Rank([str(word) for word in words], env)


def ranks(count, words, program=("main.py",)):
    """Processes as torchrun would start them, each with its output in a pipe."""
    meeting = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        start_rank(*program, *words, RANK=rank, LOCAL_RANK=rank, **meeting) for rank in range(count)
    ]


def until(process, line):
    """The output of a process up to a line that starts with ``line``."""
    output = ""
    for text in process.stdout:
        output += text
        if text.startswith(line):
            return output
    raise AssertionError(f"no line {line!r} in {output}{process.communicate(timeout=60)[1]}")


def together(count, words, rank=None, number=None, line=None, program=("main.py",)):
    """Run on several ranks, one of which gets a signal when the first prints a line.

    Returns their exit statuses, the output of the first, and the errors of all.
    """
    processes = ranks(count, words, program)
    output = ""
    if line is not None:
        output = until(processes[0], line)
        processes[rank].send_signal(number)
    results = [process.communicate(timeout=300) for process in processes]
    return [p.returncode for p in processes], output + results[0][0], [e for _, e in results]


def run_ranks(count, words, **options):
    """The output of :func:`together`, in which every rank must succeed."""
    codes, output, errors = together(count, words, **options)
    assert codes == [0] * count, errors
    return output


def read_log(folder):
    """The lines of a run's ``log.txt``."""
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


def same_run(first, second):
    """Whether two folders hold bitwise the same run: its log and its checkpoints."""
    from tests.crash.compare import compare

    return compare(Path(first), Path(second)) == 0


def accuracy_lines(output):
    return [line for line in output.splitlines() if "* Acc@1" in line]


def processes_and_launcher(output):
    return re.search(r"(\d+) process\S* .*\b(\w+)\n", output).groups()


@pytest.fixture
def vit(tmp_path):
    """A tiny Vision Transformer, and its checkpoint."""
    from exporting import VIT, save

    path = tmp_path / "vit.pth"
    return save(path, "vit_b_32_224", VIT, (32, 32)), path


class Printed(io.StringIO):
    """Captured text; the first line that starts with ``line`` calls ``act``."""

    def __init__(self, line=None, act=None):
        super().__init__()
        self.line, self.act = line, act

    def write(self, text):
        super().write(text)
        if self.line is not None and text.startswith(self.line):
            self.line = None
            self.act()
        return len(text)


def call(main, *flags, line=None, act=None):
    """Run a program's ``main`` in this process, with one thread: sums depend on their number.

    Args:
        main: Function of the flags, as a list.
        flags: Flags of the command line.
        line, act: When a line of the output starts with ``line``, call ``act``; a signal number
            is raised.

    Returns:
        Exit status, output and errors.
    """
    if isinstance(act, int):
        act = partial(signal.raise_signal, act)
    output, errors = Printed(line, act), io.StringIO()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.dict(os.environ, clean_env(), clear=True),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            status = main([str(flag) for flag in flags])
    finally:
        torch.set_num_threads(THREADS)
    assert output.line is None, f"no line {line!r} in {output.getvalue()}{errors.getvalue()}"
    return status, output.getvalue(), errors.getvalue()


def run_main(*flags, **options):
    """Run main.py in this process; see :func:`call`."""
    import main

    return call(main.main, *flags, **options)


def succeed(*flags, **options):
    """Output of :func:`run_main`, which must succeed without a word on standard error."""
    status, output, errors = run_main(*flags, **options)
    assert (status, errors) == (0, ""), errors
    return output


def error_of(program, *flags, **options):
    """The line of the error with which a program's ``main`` ends; see :func:`call`."""
    status, _, errors = call(program, *flags, **options)
    assert (status, errors.count("\n"), errors[:7]) == (1, 1, "error: "), errors
    return errors


@pytest.fixture
def main():
    return run_main


@pytest.fixture(scope="session")
def on_device():
    """Run Python on CUDA devices that are not there; see tests/nullcuda/README.md.

    ``on_device(*words, options=(), status=0)`` returns the output, the errors, and the counters of
    every process that used a device. On a machine with a GPU, that is used, and counts nothing.
    """

    def run(*words, options=(), status=0, timeout=600, **env):
        launcher = [str(ROOT / "tests" / "nullcuda" / "nullcuda"), *map(str, options)]
        done = subprocess.run(
            [*(() if torch.cuda.is_available() else launcher), sys.executable, *map(str, words)],
            cwd=ROOT,
            env=clean_env(PYTHONPATH=str(ROOT), **{key: str(env[key]) for key in env}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("nullcuda: ")]
        if done.returncode == 77:
            pytest.skip(lines[-1])
        assert done.returncode == status, done.stderr
        counted = [json.loads(line.removeprefix("nullcuda: ")) for line in lines if "{" in line]
        errors = "".join(x for x in done.stderr.splitlines(True) if x.rstrip("\n") not in lines)
        return done.stdout, errors, counted

    return run


@pytest.fixture(scope="session")
def count_on_device(on_device):
    """``count_on_device(program, *words, options=())``: the lines of JSON that a program prints."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, which counts nothing")

    def run(program, *words, **options):
        output, _, _ = on_device("-m", f"tests.nullcuda.{program}", *words, **options)
        return [json.loads(line) for line in output.splitlines() if line.startswith("{")]

    return run
