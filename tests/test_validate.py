"""tools.validate: scores, classes, ImageNet's other sets, tables and pictures."""

import csv
import json
import re
import sys
from importlib import resources

import numpy as np
import pytest
import timm
import torch
from conftest import THREADS, write_images
from PIL import Image
from timm.data import RealLabelsImagenet

import datasets
from configs import get_args_parser
from pipeline.images import DataError, load_image
from tools.validate import __main__ as validate
from tools.validate import corruptions, counts, pictures, tables
from tools.validate.classes import imagenet_wnids, match_classes
from tools.validate.evaluate import Clock
from tools.validate.networks import read_network

CLASSES = [f"kind{index:02}" for index in range(12)]
SIZE = 32


def random_vit(num_classes, seed=0):
    """A tiny network whose predictions differ from image to image."""
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", num_classes=num_classes, img_size=SIZE)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


def save(path, model, ema=None, **more):
    """A checkpoint as training writes it, as far as evaluation reads it."""
    num_classes = model.num_classes
    content = {"model": model.state_dict(), "model_ema": ema and ema.state_dict()}
    content |= {"model_name": "test_vit", "input_size": SIZE, "epoch": 3}
    content |= {"model_kwargs": {"num_classes": num_classes, "img_size": SIZE}}
    torch.save(content | more, path)
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these are slower with several."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(checkpoint with a moving average, image folder, network, average)."""
    folder = tmp_path_factory.mktemp("run")
    images = write_images(folder / "images", train=1, val=9, classes=CLASSES)
    model, ema = random_vit(12), random_vit(12, seed=1)
    checkpoint = save(folder / "checkpoint.pth", model, ema, classes=CLASSES)
    return checkpoint, images, model, ema


@pytest.fixture
def call(capsys):
    """``call(*flags) -> (status, output, errors)`` of tools.validate."""

    def run_it(*flags):
        capsys.readouterr()
        status = validate.main([*map(str, flags), "--num_workers", "0"])
        return (status, *capsys.readouterr())

    return run_it


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def logits_of(model, folder):
    """Float64 logits of the images of ``folder/CLASS``, targets in the order of names, paths."""
    args = get_args_parser().parse_args(["--input-size", str(SIZE)])
    transform = datasets.build_transform(False, args)
    paths = sorted(folder.glob("*/*"))
    names = sorted({path.parent.name for path in paths})
    images = torch.stack([transform(load_image(path)) for path in paths]).double()
    with torch.inference_mode():
        logits = model.double()(images).numpy()
    model.float()
    return logits, np.array([names.index(path.parent.name) for path in paths]), paths


def formulas(logits, targets):
    """The scores by their definitions, in float64 and in loops."""
    exps = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = exps / exps.sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    top1 = [order[i, 0] == t for i, t in enumerate(targets)]
    top5 = [t in order[i, :5] for i, t in enumerate(targets)]
    confidence = probabilities.max(1)
    ece = 0.0
    for m in range(1, 16):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / 15 < c <= m / 15]
        if inside:
            accuracy = np.mean([top1[i] for i in inside])
            ece += len(inside) / len(targets) * abs(accuracy - np.mean(confidence[inside]))
    nll = -np.mean([np.log(probabilities[i, t]) for i, t in enumerate(targets)])
    return {
        "top1": 100 * np.mean(top1),
        "top5": 100 * np.mean(top5),
        "nll": nll,
        "ece": 100 * ece,
        "confidence": 100 * np.mean(confidence),
    }


def agrees(row, expected):
    for key, value in expected.items():
        assert float(row[key]) == pytest.approx(value, abs=2e-3), key


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


def test_bins_hold_their_upper_edge():
    edges = torch.tensor([0.2, 0.2 + 1e-9, 0.4, 0.6, 1.0, 1e-3, 0.0], dtype=torch.float64)
    assert counts.bin_of(edges).tolist() == [2, 3, 5, 8, 14, 0, 0]
    assert counts.bin_of(torch.tensor([float("nan")])).tolist()[0] in range(15)


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
    for index, row in enumerate(read(tmp_path / "classes.csv")):
        assert (row["class"], row["folder"], row["images"]) == (str(index), CLASSES[index], "9")
        right = int(((predicted == index) & (targets == index)).sum())
        assert float(row["recall"]) == pytest.approx(right / 9)
        claimed = int((predicted == index).sum())
        assert row["precision"] == (str(right / claimed) if claimed else "")
        wrong = [int(p) for p in predicted[targets == index] if p != index]
        most = max(map(wrong.count, wrong))
        assert row["wrong_images"] == str(most)
        assert wrong.count(CLASSES.index(row["wrong"])) == most


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
    for name in names:
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
    logits, targets, _ = logits_of(model, folder)
    expected = formulas(logits[:, outputs], targets)
    assert 0 < expected["top1"] < 100
    agrees(read(tmp_path / "rows.csv")[0], expected)
    found = [(int(row["class"]), row["folder"]) for row in read(tmp_path / "classes.csv")]
    assert found == sorted(zip(outputs, names, strict=True))


def test_wnids_are_those_of_imagenet_a_and_r():
    def lines(name):
        return (resources.files("timm.data") / "_info" / name).read_text().split()

    assert len(imagenet_wnids()) == 1000
    for name in "ar":
        indices = [int(index) for index in lines(f"imagenet_{name}_indices.txt")]
        matched = match_classes(lines(f"imagenet_{name}_synsets.txt"), 1000)
        assert (matched.rule, len(matched.outputs), matched.is_subset) == ("wnid", 200, True)
        assert list(matched.outputs) == indices


def test_rules_of_matching():
    numbers = sorted(map(str, range(1000)))  # as text: 0, 1, 10, 100, 101, ...
    matched = match_classes(numbers, 1000)
    assert matched.outputs == tuple(map(int, numbers))
    assert matched.columns == list(range(1000))
    assert matched.column_names == [str(index) for index in range(1000)]
    # numbers that a network was trained on in this very order
    twelve = sorted(map(str, range(12)))
    assert match_classes(twelve, 12).outputs == tuple(range(12))
    assert match_classes(twelve, 12, rule="number").outputs == tuple(map(int, twelve))
    assert match_classes(["a", "b"], 2).rule == "position"
    assert match_classes(["b", "a"], 2, ["a", "b"]).outputs == (1, 0)
    # a network of this project, trained on ImageNet's folders
    assert match_classes(["7", "11"], 1000, imagenet_wnids()).outputs == (7, 11)
    assert match_classes(["n01443537"], 1000, imagenet_wnids()).outputs == (1,)


@pytest.mark.parametrize(
    ("names", "num_outputs", "known", "rule", "message"),
    [
        (["n01440764", "cats"], 1000, None, "auto", "'cats' is no wnid"),
        (["n99999999"], 1000, None, "auto", "'n99999999' is no wnid"),
        (["n01440764", "n01443537"], 3, None, "auto", "knows 3 classes, the set has 2"),
        (["n01440764"], 10, None, "wnid", "knows 10 classes"),
        (["3", "1000"], 1000, None, "auto", "no class 1000"),
        (["3", "cat"], 12, None, "number", "'cat' is no number"),
        (["1", "01"], 1000, None, "auto", "'1' and '01' are the same class 1"),
        (["a", "b", "c"], 2, None, "auto", "knows 2 classes, the set has 3"),
        (["a", "x"], 3, ["a", "b", "c"], "auto", "'x' is not among the 3"),
        (["n01440764", "x"], 1000, imagenet_wnids(), "auto", "'x' is no wnid"),
    ],
)
def test_classes_that_do_not_fit(names, num_outputs, known, rule, message):
    with pytest.raises(DataError, match=re.escape(message)):
        match_classes(names, num_outputs, known, rule)


@pytest.fixture
def imagenet_files(tmp_path):
    """9 validation images of two classes, and labels of the same and of others."""
    names = ("n01440764", "n01443537")
    folder = write_images(tmp_path / "images", train=0, val=5, classes=names) / "val"
    (folder / names[1] / "4.jpg").unlink()
    for number, path in enumerate(sorted(folder.glob("*/*")), start=1):
        shuffled = number * 4 % 11
        path.rename(path.with_name(f"ILSVRC2012_val_{shuffled:08}.JPEG"))
    return folder


def test_real_labels(imagenet_files, call, tmp_path):
    model = random_vit(1000)
    logits, _, paths = logits_of(model, imagenet_files)
    best = np.argsort(-logits, axis=1)
    labels = [[] for _ in range(10)]
    for row, path in enumerate(paths):
        number = int(path.stem[-8:])
        kinds = [[int(best[row, 0]), 3], [5, int(best[row, 3])], [int(best[row, 700])], []]
        labels[number - 1] = kinds[row % 4]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    judge = RealLabelsImagenet(
        [str(p) for p in paths] + ["ILSVRC2012_val_00000001.JPEG"] * (10 - len(paths)),
        tmp_path / "real.json",
    )
    judge.add_result(torch.from_numpy(logits))
    checkpoint = tmp_path / "plain.pth"
    torch.save(model.state_dict(), checkpoint)
    flags = [checkpoint, "--model", "test_vit", "--input-size", SIZE, "--batch-size", 2]
    flags += ["--data-path", imagenet_files, "--real-labels", tmp_path / "real.json"]
    assert call(*flags, "--csv", tmp_path / "rows.csv")[0] == 0
    row = read(tmp_path / "rows.csv")[0]
    assert int(row["real_images"]) == len(judge.is_correct[1]) == 7
    assert float(row["real_top1"]) == pytest.approx(judge.get_accuracy(1))
    assert float(row["real_top5"]) == pytest.approx(judge.get_accuracy(5))
    assert judge.get_accuracy(1) != judge.get_accuracy(5)
    # one that is left out shifts nothing
    paths[1].write_bytes(b"broken")
    judge.is_correct = {k: v[:1] + v[2:] for k, v in judge.is_correct.items()}
    assert call(*flags, "--csv", tmp_path / "rows.csv", "--on-corrupt", "skip")[0] == 0
    row = read(tmp_path / "rows.csv")[0]
    assert (row["images"], row["corrupt"], row["real_images"]) == ("8", "1", "6")
    assert float(row["real_top1"]) == pytest.approx(judge.get_accuracy(1))
    status, _, errors = call(*flags)
    assert status == 1
    assert paths[1].name in errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0], [1]", "is no JSON file"),
        ('{"a": [1]}', "must be a list"),
        ("[[0], [1000]]", "image 2 has label 1000"),
        ("[[0], [1]]", "images 1 to 2, but none for"),
        (None, "cannot read --real-labels"),
    ],
)
def test_real_labels_that_cannot_be_used(content, message, imagenet_files, call, tmp_path):
    torch.save(random_vit(1000).state_dict(), tmp_path / "plain.pth")
    if content is not None:
        (tmp_path / "real.json").write_text(content)
    flags = [tmp_path / "plain.pth", "--model", "test_vit", "--input-size", SIZE, "--csv"]
    flags += [tmp_path / "rows.csv", "--data-path", imagenet_files]
    status, _, errors = call(*flags, "--real-labels", tmp_path / "real.json")
    assert (status, errors.startswith("error: ")) == (1, True)
    assert message in errors
    assert not (tmp_path / "rows.csv").exists()


def test_timms_copy_of_the_real_labels():
    from tools.validate.real import read_labels

    labels = read_labels("timm")
    assert (len(labels), sum(not one for one in labels)) == (50000, 3163)


def test_corruptions(run, call, tmp_path):
    checkpoint, _, model, _ = run
    root, expected = tmp_path / "images", {}
    generator = np.random.default_rng(0)
    for name in ("fog", "zoom_blur", "spatter"):
        for severity in range(1, 6):
            for kind in CLASSES[:3]:
                folder = root / name / str(severity) / kind
                folder.mkdir(parents=True)
                for i in range(4):
                    pixels = generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
            logits, targets, _ = logits_of(model, root / name / str(severity))
            scores = formulas(logits[:, :3], targets)
            expected.setdefault(name, []).append(100 - scores["top1"])
    flags = (checkpoint, "--weights", "model", "--corruptions", root)
    status, output, _ = call(*flags, "--csv", tmp_path / "c.csv")
    assert status == 0
    rows = read(tmp_path / "c.csv")
    assert [row["corruption"] for row in rows] == ["zoom_blur", "fog", "spatter", "mean"]
    for row in rows[:-1]:
        errors = [float(row[f"severity_{severity}"]) for severity in range(1, 6)]
        assert errors == pytest.approx(expected[row["corruption"]])
        assert float(row["error"]) == pytest.approx(np.mean(errors))
        assert row["relative"] == ""
    assert float(rows[-1]["error"]) == pytest.approx(np.mean([*expected.values()]))
    assert "mCE" not in output
    assert f"{np.mean(expected['fog']):.2f}" in output
    (root / "fog" / "3").rename(root / "fog" / "6")
    status, _, errors = call(*flags)
    assert status == 1
    assert str(root / "fog" / "3") in errors


def test_corruptions_have_imagenets_size(call, tmp_path):
    model = timm.create_model("test_vit", num_classes=1, img_size=224)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    for severity in range(1, 6):
        folder = tmp_path / "images" / "fog" / str(severity)
        write_images(folder, train=0, val=1, classes=["only"])
        (folder / "val" / "only").rename(folder / "only")
        (folder / "val").rmdir()
        (folder / "train" / "only").rmdir()
        (folder / "train").rmdir()
    flags = (tmp_path / "plain.pth", "--model", "test_vit", "--corruptions", tmp_path / "images")
    status, output, _ = call(*flags)
    assert status == 0
    assert "plain.pth (model, 224 pixels)" in output


def test_mce_is_relative_to_alexnet():
    def measured(share, names=corruptions.ALEXNET):
        return [
            corruptions.Corruption(name, (share * corruptions.ALEXNET[name],) * 5) for name in names
        ]

    assert corruptions.mce(measured(1.0)) == pytest.approx(100)
    # AlexNet's errors as published, and their order
    published = "88.6 89.4 92.3 82.0 82.6 78.6 79.8 86.7 82.7 81.9 56.5 85.3 64.6 71.8 60.7"
    assert list(corruptions.ALEXNET.values()) == [float(value) for value in published.split()]
    names = list(corruptions.ALEXNET)
    mixed = measured(0.5, names[:5]) + measured(0.8, names[5:])
    extra = corruptions.Corruption("spatter", (10.0, 20.0, 30.0, 40.0, 50.0))
    assert corruptions.mce([*mixed, extra]) == pytest.approx((5 * 50 + 10 * 80) / 15)
    assert corruptions.mce(measured(1.0, names[1:])) is None
    assert corruptions.mean_error([extra]) == 30
    text = tables.corruption_table([*mixed, extra], 70.0, True)
    assert text.endswith("mCE 70.0")


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
    assert seen[0].shapes == [(49, 3, SIZE, SIZE)] * 3  # of 108 images
    agrees(read(tmp_path / "t.csv")[0], formulas(*logits_of(model, images / "val")[:2]))


def test_the_mce_of_a_network_of_imagenet(run, call, tmp_path, monkeypatch):
    for name in corruptions.ALEXNET:
        for severity in range(1, 6):
            (tmp_path / "images" / name / str(severity)).mkdir(parents=True)

    def errors_of(case, folders):
        assert list(folders) == list(corruptions.ALEXNET)
        half = [corruptions.Corruption(n, (0.5 * corruptions.ALEXNET[n],) * 5) for n in folders]
        return half, case.weights == "model"

    monkeypatch.setattr(validate, "errors_of", errors_of)
    flags = (run[0], "--corruptions", tmp_path / "images", "--csv", tmp_path / "c.csv")
    status, output, _ = call(*flags)
    assert status == 0
    assert output.count("mCE 50.0") == 1  # not of the average, which is said to be another's
    rows = read(tmp_path / "c.csv")
    relative = [row["relative"] and float(row["relative"]) for row in rows]
    assert relative == [pytest.approx(50)] * 16 + [""] * 16


@pytest.mark.parametrize("flags", [["--fuse"], ["--amp", "--amp-dtype", "bfloat16"]])
def test_ways_to_run_a_network(flags, call, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("visformer_tiny", num_classes=3, img_size=SIZE)
    names = ["a", "b", "c"]
    folder = write_images(tmp_path / "images", train=0, val=5, classes=names) / "val"
    more = {"model_name": "visformer_tiny", "classes": names}
    checkpoint = save(tmp_path / "ours.pth", model, **more)
    common = (checkpoint, "--data-path", folder, "--batch-size", 4, "--csv", tmp_path / "t.csv")
    assert call(*common)[0] == 0
    plain = read(tmp_path / "t.csv")
    assert [row["weights"] for row in plain] == ["model"]  # there is no average
    assert call(*common, *flags)[0] == 0
    again = read(tmp_path / "t.csv")[0]
    assert float(again["nll"]) == pytest.approx(float(plain[0]["nll"]), rel=1e-2)
    assert again["images"] == "15"


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
        assert (status, "is ignored" in output) == (0, ours in more and len(more) > 1)
        nll.append(float(read(tmp_path / "t.csv")[0]["nll"]))
    assert nll[0] == nll[1] == nll[2] != nll[3]


def test_a_foreign_file_says_little(run, call, tmp_path):
    *_, model, _ = run
    checkpoint = tmp_path / "plain.pth"
    torch.save(model.state_dict(), checkpoint)
    status, _, errors = call(checkpoint, "--data-path", run[1])
    assert status == 1
    assert "give --model NAME" in errors
    network = read_network(str(checkpoint), "test_vit")
    assert network.required["num_classes"] == 12
    assert network.classes is None


def test_pretrained_weights(call, tmp_path, monkeypatch):
    create, asked = timm.create_model, []

    def fake(name, pretrained=False, **kwargs):
        asked.append(pretrained)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", fake)
    folder = write_images(tmp_path / "images", train=0, val=1, classes=["n01440764"]) / "val"
    flags = ("--model", "test_vit", "--pretrained", "--data-path", folder)
    status, output, _ = call(*flags)
    assert (status, asked) == (0, [True])
    assert "timm's weights of test_vit (model, 160 pixels)" in output
    assert "1 of 1000 classes, by wnid: top-1 100.000" in output
    assert "warning: timm's weights of test_vit expect images normalised by" in output
    status, _, errors = call(*flags, "--weights", "ema")
    assert status == 1
    assert "no moving average" in errors

    def fail(name, **kwargs):
        raise OSError("no route\nto the Hub")

    monkeypatch.setattr(timm, "create_model", fail)
    status, _, errors = call(*flags)
    assert status == 1
    assert "no weights for test_vit from timm: no route to the Hub" in errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"input_size": 0}, "input_size must be a number of pixels"),
        ({"input_size": "32"}, "input_size must be a number of pixels"),
        ({"classes": ["a", 2]}, "classes must be a list of names"),
        ({"classes": ["a", "b"]}, "2 names of classes for 3 outputs"),
    ],
)
def test_files_that_contradict_themselves(more, message, call, tmp_path):
    checkpoint = save(tmp_path / "odd.pth", random_vit(3), **more)
    status, _, errors = call(checkpoint)
    assert (status, errors.startswith("error: ")) == (1, True)
    assert message in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give a checkpoint"),
        (["--pretrained"], "--pretrained needs --model"),
        (["{checkpoint}", "--pretrained"], "leave the checkpoints out"),
        (["nowhere.pth"], "nowhere.pth"),
        (["{checkpoint}", "--data-path", "nowhere"], "nowhere does not exist"),
        (["{checkpoint}", "--input-size", "0"], "--input-size 0 must be positive"),
        (["{checkpoint}", "--batch-size", "0"], "--batch-size 0 must be positive"),
        (["{checkpoint}", "--eval-crop-ratio", "0"], "--eval-crop-ratio 0.0"),
        (["{checkpoint}", "--compile", "gcc"], "--compile gcc is no backend"),
        (["{checkpoint}", "--fuse"], "leave --fuse out"),
        (["{checkpoint}", "--csv", "no/where.csv"], "no folder no"),
        (["{checkpoint}", "--confusion", "c.jpg"], "must end in .png"),
        (["{checkpoint}", "--corruptions", "nowhere"], "--corruptions nowhere is no folder"),
        (["{checkpoint}", "--corruptions", ".", "--confusion", "c.png"], "--confusion is not for"),
        (["{checkpoint}", "--real-labels", "timm"], "knows 12"),
        (["{checkpoint}", "--classes", "wnid"], "knows 12 classes"),
        (["{checkpoint}", "--model", "test_vitt"], "test_vit"),
    ],
)
def test_errors_name_what_is_wrong(flags, message, run, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [flag.format(checkpoint=run[0]) for flag in flags]
    if "--data-path" not in flags:
        flags += ["--data-path", run[1]]
    status, _, errors = call(*flags)
    assert status == 1
    assert errors.startswith("error: ")
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_pictures_need_matplotlib(run, call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    flags = (run[0], "--data-path", run[1], "--confusion", tmp_path / "c.png")
    status, _, errors = call(*flags)
    assert status == 1
    assert "pip install matplotlib" in errors


def test_picture_of_a_few_classes():
    confusion = np.array([[3, 1], [0, 8]])
    figure = pictures.confusion_figure(confusion, ["n01440764", "a $ sign"], "title")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["3", "1", "8"]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (1, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tench", r"a \$ sign"]
    assert axes.get_images()[0].get_array().tolist() == [[0.75**0.5, 0.5], [0, 1]]


def test_picture_of_many_classes():
    confusion = np.diag(np.full(1000, 50))
    confusion[2, 1] = 7
    figure = pictures.confusion_figure(confusion, imagenet_wnids(), "title")
    assert not len(figure.axes[0].get_xticks())
    assert "7  great white shark → goldfish" in figure.axes[1].texts[0].get_text()


def test_picture_of_the_reliability():
    numbers = np.zeros(15, np.int64)
    numbers[[3, 14]] = 10, 30
    bins = counts.Bins(numbers, np.where(numbers == 10, 5, 24) * (numbers > 0), numbers * 0.9)
    figure = pictures.reliability_figure(bins, "title")
    upper, lower = figure.axes
    accuracy, gap = ([bar.get_height() for bar in group] for group in upper.containers)
    assert (accuracy[3], accuracy[14], sum(accuracy)) == (50, 80, 130)
    assert (gap[3], gap[14]) == pytest.approx((40, 10))
    shares = [bar.get_height() for bar in lower.containers[0]]
    assert (shares[3], shares[14]) == (25, 75)
    assert "ECE 17.50%" in figure.get_suptitle()
