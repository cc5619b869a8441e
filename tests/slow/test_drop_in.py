"""What users do with timm's models works with ours of the same name, and gives the same numbers."""

import copy
import io
import pickle
import warnings
from functools import cache

import onnxruntime
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from small_models import relative, small, stir
from timm.models import FeatureGraphNet, create_feature_extractor, get_graph_node_names
from timm.models import convit as timm_convit
from timm.models import fastvit as timm_fastvit
from timm.models import visformer as timm_visformer
from timm.models import vision_transformer as timm_vit
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic, quantize_fx

from models import fastvit, visformer, vit
from models.layers import DropPath

SIZE = (64, 64)
SMALL_VISFORMER = (
    visformer.Stage(1, 24, 4, mlp_ratio=2.0, spatial_groups=8),
    visformer.Stage(1, 48, num_heads=3),
    visformer.Stage(1, 96, num_heads=3),
)
SMALL_FASTVIT = [fastvit.Stage(1, dim, 2.0) for dim in (16, 32, 64)]
WIDTHS = {"depth": 2, "num_heads": 4}
OURS = {  # a small net of each family
    "visformer_tiny": {"stages": SMALL_VISFORMER, "img_size": SIZE},
    "convit_tiny": {"embed_dim": 64, "local_up_to_layer": 1, "img_size": SIZE, **WIDTHS},
    "fastvit_sa12": {"stages": [*SMALL_FASTVIT, fastvit.Stage(1, 128, 2.0, "attention", True)]},
    "vit_base_patch32_224": {"embed_dim": 64, "img_size": SIZE, **WIDTHS},
    "swin_visformer_tiny_v2": {},
}
TIMMS = {  # the same of timm's, if it has one
    "visformer_tiny": (timm_visformer, {"embed_dim": 48, "depth": (1, 1, 1), "img_size": SIZE}),
    "convit_tiny": (timm_convit, OURS["convit_tiny"] | {"embed_dim": 16}),  # of a head
    "fastvit_sa12": (
        timm_fastvit,
        {"layers": (1,) * 4, "embed_dims": (16, 32, 64, 128), "mlp_ratios": (2,) * 4},
    ),
    "vit_base_patch32_224": (timm_vit, OURS["vit_base_patch32_224"]),
}
ANY_SIZE = "fastvit_sa12"
FAMILIES = list(OURS)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@cache
def _ours(name):
    return stir(small(name, **OURS[name]))


def ours(name):
    return copy.deepcopy(_ours(name))


@cache
def reference(name):
    """timm's model with the same weights; ours for what timm does not have."""
    if name not in TIMMS:
        return _ours(name)
    module, kwargs = TIMMS[name]
    model = getattr(module, name)(num_classes=10, **kwargs).eval()
    model.load_state_dict(_ours(name).state_dict())
    return model


def images(batch, size=SIZE):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def check(run, name, tolerance=1e-4, sizes=(SIZE,)):
    """A program gives the logits of timm's model, at two sizes of a batch."""
    for size in sizes:
        for batch in (1, 3):
            x = images(batch, size)
            with torch.no_grad():
                expected = reference(name)(x)
            assert relative(run(x).detach(), expected) < tolerance


def reloaded(program):
    """What ``torch.jit.load`` makes of a program."""
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


def onnx(model, path, **options):
    """An ONNX program of ``model``, run by onnxruntime."""
    torch.onnx.export(model, (images(2),), path, input_names=["image"], **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def last_node(model):
    _, nodes = get_graph_node_names(model)
    extractor = create_feature_extractor(model, nodes[-1:])
    return lambda x: extractor(x)[nodes[-1]]


def fx_quantised(model):
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("onednn"), (images(2),))
    with torch.no_grad():
        prepared(images(4))
    return quantize_fx.convert_fx(prepared)


BATCH = {0: "batch"}
AXES = {"image": BATCH, "logits": BATCH}
CLIENTS = {
    "symbolic trace": torch.fx.symbolic_trace,
    "feature extractor": last_node,
    "script": lambda model: reloaded(torch.jit.script(model)),
    "trace": lambda model: reloaded(torch.jit.trace(model, images(2))),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "export": lambda model: torch.export.export(
        model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    ).module(),
}


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_programs(name, client, fused):
    model = ours(name)
    run = CLIENTS[client](model.fuse() if fused else model)
    check(run, name)
    with torch.no_grad():
        check(run, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_traced_without_gradients(name):
    with torch.no_grad():
        check(reloaded(torch.jit.trace(ours(name), images(2))), name)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_legacy_onnx(name, gradients, tmp_path):
    with torch.set_grad_enabled(gradients):
        options = {"dynamo": False, "output_names": ["logits"], "dynamic_axes": AXES}
        check(onnx(ours(name), tmp_path / "model.onnx", **options), name)


@pytest.mark.parametrize("name", FAMILIES)
def test_dynamo_onnx(name, tmp_path):
    options = {"dynamo": True, "verbose": False, "dynamic_shapes": (BATCH,)}
    check(onnx(ours(name), tmp_path / "model.onnx", **options), name)


def test_height_and_width_may_stay_open(tmp_path):
    model, open_ = ours(ANY_SIZE), BATCH | {2: "height", 3: "width"}
    sizes = (SIZE, (96, 128))
    check(torch.jit.trace(model, images(2)), ANY_SIZE, sizes=sizes)
    check(torch.jit.script(model), ANY_SIZE, sizes=sizes)
    options = {"dynamo": False, "dynamic_axes": {"image": open_}}
    check(onnx(model, tmp_path / "legacy.onnx", **options), ANY_SIZE, sizes=sizes)
    dims = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (images(2),), dynamic_shapes=(dims,)).module()
    check(program, ANY_SIZE, sizes=sizes)


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_maps_of_a_graph(name):
    model, x = ours(name), images(2)
    graph = FeatureGraphNet(copy.deepcopy(model), (0, 1))
    blocks = [model.get_submodule(info["module"]) for info in model.feature_info[:2]]
    kept = []
    for block in blocks:
        block.register_forward_hook(lambda _, args, output: kept.append(output))
    model(x)
    for run in (graph, torch.jit.script(graph)):
        for found, expected in zip(run(x), kept, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_are_trained(name):
    model, x = ours(name).train(), images(2)
    copies = [torch.fx.symbolic_trace(copy.deepcopy(model))]
    copies.append(torch.jit.script(copy.deepcopy(model)))
    for net in (model, *copies):
        net(x).square().mean().backward()
    for net in copies:
        for key, parameter in net.named_parameters():
            expected = model.get_parameter(key).grad
            assert (parameter.grad - expected).norm() <= 1e-3 * expected.norm() + 1e-6, key


def test_scripted_paths_are_dropped_in_training_alone():
    script = torch.jit.script(small("visformer_tiny", drop_path_rate=0.5, **OURS["visformer_tiny"]))
    x = images(1).expand(32, -1, -1, -1)
    rows = script(x)
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))
    for module in script.modules():
        if getattr(module, "original_name", "") == DropPath.__name__:
            module.train()
    rows = script(x)
    assert len({tuple(row) for row in rows.tolist()}) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_hub_mixin(name, tmp_path):
    model = ours(name)
    hub_class = type("Hub", (type(model), PyTorchModelHubMixin), {})
    arguments = {"num_classes": 10, **OURS[name]}
    if isinstance(model, visformer.Visformer):
        arguments |= {"stages": model.stages, "init_channels": model.stem[0].out_channels}
        arguments["img_size"] = SIZE
    if isinstance(model, vit.ViT):
        arguments["patch_size"] = 32
    hub = hub_class(**arguments)
    hub.load_state_dict(model.state_dict())
    hub.save_pretrained(tmp_path)
    check(hub_class.from_pretrained(tmp_path).eval(), name)


@pytest.mark.parametrize("name", FAMILIES)
def test_grad_cam(name):
    maps = []
    for net in (ours(name), reference(name)):
        block = net.get_submodule(net.feature_info[-1]["module"])
        kept = {}

        def forward(module, args, output, kept=kept):
            kept["activation"] = output

        def backward(module, grad_input, grad_output, kept=kept):
            kept["gradient"] = grad_output[0]

        hooks = block.register_forward_hook(forward), block.register_full_backward_hook(backward)
        net(images(2))[:, 0].sum().backward()
        for hook in hooks:
            hook.remove()
        maps.append(kept["activation"] * kept["gradient"])
    assert relative(*maps) < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_dynamic_quantisation(name, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", "onednn")
    model = quantize_dynamic(ours(name), {nn.Linear})
    assert not any(type(module) is nn.Linear for module in model.modules())
    check(model, name, 0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_quantisation_of_a_graph(name, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", "onednn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(fx_quantised(ours(name)), name, 0.3)


@pytest.mark.parametrize("name", TIMMS)
def test_weights_go_to_timm_and_back(name):
    model, theirs = ours(name), reference(name)
    state = theirs.state_dict()
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    check(model, name)
