"""Every program loads every kind of source: the same model, the same images."""

import importlib.util
import re
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, call, read_log, succeed
from exporting import close, export, session_of
from sources import (
    CLASSES,
    KINDS,
    NAME,
    ONCE,
    SourceCase,
    timms_transform,
    transform_of,
    web_server,
    write_sources,
)
from timm.data import create_transform, resolve_data_config
from torchvision.datasets import ImageFolder
from validating import agrees, formulas, read
from visualizing import model_of

import models
from engine import Precision
from models import DataConfig
from tools import convert_checkpoint, predict
from tools.export.__main__ import get_parser
from tools.export.source import load_source
from tools.flops import __main__ as flops
from tools.flops.counting import Request, total
from tools.flops.counting import run as count
from tools.validate import __main__ as validate
from tools.visualize.loading import load_images
from training.distillation import build_teacher
from training.flags import parse_args

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A source of every kind, and the folder of images in which they are tried."""
    folder = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch, web_server(folder / "run") as address:
        patch.setenv("TORCH_HOME", str(folder / "home"))
        found = write_sources(folder)
        found["address"] = found["run"]._replace(where=f"{address}/best.pth")
        yield found, folder / "images"


class Expected(NamedTuple):
    """What a program must compute for the validation images."""

    case: SourceCase
    data: object
    paths: list
    pixels: torch.Tensor
    logits: torch.Tensor
    scores: dict

    @property
    def val(self):
        return self.data / "val"


@pytest.fixture(scope="module")
def expect(cases):
    """``expect(kind) -> Expected``, once for each kind."""
    found, data, cache = *cases, {}

    def load(kind):
        case = found[kind]
        loaded = models.load_model(case.where, case.name, pretrained=kind == "name")
        config = resolve_data_config({}, model=loaded.model)
        assert DataConfig(**config | {"input_size": config["input_size"][1:]}) == case.config
        assert loaded.data_config == case.config
        files = ImageFolder(data / "val", create_transform(**config))
        pixels = torch.stack([image for image, _ in files])
        with torch.no_grad():
            logits = case.model(pixels)
            assert torch.equal(loaded.model(pixels), logits)
        scores = formulas(logits.double().numpy(), np.array(files.targets))
        paths = [path for path, _ in files.samples]
        assert len({round(value, 3) for value in logits.flatten().tolist()}) > 40
        return Expected(case, data, paths, pixels, logits, scores)

    def expected(kind):
        if kind not in cache:
            cache[kind] = load(kind)
        return cache[kind]

    return expected


@pytest.fixture(params=KINDS)
def expected(request, expect):
    return expect(request.param)


def run(program, *words):
    status, output, errors = call(program.main, *words)
    assert (status, errors) == (0, ""), errors
    return output


def first_scores(output):
    """The scores of the first line of ``main.py``: of the raw weights."""
    names = ("top1", "top5", "nll")
    found = re.search(r"Acc@1 ([\d.]+) Acc@5 ([\d.]+) loss ([\d.]+) on (\d+)", output)
    return dict(zip(names, map(float, found.groups()), strict=False))


def test_main_evaluates(expected):
    case = expected.case
    words = ["--data-path", expected.data, "--num_workers", 0, *case.flags()]
    agrees(expected.scores, first_scores(succeed("--eval", "--resume", case.where, *words)))


@pytest.mark.parametrize("kind", ["local-dir", "name"])
def test_main_evaluates_published_weights(kind, expect):
    expected = expect(kind)
    words = ["--model", expected.case.where, "--data-path", expected.data, "--num_workers", 0]
    agrees(expected.scores, first_scores(succeed("--eval", "--pretrained", *words)))


def test_main_starts_from_it_and_records_its_images(expected, tmp_path):
    case = expected.case
    still = ["--unscale-lr", "--lr", 0, "--min-lr", 0, "--warmup-lr", 0, "--no-model-ema"]
    words = ["--data-path", expected.data, *ONCE, *still, *case.flags(), "--output_dir", tmp_path]
    succeed("--finetune", case.where, *words)
    row, best = read_log(tmp_path)[0], torch.load(tmp_path / "best.pth", weights_only=True)
    assert best["data_config"] == case.config.to_timm()
    assert best["model"].keys() == case.model.state_dict().keys()
    for key, value in case.model.state_dict().items():
        assert torch.equal(best["model"][key], value), key
    agrees(expected.scores, {"top1": row["test_acc1"], "nll": row["test_loss"]})
    again = models.load_model(tmp_path / "best.pth")
    assert again.data_config == case.config
    assert again.classes == CLASSES


def test_it_teaches(expected):
    case, given = expected.case, DataConfig().at_size(expected.case.config.size)
    named = ["--teacher-model", case.name] if case.name else []
    words = ["--distillation-type", "hard", "--teacher-path", case.where, *named]
    teacher = build_teacher(parse_args(words)[0], len(CLASSES), Precision(CPU), given)
    own, students = (
        [torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std)]
        for config in (case.config, given)
    )
    colours = expected.pixels * own[1] + own[0]
    with torch.no_grad():
        found = teacher((colours - students[0]) / students[1])
    torch.testing.assert_close(found, expected.logits, rtol=1e-4, atol=1e-4)


def test_tools_validate(expected, tmp_path):
    case, rows = expected.case, tmp_path / "rows.csv"
    words = ["--data-path", expected.data, "--num_workers", 0, "--csv", rows, *case.flags()]
    run(validate, case.where, *words)
    row = read(rows)[0]
    assert (row["size"], row["weights"]) == (str(case.config.size), "model")
    agrees(row, expected.scores)


def test_tools_predict(expected, tmp_path):
    case, table = expected.case, tmp_path / "p.csv"
    words = ["--checkpoint", case.where, *case.flags(), "--csv", table, "--topk", len(CLASSES)]
    run(predict, *expected.paths, *words)
    found = {(row["image"], int(row["class"])): float(row["probability"]) for row in read(table)}
    odds = expected.logits.softmax(1).tolist()
    pairs = zip(expected.paths, odds, strict=True)
    told = {(path, k): value for path, row in pairs for k, value in enumerate(row)}
    assert found == pytest.approx(told, abs=1e-5)


def test_tools_visualize(expected):
    case = expected.case
    more = ["--pretrained"] if case.where.startswith(NAME) else case.flags()
    model = model_of(case.where, *more)
    assert (model.images, model.size) == (case.config, case.config.size)
    images = model.normalized(load_images(model, expected.paths))
    assert torch.equal(images, expected.pixels)
    with torch.no_grad():
        assert torch.equal(model.module(images), expected.logits)


def test_what_is_exported(expected):
    case = expected.case
    words = ["--output", "x.onnx", "--checkpoint", case.where, *case.flags()]
    source = load_source(get_parser().parse_args(words), CPU)
    files = ImageFolder(expected.val, transform_of(source.metadata))
    pixels = torch.stack([image for image, _ in files])
    assert torch.equal(pixels, expected.pixels)
    with torch.no_grad():
        assert torch.equal(source.exported(pixels), expected.logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local-dir", "timm", "name"])
def test_onnx(kind, expect, tmp_path):
    expected, program = expect(kind), tmp_path / "program.onnx"
    case = expected.case
    assert export("--checkpoint", case.where, *case.flags(), "--output", program) == 0
    session = session_of(program)
    transform = transform_of(session.get_modelmeta().custom_metadata_map)
    pixels = torch.stack([image for image, _ in ImageFolder(expected.val, transform)])
    assert torch.equal(pixels, expected.pixels)
    close(session.run(["logits"], {"image": pixels.numpy()})[0], expected.logits)


@pytest.mark.parametrize("layout", ["ours", "hub"])
def test_tools_convert_checkpoint(layout, expected, tmp_path):
    case, out = expected.case, tmp_path / ("hub" if layout == "hub" else "out.pth")
    run(convert_checkpoint, case.where, out, *case.flags(), "--to", layout)
    found = models.load_model(out)
    assert (found.name.partition(".")[0], found.data_config) == (NAME, case.config)
    with torch.no_grad():
        assert torch.equal(found.model(expected.pixels), expected.logits)


def test_tools_flops(expected, tmp_path):
    case, table = expected.case, tmp_path / "cost.csv"
    run(flops, "--checkpoint", case.where, *filter(None, [case.name]), "--csv", table)
    (row,) = read(table)
    side = case.config.size
    model, counter = count(Request(NAME, (side, side)))
    cost = total(model, counter)
    assert int(row["parameters"]) == sum(p.numel() for p in case.model.parameters())
    assert (int(row["macs"]), int(row["activations"])) == (cost.macs, cost.activations)
    assert row["output"] == f"1x{len(CLASSES)}"


@pytest.fixture(scope="module")
def entrypoint(cases):
    """torch.hub's entrypoint of the small model, as if it were one of this repository's."""
    build = timm.models.model_entrypoint(NAME)
    spec = importlib.util.spec_from_file_location("hubconf_of_sources", ROOT / "hubconf.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "__module__", "models.vit")
        patch.setattr(models.vit, NAME, build, raising=False)
        hubconf = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(hubconf)
        yield getattr(hubconf, NAME)


def test_torch_hub(entrypoint, expected):
    model = entrypoint(checkpoint=expected.case.where).eval()
    files = ImageFolder(expected.val, timms_transform(model))
    pixels = torch.stack([image for image, _ in files])
    assert torch.equal(pixels, expected.pixels)
    with torch.no_grad():
        assert torch.equal(model(pixels), expected.logits)


def test_backbones(expected):
    case, x = expected.case, expected.pixels
    backbone = models.VisionBackbone(
        NAME,
        model_kwargs={"img_size": case.config.size},
        init_cfg={"type": "Pretrained", "checkpoint": case.where},
    )
    report = backbone.eval().init_weights()
    assert not any(key.startswith("net.") for key in report.missing)
    with torch.no_grad():
        found, maps = (
            net.forward_intermediates(x, intermediates_only=True)
            for net in (backbone.net, case.model)
        )
    for ours, theirs in zip(found, maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
