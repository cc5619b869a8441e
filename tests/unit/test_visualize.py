"""tools.visualize: figures of what is asked for, or errors that name what is wrong."""

import csv
import json
import math
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from loading import refused
from PIL import Image
from validating import caller, refuses
from visualizing import gate, in_folder, model_of, write_files

from tools.visualize import __main__ as visualize
from tools.visualize import curves
from tools.visualize.attention import measure, parse_query
from tools.visualize.curves import read_log
from utils import UserError

IMAGE = "@images/val/cat/0.jpg"
CLASS = ("--query", "class")


def line(epoch, **values):
    numbers = {"train_loss": 2.0, "train_lr": 1e-3, "test_loss": 1.5}
    return json.dumps(numbers | {"test_acc1": 10.0, "test_acc5": 50.0, "epoch": epoch} | values)


def write_log(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("\n".join(lines or [line(0)]))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Good and bad checkpoints, images and logs."""
    root = write_files(tmp_path_factory.mktemp("visualize"))
    for name in ("broken.pth", "broken.jpg"):
        (root / name).write_bytes(b"nothing")
    state = torch.load(root / "0.pth", weights_only=True)
    weights = state["model"]
    average = {k: v + 1.0 if k.endswith("gating_param") else v for k, v in weights.items()}
    nan = {"blocks.1.attn.gating_param": weights["blocks.1.attn.gating_param"] * torch.nan}
    large = {"blocks.0.mlp.fc2.bias": torch.full_like(weights["blocks.0.mlp.fc2.bias"], 3e38)}
    for name, change in {
        "ema": {"model_ema": average, "epoch": 5},
        "no_epoch": {"epoch": None},
        "within": {"step": 5, "epoch": 1},
        "plus": {"model_name": "convit_tiny_plus", "epoch": 1},
        "nan": {"model": weights | nan},
        "large": {"model": weights | large},
    }.items():
        torch.save(state | change, root / f"{name}.pth")
    name, kwargs = "vit_wee_patch16_reg1_gap_256", {"depth": 1, "embed_dim": 8, "num_heads": 2}
    weights = timm.create_model(name, img_size=32, num_classes=3, **kwargs).state_dict()
    state = {"model": weights, "model_name": name, "model_kwargs": kwargs, "input_size": 32}
    torch.save(state, root / "no_class.pth")
    write_log(root / "some run", line(0), line(1, ema_acc1=3.0, ema_loss=9.0))
    for i in range(9):
        write_log(root / "runs" / str(i))
    (root / "empty.txt").write_text("\n")
    (root / "cut.txt").write_text(line(0) + "\n" + line(1)[:30])
    (root / "lacking.txt").write_text(line(0).replace("test_acc5", "other"))
    (root / "words.txt").write_text(line(0, test_loss="low"))
    return root


@pytest.fixture
def rows_of(files, tmp_path, capsys):
    """``rows_of(*words)``: the CSV file of a figure."""

    def make(*words):
        table = tmp_path / "out.csv"
        status = visualize.main(in_folder(files, [*words, "--csv", table]))
        assert status == 0, capsys.readouterr().err
        with table.open(newline="") as file:
            return list(csv.DictReader(file))

    return make


@pytest.mark.parametrize(
    "words",
    [
        ["gates", "@0.pth", "@1.pth"],
        ["nonlocality", "@0.pth", "--image", IMAGE],
        ["attention", "@1.pth", "--image", IMAGE, "--heads", "0"],
        ["bias", "@1.pth", "--layers", "0"],
        ["kernels", "drawn_fastvit", "--channels", "1"],
        ["features", "@1.pth", "--image", IMAGE, "--channels", "1"],
        ["curves", "@some run"],
    ],
    ids=lambda words: words[0],
)
def test_figures_are_written(words, files, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert visualize.main(in_folder(files, [*words, "--output", out])) == 0
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # not blank


def test_the_last_line_of_an_epoch_counts(tmp_path):
    lines = [line(0), line(1, test_acc1=1.0), line(2), line(1, test_acc1=7.0)]
    rows = read_log(write_log(tmp_path / "run", *lines) / "log.txt")
    assert [(row["epoch"], row["test_acc1"]) for row in rows] == [(0, 10.0), (1, 7.0), (2, 10.0)]


def test_epochs_without_an_evaluation_are_drawn(tmp_path):
    """Those of --val-interval have no point in the curves of the test."""
    skipped = json.dumps({"epoch": 1, "train_loss": 2.0, "train_lr": 1e-3})
    run = write_log(tmp_path / "run", line(0), skipped, line(2))
    picture = curves.make(Namespace(runs=[str(run)]))
    assert [row["test_acc1"] for row in picture.rows] == [10.0, None, 10.0]
    loss, accuracy, *_ = picture.figure.axes
    assert [len(drawn.get_xdata()) for drawn in (*loss.lines, *accuracy.lines)] == [3, 2, 2]
    file = run / "log.txt"
    for key in ("test_loss", "train_loss"):  # the rest of an evaluation, or of a line
        row = {k: v for k, v in json.loads(line(1)).items() if k != key}
        file.write_text(json.dumps(row))
        refused(lambda: read_log(file), "line 1", key, kind=UserError)


def test_gates_over_epochs_and_of_the_average(rows_of):
    def expected(parameter):
        return pytest.approx(1 / (1 + math.exp(-parameter)), rel=1e-5)

    rows = rows_of("gates", "@2.pth", "@0.pth", "@1.pth")
    assert [int(row["epoch"]) for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    for row in rows:
        assert float(row["gate"]) == expected(gate(int(row["epoch"]), int(row["head"])))
    for weights, value in (("model", 0.0), ("ema", 1.0)):
        rows = rows_of("gates", "@ema.pth", "--weights", weights)
        assert {row["epoch"] for row in rows} == {"5"}
        assert float(rows[0]["gate"]) == expected(value)


def test_of_two_files_of_an_epoch_the_first_counts(files, tmp_path, capsys):
    words = in_folder(files, ["@0.pth", "@ema.pth", "@0.pth", "--csv", tmp_path / "a.csv"])
    assert visualize.main(["gates", *words]) == 0
    assert capsys.readouterr().out.count(words[0]) == 2  # the file left out, and the one shown
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 2 * 8


def test_nonlocality_command(rows_of):
    rows = rows_of("nonlocality", "@1.pth", "--data-path", "@images", "--count", "3")
    assert len(rows) == 3 * 4
    assert all(0 < float(row["nonlocality"]) < 3 * math.sqrt(2) for row in rows)
    several = rows_of("nonlocality", "@0.pth", "@1.pth", "--image", "@images/val/cat")
    one = rows_of("nonlocality", "@1.pth", "--image", IMAGE)
    assert several[12:] == one  # a folder stands for its first image


def test_attention_command(rows_of):
    words = ["attention", "@1.pth", "--image", IMAGE]
    rows = rows_of(*words, "--part", "all", "--heads", "0", "3")
    assert list(rows[0]) == ["layer", "head", "part", "y", "x", "weight"]
    parts = {(row["layer"], row["part"]) for row in rows}
    assert ("blocks.0.attn", "position") in parts
    assert ("blocks.2.attn", "position") not in parts
    sums = {}
    for row in rows:
        key = row["layer"], row["part"], row["head"]
        sums[key] = sums.get(key, 0.0) + float(row["weight"])
    for (layer, _, _), total in sums.items():
        if layer == "blocks.2.attn":
            assert 0 < total < 0.999  # the class token has the rest
        else:
            assert total == pytest.approx(1.0, abs=1e-5)
    assert {row["layer"] for row in rows_of(*words, *CLASS)} == {"blocks.2.attn"}
    words = ["attention", "drawn_visformer", "--image", IMAGE, "--heads", "1"]
    found = {(row["layer"], row["head"]) for row in rows_of(*words, "--query", "31,0")}
    assert found == {("stage2.0.attn", "1"), ("stage3.0.attn", "1")}


def test_the_query_is_the_patch_under_the_pixel(files):
    """A head that looks at its own patch alone shows which one that is."""
    assert parse_query("centre", 16) == (8, 8)
    model = model_of(files / "1.pth")
    layer = model.module.blocks[0].attn
    with torch.no_grad():
        layer.pos_proj.weight.copy_(torch.tensor([0.0, 0.0, -100.0]).expand(4, 3))
        layer.gating_param.fill_(100.0)
    (one,) = measure(model, torch.zeros(1, 3, 16, 16), (13, 6), ("full",), [0])
    assert one.place == (1, 3)  # x = 13 of 16 pixels is in the last of four columns
    assert torch.all(one.maps["full"][:, 1, 3] > 0.999)


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        (["@1.pth"], ["layer", "head", "y", "x", "weight"]),
        (["@1.pth", "--show", "embedding"], ["layer", "row", "column", "y", "x", "similarity"]),
        (["drawn_visformer", "--layers", "1"], ["layer", "head", "dy", "dx", "bias"]),
    ],
)
def test_bias_command(rows_of, words, columns):
    assert list(rows_of("bias", *words)[0]) == columns


@pytest.mark.parametrize(
    ("words", "branches"),
    [
        ([], {"skip", "mixer.conv_scale", "mixer.identity"}),
        (["--layer", "stem.0"], {"conv_scale"}),
        (["--layer", "stages.2.pos_emb"], {"skip", "pos_enc"}),
    ],
)
def test_kernels_command(rows_of, words, branches):
    found = {
        row["branch"] for row in rows_of("kernels", "drawn_fastvit", *words, "--channels", "1")
    }
    assert found >= branches | {"sum", "fused"}
    assert ("identity" in str(found)) == ("identity" in str(branches))


def test_features_command(rows_of):
    words = ["--image", IMAGE, "--channels", "3", "--pick", "variance"]
    rows = rows_of("features", "@1.pth", *words)
    assert len(rows) == 3 * 3 * 16
    by_channel = {}
    for row in rows[: 3 * 16]:
        by_channel.setdefault(row["channel"], []).append(float(row["value"]))
    spreads = [np.var(values) for values in by_channel.values()]
    assert len(spreads) == 3
    assert spreads == sorted(spreads, reverse=True)


def test_curves_command(rows_of):
    found = [(row["run"], row["epoch"], row["ema_acc1"]) for row in rows_of("curves", "@some run")]
    assert found == [("some run", "0", ""), ("some run", "1", "3.0")]


def test_branches_of_a_reparameterised_model_are_gone(tmp_path, capsys):
    kwargs = {"inference_mode": True}
    state = {"model": timm.create_model("drawn_fastvit", **kwargs).state_dict(), "input_size": 32}
    path, out = tmp_path / "in.pth", tmp_path / "out.png"
    torch.save(state | {"model_name": "drawn_fastvit", "model_kwargs": kwargs}, path)
    refuses(caller(capsys, visualize, more=())("kernels", path, "--output", out), "FastViT")
    assert not out.exists()


OF_VIT = ["test_vit", "--image", IMAGE]
OF_CONVIT = ["@0.pth", "--image", IMAGE]
OF_V2 = ["drawn_visformer", "--image", IMAGE]
WRONG = [  # words, and what the message must name
    (["gates", "test_vit"], "VisionTransformer"),
    (["gates", "@none.pth"], "none.pth"),
    (["gates", "convit_tny"], "convit_tiny"),
    (["gates", "@0.pth", "--pretrained"], "--pretrained"),
    (["gates", "test_vit", "--weights", "ema"], "test_vit"),
    (["gates", "test_vit", "--model", "convit_tiny"], "convit_tiny"),
    (["gates", "@broken.pth"], "broken.pth"),
    (["gates", "@0.pth", "@no_epoch.pth"], "no_epoch.pth"),
    (["gates", "@0.pth", "@within.pth"], "within.pth"),
    (["gates", "@0.pth", "@plus.pth"], "convit_tiny_plus"),
    (["gates", "@nan.pth"], "blocks.1.attn.gating_param"),
    (["gates", "@0.pth", "--input-size", "18"], "18"),
    (["nonlocality", "@0.pth"], "--data-path"),
    (["nonlocality", "@0.pth", "--data-path", "@images", "--count", "99"], "99"),
    (["nonlocality", "@0.pth", "--data-path", "@nowhere"], "nowhere"),
    (["nonlocality", "test_convnext", "--image", IMAGE], "ConvNeXt"),
    (["attention", "test_vit", "--image", "@broken.jpg"], "broken.jpg"),
    (["attention", "test_vit", "--image", "@some run"], "some run"),
    (["attention", "@no_class.pth", "--image", IMAGE, *CLASS], "no_class.pth"),
    (["attention", *OF_V2, "--heads", "7"], "stage2.0.attn"),
    (["attention", *OF_VIT, "--query", "160,0"], "160x160"),
    (["attention", *OF_VIT, "--query", "a"], "--query a"),
    (["attention", *OF_VIT, "--layers", "6"], "--layers 6"),
    (["attention", *OF_VIT, "--heads", "2"], "--heads 2"),
    (["attention", *OF_VIT, "--part", "position"], "--part position"),
    (["attention", *OF_CONVIT, *CLASS, "--layers", "0"], "blocks.0"),
    (["bias", "drawn_fastvit"], "drawn_fastvit"),
    (["bias", "test_vit", "--show", "table"], "--show table"),
    (["kernels", "test_vit"], "VisionTransformer"),
    (["kernels", "drawn_fastvit", "--layer", "stem"], "stem.0"),
    (["features", "test_vit", "--image", IMAGE, "--layers", "9"], "--layers 9"),
    (["features", "test_vit", "--image", IMAGE, "--channels", "63"], "--channels"),
    (["features", "@large.pth", "--image", IMAGE], "blocks.1"),
    (["curves", *(f"@runs/{i}" for i in range(9))], "9"),
    (["curves", "@images"], "log.txt"),
    (["curves", "@empty.txt"], "empty.txt"),
    (["curves", "@cut.txt"], "cut.txt line 2"),
    (["curves", "@lacking.txt"], "test_acc5"),
    (["curves", "@words.txt"], "'low'"),
]


@pytest.mark.parametrize(("words", "named"), WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_errors_name_what_is_wrong(words, named, files, tmp_path, capsys):
    call = caller(capsys, visualize, more=())
    refuses(call(*in_folder(files, [*words, "--output", tmp_path / "out.png"])), named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--channels", "--input-size"])
def test_numbers_are_positive(flag, capsys):
    with pytest.raises(SystemExit):
        visualize.get_parser().parse_args(["kernels", "fastvit_t8", flag, "0"])
    assert flag in capsys.readouterr().err


def test_targets(files, tmp_path, capsys):
    call = partial(caller(capsys, visualize, more=()), "curves", files / "some run")
    for more, named in (
        ([], "--output"),
        (["--output", "a.jpg"], ".png"),
        (["--output", tmp_path / "a.png", "--csv", tmp_path / "b.png"], ".csv"),
        (["--output", tmp_path], ".png"),
        (["--output", tmp_path / "no" / "a.png"], tmp_path / "no"),
        (["--tensorboard", files / "0.pth"], files / "0.pth"),
    ):
        refuses(call(*more), named)
    # a previous figure stays where the new one, or the values, cannot be written
    old, numbers = tmp_path / "a.png", tmp_path / "b.csv"
    old.write_bytes(b"of before")
    numbers.mkdir()
    refuses(call("--output", old, "--csv", numbers), f"--csv {numbers}")
    assert old.read_bytes() == b"of before"


def test_what_is_read_is_not_overwritten(files, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (16, 16)).save(photo)
    before = photo.read_bytes()
    words = ["attention", files / "0.pth", "--image", photo, "--output", photo]
    refuses(caller(capsys, visualize, more=())(*words), f"--output {photo}")
    assert photo.read_bytes() == before


def test_names_of_any_kind(files, tmp_path, capsys):
    names = ["one/cost_$5_{x$", f"two/{'long' * 40}", "x", "two/x"]
    folders = [str(write_log(tmp_path / name)) for name in names]
    out, table = tmp_path / "out.png", tmp_path / "out.csv"
    words = [*folders, str(tmp_path / "x" / "log.txt"), "--output", str(out), "--csv", str(table)]
    assert visualize.main(["curves", *words]) == 0
    assert f"{folders[2]}/log.txt" in capsys.readouterr().out  # is left out
    with table.open(newline="") as file, Image.open(out) as picture:
        runs = list(dict.fromkeys(row["run"] for row in csv.DictReader(file)))
        assert picture.width < 1300
    # folders that are called the same are told apart by their paths
    assert runs == [names[0].split("/")[1], names[1].split("/")[1], *folders[2:]]
    name = files / "a$_{b$.pth"
    name.write_bytes((files / "0.pth").read_bytes())
    assert visualize.main(["gates", str(name), "--output", str(out)]) == 0
