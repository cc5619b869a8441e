"""Detectors and feature maps in ONNX, against torch."""

import functools
import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import call, error_of
from PIL import Image

import models

pytest.importorskip("faster_coco_eval")

from object_detection import export, onnx_models
from object_detection.onnx_models import OUTPUTS, lost
from object_detection.torchvision_rcnn import build_detector

SIZE = (96, 130)
refused = functools.partial(error_of, export.main)


def exported(*flags):
    status, output, errors = call(export.main, *flags)
    assert (status, errors) == (0, ""), errors
    return output


def save_detector(path, name, seed=0):
    """A random detector of two classes, whose statistics are those of some images."""
    torch.manual_seed(seed)
    settings = {"model_name": name, "min_size": [64, 80], "max_size": 128, "channels": 8}
    settings |= {"qk_scale_factor": None, "classes": ["cat", "dog"]}
    model = build_detector(settings)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        model.backbone.body.train()(torch.randn(4, 3, 96, 128))
    progress = {"optimizer": {}, "scaler": {}, "epoch": 0, "best_ap": 0.0}
    torch.save({**settings, **progress, "model": model.state_dict()}, path)
    return model.eval()


def photographs(folder):
    for path in sorted(folder.glob("images/*.png"))[:3]:
        yield np.array(Image.open(path).convert("RGB").resize(SIZE[::-1]))


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=["visformer_tiny", "test_resnet"])
def program(request, few, tmp_path_factory):
    """A detector and its file in ONNX."""
    folder = tmp_path_factory.mktemp("program")
    detector = save_detector(folder / "detector.pth", request.param)
    flags = [folder / "detector.pth", "--output", folder / "a.onnx", "--size", *SIZE]
    exported(*flags, "--image", few / "images" / "FudanPed00001.png")
    return request.param, detector, folder / "a.onnx"


def test_detections_are_those_of_torch(few, program):
    name, detector, path = program
    session, count = session_of(path), 0
    assert session.get_inputs()[0].shape == [*SIZE, 3]
    for pixels in photographs(few):
        found = session.run(list(OUTPUTS), {"pixels": pixels})
        found = [torch.from_numpy(output) for output in found]
        with torch.no_grad():
            expected = detector([torch.from_numpy(pixels).permute(2, 0, 1) / 255])[0]
        assert [tuple(output.shape[1:]) for output in found] == [(4,), (), (), (1, *SIZE)]
        assert found[3].min() >= 0 and found[3].max() <= 1 + 1e-6
        count += len(expected["boxes"])
        assert lost(found, [expected[key] for key in OUTPUTS]) <= len(expected["boxes"]) // 50
    assert count > 100
    metadata = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(metadata["classes"]) == ["cat", "dog"]
    assert json.loads(metadata["input_size"]) == list(SIZE) and metadata["model"] == name


def test_an_image_without_detections(tmp_path):
    detector = save_detector(tmp_path / "detector.pth", "test_resnet").requires_grad_(False)
    detector.roi_heads.score_thresh = 1.0
    images, _ = detector.transform([torch.zeros(3, *SIZE)])
    maps = list(detector.backbone(images.tensors).values())
    names = [f"level{number}" for number in range(len(maps))]
    heads = onnx_models.Heads(detector, images, SIZE).eval()
    axes = {name: {0: "detections"} for name in OUTPUTS}
    options = {"dynamo": False, "dynamic_axes": axes}
    program = onnx_models.to_onnx(heads, maps, [*names, *OUTPUTS], **options)
    session = onnxruntime.InferenceSession(program.SerializeToString())
    inputs = {name: level.numpy() for name, level in zip(names, maps, strict=True)}
    found = session.run(list(OUTPUTS), inputs)
    assert [output.shape for output in found] == [(0, 4), (0,), (0,), (0, 1, *SIZE)]


def test_a_wrong_program_is_not_kept(program, tmp_path, monkeypatch):
    name, _, path = program
    save_detector(tmp_path / "detector.pth", name, seed=1)
    monkeypatch.setattr(export, "detector_to_onnx", lambda *args: onnx.load(path))
    (tmp_path / "a.onnx").write_text("before")
    flags = [tmp_path / "detector.pth", "--output", tmp_path / "a.onnx", "--size", *SIZE]
    assert re.search(r"(\d+) of \1 detections", refused(*flags))
    assert (tmp_path / "a.onnx").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "detector.pth"]


def test_lost_detections_are_counted():
    boxes = torch.tensor([[1.0, 2, 11, 12], [5, 5, 20, 30], [5, 5, 20, 30]])
    masks = torch.rand(3, 1, 40, 50)
    one = [boxes, torch.tensor([1, 2, 1]), torch.tensor([0.9, 0.8, 0.7]), masks]
    assert lost(one, one) == 0
    assert lost([x[[2, 0, 1]] for x in one], one) == 0
    assert lost([x[:2] for x in one], one) == lost(one, [x[:2] for x in one]) == 1
    assert lost([x[:0] for x in one], one) == 3 and lost(*[[x[:0] for x in one]] * 2) == 0
    for index, change in ((0, 0.5), (1, 1), (2, 0.01), (3, 0.01)):
        other = [x.clone() for x in one]
        other[index].view(3, -1)[1, 0] += change
        assert lost(other, one) == 1


def test_feature_maps_of_a_classifier(few, tmp_path):
    torch.manual_seed(0)
    classifier, kwargs = models.build_model("test_resnet", {}, {})
    content = {
        "model": classifier.state_dict(),
        "model_name": "test_resnet",
        "model_kwargs": kwargs,
    }
    torch.save(content, tmp_path / "classifier.pth")
    flags = ["--features", "--output", tmp_path / "a.onnx", "--size", *SIZE]
    exported(tmp_path / "classifier.pth", *flags)
    backbone = models.VisionBackbone("test_resnet").eval()
    models.load_backbone(backbone, tmp_path / "classifier.pth")
    image = torch.randn(1, 3, *SIZE)
    session = session_of(tmp_path / "a.onnx")
    found = session.run(None, {"image": image.numpy()})
    assert [output.name for output in session.get_outputs()] == [
        f"stride{stride}" for stride in (4, 8, 16, 32)
    ]
    with torch.no_grad():
        for output, expected in zip(found, backbone(image), strict=True):
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                torch.from_numpy(output), expected, rtol=0, atol=1e-4 * scale
            )
    exported("--model", "test_resnet", *flags)  # random weights
    assert not np.allclose(
        session_of(tmp_path / "a.onnx").run(None, {"image": image.numpy()})[0], found[0]
    )


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--output", "TMP/a.onnx"], "CHECKPOINT"),
        (["--features", "--output", "TMP/a.onnx"], "--model"),
        (["TMP/none.pth", "--output", "TMP/a.onnx"], "none.pth"),
        (["TMP/other.pth", "--output", "TMP/a.onnx"], "other.pth"),
        (["TMP/other.pth", "--features", "--output", "TMP/a.onnx"], "--model"),
        (["TMP/other.pth", "--output", "TMP/a.pt2"], "a.pt2"),
        (["TMP/other.pth", "--output", "TMP/nowhere/a.onnx"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, names):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    assert names in refused(*[flag.replace("TMP", str(tmp_path)) for flag in flags])
