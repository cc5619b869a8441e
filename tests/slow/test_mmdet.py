"""The parts of object_detection for mmdet and mmseg: operators, backbones, configs, checkpoints."""

import copy
import functools
import importlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import ROOT, run_python
from loading import Trap
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import models
import object_detection
from models.detection_backbone import load_backbone
from object_detection import checkpoints, flops, launch, mmcv_ops, runtime
from utils import UserError

try:
    runtime.load_mmdet()
except UserError as error:
    pytest.skip(f"{error}", allow_module_level=True)

import mmcv.ops
import mmengine.registry
import mmengine.runner
from mmdet.registry import MODELS
from mmengine.logging import HistoryBuffer
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData

CONFIGS = ROOT / "object_detection" / "configs"
COCO = sorted(CONFIGS.glob("*_coco.py"))
# of the docs' table: parameters in millions and those published, GFLOPs and those published
ROW = re.compile(r"^\| `(\w+coco)`[^|]*\|[^|]*" + 4 * r"\| *([\d.]*) *" + r"\|$", re.M)
FIGURES = {
    stem: [float(number) if number else None for number in numbers]
    for stem, *numbers in ROW.findall((ROOT / "docs" / "DETECTION.md").read_text())
}
VISFORMERS = {
    "swin_visformer_small": [96, 192, 384, 768],
    "swin_visformer_small_v2": [64, 128, 256, 512],
    "swin_visformer_tiny_v2": [48, 96, 192, 384],
}
OTHERS = {
    "fastvit_sa12": [64, 128, 256, 512],
    "fastvit_sa24": [64, 128, 256, 512],
    "fastvit_sa36": [64, 128, 256, 512],
    "fastvit_ma36": [76, 152, 304, 608],
    "convit_small": [108, 216, 432, 432],
    "vit_base_patch16_224": [192, 384, 768, 768],
}
MASK = CONFIGS / "mask_rcnn_swin_visformer_small_v2_1x_coco.py"
CASCADE = CONFIGS / "cascade_mask_rcnn_swin_visformer_small_v2_1x_ms_coco.py"
TINY = CONFIGS / "mask_rcnn_swin_visformer_tiny_v2_pennfudan.py"
UPERNET = CONFIGS / "upernet_swin_visformer_small_v2_160k_ade20k.py"
stand_in = pytest.mark.skipif(
    not isinstance(sys.modules.get("mmcv._ext"), mmcv_ops.Operators),
    reason="mmcv has compiled operators",
)


@functools.cache
def on_meta(path):
    """Config and model, built once; do not change them."""
    config = runtime.read_config(str(path))
    with torch.device("meta"):
        return config, runtime.build_model(config, str(path))


# --- operators


def reference_nms(boxes, scores, threshold, offset):
    """Indices kept, by the definition."""
    kept = []
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    for i in np.argsort(-scores, kind="stable"):
        corners = np.maximum(boxes[i, :2], boxes[kept, :2])
        sides = np.minimum(boxes[i, 2:], boxes[kept, 2:]) - corners + offset
        overlaps = sides.clip(0).prod(1)
        if (overlaps <= threshold * (areas[i] + areas[kept] - overlaps)).all():
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_what_the_definition_keeps(offset):
    random = np.random.default_rng(0)
    for count in (0, 1, 50):
        corner = random.uniform(0, 20, (count, 2))
        boxes = np.concatenate([corner, corner + random.uniform(1, 12, (count, 2))], 1)
        scores = random.permutation(count) / max(count, 1)
        _, kept = mmcv.ops.nms(
            torch.tensor(boxes, dtype=torch.float32),
            torch.tensor(scores, dtype=torch.float32),
            0.4,
            offset=offset,
        )
        assert kept.tolist() == reference_nms(boxes, scores, 0.4, offset)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 2])
def test_roi_align_and_its_gradient(aligned, samples):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(
        [[0, 2, 3, 20, 14], [1, 0, 0, 43, 35], [1, 7.5, 1.2, 8, 30]], dtype=torch.float64
    )
    out = mmcv.ops.roi_align(maps, rois, (4, 3), 0.25, samples, "avg", aligned)
    expected = torchvision.ops.roi_align(maps, rois, (4, 3), 0.25, samples, aligned)
    assert torch.equal(out, expected) and out.shape == (3, 3, 4, 3)
    weights = torch.randn_like(out)
    gradients = [torch.autograd.grad((y * weights).sum(), maps)[0] for y in (out, expected)]
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    # of a map that rises by 1 per pixel, the average in a bin is its centre
    ramp = torch.arange(11.0, dtype=torch.float64).expand(1, 1, 9, 11)
    roi = torch.tensor([[0, 8, 8, 32, 24]], dtype=torch.float64)
    centres = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64) - 0.5 * aligned
    out = mmcv.ops.roi_align(ramp, roi, (4, 3), 0.25, 2, "avg", aligned)
    assert (out[0, 0] - centres).abs().max() < 1e-9


@stand_in
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roi_align_of_halves_is_rounded_once(dtype):
    torch.manual_seed(0)
    maps = torch.randn(1, 2, 9, 11).to(dtype).requires_grad_()
    rois = torch.tensor([[0, 2, 3, 20, 14]] * 300, dtype=dtype)  # a sum of many in each pixel
    out = mmcv.ops.roi_align(maps, rois, (4, 3), 0.25, 2, "avg", True)
    weights = torch.rand_like(out)
    out.backward(weights)
    exact = maps.detach().double().requires_grad_()
    expected = torchvision.ops.roi_align(exact, rois.double(), (4, 3), 0.25, 2, True)
    expected.backward(weights.double())
    for found, wanted in ((out, expected), (maps.grad, exact.grad)):
        assert found.dtype == dtype
        error = (found.double() - wanted).abs() / wanted.abs().clamp(min=0.01)
        assert error.max() < 0.6 * torch.finfo(dtype).eps


@stand_in
def test_other_operators_are_refused_by_name():
    maps, rois = torch.zeros(1, 1, 4, 4), torch.zeros(1, 5)
    with pytest.raises(mmcv_ops.MissingOperatorError, match="pool_mode='max'"):
        mmcv.ops.roi_align(maps, rois, (2, 2), 1.0, 0, "max", True)
    with pytest.raises(mmcv_ops.MissingOperatorError, match="softnms"):
        mmcv.ops.soft_nms(torch.zeros(1, 4), torch.zeros(1))
    assert not hasattr(sys.modules["mmcv._ext"], "__path__")


def test_compiled_operators_are_preferred(tmp_path, monkeypatch):
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in [name for name in sys.modules if name.split(".")[0] == "mmcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    mmcv_ops.install()
    assert isinstance(sys.modules["mmcv._ext"], mmcv_ops.Operators)
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    (tmp_path / "mmcv" / "_ext.py").write_text("")
    importlib.invalidate_caches()
    mmcv_ops.install()
    assert "mmcv._ext" not in sys.modules


# --- backbones


@pytest.mark.parametrize("missing", [(), ("mmdet",), ("mmdet", "mmcv"), ("mmengine",)])
def test_importing_is_silent_and_needs_mmengine_only(missing):
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); import object_detection\n"
    code += "print('mmdet.models' in sys.modules)\n"
    if "mmengine" not in missing:
        code += "from mmengine.registry import MODELS; print(MODELS.get('SwinVisformer').__name__)"
    done = run_python("-W", "error", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["False", "SwinVisformer"][: 1 if "mmengine" in missing else 2]


@pytest.mark.parametrize("library", ["mmengine", "mmdet", "mmseg"])
@pytest.mark.parametrize("name", ["VisionBackbone", "SwinVisformer"])
def test_every_library_finds_the_backbones(library, name):
    registry = pytest.importorskip(f"{library}.registry").MODELS
    with mmengine.registry.DefaultScope.overwrite_default_scope(library):
        for key in (name, f"mmdet.{name}"):
            assert issubclass(registry.get(key), getattr(models, name))


def test_backbones_can_be_registered_again(capsys):
    importlib.reload(object_detection)
    importlib.reload(sys.modules["object_detection.mmdet_backbones"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("is_run", [False, True])
def test_weights_of_a_classifier_or_a_run_of_mmengine(tmp_path, monkeypatch, is_run):
    name, path = "swin_visformer_tiny_v2", str(tmp_path / "epoch_1.pth")
    if is_run:
        source = models.VisionBackbone(name)
        state = {f"backbone.{key}": value for key, value in source.state_dict().items()}
        hub = {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}}
        torch.save({"state_dict": state, "message_hub": hub}, path)
    else:
        source = timm.create_model(name)
        torch.save({"model": source.state_dict()}, path)
    messages = []
    module = sys.modules["object_detection.mmdet_backbones"]
    monkeypatch.setattr(module, "print_log", lambda text, logger: messages.append(text))
    settings = runtime.read_config(str(TINY)).model.backbone
    assert settings.type == "VisionBackbone"
    settings.init_cfg = {"type": "Pretrained", "checkpoint": path}
    backbone = MODELS.build(settings)
    assert bool(backbone.init_weights().missing) != is_run  # the norms of the levels
    assert len(messages) == 1 and ("net.norm, net.head" in messages[0]) != is_run
    weight = (source.net if is_run else source).stem[0].weight
    assert torch.equal(backbone.net.stem[0].weight, weight)


def test_old_backbone_block_and_detector_checkpoint(shared, golden, tmp_path):
    """A config and a checkpoint of mmdet 2, with the original's names of its backbone."""
    text = (shared / "goldens" / "danczs.det_swin_visformer_small_v2.json").read_text()
    description = json.loads(text)
    weights = golden.weights(description)
    config = runtime.read_config(str(MASK))
    config.model.backbone = {"type": "SwinVisformer", **description["kwargs"]}
    detector = runtime.build_model(config, "old")
    parts = {k: v for k, v in detector.state_dict().items() if not k.startswith("backbone.")}
    parts["neck.lateral_convs.0.conv.bias"] = torch.full((256,), 7.0)
    old = {f"backbone.{key}": value for key, value in weights.items()}
    torch.save({"meta": {"CLASSES": ("cat",)}, "state_dict": old | parts}, tmp_path / "old.pth")
    torch.save(weights, tmp_path / "backbone.pth")

    checkpoint = mmengine.runner.load_checkpoint(detector, str(tmp_path / "old.pth"))
    checkpoints.check_fit(detector, checkpoint, "old.pth")
    expected = MODELS.build({"type": "SwinVisformer", **description["kwargs"]})
    load_backbone(expected, str(tmp_path / "backbone.pth"))
    for key, value in expected.state_dict().items():
        assert torch.equal(detector.backbone.state_dict()[key], value), key
    assert detector.neck.lateral_convs[0].conv.bias.eq(7).all()
    del checkpoint["state_dict"]["backbone.stage2.0.attn.qkv.weight"]
    with pytest.raises(models.CheckpointError, match=r"old\.pth .*backbone\.net\.stage2\.0\.attn"):
        checkpoints.check_fit(detector, checkpoint, "old.pth")


# --- configs


def test_every_model_has_every_recipe():
    recipes = ("mask_rcnn_{}_1x_coco", "mask_rcnn_{}_3x_ms_coco")
    recipes += ("cascade_mask_rcnn_{}_1x_ms_coco", "cascade_mask_rcnn_{}_3x_ms_coco")
    expected = {recipe.format(name) for name in VISFORMERS for recipe in recipes}
    assert {path.stem for path in COCO} == expected | {recipes[0].format(name) for name in OTHERS}
    assert set(FIGURES) <= {path.stem for path in COCO}
    assert {recipes[0].format(name) for name in VISFORMERS | OTHERS} <= set(FIGURES)


@pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
def test_config_builds_with_its_recipe(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config, model = on_meta(path)
    config = copy.deepcopy(config)
    long = "_3x_" in path.stem
    name = re.fullmatch(r"(?:cascade_)?mask_rcnn_(\w+)_[13]x_(?:ms_)?coco", path.stem)[1]
    assert (
        model.backbone.num_features == (VISFORMERS | OTHERS)[name] == list(model.neck.in_channels)
    )
    assert model.backbone.strides == [4, 8, 16, 32]
    if name in VISFORMERS:
        assert model.backbone.qk_scale_factor == -0.5
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2 if long else 0.1)
    if path.stem in FIGURES:
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        documented, published = FIGURES[path.stem][:2]
        assert millions == pytest.approx(documented, abs=0.06)
        assert published is None or millions == pytest.approx(published, abs=0.6)

    launch.choose_precision(config, None)
    assert config.optim_wrapper.type == "AmpOptimWrapper"
    assert config.train_cfg.max_epochs == (36 if long else 12)
    warm_up, steps = config.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (0.001, 500)
    assert steps.milestones == ([27, 33] if long else [8, 11])
    assert config.train_dataloader.batch_size == 2
    transforms = [step.type for step in config.train_dataloader.dataset.pipeline]
    assert ("RandomChoice" in transforms) == ("_ms_" in path.stem)
    assert ("Resize" in transforms) != ("_ms_" in path.stem)
    heads = model.roi_head.bbox_head
    if path.stem.startswith("cascade"):
        assert [len(head.shared_convs) for head in heads] == [4, 4, 4]
        assert all(head.reg_decoded_bbox and head.loss_bbox.loss_weight == 10 for head in heads)
        assert [c.assigner.pos_iou_thr for c in model.train_cfg.rcnn] == [0.5, 0.6, 0.7]


def optimizer_of(path):
    """Model and optimiser of a config."""
    config, model = on_meta(path)
    config = copy.deepcopy(config)
    launch.choose_precision(config, False)
    return model, build_optim_wrapper(model, config.optim_wrapper).optimizer


@pytest.mark.parametrize("path", [MASK, CASCADE], ids=lambda path: path.stem)
def test_norms_and_biases_of_attention_do_not_decay(path):
    model, optimizer = optimizer_of(path)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    free = set()
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm | nn.LayerNorm):
            free |= {f"{name}.{key}" for key, _ in module.named_parameters()}
    assert "backbone.net.stem.1.weight" in free
    free |= {key for key, _ in model.named_parameters() if "relative_position_bias" in key}
    for key, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0 if key in free else 0.05), key
    assert {group["lr"] for group in optimizer.param_groups} == {1e-4}
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_layers_of_vit_learn_slower_the_nearer_they_are_to_the_image():
    model, optimizer = optimizer_of(CONFIGS / "mask_rcnn_vit_base_patch16_224_1x_coco.py")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert set(groups) == set(names.values())
    for name, group in groups.items():
        block = re.match(r"backbone\.net\.blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else 0 if name.startswith("backbone.net.") else 13
        assert group["lr"] == pytest.approx(1e-4 * 0.7 ** (13 - layer)), name
        norm = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)
        free = norm or name == "backbone.net.pos_embed"
        assert group["weight_decay"] == (0 if free else 0.1), name


def test_a_segmentation_recipe_trains_and_predicts():
    mmseg = pytest.importorskip("mmseg.utils", reason="onedl-mmsegmentation is not installed")
    mmseg.register_all_modules(init_default_scope=False)
    from mmseg.structures import SegDataSample

    config = runtime.read_config(str(UPERNET))
    config.model.data_preprocessor.size = (64, 64)
    config.model.decode_head.channels = config.model.auxiliary_head.channels = 16
    torch.manual_seed(0)
    with mmengine.registry.DefaultScope.overwrite_default_scope("mmseg"):
        model = revert_sync_batchnorm(MODELS.build(config.model))
        wrapper = build_optim_wrapper(model, config.optim_wrapper)
    assert model.backbone.num_features == list(model.decode_head.in_channels)
    batch = {"inputs": list(torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8))}
    labels = torch.randint(0, 150, (2, 1, 64, 48))
    sizes = {"ori_shape": (64, 48), "img_shape": (64, 48)}
    batch["data_samples"] = [
        SegDataSample(metainfo=sizes, gt_sem_seg=PixelData(data=label)) for label in labels
    ]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = model.train_step(batch, wrapper)
    assert losses["loss"].item() > 0
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert {name.partition(".")[0] for name in changed} == {
        *("backbone", "decode_head", "auxiliary_head"),
    }
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm | nn.LayerNorm)]
    names = {id(p): name for name, p in model.named_parameters()}
    for group in wrapper.optimizer.param_groups:
        name = names[id(group["params"][0])]
        free = name.rpartition(".")[0] in norms or "relative_position_bias" in name
        assert group["weight_decay"] == (0 if free else 0.01), name
    for result in model.eval().test_step(batch):
        found = result.pred_sem_seg.data
        assert found.shape == (1, 64, 48) and found.min() >= 0 and found.max() < 150


def test_mixed_precision_needs_a_gpu(monkeypatch):
    path = str(CASCADE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for amp in (None, True):
        config = runtime.read_config(path)
        launch.choose_precision(config, amp)
        assert config.optim_wrapper.type == "OptimWrapper"
        assert "loss_scale" not in config.optim_wrapper
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = runtime.read_config(path)
    launch.choose_precision(config, False)
    assert config.optim_wrapper.type == "OptimWrapper"
    launch.choose_precision(config, True)
    assert config.optim_wrapper.type == "AmpOptimWrapper"


def test_data_root_is_replaced_everywhere():
    config = runtime.read_config(str(COCO[0]), ["train_dataloader.batch_size=1"], "/elsewhere")
    assert config.train_dataloader.dataset.data_root == "/elsewhere/"
    assert config.test_evaluator.ann_file == "/elsewhere/annotations/instances_val2017.json"
    assert "data/coco" not in str(config.to_dict())
    by_option = runtime.read_config(str(COCO[0]), ["data_root=/elsewhere"])
    assert by_option.val_dataloader.dataset.data_root == "/elsewhere/"


# --- counting


@pytest.mark.parametrize("stem", FIGURES)
def test_operations_are_the_documented_and_near_the_published(stem):
    _, model = on_meta(CONFIGS / f"{stem}.py")
    total = sum(flops.count(model, 1280, 800).values()) / 1e9
    documented, published = FIGURES[stem][2:]
    assert total == pytest.approx(documented, abs=0.6)
    # published counts include projections of the windows' padding, which are not computed here
    assert published is None or 0.98 * published < total < published


def test_both_products_of_attention_are_counted():
    _, model = on_meta(TINY)
    convolutions = Counter()

    def add(module, inputs, output):
        weight = module.weight
        convolutions["macs"] += output.numel() * weight[0].numel()

    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    counted = flops.count(model, 1280, 800)["backbone"]
    products = 0
    for index, stage in enumerate(model.backbone.net.stages):
        if stage.num_heads is None:
            continue
        width, height = 1280 // 2 ** (index + 2), 800 // 2 ** (index + 2)
        padded = np.prod([-(-side // stage.window) * stage.window for side in (width, height)])
        channels = stage.num_heads * (stage.head_dim or stage.dim // stage.num_heads)
        products += 2 * stage.depth * padded * stage.window**2 * channels
    assert products > 0.01 * counted
    assert counted == convolutions["macs"] + products


# --- checkpoints


@pytest.mark.parametrize(
    "call",
    [
        lambda path: Trap(Path.touch, path),
        lambda path: Trap(os.system, f"touch {path}"),
        lambda path: Trap(getattr, HistoryBuffer, "register_statistics"),
    ],
)
def test_a_checkpoint_that_asks_to_run_code_is_refused(tmp_path, call):
    model = nn.Linear(1, 1)
    content = {"state_dict": model.state_dict(), "message_hub": call(tmp_path / "ran")}
    torch.save(content, tmp_path / "bad.pth")
    for load in (checkpoints.read, lambda path: mmengine.runner.load_checkpoint(model, path)):
        with pytest.raises(models.CheckpointError, match=r"bad\.pth"):
            load(str(tmp_path / "bad.pth"))
    assert not (tmp_path / "ran").exists()


def test_source_that_resuming_would_execute_is_dropped(tmp_path):
    torch.save(
        {"state_dict": {}, "meta": {"config": "raise SystemExit", "epoch": 1}}, tmp_path / "x"
    )
    assert checkpoints.read(tmp_path / "x")["meta"] == {"epoch": 1}
