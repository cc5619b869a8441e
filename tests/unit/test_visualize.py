"""Pictures of what is within nets come out, of what is asked for, or errors say why not."""

import csv
import json
import math

import numpy as np
import pytest
import timm
import torch
from conftest import write_images
from PIL import Image
from visualizing import TINY, randomize

from tools.visualize import __main__ as visualize
from tools.visualize.attention import _row, parse_query
from tools.visualize.capture import capture
from tools.visualize.loading import load_subject
from tools.visualize.logs import read_log


def line(epoch, **values):
    numbers = {"train_loss": 2.0, "train_lr": 1e-3, "test_loss": 1.5}
    return json.dumps(numbers | {"test_acc1": 10.0, "test_acc5": 50.0, "epoch": epoch} | values)


def test_the_last_line_of_an_epoch_counts(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("\n".join([line(0), line(1, test_acc1=1.0), line(2), line(1, test_acc1=7.0)]))
    rows = read_log(log)
    assert [(row["epoch"], row["test_acc1"]) for row in rows] == [(0, 10.0), (1, 7.0), (2, 10.0)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images, checkpoints of three epochs of a small ConViT, and one of Visformer V2."""
    root = tmp_path_factory.mktemp("visualize")
    write_images(root / "images", train=2, val=1, size=40)
    kwargs = {"num_classes": 3, "img_size": 16, **TINY}
    for epoch in (2, 0, 1):
        torch.manual_seed(epoch)
        model = randomize(timm.create_model("convit_tiny", **kwargs), 0.1)
        with torch.no_grad():
            for block in model.blocks[:2]:
                block.attn.gating_param.fill_(float(epoch))
        state = {"model": model.state_dict(), "model_ema": model.state_dict()}
        state |= {"model_name": "convit_tiny", "model_kwargs": kwargs, "input_size": 16}
        torch.save(state | {"epoch": epoch}, root / f"epoch{epoch}.pth")
    average = {k: v + 1.0 if k.endswith("gating_param") else v for k, v in state["model"].items()}
    torch.save(state | {"model_ema": average, "epoch": 5}, root / "ema.pth")
    run = root / "some run"
    run.mkdir()
    (run / "log.txt").write_text("\n".join([line(0), line(1, ema_acc1=3.0, ema_loss=9.0)]))
    return root


@pytest.fixture
def picture(files, tmp_path, capsys):
    """``picture(*words) -> (size, rows)``: a picture that was made without complaint."""

    def make(*words):
        words = [
            str(files / word[1:]) if str(word).startswith("@") else str(word) for word in words
        ]
        out, table = tmp_path / "out.png", tmp_path / "out.csv"
        status = visualize.main([*words, "--output", str(out), "--csv", str(table)])
        assert status == 0, capsys.readouterr().err
        with Image.open(out) as image, table.open(newline="") as file:
            pixels = np.asarray(image.convert("RGB"))
            assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # not blank
            return image.size, list(csv.DictReader(file))

    return make


IMAGE = "@images/val/cat/0.jpg"
CLASS = ("--query", "class")


def test_gates_over_epochs_and_of_the_average(picture):
    _, rows = picture("gates", "@epoch2.pth", "@epoch0.pth", "@epoch1.pth")
    assert [int(row["epoch"]) for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    for row in rows:
        assert float(row["gate"]) == pytest.approx(1 / (1 + math.exp(-int(row["epoch"]))), rel=1e-5)
    for weights, value in (("model", 1.0), ("ema", 2.0)):
        _, rows = picture("gates", "@ema.pth", "--weights", weights)
        assert {row["epoch"] for row in rows} == {"5"}
        assert float(rows[0]["gate"]) == pytest.approx(1 / (1 + math.exp(-value)), rel=1e-5)


def test_of_two_files_of_an_epoch_the_first_counts(files, tmp_path, capsys):
    words = [str(files / name) for name in ("epoch0.pth", "ema.pth", "epoch0.pth")]
    assert visualize.main(["gates", *words, "--csv", str(tmp_path / "a.csv")]) == 0
    assert "epoch0.pth left out: of epoch 0" in capsys.readouterr().out
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 2 * 8


def test_nonlocality_command(picture):
    _, rows = picture("nonlocality", "@epoch1.pth", "--data-path", "@images", "--count", "3")
    assert len(rows) == 3 * 4
    assert all(0 < float(row["nonlocality"]) < 3 * math.sqrt(2) for row in rows)
    _, several = picture("nonlocality", "@epoch0.pth", "@epoch1.pth", "--image", "@images/val/cat")
    _, one = picture("nonlocality", "@epoch1.pth", "--image", IMAGE)
    assert several[12:] == one  # a folder stands for its first image


def test_attention_command(picture):
    _, rows = picture(
        "attention",
        "--checkpoint",
        "@epoch1.pth",
        "--image",
        IMAGE,
        "--part",
        "all",
        "--heads",
        "0",
        "3",
    )
    shown = {(row["layer"], row["part"]) for row in rows}
    assert ("blocks.0.attn", "position") in shown
    assert ("blocks.2.attn", "position") not in shown
    sums = {}
    for row in rows:
        key = row["layer"], row["part"], row["head"]
        sums[key] = sums.get(key, 0.0) + float(row["weight"])
    for (layer, _, _), total in sums.items():
        if layer == "blocks.2.attn":
            assert 0.5 < total < 1.0  # the class token has the rest
        else:
            assert total == pytest.approx(1.0, abs=1e-5)
    _, rows = picture("attention", "--checkpoint", "@epoch1.pth", "--image", IMAGE, *CLASS)
    assert {row["layer"] for row in rows} == {"blocks.2.attn"}
    words = [
        "attention",
        "--model",
        "swin_visformer_tiny_v2",
        "--input-size",
        "64",
        "--image",
        IMAGE,
    ]
    _, rows = picture(*words, "--layers", "0", "6", "--heads", "1", "--query", "63,0")
    assert {(row["layer"], row["head"]) for row in rows} == {
        ("stage2.0.attn", "1"),
        ("stage3.0.attn", "1"),
    }


def test_the_query_is_the_patch_under_the_pixel(files):
    """A head that looks at its own patch alone shows which one that is."""
    assert parse_query("centre", 16) == (8, 8)
    args = visualize.get_parser().parse_args(
        ["attention", "--checkpoint", str(files / "epoch1.pth"), "--image", "x"]
    )
    subject = load_subject(args.checkpoint, args)
    layer = subject.model.blocks[0].attn
    with torch.no_grad():
        layer.pos_proj.weight.copy_(torch.tensor([0.0, 0.0, -100.0]).expand(4, 3))
        layer.gating_param.fill_(100.0)
    layers = {"blocks.0.attn": layer}
    (captured,) = capture(subject.model, layers, torch.zeros(1, 3, 16, 16))
    row = _row(captured, (13, 6), ("full",), None, 16)
    assert row.place == (1, 3)  # x = 13 of 16 pixels is in the last of four columns
    assert torch.all(row.maps["full"][:, 1, 3] > 0.999)


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        (["@epoch1.pth"], {"weight"}),
        (["@epoch1.pth", "--show", "embedding"], {"similarity"}),
        (["swin_visformer_tiny_v2", "--input-size", "64", "--layers", "0", "8"], {"bias", "dx"}),
    ],
)
def test_bias_command(picture, words, columns):
    _, rows = picture("bias", *words)
    assert columns <= rows[0].keys()


def test_kernels_and_features_commands(picture):
    _, rows = picture("kernels", "fastvit_t8", "--input-size", "32", "--channels", "1")
    assert {row["branch"] for row in rows} >= {"skip", "mixer.conv_scale", "sum", "fused"}
    _, rows = picture(
        "kernels", "fastvit_t8", "--input-size", "32", "--layer", "stem.0", "--channels", "1"
    )
    assert "identity" not in {row["branch"] for row in rows}
    words = ["fastvit_sa12", "--input-size", "64", "--layer", "stages.3.pos_emb"]
    _, rows = picture("kernels", *words, "--channels", "1")
    assert {row["branch"] for row in rows} == {"skip", "pos_enc", "sum", "fused"}
    words = ["--image", IMAGE, "--channels", "3", "--pick", "variance"]
    _, rows = picture("features", "@epoch1.pth", *words)
    assert len(rows) == 3 * 3 * 16
    by_channel = {}
    for row in rows[: 3 * 16]:
        by_channel.setdefault(row["channel"], []).append(float(row["value"]))
    spreads = [np.var(values) for values in by_channel.values()]
    assert len(spreads) == 3
    assert spreads == sorted(spreads, reverse=True)


def test_curves_command_and_tensorboard(picture, files, tmp_path):
    _, rows = picture("curves", "@some run", "--tensorboard", tmp_path / "events")
    assert [(row["run"], row["epoch"], row["ema_acc1"]) for row in rows] == [
        ("some run", "0", ""),
        ("some run", "1", "3.0"),
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events")).Reload()
    (event,) = events.Images("visualize/curves")
    assert event.step == 1
    assert event.width > 500


def test_the_fused_net_says_that_its_branches_are_gone(tmp_path, capsys):
    kwargs = {"num_classes": 3, "inference_mode": True}
    model = timm.create_model("fastvit_t8", **kwargs)
    torch.save(
        {
            "model": model.state_dict(),
            "model_name": "fastvit_t8",
            "model_kwargs": kwargs,
            "input_size": 32,
        },
        tmp_path / "in.pth",
    )
    out = tmp_path / "out.png"
    assert visualize.main(["kernels", str(tmp_path / "in.pth"), "--output", str(out)]) == 1
    assert "reparameterised already" in capsys.readouterr().err
    assert not out.exists()


WRONG = [
    (["gates", "test_vit"], "no gates"),
    (["gates", "@none.pth"], "neither a checkpoint file nor a model"),
    (["gates", "@epoch0.pth", "--pretrained"], "--pretrained goes with the name"),
    (["gates", "@broken.pth"], "not a checkpoint"),
    (["gates", "@epoch0.pth", "@no_epoch.pth"], "does not say its epoch"),
    (["gates", "@epoch0.pth", "@within.pth"], "or is of the middle of one"),
    (["gates", "@epoch0.pth", "@plus.pth"], "give checkpoints of one"),
    (["gates", "convit_tny"], "the nearest are convit_tiny"),
    (["gates", "@nan.pth"], "blocks.1.attn.gating_param has values that are not finite"),
    (["gates", "@epoch0.pth", "--input-size", "0"], "image size 0x0 does not fit"),
    (["gates", "@epoch0.pth", "--input-size", "18"], "multiples of 4"),
    (["nonlocality", "@epoch0.pth"], "either --image IMG ... or --data-path"),
    (
        ["nonlocality", "@epoch0.pth", "--data-path", "@images", "--count", "99"],
        "has 6 image(s), and 99 are wanted",
    ),
    (["nonlocality", "fastvit_t8", "--image", IMAGE], "no attention layer"),
    (["attention", "--image", IMAGE], "give --checkpoint CKPT or --model NAME"),
    (["attention", "--model", "test_vit", "--image", "@broken.jpg"], "cannot decode image"),
    (["attention", "--model", "test_vit", "--image", "@some run"], "has 0 image(s)"),
    (
        ["attention", "--model", "vit_wee_patch16_reg1_gap_256", "--image", IMAGE, *CLASS],
        "no layer of vit_wee_patch16_reg1_gap_256, random weights has a class token",
    ),
    (
        ["attention", "--model", "swin_visformer_tiny_v2", "--image", IMAGE, "--heads", "7"],
        "no head of stage2.0.attn (--layers chooses others) 7, they are 0..5",
    ),
    (["attention", "--model", "test_vit", "--image", IMAGE, "--query", "160,0"], "160x160 pixels"),
    (["attention", "--model", "test_vit", "--image", IMAGE, "--query", "a"], "none of X,Y, centre"),
    (["attention", "--model", "test_vit", "--image", IMAGE, "--layers", "6"], "they are 0..5"),
    (["attention", "--model", "test_vit", "--image", IMAGE, "--heads", "2"], "they are 0..1"),
    (["attention", "--model", "test_vit", "--image", IMAGE, "--part", "position"], "by position"),
    (
        ["attention", "--checkpoint", "@epoch0.pth", "--image", IMAGE, *CLASS, "--layers", "0"],
        "no class token",
    ),
    (["bias", "fastvit_t8"], "it has no bias table"),
    (["bias", "test_vit", "--show", "table"], "has only embedding"),
    (["kernels", "test_vit"], "FastViT has"),
    (["kernels", "fastvit_t8", "--layer", "stem"], "is none of stem.0"),
    (["features", "test_vit", "--image", IMAGE, "--channels", "0"], "1 at least"),
    (["features", "test_vit", "--image", IMAGE, "--layers", "9"], "there is no stage 9"),
    (["features", "test_vit", "--image", IMAGE, "--channels", "63"], "choose fewer by --channels"),
    (["features", "@large.pth", "--image", IMAGE], "maps after 1: blocks.1 are not finite"),
    (["curves", *(f"@runs/{i}" for i in range(9))], "9 runs are more than there are colours, 8"),
    (["curves", "@images"], "there is no log"),
    (["curves", "@empty.txt"], "is empty"),
    (["curves", "@cut.txt"], "cut.txt line 2 is broken"),
    (["curves", "@lacking.txt"], "lacking.txt line 1 lacks test_acc5"),
    (["curves", "@words.txt"], "line 1: test_loss is 'low', not a number"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_says_what_is_wrong(words, message, files, tmp_path, capsys):
    (files / "broken.pth").write_bytes(b"nothing")
    (files / "broken.jpg").write_bytes(b"nothing")
    (files / "empty.txt").write_text("\n")
    (files / "cut.txt").write_text(line(0) + "\n" + line(1)[:30])
    (files / "lacking.txt").write_text(line(0).replace("test_acc5", "other"))
    (files / "words.txt").write_text(line(0, test_loss="low"))
    state = torch.load(files / "epoch0.pth", weights_only=True)
    torch.save({key: v for key, v in state.items() if key != "epoch"}, files / "no_epoch.pth")
    torch.save(state | {"step": 5, "epoch": 1}, files / "within.pth")
    torch.save(state | {"model_name": "convit_tiny_plus", "epoch": 1}, files / "plus.pth")
    for name, key, value in (
        ("nan", "blocks.1.attn.gating_param", torch.nan),
        ("large", "blocks.0.mlp.fc2.bias", 3e38),
    ):
        weights = {
            k: torch.full_like(v, value) if k == key else v for k, v in state["model"].items()
        }
        torch.save(state | {"model": weights}, files / f"{name}.pth")
    for i in range(9):
        (files / "runs" / str(i)).mkdir(parents=True, exist_ok=True)
        (files / "runs" / str(i) / "log.txt").write_text(line(0))
    words = [str(files / word[1:]) if word.startswith("@") else word for word in words]
    out = tmp_path / "out.png"
    assert visualize.main([*words, "--output", str(out)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert list(tmp_path.iterdir()) == []


def test_targets(files, tmp_path, capsys):
    words = ["curves", str(files / "some run")]
    for more, message in (
        ([], "give --output FILE.png"),
        (["--output", "a.jpg"], "must end in .png"),
        (["--output", str(tmp_path / "a.png"), "--csv", str(tmp_path / "b.png")], "end in .csv"),
        (["--output", str(tmp_path)], "must end in .png"),
        (["--output", str(tmp_path / "no" / "a.png")], "there is no folder"),
        (["--tensorboard", str(files / "epoch0.pth")], "is no folder"),
    ):
        assert visualize.main([*words, *more]) == 1
        assert message in capsys.readouterr().err
    # a picture of before stays where its successor, or the numbers beside it, cannot be written
    old, numbers = tmp_path / "a.png", tmp_path / "b.csv"
    old.write_bytes(b"of before")
    numbers.mkdir()
    assert visualize.main([*words, "--output", str(old), "--csv", str(numbers)]) == 1
    assert f"--csv {numbers} is a folder" in capsys.readouterr().err
    assert old.read_bytes() == b"of before"


def test_what_is_read_is_not_overwritten(files, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (16, 16)).save(photo)
    before = photo.read_bytes()
    words = ["--checkpoint", str(files / "epoch0.pth"), "--image", str(photo)]
    assert visualize.main(["attention", *words, "--output", str(photo)]) == 1
    assert "would overwrite what is read" in capsys.readouterr().err
    assert photo.read_bytes() == before


def test_names_of_any_kind(files, tmp_path, capsys):
    log = (files / "some run" / "log.txt").read_text()
    folders = [tmp_path / "one" / "cost_$5_{x$", tmp_path / "two" / ("long" * 40), tmp_path / "x"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text(log)
    clash = tmp_path / "two" / "x"
    clash.mkdir()
    (clash / "log.txt").write_text(log)
    out, table = tmp_path / "out.png", tmp_path / "out.csv"
    words = [*map(str, folders), str(clash), str(tmp_path / "x" / "log.txt")]
    words += ["--output", str(out), "--csv", str(table)]
    assert visualize.main(["curves", *words]) == 0
    assert f"{folders[2] / 'log.txt'} left out: {folders[2]} is the same" in capsys.readouterr().out
    with table.open(newline="") as file, Image.open(out) as picture:
        runs = list(dict.fromkeys(row["run"] for row in csv.DictReader(file)))
        assert picture.width < 1300
    assert runs == [folders[0].name, folders[1].name, str(folders[2]), str(clash)]
    name = files / "a$_{b$.pth"
    name.write_bytes((files / "epoch0.pth").read_bytes())
    assert visualize.main(["gates", str(name), "--output", str(out)]) == 0
