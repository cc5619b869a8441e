"""tools.validate: scores, classes, and the models that are evaluated."""

import re
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from conftest import write_images
from PIL import Image
from validating import (
    CLASSES,
    SIZE,
    agrees,
    caller,
    formulas,
    logits_of,
    plain,
    random_vit,
    read,
    refuses,
    save,
    trained,
)

import models
from models import DataConfig
from tools import cli
from tools.validate import metrics
from tools.validate.__main__ import get_parser
from tools.validate.classes import readable
from tools.validate.eval_models import eval_models

CPU = torch.device("cpu")
SCORES = ("top1", "top5", "nll", "ece")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"), CLASSES, 9)


@pytest.fixture
def call(capsys):
    return caller(capsys)


def test_the_lines_of_main_eval(run, call, main, tmp_path):
    checkpoint, images, *_ = run
    status, output, _ = main(
        *("--eval", "--resume", checkpoint, "--data-path", images, "--num_workers", 0)
    )
    assert status == 0
    found = re.findall(r"Acc@1 ([\d.]+) Acc@5 ([\d.]+) loss ([\d.]+) on (\d+)", output)
    call(checkpoint, "--data-path", images, "--csv", tmp_path / "rows.csv")
    assert read(tmp_path / "rows.csv", "weights") == [("model",), ("ema",)]
    rows = read(tmp_path / "rows.csv", "top1", "top5", "nll", "images")
    ours = [(*(f"{float(score):.3f}" for score in scores), images) for *scores, images in rows]
    assert ours == found
    assert ours[0] != ours[1]


def test_scores_follow_their_formulas(run, call, tmp_path):
    checkpoint, images, model, ema = run
    status, output, _ = call(checkpoint, "--data-path", images, "--csv", tmp_path / "rows.csv")
    assert status == 0
    rows = read(tmp_path / "rows.csv")
    for row, network in zip(rows, (model, ema), strict=True):
        agrees(row, formulas(*logits_of(network, images / "val")[:2]))
        assert (row["images"], row["corrupt"], row["size"]) == ("108", "0", str(SIZE))
        assert min(float(row["network_rate"]), float(row["rate"])) > 0
    printed = output.split("\n\n")[1].splitlines()
    assert len({len(line) for line in printed[:3]}) == 1  # aligned
    assert f"{float(rows[0]['ece']):.3f}" in printed[1]
    for flags in (["--batch-size", 7], ["--loader", "timm"], ["--channels-last"]):
        call(checkpoint, "--data-path", images, "--csv", tmp_path / "again.csv", *flags)
        for row, again in zip(rows, read(tmp_path / "again.csv"), strict=True):
            agrees(again, {key: float(row[key]) for key in SCORES})


def test_the_first_batch_does_not_count_for_the_network(monkeypatch):
    times = iter([0.0, 10.0, 20.0, 21.0, 30.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = metrics.Clock(CPU)
    with clock.batch(50):
        pass
    assert clock.rate() == 5
    for images in (40, 20):
        with clock.batch(images):
            pass
    assert clock.rate() == 30


def test_rates_of_the_network_and_of_all(run, call, tmp_path, monkeypatch):
    now = iter(range(100))  # each call of the clock takes a second
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    flags = (run[0], "--data-path", run[1], "--weights", "model", "--csv", tmp_path / "t.csv")
    assert call(*flags, "--batch-size", 24)[0] == 0  # 36, 36 and 36 images
    row = read(tmp_path / "t.csv")[0]
    assert (float(row["network_rate"]), float(row["rate"])) == (36, pytest.approx(108 / 7))


def measured(*batches, columns=3, images=1):
    """Return the metrics of batches of (logits, targets)."""
    counted = metrics.ClassificationMetrics(columns, CPU, pairs=True)
    for logits, targets in batches:
        counted.update(logits, torch.tensor(targets))
    return counted.compute(images)


def test_bins_hold_their_upper_edge():
    edges = torch.tensor([0.2, 0.2 + 1e-9, 0.4, 0.6, 1.0, 1e-3, 0.0], dtype=torch.float64)
    assert metrics.bin_of(edges).tolist() == [2, 3, 5, 8, 14, 0, 0]


def test_outputs_that_are_not_finite_predict_nothing():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[2.0, 0, 0], [nan, nan, nan], [0, nan, 0], [inf, 0, 0], [0, 0, 1.0]])
    found = measured((logits, [0, 0, 1, 0, 1]), images=100)
    assert (found["nonfinite"], found["top1"], found["top5"]) == (3, 1, 2)
    assert found["confusion"].tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    finite = measured((logits[[0, 4]], [0, 1]))
    assert (found["ece"], found["bins"].counts.sum()) == (finite["ece"], 2)
    assert np.isnan(measured((logits[1:2], [0]))["ece"])


def test_calibration_error_of_four_images():
    probabilities = torch.tensor([[0.25, 0.75], [0.55, 0.45], [0.43, 0.57], [0.01, 0.99]]).log()
    found = measured((probabilities[:3], [1, 0, 0]), (probabilities[3:], [0]), columns=2)
    numbers = found["bins"].counts.tolist()
    assert {m: n for m, n in enumerate(numbers) if n} == {8: 2, 11: 1, 14: 1}
    # 0.55 and 0.57 share a bin, whose accuracy is a half
    expected = 100 * (abs(1 - 0.55 - 0.57) + abs(1 - 0.75) + abs(0 - 0.99)) / 4
    assert found["ece"] == pytest.approx(expected)
    assert found["confidence"] == pytest.approx(100 * (0.55 + 0.57 + 0.75 + 0.99) / 4)


def check_picture(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400


def test_files_of_classes_follow_from_the_predictions(run, call, tmp_path):
    checkpoint, images, model, _ = run
    flags = [checkpoint, "--data-path", images, "--weights", "model"]
    flags += ["--confusion", tmp_path / "c.png"]
    assert call(*flags, "--per-class", tmp_path / "classes.csv")[0] == 0
    check_picture(tmp_path / "c.png")
    logits, targets, _ = logits_of(model, images / "val")
    predicted = logits.argmax(1)
    assert len(set(predicted)) > 3
    rows = read(tmp_path / "classes.csv")
    for index, row in enumerate(rows):
        assert (row["class"], row["folder"], row["images"]) == (str(index), CLASSES[index], "9")
        right = int(((predicted == index) & (targets == index)).sum())
        assert float(row["recall"]) == pytest.approx(right / 9)
        claimed = int((predicted == index).sum())
        assert row["precision"] == (str(right / claimed) if claimed else "")
        wrong = [int(p) for p in predicted[targets == index] if p != index]
        most = max(map(wrong.count, wrong))
        assert row["wrong_images"] == str(most)
        assert wrong.count(int(row["wrong_class"])) == most
        assert row["wrong"] == CLASSES[int(row["wrong_class"])]


def test_class_scores_without_images_or_predictions():
    found = metrics.class_scores(np.array([[2, 0, 0], [0, 0, 0], [1, 0, 3]]))
    assert [(s.recall, s.precision, s.wrong) for s in found] == [
        (1.0, 2 / 3, None),
        (None, None, None),
        (0.75, 1.0, 0),
    ]
    pairs = metrics.most_confused(np.array([[5, 1, 0], [4, 9, 2], [0, 0, 3]]), 2)
    assert pairs == [(1, 0, 4), (1, 2, 2)]


def test_sizes_files_and_their_names(run, call, tmp_path):
    checkpoint, images, *_ = run
    flags = [checkpoint, "--data-path", images, "--input-size", 32, 48, "--csv", tmp_path / "t.csv"]
    assert call(*flags, "--weights", "ema", "--reliability", tmp_path / "r.png")[0] == 0
    names = ["r-1-ema-32.png", "r-2-ema-48.png"]
    for name in names:
        check_picture(tmp_path / name)
    assert call(*flags, "--per-class", tmp_path / "p.csv")[0] == 0
    names += [f"p-{n}.csv" for n in ("1-model-32", "2-ema-32", "3-model-48", "4-ema-48")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "t.csv"])
    assert read(tmp_path / "t.csv", "size") == [("32",), ("32",), ("48",), ("48",)]
    nll = read(tmp_path / "t.csv", "nll")
    assert nll[0] != nll[2]


def test_a_subset_is_evaluated_on_its_classes(run, call, tmp_path):
    checkpoint, _, model, _ = run
    chosen = [CLASSES[index] for index in (2, 7, 11)]
    folder = write_images(tmp_path / "images", train=0, val=8, classes=chosen) / "val"
    flags = (checkpoint, "--data-path", folder, "--weights", "model")
    status, output, _ = call(*flags, "--csv", tmp_path / "rows.csv")
    assert status == 0
    assert "3 of 12" in output
    logits, targets, _ = logits_of(model, folder)
    agrees(read(tmp_path / "rows.csv")[0], formulas(logits[:, [2, 7, 11]], targets))
    (folder / CLASSES[2]).rename(folder / "kind13")
    refuses(call(*flags), "'kind13'", checkpoint, "kind11")


@pytest.mark.parametrize(
    ("names", "outputs"),
    [(["n01443537", "n01484850", "n02119789"], [1, 2, 278]), (["0", "10", "2", "999"], None)],
)
def test_imagenets_sets(names, outputs, call, tmp_path):
    flags, model = plain(tmp_path / "plain.pth")
    folder = write_images(tmp_path / "images", train=0, val=8, classes=names) / "val"
    flags += ["--data-path", folder, "--csv", tmp_path / "rows.csv"]
    flags += ["--per-class", tmp_path / "classes.csv"]
    assert call(*flags)[0] == 0
    outputs = outputs or [int(name) for name in names]
    logits, targets, _ = logits_of(model, folder, plain=True)
    expected = formulas(logits[:, outputs], targets)
    assert 0 < expected["top1"] < 100
    agrees(read(tmp_path / "rows.csv")[0], expected)
    rows = read(tmp_path / "classes.csv")
    found = [(int(row["class"]), row["folder"]) for row in rows]
    assert found == sorted(zip(outputs, names, strict=True))
    if names[0] == "n01443537":
        assert rows[0]["name"] == "goldfish, Carassius auratus"
    wrong = {int(row["wrong_class"]): row["wrong"] for row in rows if row["wrong"]}
    assert wrong
    for output, name in wrong.items():
        folder = names[outputs.index(output)]
        assert name == (readable(folder) if folder.startswith("n") else folder)


class Compiled(torch.nn.Module):
    """A module like a compiled model's, which records the shapes of its inputs."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod, self.shapes = model, []

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        return self._orig_mod(images)


def test_a_compiled_network_sees_batches_of_one_size(run, call, tmp_path, monkeypatch):
    checkpoint, images, model, _ = run
    seen = []

    def compiled(model, *how):
        assert how == ("eager", None, False)
        seen.append(Compiled(model))
        return seen[-1]

    monkeypatch.setattr("tools.validate.eval_models.compiled", compiled)
    flags = [checkpoint, "--data-path", images, "--weights", "model", "--compile", "eager"]
    assert call(*flags, "--batch-size", 33, "--csv", tmp_path / "t.csv")[0] == 0
    assert seen[-1].shapes == [(49, 3, SIZE, SIZE)] * 3  # of 108 images
    agrees(read(tmp_path / "t.csv")[0], formulas(*logits_of(model, images / "val")[:2]))


@pytest.mark.slow
def test_ways_to_run_a_network(call, tmp_path):
    torch.manual_seed(0)
    model, average = (
        timm.create_model("visformer_tiny", num_classes=3, img_size=SIZE) for _ in range(2)
    )
    names = ["a", "b", "c"]
    folder = write_images(tmp_path / "images", train=0, val=5, classes=names) / "val"
    more = {"model_name": "visformer_tiny", "classes": names}
    checkpoint = save(tmp_path / "ours.pth", model, average, **more)
    common = (checkpoint, "--data-path", folder, "--batch-size", 4, "--csv", tmp_path / "t.csv")
    nll = []
    for flags in ([], ["--fuse"], ["--amp", "--amp-dtype", "bfloat16", "--weights", "model"]):
        assert call(*common, *flags)[0] == 0
        assert {*read(tmp_path / "t.csv", "images")} == {("15",)}
        nll.append([float(value) for (value,) in read(tmp_path / "t.csv", "nll")])
    assert nll[1] == pytest.approx(nll[0], rel=1e-2)
    assert nll[2] == pytest.approx(nll[0][:1], rel=1e-2)
    assert len({nll[0][0], nll[1][0], nll[2][0]}) == 3  # the flags have an effect
    assert abs(nll[0][0] - nll[0][1]) > 3e-2 * nll[0][0]  # and the weights differ by more


def test_the_weights_that_there_are(run, call, tmp_path):
    *_, model, average = run
    flags = ("--data-path", run[1], "--csv", tmp_path / "t.csv")
    for content, names in (
        ({"model": model.state_dict()}, ["model"]),
        ({"model_ema": average.state_dict()}, ["ema"]),
        ({"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()},
         ["model", "ema"]),
    ):  # fmt: skip
        checkpoint = tmp_path / "net.pth"
        torch.save(content | {"model_name": "test_vit", "input_size": SIZE}, checkpoint)
        assert call(checkpoint, *flags)[0] == 0
        assert [name for (name,) in read(tmp_path / "t.csv", "weights")] == names
    torch.save({"model_name": "test_vit", "epoch": 3}, checkpoint)
    refuses(call(checkpoint, *flags), checkpoint, "'model'", "'state_dict'")


def test_the_exponent_of_a_file_goes_before_the_flag(call, tmp_path):
    model = timm.create_model("visformer_tiny", num_classes=2, img_size=SIZE, qk_scale_factor=-0.5)
    folder = write_images(tmp_path / "images", train=0, val=2, classes=["a", "b"]) / "val"
    kwargs = {"num_classes": 2, "img_size": SIZE, "qk_scale_factor": -0.5}
    ours = save(tmp_path / "ours.pth", model, model_name="visformer_tiny", model_kwargs=kwargs)
    foreign = tmp_path / "foreign.pth"
    torch.save(model.state_dict(), foreign)
    flags = ("--data-path", folder, "--csv", tmp_path / "t.csv", "--input-size", SIZE)
    nll = []
    for more in (
        [ours],
        [ours, "--qk-scale-factor", -0.25],
        [foreign, "--model", "visformer_tiny", "--qk-scale-factor", -0.5],
        [foreign, "--model", "visformer_tiny"],
    ):
        status, output, _ = call(*more, *flags)
        warned = output.count("--qk-scale-factor -0.25")
        assert (status, warned) == (0, -0.25 in more)
        nll.append(float(read(tmp_path / "t.csv")[0]["nll"]))
    assert nll[0] == nll[1] == nll[2] != nll[3]


def test_a_foreign_file_says_little(run, call, tmp_path):
    (checkpoint, *_), _ = plain(tmp_path / "plain.pth", 12)
    refuses(call(checkpoint, "--data-path", run[1]), checkpoint, "--model NAME")
    source = models.find_model(str(checkpoint), "test_vit")
    assert (source.build(SIZE).num_classes, source.classes) == (12, None)


def test_weights_of_others_get_images_as_they_expect(call, main, tmp_path):
    model, checkpoint = random_vit(3), tmp_path / "plain.pth"
    folder = write_images(tmp_path / "images", train=4, val=8, classes=("ant", "bee", "cat"))
    logits, targets, _ = logits_of(model, folder / "val", plain=True)
    expected = formulas(logits, targets)
    assert expected["top1"] != formulas(*logits_of(model, folder / "val")[:2])["top1"]
    words = ["--model", "test_vit", "--data-path", folder, "--input-size", SIZE]
    evaluation = ["--eval", "--resume", checkpoint, "--num_workers", 0, *words]
    state = model.state_dict()
    for content in (state, {"state_dict": state, "arch": "t", "args": {}}):
        torch.save(content, checkpoint)
        assert call(checkpoint, *words, "--csv", tmp_path / "rows.csv")[0] == 0
        agrees(read(tmp_path / "rows.csv")[0], expected)
        _, output, _ = main(*evaluation)
        assert output.count(str((0.5,) * 3)) == 2  # mean and std
        assert f"* Acc@1 {expected['top1']:.3f} " in output
        loss = float(re.search(r"loss ([\d.]+) on", output)[1])
        assert loss == pytest.approx(expected["nll"], abs=2e-3)
    torch.save({"model": model.state_dict(), "args": Namespace(lr=1.0)}, checkpoint)  # as DeiT's
    _, output, _ = main(*evaluation)
    assert f"* Acc@1 {formulas(*logits_of(model, folder / 'val')[:2])['top1']:.3f} " in output


def test_pretrained_weights(call, tmp_path, monkeypatch):
    create, asked = timm.create_model, []

    def fake(name, pretrained=False, **kwargs):
        asked.append(pretrained)
        kwargs.pop("pretrained_cfg", None)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", fake)
    monkeypatch.setattr(models.source, "check_pretrained", lambda *args: None)
    folder = write_images(tmp_path / "images", train=0, val=1, classes=["n01440764"]) / "val"
    flags = ("--model", "test_vit", "--pretrained", "--data-path", folder)
    status, output, _ = call(*flags)
    assert (status, {*asked}) == (0, {True})
    assert re.search(r"\btest_vit\b.*\b160\b", output)
    assert re.search(r"\b1 of 1000\b.* 100\.000\b", output)
    args = cli.parse(get_parser, ["--model", "test_vit", "--pretrained"])
    (subject,) = eval_models([], args, CPU)
    half = (0.5,) * 3
    assert subject.images == DataConfig((160, 160), mean=half, std=half, crop_pct=0.95)
    refuses(call(*flags, "--weights", "ema"), "test_vit", "--weights model")
    refuses(call("--model", "test_vit.x", "--pretrained"), "'test_vit.x'")

    def fail(name, **kwargs):
        raise OSError("no route\nto the Hub")

    monkeypatch.setattr(timm, "create_model", fail)
    refuses(call(*flags), "test_vit", "no route to the Hub")


@pytest.mark.parametrize(
    ("more", "values"),
    [
        ({"input_size": 0}, ["input_size", "0"]),
        ({"input_size": "32"}, ["input_size", "32"]),
        ({"input_size": True}, ["input_size", "True"]),
        ({"classes": ["a", 2]}, ["classes"]),
        ({"classes": ["a", "b"]}, ["2", "3"]),
    ],
)
def test_files_that_contradict_themselves(more, values, call, tmp_path):
    checkpoint = save(tmp_path / "odd.pth", random_vit(3), **more)
    refuses(call(checkpoint), checkpoint, *values)
