"""tools.validate: scores, classes, and the networks that are evaluated."""

import re
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from conftest import write_images
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize
from validating import (
    CLASSES,
    SIZE,
    agrees,
    caller,
    formulas,
    logits_of,
    random_vit,
    read,
    save,
    trained,
    with_one_thread,
)

from tools.networks import from_checkpoint
from tools.validate import counts
from tools.validate import flags as validate_flags
from tools.validate.__main__ import get_parser
from tools.validate.cases import cases
from tools.validate.classes import readable
from tools.validate.evaluate import Clock


@pytest.fixture(autouse=True)
def one_thread():
    yield from with_one_thread()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(checkpoint with a moving average, image folder, network, average)."""
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
    rows = read(tmp_path / "rows.csv")
    assert [row["weights"] for row in rows] == ["model", "ema"]
    ours = [(*(f"{float(r[k]):.3f}" for k in ("top1", "top5", "nll")), r["images"]) for r in rows]
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
            agrees(again, {key: float(row[key]) for key in ("top1", "top5", "nll", "ece")})


def test_the_first_batch_does_not_count_for_the_network(monkeypatch):
    times = iter([0.0, 10.0, 20.0, 21.0, 30.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    with clock.batch(50):
        pass
    assert clock.rate() == 5
    for images in (40, 20):
        with clock.batch(images):
            pass
    assert clock.rate() == 30


def test_rates_of_the_network_and_of_all(run, call, tmp_path, monkeypatch):
    now = iter(range(100))  # a second passes between each two looks at the clock
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    flags = (run[0], "--data-path", run[1], "--weights", "model", "--csv", tmp_path / "t.csv")
    assert call(*flags, "--batch-size", 24)[0] == 0  # 36, 36 and 36 images
    row = read(tmp_path / "t.csv")[0]
    assert (float(row["network_rate"]), float(row["rate"])) == (36, pytest.approx(108 / 7))


def test_bins_hold_their_upper_edge():
    edges = torch.tensor([0.2, 0.2 + 1e-9, 0.4, 0.6, 1.0, 1e-3, 0.0], dtype=torch.float64)
    assert counts.bin_of(edges).tolist() == [2, 3, 5, 8, 14, 0, 0]


def test_outputs_that_are_not_finite_predict_nothing():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[2.0, 0, 0], [nan, nan, nan], [0, nan, 0], [inf, 0, 0], [0, 0, 1.0]])
    counted = counts.Counts(3, torch.device("cpu"), pairs=True)
    counted.add(logits, torch.tensor([0, 0, 1, 0, 1]))
    assert counted.nonfinite() == 3
    assert counted.hits() == (1, 2)
    assert counted.confusion().tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    sound = counts.Counts(3, torch.device("cpu"))
    sound.add(logits[[0, 4]], torch.tensor([0, 1]))
    assert (counted.bins().ece, counted.bins().counts.sum()) == (sound.bins().ece, 2)
    none = counts.Counts(3, torch.device("cpu"))
    none.add(logits[1:2], torch.tensor([0]))
    assert np.isnan(none.bins().ece)


def test_calibration_error_of_four_images():
    probabilities = torch.tensor([[0.25, 0.75], [0.55, 0.45], [0.43, 0.57], [0.01, 0.99]])
    counted = counts.Counts(2, torch.device("cpu"))
    counted.add(probabilities[:3].log(), torch.tensor([1, 0, 0]))
    counted.add(probabilities[3:].log(), torch.tensor([0]))
    bins = counted.bins()
    assert {m: n for m, n in enumerate(bins.counts.tolist()) if n} == {8: 2, 11: 1, 14: 1}
    # 0.55 and 0.57 share a bin, whose accuracy is a half
    assert bins.ece == pytest.approx((abs(1 - 0.55 - 0.57) + abs(1 - 0.75) + abs(0 - 0.99)) / 4)
    assert bins.mean_confidence == pytest.approx((0.55 + 0.57 + 0.75 + 0.99) / 4)


def test_per_class_file_follows_from_the_predictions(run, call, tmp_path):
    checkpoint, images, model, _ = run
    flags = (checkpoint, "--data-path", images, "--weights", "model")
    assert call(*flags, "--per-class", tmp_path / "classes.csv")[0] == 0
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
    found = counts.class_scores(np.array([[2, 0, 0], [0, 0, 0], [1, 0, 3]]))
    assert [(s.recall, s.precision, s.wrong) for s in found] == [
        (1.0, 2 / 3, None),
        (None, None, None),
        (0.75, 1.0, 0),
    ]
    pairs = counts.most_confused(np.array([[5, 1, 0], [4, 9, 2], [0, 0, 3]]), 2)
    assert pairs == [(1, 0, 4), (1, 2, 2)]


def test_sizes_files_and_their_names(run, call, tmp_path):
    checkpoint, images, *_ = run
    flags = [checkpoint, "--data-path", images, "--input-size", 32, 48, "--confusion"]
    flags += [tmp_path / "c.png", "--reliability", tmp_path / "r.png", "--csv", tmp_path / "t.csv"]
    assert call(*flags)[0] == 0
    names = [f"{n}-{number}-{weights}-{size}.png" for n in "cr" for number, weights, size in
             ((1, "model", 32), (2, "ema", 32), (3, "model", 48), (4, "ema", 48))]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "t.csv"])
    for name in (names[0], names[4]):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 400
    rows = read(tmp_path / "t.csv")
    assert [row["size"] for row in rows] == ["32", "32", "48", "48"]
    assert rows[0]["nll"] != rows[2]["nll"]


def test_a_folder_of_classes_is_a_set(run, call, tmp_path):
    checkpoint, images, *_ = run
    call(checkpoint, "--data-path", images, "--csv", tmp_path / "whole.csv")
    call(checkpoint, "--data-path", images / "val", "--csv", tmp_path / "folder.csv")
    keys = ("top1", "top5", "nll", "ece", "images")
    whole, folder = (
        [[row[key] for key in keys] for row in read(tmp_path / f"{name}.csv")]
        for name in ("whole", "folder")
    )
    assert whole == folder


def test_a_subset_is_evaluated_on_its_classes(run, call, tmp_path):
    checkpoint, _, model, _ = run
    chosen = [CLASSES[index] for index in (2, 7, 11)]
    folder = write_images(tmp_path / "images", train=0, val=8, classes=chosen) / "val"
    flags = (checkpoint, "--data-path", folder, "--weights", "model")
    status, output, _ = call(*flags, "--csv", tmp_path / "rows.csv")
    assert status == 0
    assert "3 of 12 classes, by name" in output
    logits, targets, _ = logits_of(model, folder)
    agrees(read(tmp_path / "rows.csv")[0], formulas(logits[:, [2, 7, 11]], targets))
    (folder / CLASSES[2]).rename(folder / "kind13")
    status, _, errors = call(*flags)
    assert status == 1
    assert "'kind13' is not among the 12" in errors


@pytest.mark.parametrize(
    ("names", "outputs"),
    [(["n01443537", "n01484850", "n02119789"], [1, 2, 278]), (["0", "10", "2", "999"], None)],
)
def test_imagenets_sets(names, outputs, call, tmp_path):
    model = random_vit(1000)
    checkpoint = tmp_path / "plain.pth"
    torch.save(model.state_dict(), checkpoint)
    folder = write_images(tmp_path / "images", train=0, val=8, classes=names) / "val"
    flags = [checkpoint, "--model", "test_vit", "--input-size", SIZE, "--data-path", folder]
    flags += ["--csv", tmp_path / "rows.csv", "--per-class", tmp_path / "classes.csv"]
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
    """Looks like a compiled model, and remembers the shapes that it was given."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod, self.shapes = model, []

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        return self._orig_mod(images)


def test_a_compiled_network_sees_batches_of_one_size(run, call, tmp_path, monkeypatch):
    checkpoint, images, model, _ = run
    seen = []

    def compiled(model, backend):
        assert backend == "eager"
        seen.append(Compiled(model))
        return seen[-1]

    monkeypatch.setattr("engine.compiled", compiled)
    flags = (checkpoint, "--data-path", images, "--weights", "model", "--compile", "eager")
    assert call(*flags, "--batch-size", 33, "--csv", tmp_path / "t.csv")[0] == 0
    assert seen[-1].shapes == [(49, 3, SIZE, SIZE)] * 3  # of 108 images
    agrees(read(tmp_path / "t.csv")[0], formulas(*logits_of(model, images / "val")[:2]))


@pytest.mark.parametrize("flags", [["--fuse"], ["--amp", "--amp-dtype", "bfloat16"]])
def test_ways_to_run_a_network(flags, call, tmp_path):
    torch.manual_seed(0)
    model, average = (
        timm.create_model("visformer_tiny", num_classes=3, img_size=SIZE) for _ in range(2)
    )
    names = ["a", "b", "c"]
    folder = write_images(tmp_path / "images", train=0, val=5, classes=names) / "val"
    more = {"model_name": "visformer_tiny", "classes": names}
    checkpoint = save(tmp_path / "ours.pth", model, average, **more)
    common = (checkpoint, "--data-path", folder, "--batch-size", 4, "--csv", tmp_path / "t.csv")
    assert call(*common)[0] == 0
    plain = read(tmp_path / "t.csv")
    assert call(*common, *flags)[0] == 0
    again = read(tmp_path / "t.csv")
    for row, other in zip(plain, again, strict=True):
        assert float(other["nll"]) == pytest.approx(float(row["nll"]), rel=1e-2)
        assert other["images"] == "15"
    nll = [float(row["nll"]) for row in plain]
    assert abs(nll[0] - nll[1]) > 3e-2 * nll[0]  # each is what the other would not pass for


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
        assert [row["weights"] for row in read(tmp_path / "t.csv")] == names
    torch.save({"model_name": "test_vit", "epoch": 3}, checkpoint)
    status, _, errors = call(checkpoint, *flags)
    assert (status, "has no weights under 'model' or 'state_dict'" in errors) == (1, True)


def test_the_exponent_of_a_file_goes_before_the_flag(call, tmp_path):
    model = timm.create_model("visformer_tiny", num_classes=2, img_size=SIZE, qk_scale_factor=-0.5)
    folder = write_images(tmp_path / "images", train=0, val=2, classes=["a", "b"]) / "val"
    kwargs = {"num_classes": 2, "img_size": SIZE, "qk_scale_factor": -0.5}
    ours = save(tmp_path / "ours.pth", model, model_name="visformer_tiny", model_kwargs=kwargs)
    plain = tmp_path / "plain.pth"
    torch.save(model.state_dict(), plain)
    flags = ("--data-path", folder, "--csv", tmp_path / "t.csv", "--input-size", SIZE)
    nll = []
    for more in (
        [ours],
        [ours, "--qk-scale-factor", -0.25],
        [plain, "--model", "visformer_tiny", "--qk-scale-factor", -0.5],
        [plain, "--model", "visformer_tiny"],
    ):
        status, output, _ = call(*more, *flags)
        assert (status, output.count("is ignored")) == (0, ours in more and len(more) > 1)
        nll.append(float(read(tmp_path / "t.csv")[0]["nll"]))
    assert nll[0] == nll[1] == nll[2] != nll[3]


def test_a_foreign_file_says_little(run, call, tmp_path):
    *_, model, _ = run
    checkpoint = tmp_path / "plain.pth"
    torch.save(model.state_dict(), checkpoint)
    status, _, errors = call(checkpoint, "--data-path", run[1])
    assert status == 1
    assert "give --model NAME" in errors
    network = from_checkpoint(str(checkpoint), "test_vit")
    assert network.required["num_classes"] == 12
    assert network.classes is None


def test_weights_of_others_get_images_as_they_expect(call, main, tmp_path):
    model, checkpoint = random_vit(3), tmp_path / "plain.pth"
    folder = write_images(tmp_path / "images", train=4, val=8, classes=("ant", "bee", "cat"))
    logits, targets, _ = logits_of(model, folder / "val", plain=True)
    expected = formulas(logits, targets)
    assert expected["top1"] != formulas(*logits_of(model, folder / "val")[:2])["top1"]
    words = ["--model", "test_vit", "--data-path", folder, "--input-size", SIZE]
    evaluation = ["--eval", "--resume", checkpoint, "--num_workers", 0, *words]
    for content in (
        model.state_dict(),
        {"state_dict": model.state_dict(), "arch": "t", "args": {}},
    ):
        torch.save(content, checkpoint)
        assert call(checkpoint, *words, "--csv", tmp_path / "rows.csv")[0] == 0
        agrees(read(tmp_path / "rows.csv")[0], expected)
        _, output, _ = main(*evaluation)
        assert f"expects: mean {(0.5,) * 3}, std {(0.5,) * 3}" in output
        assert f"* Acc@1 {expected['top1']:.3f} " in output
        assert float(re.search(r"loss ([\d.]+) on", output)[1]) == pytest.approx(
            expected["nll"], abs=2e-3
        )
    torch.save({"model": model.state_dict(), "args": Namespace(lr=1.0)}, checkpoint)  # as DeiT's
    _, output, _ = main(*evaluation)
    assert f"* Acc@1 {formulas(*logits_of(model, folder / 'val')[:2])['top1']:.3f} " in output


def test_pretrained_weights(call, tmp_path, monkeypatch):
    create, asked = timm.create_model, []

    def fake(name, pretrained=False, **kwargs):
        asked.append(pretrained)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", fake)
    folder = write_images(tmp_path / "images", train=0, val=1, classes=["n01440764"]) / "val"
    flags = ("--model", "test_vit", "--pretrained", "--data-path", folder)
    status, output, _ = call(*flags)
    assert (status, {*asked}) == (0, {True})
    assert "timm's weights of test_vit (model, 160 pixels)" in output
    assert "1 of 1000 classes, by wnid: top-1 100.000" in output
    args = validate_flags.parse(get_parser, ["--model", "test_vit", "--pretrained"])
    (case,) = cases([], args, torch.device("cpu"))
    net = case.model.model
    pixels = torch.rand(2, 3, 160, 160)
    assert net.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    ours = normalize(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    with torch.no_grad():
        expected = net.eval()(normalize(pixels, *[(0.5,) * 3] * 2))
        torch.testing.assert_close(case.model(ours), expected, atol=1e-5, rtol=0)
    status, _, errors = call(*flags, "--weights", "ema")
    assert status == 1
    assert "no moving average" in errors
    status, _, errors = call("--model", "test_vit.x", "--pretrained")
    assert (status, "there is no model 'test_vit.x'" in errors) == (1, True)

    def fail(name, **kwargs):
        raise OSError("no route\nto the Hub")

    monkeypatch.setattr(timm, "create_model", fail)
    status, _, errors = call(*flags)
    assert status == 1
    assert "no route to the Hub" in errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"input_size": 0}, "input_size must be a number of pixels"),
        ({"input_size": "32"}, "input_size must be a number of pixels"),
        ({"input_size": True}, "input_size must be a number of pixels, not True"),
        ({"classes": ["a", 2]}, "classes must be a list of names"),
        ({"classes": ["a", "b"]}, "for 3 outputs"),
    ],
)
def test_files_that_contradict_themselves(more, message, call, tmp_path):
    checkpoint = save(tmp_path / "odd.pth", random_vit(3), **more)
    status, _, errors = call(checkpoint)
    assert (status, errors.startswith("error: ")) == (1, True)
    assert message in errors
