"""The commands of object_detection that run mmdet, with good and with bad input."""

import importlib.machinery
import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, call, run_ranks
from PIL import Image

from object_detection import flops, infer, runtime, test, train
from utils import UserError

try:
    runtime.load_mmdet()
except UserError as error:
    pytest.skip(f"{error}", allow_module_level=True)

CONFIG = ROOT / "object_detection/configs/mask_rcnn_swin_visformer_tiny_v2_pennfudan.py"
CASCADE = ROOT / "object_detection/configs/cascade_mask_rcnn_swin_visformer_tiny_v2_1x_ms_coco.py"
SPLITS = ("train", "val", "test")
CHANNELS = ["neck.out_channels", "rpn_head.in_channels", "rpn_head.feat_channels"]
CHANNELS += [f"roi_head.{kind}_roi_extractor.out_channels" for kind in ("bbox", "mask")]
CHANNELS += [f"roi_head.{kind}_head.in_channels" for kind in ("bbox", "mask")]
CHANNELS += ["roi_head.bbox_head.fc_out_channels", "roi_head.mask_head.conv_out_channels"]
# no processes for the loaders, small images and heads, few proposals
OPTIONS = [
    *(f"model.{name}=8" for name in CHANNELS),
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


def output_of(command, *flags):
    """Run a command, which must succeed, in this process."""
    status, output, errors = call(command.main, *flags)
    assert status == 0, errors
    return output


def error_of(command, *flags):
    """Line of the error of a command that must fail, among warnings."""
    status, _, errors = call(command.main, *flags)
    (line,) = [line for line in errors.splitlines() if line.startswith("error")]
    assert status == 1
    return line


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


def training(root, *options):
    """A command that trains for one step."""
    words = [CONFIG, "--data-root", root, "--work-dir", root.parent / "run"]
    return train, *words, "--cfg-options", *OPTIONS, *options


def test_train_resume_test_infer(dataset, tmp_path):
    data, run = dataset(), tmp_path / "run"
    options = [*OPTIONS, "default_hooks.checkpoint.save_last=True"]
    options += ["model.test_cfg.rcnn.score_thr=0.0"]
    words = ["--data-root", data, "--work-dir", run, "--cfg-options", *options]

    first = output_of(train, CONFIG, "--resume", *words, "train_cfg.max_iters=2")
    assert re.search(rf"--resume\b.* {run}\b", first)  # which has no checkpoint
    assert ("float32" in first) != torch.cuda.is_available()
    assert "Iter(train) [2/2]" in first
    assert (run / "last_checkpoint").read_text().endswith("iter_2.pth")

    second = output_of(train, CONFIG, "--resume", *words, "train_cfg.max_iters=3")
    assert "Iter(train) [3/3]" in second and "Iter(train) [2/3]" not in second

    checkpoint = run / "iter_3.pth"
    tested = output_of(test, CONFIG, checkpoint, *words)
    metrics = dict(line.split() for line in tested.splitlines() if line[:5] == "coco/")
    for name in ("bbox", "segm"):
        assert 0 <= float(metrics[f"coco/{name}_mAP_50"]) <= 1

    image = data / "images" / "0.png"
    out = tmp_path / "found" / "0_objects.png"
    found = output_of(
        infer, run / CONFIG.name, checkpoint, image, "--out", out.parent, "--score-thr", 0
    )
    assert "person 0." in found and str(out) in found
    with Image.open(image) as before, Image.open(out) as after:
        assert (after.format, after.size) == ("PNG", before.size)
        assert (np.asarray(before.convert("RGB")) != np.asarray(after)).any()


def test_two_processes_train(dataset, tmp_path):
    """On a CPU, where mmengine joins no processes by itself."""
    words = [CONFIG, "--launcher", "pytorch", "--data-root", dataset(), "--work-dir", tmp_path]
    words += ["--cfg-options", *OPTIONS, "train_cfg.val_begin=2"]
    output = run_ranks(2, words, program=("-m", "object_detection.train"))
    assert output.count("Iter(train) [1/1]") == 1


def test_flops_prints_every_part():
    lines = output_of(flops, CONFIG, "--size", 1270, 790).splitlines()
    assert "1280x800" in lines[0]  # whole strides
    parts = {line.split()[0]: float(line.split()[-2]) for line in lines[1:]}
    assert parts.pop("detector") == pytest.approx(sum(parts.values()), abs=0.03)
    assert set(parts) == {"backbone", "neck", "rpn_head", "roi_head"}


# --- images and annotations


def test_images_without_objects_degenerate_boxes_and_missing_masks_are_trained_through(dataset):
    boxes = [(5, 5, 0, 40), (5, 5, 0.5, 3), (100, 100, 5, 5), (5, 5, 30, 40), (30, 9, 30, 40)]
    keep = "train_dataloader.dataset.filter_cfg.filter_empty_gt=False"

    def edit(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 0]
        del content["annotations"][-1]["segmentation"]

    words = training(dataset(boxes, edit=edit), keep, "train_cfg.max_iters=3")
    assert "Iter(train) [3/3]" in output_of(*words)


HEADS = [f"model.roi_head.{kind}_head.num_classes=3" for kind in ("bbox", "mask")]
TRAIN = r"instances_train\.json"


@pytest.mark.parametrize(
    ("given", "options", "names"),
    [
        ({"edit": lambda content: content.pop("categories")}, [], f"{TRAIN}.*categories"),
        ({"edit": lambda content: content["images"].clear()}, [], f"{TRAIN}.*images"),
        ({"edit": lambda content: content["annotations"].clear()}, [], f"{TRAIN}.*object"),
        ({"edit": lambda content: content["categories"][0].update(name="dog")}, [], TRAIN),
        (
            {"edit": lambda content: content["annotations"][0].update(bbox=[5])},
            [],
            f"{TRAIN}.*bbox",
        ),
        ({"masks": False}, [], f"{TRAIN}.*mask"),
        ({}, HEADS, r"\b1 classes.*\b3\b"),
        ({}, ["optim_wrapper.optimizer.momentum=0.9"], "'momentum'"),
    ],
)
def test_unusable_annotations_and_settings(dataset, given, options, names):
    assert re.search(names, error_of(*training(dataset(**given), *options)))


def test_unusable_files(dataset):
    root = dataset()
    for path in (root / "images").iterdir():
        path.write_bytes(b"no image")
    words = training(root, "train_dataloader.num_workers=1")
    assert str(root / "images") in error_of(*words)
    shutil.rmtree(root / "images")
    assert str(root / "images") in error_of(*training(root))
    (root / "annotations" / "instances_train.json").write_text("")
    assert "instances_train.json" in error_of(*training(root))
    assert str(root / "nowhere") in error_of(*training(root / "nowhere"))


# --- configs


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.backbone.model=swin_visformer_tiny_v3", "swin_visformer_tiny_v2"),
        ("model.backbone.frozen=1", "'frozen'"),
        ("model.backbone.model_kwargs.heads=1", "heads"),
        ("model.backbone.init_cfg.type=Pretrain", "dict(type='Pretrained'"),
        ("model.neck.type=Pyramid", "Pyramid"),
        ("model.neck.in_channels=[1,2,3,4]", "[48, 96, 192, 384]"),
        ("modle.neck.type=FPN", "modle"),
        ("model.neck", "KEY=VALUE"),
        ("model.neck.in_channels=[1,2", "--cfg-options"),
        ("train_dataloader.dataset.pipeline.9.scale=1", CONFIG.name),
    ],
)
def test_unusable_options(option, expected):
    assert expected in error_of(flops, CONFIG, "--cfg-options", option)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model = dict(", "config.py"),
        ("_base_ = 'nowhere.py'", "nowhere.py"),
        ("data_root = ''", "config.py.*model"),
        ("model = dict(type='RetinaNet')", "config.py: .*backbone"),
    ],
)
def test_unusable_configs(tmp_path, text, expected):
    (tmp_path / "config.py").write_text(text)
    assert re.search(expected, error_of(flops, tmp_path / "config.py"))


def test_unusable_flags():
    assert "nowhere.py" in error_of(train, "nowhere.py")
    assert "torchrun" in error_of(train, CONFIG, "--launcher", "pytorch")


# --- checkpoints


def test_unusable_checkpoints(dataset, tmp_path):
    root = dataset()
    image, options = root / "images" / "0.png", ["--cfg-options", *OPTIONS]
    words = ["--data-root", root, "--work-dir", tmp_path / "run", *options]
    other, text, none = (tmp_path / f"{name}.pth" for name in ("other", "text", "none"))
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, other)
    text.write_text("hello")
    for command, path, flags in (
        (test, other, [CONFIG, other, *words]),
        (test, text, [CONFIG, text, *words]),
        (test, none, [CONFIG, none, *words]),
        (train, other, [CONFIG, *words, f"load_from={other}"]),
        (train, other, [CONFIG, "--resume", other, *words]),
        (infer, other, [CONFIG, other, image]),
        (infer, other, [CONFIG, other, other]),
    ):
        assert str(path) in error_of(command, *flags)


# --- installations


@pytest.mark.parametrize("name", ["mmengine", "mmcv", "mmdet"])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert re.search(f"{name} .*{re.escape(runtime.INSTALL)}", error_of(flops, CONFIG))


def test_an_old_mmdet_is_named_with_its_remedy(monkeypatch):
    old = types.ModuleType("mmdet")
    old.__version__, old.__spec__ = "2.28.0", importlib.machinery.ModuleSpec("mmdet", None)
    monkeypatch.setitem(sys.modules, "mmdet", old)
    error = error_of(flops, CONFIG)
    assert "mmdet 2.28.0" in error and runtime.INSTALL in error
