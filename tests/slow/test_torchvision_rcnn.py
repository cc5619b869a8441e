"""Mask R-CNN by torchvision: the model, training, resume, evaluation."""

import functools
import re
import shutil
import sys

import pytest
import torch
from conftest import (
    call,
    error_of,
    processes_and_launcher,
    read_log,
    run_python,
    run_ranks,
    together,
)
from PIL import Image
from test_coco import tampered
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops.poolers import _setup_scales

import models
from pipeline.images import DataError
from samplers import RASampler
from tests.crash.compare import compare

pytest.importorskip("faster_coco_eval")

from object_detection import annotations, torchvision_rcnn
from object_detection.mask_rcnn import LevelAnchors
from object_detection.rcnn_flags import parse_args
from object_detection.torchvision_rcnn import build_mask_rcnn

MODULE = "object_detection.torchvision_rcnn"
TINY = ["--model", "visformer_tiny", "--min-size", 64, "--max-size", 96, "--channels", 8]
RUN = [*TINY, "--batch-size", 2, "--num_workers", 0, "--device", "cpu"]
LEVELS = {
    "swin_visformer_tiny_v2": [4, 8, 16, 32],
    "visformer_tiny": [8, 16, 32],
    "convit_tiny": [4, 8, 16, 32],
    "fastvit_t8": [4, 8, 16, 32],
    "resnet18": [4, 8, 16, 32],
}


def make_targets():
    """Images of odd sizes, the second without an object."""
    images = [torch.rand(3, 101, 77), torch.rand(3, 60, 131)]
    pixels = torch.zeros(2, 101, 77, dtype=torch.uint8)
    pixels[0, 10:60, 10:50] = pixels[1, 50:90, 20:70] = 1
    boxes = torch.tensor([[10.0, 10, 50, 60], [20, 50, 70, 90]])
    empty = {"boxes": boxes[:0], "labels": torch.zeros(0).long(), "masks": torch.zeros(0, 60, 131)}
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": pixels}, empty]


# --- model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEVELS)
def test_every_kind_of_model_trains_and_detects(name):
    torch.manual_seed(0)
    model = build_mask_rcnn(name, 3, min_size=(80, 96), max_size=160, channels=8)
    assert model.backbone.body.strides == LEVELS[name]
    images, targets = make_targets()
    losses = model(images, targets)
    assert len(losses) == 5
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.backbone.body.parameters())
    assert model.rpn.anchor_generator.sizes[0] == (8 * LEVELS[name][0],)
    assert model.transform.image_mean == list(
        models.build_model(name, {}, {})[0].pretrained_cfg["mean"]
    )

    model.roi_heads.score_thresh = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.eval()(images)
    for image, detections in zip(images, found, strict=True):
        height, width = image.shape[1:]
        boxes = detections["boxes"]
        assert boxes.dtype == detections["masks"].dtype == torch.float32
        assert len(boxes) and (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height] * 2) + 1e-3).all()
        assert detections["masks"].shape[1:] == (1, height, width)
        assert set(detections["labels"].tolist()) <= {1, 2, 3}


def test_anchors_lie_on_the_strides_in_full_precision():
    generator = LevelAnchors([8, 16])
    maps = [torch.zeros(2, 1, 97, 125, dtype=torch.bfloat16), torch.zeros(2, 1, 49, 63)]
    image = ImageList(torch.zeros(2, 3, 776, 1000), [(776, 1000)] * 2)
    anchors = generator(image, maps)
    assert len(anchors) == 2 and anchors[0].dtype == torch.float32
    assert len(anchors[0]) == 3 * (97 * 125 + 49 * 63)
    centres = (anchors[0][:, :2] + anchors[0][:, 2:]) / 2
    assert centres[3 * 97 * 125 - 1].tolist() == [124 * 8, 96 * 8]
    # 16 pixels each, though 1000 / 63 and 776 / 49 are less
    assert centres[-1].tolist() == [62 * 16, 48 * 16]
    square = anchors[0][1]
    assert (square[2:] - square[:2]).tolist() == [64, 64]


@pytest.mark.parametrize("name", ["visformer_tiny", "resnet18"])
def test_regions_are_pooled_at_the_scales_of_torchvision(name):
    model = build_mask_rcnn(name, 1, channels=8).eval()
    with torch.no_grad():
        levels = list(model.backbone(torch.zeros(1, 3, 256, 256)).values())[:-1]
    scales, mapper = _setup_scales(levels, [(256, 256)], 224, 4)
    for pooler in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        assert pooler.scales == scales
        assert vars(pooler.map_levels) == vars(mapper)


def test_backbone_options_reach_the_backbone(tmp_path):
    classifier = models.build_model("resnet18", {}, {})[0]
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "classifier.pth")}
    model = build_mask_rcnn(
        "resnet18", 2, channels=8, out_indices=(2, 3), frozen_stages=0, init_cfg=init_cfg
    )
    body = model.backbone.body
    assert body.strides == [8, 16]
    assert torch.equal(body.net.layer1[0].conv1.weight, classifier.layer1[0].conv1.weight)
    assert not body.net.conv1.weight.requires_grad
    assert model.roi_heads.box_predictor.cls_score.out_features == 3  # with the background
    with pytest.raises(models.ModelError, match=r"resnet18.*\[4, 16\]"):
        build_mask_rcnn("resnet18", 2, channels=8, out_indices=(1, 3))
    with pytest.raises(models.ModelError, match="num_classes 0"):
        build_mask_rcnn("resnet18", 0)
    with pytest.raises(TypeError, match="froze_stages"):
        build_mask_rcnn("resnet18", 2, froze_stages=1)


def test_what_does_not_decay():
    model = build_mask_rcnn("swin_visformer_tiny_v2", 1, channels=8, frozen_stages=0)
    optimizer = torchvision_rcnn.build_optimizer(model, 1e-3, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    spared = {name for name, decay in decays.items() if decay == 0}
    decayed = decays.keys() - spared
    assert any(name.endswith("relative_position_bias_table") for name in spared)
    assert not any(name.endswith(("bias", "bias_table")) for name in decayed)
    assert all(model.get_parameter(name).ndim > 1 for name in decayed)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and spared | decayed == set(names.values()) - frozen


def test_learning_rate_rises_and_falls():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = torchvision_rcnn.build_schedule(optimizer, 1200, 100)
    rates = []
    for update in range(1200):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"] / 2)
    assert rates[0] == pytest.approx(0.001)
    assert rates[50] == pytest.approx(0.5005)
    assert rates[100] == rates[799] == 1
    assert rates[800] == rates[1099] == pytest.approx(0.1)
    assert rates[1100] == rates[1199] == pytest.approx(0.01)


# --- objects without a mask -----------------------------------------------------------------


def losses_and_gradients(model, images, targets, plain=False):
    """Losses of one batch, and gradients of the mask predictor; ``plain``: by torchvision's own."""
    heads, kind = model.roi_heads, type(model.roi_heads)
    torch.manual_seed(3)
    model.zero_grad()
    if plain:
        heads.__class__ = RoIHeads
    losses = model.train()(images, targets)
    heads.__class__ = kind
    losses["loss_mask"].backward(retain_graph=True)
    gradients = [p.grad.clone() for p in heads.mask_predictor.parameters()]
    return losses, gradients


@pytest.fixture
def crowded():
    """A small detector, and a batch of three objects in two images and of none in another."""
    torch.manual_seed(0)
    model = build_mask_rcnn("resnet18", 3, min_size=96, max_size=160, channels=8)
    images, targets = make_targets()
    other = {key: value[:1].clone() for key, value in targets[0].items()}
    return model, [*images, images[0].flip(0)], [*targets, other]


def test_with_all_masks_the_losses_are_those_of_torchvision(crowded):
    losses, gradients = losses_and_gradients(*crowded)
    expected, others = losses_and_gradients(*crowded, plain=True)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[key], expected[key]) for key in losses)
    assert all(map(torch.equal, gradients, others))
    assert losses["loss_mask"] > 0 and any(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("missing", [[(0, 0)], [(0, 1), (2, 0)]])
def test_objects_without_a_mask_train_the_box_part_alone(crowded, monkeypatch, missing):
    *_, targets = crowded
    whole, _ = losses_and_gradients(*crowded)
    select = RoIHeads.select_training_samples

    def without(self, proposals, targets):
        """torchvision's selection without the positives of those objects."""
        boxes, matched, labels, regression = map(list, select(self, proposals, targets))
        for image, index in missing:
            kept = ~((labels[image] > 0) & (matched[image] == index))
            boxes[image], matched[image] = boxes[image][kept], matched[image][kept]
            labels[image], regression[image] = labels[image][kept], regression[image][kept]
        return boxes, matched, labels, regression

    with monkeypatch.context() as patch:
        patch.setattr(RoIHeads, "select_training_samples", without)
        expected, gradients = losses_and_gradients(*crowded, plain=True)
    for image, index in missing:
        targets[image]["masks"][index] = 0
    losses, found = losses_and_gradients(*crowded)
    torch.testing.assert_close(losses["loss_mask"], expected["loss_mask"])
    assert losses["loss_mask"] != whole["loss_mask"]
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)
    boxes = [key for key in losses if key != "loss_mask"]
    assert len(boxes) == 4 and all(torch.equal(losses[key], whole[key]) for key in boxes)
    assert all(losses[key] != expected[key] for key in ("loss_classifier", "loss_box_reg"))


def test_a_batch_without_any_mask_trains(crowded):
    for target in crowded[2]:
        target["masks"].zero_()
    losses, gradients = losses_and_gradients(*crowded)
    assert losses["loss_mask"] == 0 and losses["loss_box_reg"] > 0
    assert all((gradient == 0).all() for gradient in gradients)


# --- runs -----------------------------------------------------------------------------------


detect = functools.partial(call, torchvision_rcnn.main)
refused = functools.partial(error_of, torchvision_rcnn.main, *RUN)


def detected(*flags):
    status, output, errors = detect(*flags)
    assert status == 0, errors
    return output


def figures(output):
    return [line for line in output.splitlines() if line.startswith("* box AP")]


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """Two epochs, never stopped, in a process of their own."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*RUN, "--data-path", few, "--epochs", 2, "--amp"]
    flags += ["--clip-grad", 1, "--drop-path", 0.1]
    done = run_python("-m", MODULE, *flags, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return flags, folder, done.stdout


def test_stopped_and_resumed_is_the_same_run(whole, tmp_path, monkeypatch):
    flags, folder, output = whole
    assert len(figures(output)) == 2
    log = read_log(folder)
    parts = {"classifier", "box_reg", "mask", "objectness", "rpn_box_reg"}
    total = sum(log[0][f"train_loss_{part}"] for part in parts)
    assert log[0]["train_loss"] == pytest.approx(total)
    assert log[1]["train_loss"] < log[0]["train_loss"]
    # the third and the sixth of six updates, three of them to warm up, the last two at a tenth
    assert [line["train_lr"] for line in log] == pytest.approx([6.67e-5, 1e-5])
    assert "--stop-epoch" in detected(*flags, "--output_dir", tmp_path, "--stop-epoch", 1)
    assert [line["epoch"] for line in read_log(tmp_path)] == [0]
    drawn = []
    monkeypatch.setattr(
        RASampler,
        "set_epoch",
        lambda self, epoch: (drawn.append(epoch), vars(self).update(epoch=epoch)),
    )
    detected(*flags, "--output_dir", tmp_path, "--resume", "auto")
    assert drawn == [1]
    assert compare(folder, tmp_path) == 0  # bits
    detected(*flags, "--output_dir", tmp_path, "--resume", "auto")
    assert drawn == [1]  # nothing is left to train


def test_the_checkpoint_evaluates_to_the_same_figures(whole, few):
    _, folder, output = whole
    last = read_log(folder)[-1]
    assert last["test_bbox_AP50"] > 1e-3
    amp = ["--amp", *RUN[-6:]]
    checkpoint = ["--eval", "--resume", folder / "checkpoint.pth", "--data-path", few]
    found = detected(*checkpoint, *amp)
    assert figures(found) == figures(output)[-1:]
    assert f"AP50 {last['test_bbox_AP50']:.4f}" in found
    assert "sizes [64] to 96" in found
    found = run_ranks(2, [*checkpoint, *amp], program=["-m", MODULE])
    assert figures(found) == figures(output)[-1:]


def test_two_processes_train(few, tmp_path):
    flags = [*RUN, "--data-path", few, "--epochs", 1, "--frozen-stages", 0]
    codes, trained, errors = together(2, [*flags, "--output_dir", tmp_path], program=["-m", MODULE])
    assert codes == [0, 0], errors
    assert "strides" not in errors[0]
    assert trained.count("train: 5 images") == trained.count("val: 5 images") == 1
    assert processes_and_launcher(trained) == ("2", "torchrun")
    (line,) = read_log(tmp_path)
    assert line["train_loss"] > 0 and line["test_bbox_AP50"] > 1e-3
    # the first process saved what both evaluated, its statistics of BatchNorm included
    evaluation = ["--eval", "--resume", tmp_path / "checkpoint.pth", "--data-path", few]
    assert figures(detected(*evaluation, *RUN[-6:])) == figures(trained)
    assert len(figures(trained)) == 1


def test_fine_tuning_keeps_what_the_classifier_says_of_its_function(few, tmp_path):
    classifier, kwargs = models.build_model("visformer_tiny", {"qk_scale_factor": -0.5}, {})
    weights = {"model": classifier.state_dict(), "model_kwargs": kwargs, "gelu": "tanh"}
    torch.save(weights, tmp_path / "classifier.pth")
    one = ["--data-path", few, "--limit", 1]
    one += ["--val-annotations", few / "annotations" / "instances_train.json"]
    flags = [*RUN, *one, "--epochs", 1, "--lr", 0, "--output_dir", tmp_path]
    output = detected(*flags, "--finetune", tmp_path / "classifier.pth")
    assert figures(output)[0].endswith("on 1 images")  # of the training file
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (saved["qk_scale_factor"], saved["gelu"], saved["classes"]) == (-0.5, "tanh", ["person"])
    name = "stage2.0.attn.qkv.weight"
    assert torch.equal(saved["model"][f"backbone.body.net.{name}"], weights["model"][name])
    evaluation = ["--eval", "--resume", tmp_path / "checkpoint.pth", *one]
    assert figures(detected(*evaluation, *RUN[-6:])) == figures(output)


def test_cocos_own_layout(few, tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        old, new = f"instances_{split}.json", f"instances_{split}2017.json"
        (tmp_path / "annotations" / new).symlink_to(few / "annotations" / old)
        (tmp_path / f"{split}2017").symlink_to(few / "images")
    output = detected(*RUN, "--data-path", tmp_path, "--epochs", 1, "--limit", 1)
    assert len(figures(output)) == 1
    assert re.search("^train: 1 images, 2 objects", output, re.M)


def test_a_loss_that_is_not_finite_ends_the_run(few):
    assert "epoch 0, step 1" in refused("--data-path", few, "--lr", 1e30, "--warmup-iters", 0)


# --- bad input ------------------------------------------------------------------------------


TRAIN, VAL = "--train-annotations", "--val-annotations"


def of_all(**values):
    return lambda c: [a.update(values) for a in c["annotations"]]


def normalise(content):
    for entry in content["annotations"]:
        entry["bbox"] = [value / 600 for value in entry["bbox"]]


RLE = {"size": [536, 559], "counts": "PYg9>nh01O2N"}
CHANGES = {
    "size": lambda c: c["images"][0].update(width=600),
    "mask": lambda c: c["annotations"][0].update(segmentation=[["a"] * 6]),
    "pairs": lambda c: c["annotations"][0].update(segmentation=[[[1, 2], [30, 2], [30, 40]]]),
    "rectangle": of_all(segmentation=[[10, 10, 50, 50]]),
    "RLE": lambda c: c["annotations"][0].update(segmentation=RLE),
    "file": lambda c: c["images"][1].update(file_name="lost.png"),
    "images": lambda c: c["images"].append({**c["images"][0], "file_name": "other.png"}),
    "class": lambda c: c["categories"][0].update(name="Person"),
    "classes": lambda c: c.update(categories=[{"id": 1, "name": "dog"}]),
    "none": lambda c: c.update(annotations=[]),
    "crowd": of_all(iscrowd=1),
    "masks": of_all(segmentation=[]),
    "null": of_all(segmentation=None),
    "absent": lambda c: [a.pop("segmentation") for a in c["annotations"]],
    "normalised": normalise,
}
BAD = [  # flags, a change of the annotations, and what the message must name
    (["--data-path", ""], None, "--data-path"),
    (["--data-path", "TMP"], None, r"instances_train\.json"),
    ([TRAIN, "TMP/broken.json"], None, r"broken\.json"),
    (["--images", "TMP"], None, r"FudanPed00001\.png.*--images"),
    ([TRAIN, "TMP/tampered.json"], "size", r"FudanPed00001\.png.*559x536.*600x536"),
    ([TRAIN, "TMP/tampered.json"], "mask", r"annotation 1 .*FudanPed00001\.png"),
    ([TRAIN, "TMP/tampered.json"], "pairs", r"annotation 1 .*FudanPed00001\.png.*\[\[1, 2\]"),
    ([TRAIN, "TMP/tampered.json"], "rectangle", r"no object has a mask.* 8 .*annotation 1 "),
    ([TRAIN, "TMP/tampered.json"], "RLE", r"annotation 1 .*FudanPed00001\.png.*RLE"),
    ([TRAIN, "TMP/tampered.json"], "file", r"lost\.png"),
    ([TRAIN, "TMP/tampered.json"], "images", r"other\.png.*FudanPed00001\.png"),
    ([TRAIN, "TMP/tampered.json"], "none", "no object"),
    ([TRAIN, "TMP/tampered.json"], "crowd", "crowd.*annotation 1 "),
    ([TRAIN, "TMP/tampered.json"], "masks", "no object has a mask"),
    ([TRAIN, "TMP/tampered.json"], "null", "no object has a mask"),
    ([TRAIN, "TMP/tampered.json"], "absent", "no object has a mask"),
    ([TRAIN, "TMP/tampered.json"], "normalised", r"annotation 1 .*0\.\.1"),
    ([VAL, "TMP/tampered.json"], "class", "'person'.*'Person'"),
    ([VAL, "TMP/tampered.json"], "classes", "'person'.*'dog'"),
    (["--model", "visformer_tinny"], None, "visformer_tinny.* visformer_tiny"),
    (["--epochs", 0], None, "--epochs 0"),
    (["--min-size", 0], None, "min_size"),
    (["--eval"], None, "--eval.*--resume"),
    (["--resume", "auto"], None, "--resume auto.*--output_dir"),
    (["--resume", "TMP/none.pth"], None, r"none\.pth"),
    (["--resume", "TMP/empty.pth"], None, r"empty\.pth"),
    (["--resume", "TMP/other.pth"], None, r"other\.pth.* best_ap, channels, epoch"),
    (["--finetune", "TMP/other.pth"], None, r"other\.pth"),
    (["--device", "cuda:99"], None, "--device cuda:99"),
]


@pytest.mark.parametrize(("flags", "change", "names"), BAD)
def test_bad_input_is_one_line(few, tmp_path, flags, change, names):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    if change is not None:
        tampered(few, tmp_path, CHANGES[change])
    flags = [str(flag).replace("TMP", str(tmp_path)) for flag in flags]
    assert re.search(names, refused("--data-path", few, *flags))


def test_a_checkpoint_of_another_detector(whole, few, tmp_path):
    _, folder, _ = whole
    checkpoint = ["--data-path", few, "--resume", folder / "checkpoint.pth"]
    assert "checkpoint.pth" in refused(*checkpoint, "--eval", "--model", "resnet18")

    renamed = tampered(few, tmp_path, lambda c: c["categories"][0].update(name="dog"))
    error = refused(*checkpoint, TRAIN, renamed)
    assert "tampered.json" in error and "'person'" in error and "'dog'" in error


def test_half_of_the_masks_are_enough(few, tmp_path):
    def change(content):
        for number, entry in enumerate(content["annotations"]):
            entry["segmentation"] = (entry["segmentation"], [], None, [[9, 9, 50, 50]])[number % 4]

    flags = [TRAIN, tampered(few, tmp_path, change), "--output_dir", tmp_path / "run"]
    output = detected(*RUN, "--data-path", few, *flags, "--epochs", 1)
    assert re.search(r"^train: 5 images, 8 objects.* 6 without a mask", output, re.M)
    (line,) = read_log(tmp_path / "run")
    assert line["train_loss_mask"] > 0


def test_classes_are_matched_by_name(whole, few, tmp_path):
    """In another order, under other ids, and among others; old checkpoints have names by id."""

    def change(content):
        names = {5: "dog", 9: "person"}
        content["categories"] = [{"id": key, "name": name} for key, name in names.items()]
        for entry in content["annotations"]:
            entry["category_id"] = 9
        content["annotations"][0]["category_id"] = 5

    path = tampered(few, tmp_path, change, split="val")
    _, folder, _ = whole
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    saved["categories"] = dict(enumerate(saved.pop("classes"), start=3))
    torch.save(saved, tmp_path / "old.pth")
    flags = ["--eval", "--data-path", few, VAL, path, *RUN[-6:], "--amp"]
    new, old = (
        detected(*flags, "--resume", checkpoint)
        for checkpoint in (folder / "checkpoint.pth", tmp_path / "old.pth")
    )
    assert figures(new) == figures(old) and len(figures(new)) == 1
    assert "1 of other categories" in new


def test_validation_may_lack_classes_that_training_may_not(few):
    args = parse_args(["--data-path", str(few)])
    found, _ = torchvision_rcnn.read_split(args, "val", ["dog", "person"])
    assert list(found.categories.values()) == ["dog", "person"]
    assert found.per_class()["dog"] == 0 < found.per_class()["person"]
    with pytest.raises(DataError, match="'dog'"):
        torchvision_rcnn.read_split(args, "train", ["dog", "person"])


def test_without_the_coco_api(few, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    assert "faster-coco-eval" in refused("--data-path", few)


def test_an_image_that_is_no_image(few, tmp_path):
    found = annotations.read(few / "annotations" / "instances_train.json")
    for image in found.images:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    (tmp_path / found.images[2]["file_name"]).write_bytes(b"no image")
    path = few / "annotations" / "instances_train.json"
    flags = ["--data-path", few, "--images", tmp_path, VAL, path]
    assert "FudanPed00003.png" in refused(*flags, "--num_workers", 1)


def test_an_image_error_of_one_rank_ends_all(few, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(few / "images", images)
    broken = annotations.read(few / "annotations" / "instances_val.json").images[0]["file_name"]
    (images / broken).write_bytes(b"no image")
    flags = [*RUN, "--data-path", few, "--images", images, "--epochs", 1]
    codes, _, errors = together(2, flags, program=["-m", MODULE])
    assert codes == [1, 1]
    one, other = sorted(errors, key=lambda text: broken in text)
    assert broken in other and "error" not in one
