"""Programs for Core ML, ExecuTorch and OpenVINO, and int8: they compute what the model does."""

import importlib
import importlib.util
import json

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import write_images
from exporting import CLASSES, VIT, close, export, python_block, save, session_of, source_of
from torch import nn

from models import DataConfig
from tools.export.calibration import CalibrationSet
from tools.export.formats.coreml import Classifier
from tools.export.source import Preprocessed

SIZE = (64, 64)
NETS = {  # with what converters know least: masks of shifted windows, and gates
    "swin_visformer_tiny_v2": {
        "stages": ((1, 16, 4, None, 4.0, 8), (2, 32, 2, 2, 4.0, None, None, 4)),
        "img_size": SIZE[0],
    },
    "convit_tiny": {
        **{"depth": 2, "local_up_to_layer": 1, "embed_dim": 32},
        **{"num_heads": 4, "img_size": SIZE[0]},
    },
    "visformer_tiny": {"stages": ((1, 16, 4), (1, 32, 4, 2)), "img_size": SIZE[0]},
}
SMALL = {"stages": ((1, 16, 4, 2),), "img_size": SIZE[0]}  # for int8, which takes long


def needs(*packages):
    """A mark that skips a test where a package is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs pip install {' '.join(missing)}")


def written(tmp_path, name, suffix, *flags, kwargs=None):
    """A model, and what was exported of it."""
    model = save(tmp_path / "in.pth", name, kwargs or NETS[name], SIZE)
    folder = tmp_path / "out"
    folder.mkdir()
    assert (
        export("--checkpoint", tmp_path / "in.pth", "--output", folder / f"m{suffix}", *flags) == 0
    )
    return model, folder / f"m{suffix}"


def check_metadata(about, name, where="outside"):
    assert (about["project"], about["model"], about["preprocessing"]) == ("visformer", name, where)
    assert json.loads(about["classes"]) == CLASSES
    assert json.loads(about["input_size"]) == list(SIZE)


@needs("openvino")
def test_openvino(tmp_path, monkeypatch):
    model, path = written(tmp_path, "convit_tiny", ".xml")
    assert {file.name for file in path.parent.iterdir()} == {"m.xml", "m.bin"}
    (tmp_path / "output" / "cifar10").mkdir(parents=True)
    for file in path.parent.iterdir():
        file.rename(tmp_path / "output" / "cifar10" / f"model{file.suffix}")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(python_block("## OpenVINO in Python"), names)
    check_metadata(names["about"], "convit_tiny")
    assert [port.any_name for port in names["program"].outputs] == ["logits"]
    with torch.no_grad():
        close(names["logits"], model(torch.zeros(1, 3, *SIZE)))
        for batch in (1, 3):
            image = torch.randn(batch, 3, *SIZE)
            close(names["program"]({"image": image.numpy()})["logits"], model(image))


@needs("executorch")
def test_executorch(tmp_path, monkeypatch):
    model, path = written(tmp_path, "visformer_tiny", ".pte")
    (tmp_path / "output" / "cifar10").mkdir(parents=True)
    path.rename(tmp_path / "output" / "cifar10" / "model.pte")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(python_block("## ExecuTorch in Python"), names)
    check_metadata(names["about"], "visformer_tiny")
    image = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        close(names["logits"], model(torch.zeros(1, 3, *SIZE)))
        close(names["forward"].execute([image])[0], model(image))


@needs("coremltools")
def test_coreml(tmp_path, capsys):
    name = "swin_visformer_tiny_v2"
    folder = tmp_path / "out" / "m.mlpackage"
    _, path = written(tmp_path, name, ".mlpackage")
    assert "macOS" in capsys.readouterr().out
    load_spec = importlib.import_module("coremltools").utils.load_spec
    spec = load_spec(str(path))
    described = spec.description
    image = described.input[0].type.imageType
    assert (described.input[0].name, image.height, image.width) == ("image", *SIZE)
    assert image.colorSpace == type(image).ColorSpace.Value("RGB")
    assert described.predictedFeatureName == "classLabel"
    assert {output.name for output in described.output} == {"classLabel", "classLabel_probs"}
    check_metadata(dict(described.metadata.userDefined), name, "inside")
    main = spec.mlProgram.functions["main"]
    operations = main.block_specializations[main.opset].operations
    kinds = {operation.type for operation in operations}
    assert {"conv", "softmax", "gelu", "classify"} <= kinds
    types = [op.outputs[0].type.tensorType.dataType for op in operations if op.type == "conv"]
    half = type(operations[0].outputs[0].type.tensorType).DESCRIPTOR.fields_by_name["dataType"]
    assert {half.enum_type.values_by_number[number].name for number in types} == {"FLOAT16"}
    # a package replaces a package, and nothing else
    (folder / "old").write_text("")
    flags = ["--checkpoint", tmp_path / "in.pth", "--output", folder]
    assert export(*flags, "--precision", "float32") == 0
    assert not (folder / "old").exists() and [p.name for p in folder.parent.iterdir()] == [
        path.name
    ]
    assert export(*flags, "--batch-size", 2) == 1
    assert "--batch-size 2" in capsys.readouterr().err


def test_images_of_core_ml_are_normalized_inside():
    torch.manual_seed(0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())
    image = torch.randint(256, (2, 3, 8, 8)).float()
    normal = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    logits = model(normal)
    for is_labelled, expected in ((False, logits), (True, logits.softmax(1))):
        found = Classifier(Preprocessed(model, mean, std), is_labelled)(image)
        torch.testing.assert_close(found, expected)


@pytest.fixture
def folder(tmp_path):
    """Images without classes."""
    root = write_images(tmp_path / "images", train=0, val=12, classes=("one",))
    return root / "val" / "one"


def inputs_of(folder, count):
    """Inputs of a model, of the images by which it was calibrated: others may be out of range."""
    return CalibrationSet(folder, source_of(nn.Identity(), images=DataConfig(SIZE))).batch(0, count)


def deviation(found, model, image):
    """Largest difference of logits from a model's, of the largest logit."""
    with torch.no_grad():
        expected = model(image)
    return ((torch.as_tensor(found) - expected).abs().max() / expected.abs().max()).item()


def openvino_logits(path, image):
    core = importlib.import_module("openvino").Core()
    return core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image)[0]


def executorch_logits(path, image):
    program = importlib.import_module("executorch.runtime").Runtime.get().load_program(path)
    return program.load_method("forward").execute([image])[0]


@pytest.mark.parametrize(
    ("suffix", "logits"),
    [
        pytest.param(".xml", openvino_logits, marks=needs("openvino", "nncf")),
        pytest.param(".pte", executorch_logits, marks=needs("executorch", "torchao")),
    ],
)
def test_int8(suffix, logits, folder, tmp_path, capsys):
    flags = ["--precision", "int8", "--calibration", folder, "--max-drop", 100]
    model, path = written(tmp_path, "visformer_tiny", suffix, *flags, kwargs=SMALL)
    assert " 12 images" in capsys.readouterr().out
    image = inputs_of(folder, 1)
    assert 1e-5 < deviation(logits(path, image), model, image) < 0.1


def test_int8_of_onnx_has_a_scale_for_every_output(folder, tmp_path):
    flags = ["--precision", "int8", "--calibration", folder, "--max-drop", 100, "--batch-size", 5]
    model, path = written(tmp_path, "convit_tiny", ".onnx", *flags)
    assert sorted(file.name for file in path.parent.iterdir()) == ["m.onnx"]
    graph = onnx.load(path).graph
    weights = [onnx.numpy_helper.to_array(each) for each in graph.initializer]
    large = [each for each in weights if each.ndim > 1 and each.size > 500]
    assert large and all(each.dtype == np.int8 for each in large if each.shape[0] != 1)
    scales = {each.shape for each in weights if each.dtype == np.float32 and each.ndim == 1}
    assert (4 * NETS["convit_tiny"]["embed_dim"],) in scales
    session = session_of(path)
    check_metadata(session.get_modelmeta().custom_metadata_map, "convit_tiny")
    image = inputs_of(folder, 5)
    found = session.run(None, {"image": image.numpy()})[0]
    assert 1e-5 < deviation(found, model, image) < 0.1


def test_a_program_that_loses_accuracy_is_not_kept(folder, tmp_path, capsys):
    # one activation of 1e4 leaves the others of its tensor no steps of 8 bits
    model = timm.create_model("vit_b_32_224", num_classes=len(CLASSES), **VIT)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.bias[0] = 1e4
            block.mlp.fc2.weight.normal_()[:, 0] = 0
    content = {"model": model.state_dict(), "model_name": "vit_b_32_224", "input_size": 32}
    content["model_kwargs"] = {"num_classes": len(CLASSES), **VIT}
    torch.save(content, tmp_path / "in.pth")
    out = tmp_path / "out" / "m.onnx"
    out.parent.mkdir()
    out.write_bytes(b"what was there")
    words = ["--checkpoint", tmp_path / "in.pth", "--output", out, "--precision", "int8"]
    words += ["--calibration", folder]
    assert export(*words) == 1
    assert "--max-drop 1:" in capsys.readouterr().err
    assert out.read_bytes() == b"what was there"
    assert [file.name for file in out.parent.iterdir()] == ["m.onnx"]
    assert export(*words, "--max-drop", 100) == 0
    assert out.read_bytes() != b"what was there"


def test_float16_of_onnx(tmp_path):
    model, path = written(tmp_path, "convit_tiny", ".onnx", "--precision", "float16")
    graph = onnx.load(path).graph
    types = {each.data_type for each in graph.initializer if len(each.dims) > 1}
    assert onnx.TensorProto.FLOAT16 in types and onnx.TensorProto.FLOAT not in types
    ends = [end.type.tensor_type.elem_type for end in (*graph.input, *graph.output)]
    assert set(ends) == {onnx.TensorProto.FLOAT}
    image = torch.randn(2, 3, *SIZE)
    found = session_of(path).run(None, {"image": image.numpy()})[0]
    assert 1e-6 < deviation(found, model, image) < 1e-2
