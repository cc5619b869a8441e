"""The commands of object_detection that run mmdet, from good and from bad input."""

import importlib.machinery
import json
import shutil
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, THREADS, run_python
from PIL import Image

from object_detection import benchmark, flops, infer, runtime, test, train
from utils import UserError

try:
    runtime.load_mmdet()
except UserError as error:
    pytest.skip(f"{error}", allow_module_level=True)

CONFIG = ROOT / "object_detection/configs/mask_rcnn_swin_visformer_tiny_v2_pennfudan.py"
CASCADE = ROOT / "object_detection/configs/cascade_mask_rcnn_swin_visformer_tiny_v2_1x_ms_coco.py"
SPLITS = ("train", "val", "test")
# no processes for the loaders, small images, few proposals
OPTIONS = [
    *(f"{split}_dataloader.num_workers=0" for split in SPLITS),
    *(f"{split}_dataloader.persistent_workers=False" for split in SPLITS),
    "train_dataloader.batch_size=1",
    "train_dataloader.dataset.pipeline.2.scale=(64,64)",
    "val_dataloader.dataset.pipeline.1.scale=(64,64)",
    "test_dataloader.dataset.pipeline.1.scale=(64,64)",
    "model.train_cfg.rcnn.sampler.num=16",
    "model.test_cfg.rpn.max_per_img=50",
    "val_dataloader.dataset.indices=1",
    "train_cfg.max_iters=1",
    "default_hooks.logger.interval=1",
    "default_hooks.checkpoint.save_last=False",
]


@pytest.fixture
def call(capsys):
    """``call(command, *words) -> (status, output, the line of the error)``."""

    def run(command, *words):
        torch.set_num_threads(1)
        status = command.main([str(word) for word in words])
        torch.set_num_threads(THREADS)
        output, errors = capsys.readouterr()
        lines = [line for line in errors.splitlines() if line.startswith("error")]
        assert len(lines) == (status != 0)
        return status, output, "".join(lines)

    return run


@pytest.fixture
def dataset(tmp_path):
    """``dataset(boxes, masks, edit) -> folder`` of 3 images of 64 pixels with these objects."""

    def make(boxes=((5, 5, 30, 40),), masks=True, edit=lambda content: None):
        root = tmp_path / "data"
        for name in ("images", "annotations"):
            (root / name).mkdir(parents=True)
        random = np.random.default_rng(0)
        images, annotations = [], []
        for number in range(3):
            pixels = random.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{number}.png")
            file = {"id": number, "file_name": f"{number}.png", "width": 64, "height": 64}
            images.append(file)
            for x, y, w, h in boxes:
                entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
                entry |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                if masks:
                    entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotations.append(entry)
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 1, "name": "person"}]
        edit(content)
        for split in ("train", "val"):
            text = json.dumps(content)
            (root / "annotations" / f"instances_{split}.json").write_text(text)
        return root

    return make


@pytest.fixture
def training(call, tmp_path):
    """``training(folder, *options) -> (status, output, error)`` of one step."""

    def run(root, *options):
        words = [CONFIG, "--data-root", root, "--work-dir", tmp_path / "run"]
        return call(train, *words, "--cfg-options", *OPTIONS, *options)

    return run


@pytest.fixture(scope="module")
def people(shared, tmp_path_factory):
    """Penn-Fudan, and a folder for a run; both are removed, as checkpoints are large."""
    folder = tmp_path_factory.mktemp("people")
    with tarfile.open(shared / "data" / "pennfudan_coco.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    yield folder / "pennfudan_coco", folder / "run"
    shutil.rmtree(folder)


def test_train_resume_test_infer(people):
    """The commands as processes, one after the other."""
    data, run = people
    options = [option for option in OPTIONS if "max_iters" not in option]
    options = [option.replace("(64,64)", "(96,96)") for option in options]
    options += ["default_hooks.checkpoint.save_last=True", "test_dataloader.dataset.indices=3"]
    options += ["train_dataloader.dataset.indices=4", "model.test_cfg.rcnn.score_thr=0.0"]
    words = ["--data-root", data, "--work-dir", run, "--cfg-options", *options]

    first = run_python("-m", "object_detection.train", CONFIG, *words, "train_cfg.max_iters=2")
    assert first.returncode == 0, first.stderr[-2000:]
    assert ("no CUDA: float32" in first.stdout) != torch.cuda.is_available()
    assert "Iter(train) [2/2]" in first.stdout
    saved = (run / "last_checkpoint").read_text()
    assert saved.endswith("iter_2.pth")

    second = run_python(
        *("-m", "object_detection.train", CONFIG, "--resume", *words, "train_cfg.max_iters=3")
    )
    assert second.returncode == 0, second.stderr[-2000:]
    assert "resumed epoch: 0, iter: 2" in second.stdout
    assert "Iter(train) [3/3]" in second.stdout and "Iter(train) [2/3]" not in second.stdout

    checkpoint = run / "iter_3.pth"
    tested = run_python("-m", "object_detection.test", CONFIG, checkpoint, *words)
    assert tested.returncode == 0, tested.stderr[-2000:]
    metrics = dict(line.split() for line in tested.stdout.splitlines() if line.startswith("coco/"))
    for name in ("bbox", "segm"):
        assert 0 <= float(metrics[f"coco/{name}_mAP_50"]) <= 1

    image = next((data / "images").iterdir())
    out = run / "found.png"
    found = run_python(
        *("-m", "object_detection.infer", checkpoint, image, "--out", out, "--score-thr", 0)
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "person 0." in found.stdout and f"drawn into {out}" in found.stdout
    with Image.open(image) as before, Image.open(out) as after:
        assert (after.format, after.size) == ("PNG", before.size)
        assert (np.asarray(before.convert("RGB")) != np.asarray(after)).any()


def test_two_processes_train(people, dataset):
    _, run = people
    done = run_python(
        *("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
        *("-m", "object_detection.train", CONFIG, "--launcher", "pytorch"),
        *("--data-root", dataset(), "--work-dir", run / "two", "--cfg-options", *OPTIONS),
        "train_cfg.val_begin=2",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Iter(train) [1/1]") == 1


def test_cascade_runs_and_is_measured(call):
    options = ["model.test_cfg.rpn.max_per_img=20", "model.train_cfg.rpn_proposal.max_per_img=20"]
    options += [f"model.train_cfg.rcnn.{stage}.sampler.num=8" for stage in range(3)]
    words = ["--size", 64, 64, "--steps", 1, "--device", "cpu", "--cfg-options", *options]
    status, output, _ = call(benchmark, CASCADE, *words)
    assert status == 0
    speeds = [float(line.split()[-2]) for line in output.splitlines()[1:]]
    assert len(speeds) == 3 and speeds[0] > speeds[2] > 0


def test_flops_prints_every_part(call):
    status, output, _ = call(flops, CONFIG, "--size", 1270, 790)
    lines = output.splitlines()
    assert status == 0 and lines[0].startswith("image of 1280x800")  # whole strides
    parts = {line.split()[0]: float(line.split()[-2]) for line in lines[1:]}
    assert parts.pop("detector") == pytest.approx(sum(parts.values()), abs=0.03)
    assert set(parts) == set(flops.PARTS)


# --- images and annotations


def test_images_without_objects_and_degenerate_boxes_are_trained_through(dataset, training):
    boxes = [(5, 5, 0, 40), (5, 5, 0.5, 3), (100, 100, 5, 5), (5, 5, 30, 40)]
    keep = "train_dataloader.dataset.filter_cfg.filter_empty_gt=False"

    def edit(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 0]

    status, output, _ = training(dataset(boxes, edit=edit), keep, "train_cfg.max_iters=3")
    assert status == 0 and "Iter(train) [3/3]" in output


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda content: content.pop("categories"), "categories"),
        (lambda content: content["images"].clear(), "no image with objects"),
        (lambda content: content["annotations"].clear(), "no image with objects"),
        (lambda content: content["categories"][0].update(name="dog"), "no image with objects"),
        (lambda content: content["annotations"][0].pop("bbox"), "bbox"),
    ],
)
def test_annotations_of_no_use(dataset, training, edit, expected):
    status, _, error = training(dataset(edit=edit))
    assert status == 1
    assert "instances_train.json" in error and expected in error


def test_files_of_no_use(dataset, training):
    root = dataset()
    for path in (root / "images").iterdir():
        path.write_bytes(b"no image")
    status, _, error = training(root)
    assert status == 1 and "failed to load image" in error
    shutil.rmtree(root / "images")
    status, _, error = training(root, "train_dataloader.num_workers=1")
    assert status == 1 and "No such file" in error and "images" in error
    (root / "annotations" / "instances_train.json").write_text("")
    status, _, error = training(root)
    assert status == 1 and "instances_train.json" in error
    status, _, error = training(root / "nowhere")
    assert status == 1 and "No such file" in error


def test_objects_without_masks(dataset, training):
    status, _, error = training(dataset(masks=False))
    assert status == 1 and "annotation" in error and "mask" in error


def test_heads_of_other_classes(dataset, training):
    heads = [f"model.roi_head.{kind}_head.num_classes=3" for kind in ("bbox", "mask")]
    status, _, error = training(dataset(), *heads)
    assert status == 1 and "1 classes" in error and "know 3" in error


# --- configs


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.backbone.model=swin_visformer_tiny_v3", "nearest are swin_visformer_tiny_v2"),
        ("model.backbone.frozen=1", "'frozen'"),
        ("model.backbone.model_kwargs.heads=1", "does not accept heads"),
        ("model.backbone.init_cfg.type=Pretrain", "must be dict(type='Pretrained'"),
        ("model.neck.type=Pyramid", "Pyramid is not in the mmdet::model registry"),
        ("model.neck.in_channels=[1,2,3,4]", "[48, 96, 192, 384]"),
        ("modle.neck.type=FPN", "no modle"),
        ("model.neck", "KEY=VALUE"),
        ("model.neck.in_channels=[1,2", "brackets"),
        ("train_dataloader.dataset.pipeline.9.scale=1", "do not fit"),
    ],
)
def test_options_of_no_use(call, option, expected):
    status, output, error = call(flops, CONFIG, "--cfg-options", option)
    assert (status, output) == (1, "") and expected in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model = dict(", "cannot read config"),
        ("_base_ = 'nowhere.py'", "nowhere.py"),
        ("data_root = ''", "has no model"),
        ("model = dict(type='RetinaNet')", "cannot build the model"),
    ],
)
def test_configs_of_no_use(call, tmp_path, text, expected):
    (tmp_path / "config.py").write_text(text)
    status, _, error = call(flops, tmp_path / "config.py")
    assert status == 1 and expected in error


def test_optimizer_of_no_use(dataset, training):
    status, _, error = training(dataset(), "optim_wrapper.optimizer.momentum=0.9")
    assert status == 1 and "'momentum'" in error


def test_missing_config_and_device(call):
    assert "no config nowhere.py" in call(train, "nowhere.py")[2]
    assert "--device tpu9" in call(benchmark, CONFIG, "--device", "tpu9")[2]


def test_launcher_without_processes(call):
    words = [CONFIG, "--launcher", "pytorch"]
    assert "torchrun" in call(train, *words)[2]


# --- checkpoints


def test_checkpoints_of_no_use(call, dataset, tmp_path, monkeypatch):
    root = dataset()
    words = ["--data-root", root, "--work-dir", tmp_path / "run", "--cfg-options", *OPTIONS]
    other, text = tmp_path / "other.pth", tmp_path / "text.pth"
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, other)
    text.write_text("hello")
    for path, expected in (
        (other, "does not fit the config's model"),
        (text, "is not a checkpoint"),
        (tmp_path / "none.pth", "cannot read checkpoint"),
    ):
        status, _, error = call(test, CONFIG, path, *words)
        assert status == 1 and expected in error
    assert "nothing that fits" in call(train, CONFIG, *words, f"load_from={other}")[2]
    assert "no state of a run" in call(train, CONFIG, "--resume", other, *words)[2]
    assert "carries no config" in call(infer, other, root / "images" / "0.png")[2]
    words = [other, root / "images" / "0.png", "--config", CONFIG]
    assert "does not fit" in call(infer, *words)[2]
    assert "cannot read image" in call(infer, other, other)[2]


def test_resume_without_a_checkpoint_starts_afresh(call, dataset, tmp_path):
    words = [CONFIG, "--resume", "--data-root", dataset(), "--work-dir", tmp_path / "run"]
    status, output, _ = call(train, *words, "--cfg-options", *OPTIONS)
    assert status == 0 and "starting afresh" in output


# --- installations


@pytest.mark.parametrize("name", ["mmengine", "mmcv", "mmdet"])
def test_a_missing_package_is_named_with_its_remedy(call, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    status, _, error = call(flops, CONFIG)
    assert status == 1
    assert error == f"error: {name} is not installed: {runtime.INSTALL}"


def test_an_old_mmdet_is_named_with_its_remedy(call, monkeypatch):
    old = types.ModuleType("mmdet")
    old.__version__, old.__spec__ = "2.28.0", importlib.machinery.ModuleSpec("mmdet", None)
    monkeypatch.setitem(sys.modules, "mmdet", old)
    status, _, error = call(flops, CONFIG)
    assert status == 1 and "mmdet 2.28.0 is installed, and 3 is needed" in error


def test_without_mmdet_the_package_imports_silently():
    code = "import sys; sys.modules['mmdet'] = None; import object_detection"
    done = run_python("-W", "error", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
